"""Every family without a matrix of scores."""

from .masks import *
from .plain import *
from .near import *
from .blocks import *
from .sdpa import *
from .merge import *
from .chunked import *
from .choose import *
