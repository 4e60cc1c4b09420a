"""One free energy, and the ways down."""

from .chain import *
from .free_energy import *
from .settled import *
from .errors import *
from .sweeps import *
from .states import *
