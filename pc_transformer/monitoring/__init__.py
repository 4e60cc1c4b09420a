"""Is it settling, is it learning, what to turn."""

from .measures import *
from .snapshot import *
from .diagnosis import *
from .plots import *
from .monitor import *
