"""Weights move by local gradients."""

from .learners import *
from .incremental import *
from .make import *
