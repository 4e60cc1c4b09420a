"""One run: files, checkpoints, the loop."""

from .run import *
from .files import *
from .trainer import *
from .checkpoints import *
from .loop import *
from .parallel import *
