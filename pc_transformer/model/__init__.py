"""Predictors in a row."""

from .layers import *
from .transformer import *
from .convert import *
