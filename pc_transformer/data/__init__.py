"""Corpora, tokenizers, batches and baselines."""

from .corpora import *
from .tokenizers import *
from .batches import *
from .ngrams import *
from .tasks import *
