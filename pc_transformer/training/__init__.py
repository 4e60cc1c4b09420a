"""One run: files, checkpoints, the loop."""

from ..data.tasks import evaluate
from .files import *
from .trainer import *
from .checkpoints import *
from .loop import *
from .parallel import *
