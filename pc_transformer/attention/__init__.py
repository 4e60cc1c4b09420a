"""Who explains a query: likelihoods of keys, and heads that learn their precision."""

from .scores import *
from .checks import *
from .sharpness import *
from .attend import *
from .head import *
