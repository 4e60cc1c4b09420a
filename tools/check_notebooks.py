#!/usr/bin/env python
"""Test notebooks, two at a time, each in a process of its own; nbdev runs the cells.

One line a notebook, as it ends: ok or FAIL and its seconds, and what a failing one said. All are
run; exit 1 if any failed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import apart  # before torch: it sets the threads
import matplotlib.pyplot  # noqa: F401
import torch  # noqa: F401
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.test import test_nb

import pc_transformer  # noqa: F401


def run_cells(path: Path) -> bool:
    """Whether every cell passes."""
    return test_nb(path, skip_flags=get_config().tst_flags.split(), basepath=str(apart.ROOT))[0]


def find() -> list[Path]:
    """All notebooks, in the order of reading."""
    return sorted(Path(p).absolute() for p in nbglob(as_path=True))


if __name__ == "__main__":
    try:
        sys.exit(apart.main(__doc__ or "", "notebooks", find, run_cells, limit=1200))
    except KeyboardInterrupt:
        sys.exit(130)
