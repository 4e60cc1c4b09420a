"""Corpora, tokenizers, batches and baselines."""

from .corpora import *
from .tokenizers import *
from .batches import *
from .ngrams import *
from .damage import *
from .text import *
from .tasks import *
