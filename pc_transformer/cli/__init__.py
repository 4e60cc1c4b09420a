"""The command `pct`: what it is given, its verbs, the program."""

from .given import *
from .verbs import *
from .comparing import *
from .program import *
