"""Every family without a matrix of scores."""

from .masks import *
from .steps import *
from .sdpa import *
from .merge import *
from .chunked import *
from .choose import *
