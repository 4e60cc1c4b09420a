"""From logits to text, and how sure."""

from .sampling import *
from .packed import *
from .cache import *
from .reader import *
from .decode import *
from .texts import *
from .sources import *
from .generate import *
from .uncertainty import *
from .calibration import *
