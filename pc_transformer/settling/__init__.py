"""One free energy, and the ways down."""

from .chain import *
from .free_energy import *
from .errors import *
from .sweeps import *
from .states import *
