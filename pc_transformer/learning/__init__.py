"""Weights move by local gradients."""

from .learners import *
from .config import *
