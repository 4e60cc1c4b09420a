"""What an error costs: one small class per family of densities."""

from .elliptical import *
from .special import *
from .sampling import *
from .fitting import *
from .families import *
from .mixture import *
from .categorical import *
