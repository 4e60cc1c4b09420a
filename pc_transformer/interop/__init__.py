"""Other people's models, in and out."""

from .gpt2 import *
from .transformers import *
from .chains import *
