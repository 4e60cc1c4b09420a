"""Every family without a matrix of scores."""

from .masks import *
from .plain import *
from .sdpa import *
from .merge import *
from .blocks import *
from .chunked import *
from .choose import *
