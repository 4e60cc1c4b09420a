#!/usr/bin/env python
"""Run pytest, two files at a time, each in a process of its own.

One line a file, as it ends: ok or FAIL and its seconds, and what a failing one said. All are run;
exit 1 if any failed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import apart  # before torch: it sets the threads
import pytest
import torch  # noqa: F401

import pc_transformer  # noqa: F401

# no cache, which the two would both write; what is imported here cannot be rewritten
OPTIONS = (
    *("-q", "--no-header", "-p", "no:cacheprovider"),
    *("-W", "ignore::pytest.PytestAssertRewriteWarning"),
)

SLOW = ("test_processes", "test_faults", "test_tools")  # they start many processes


def run_tests(path: Path) -> bool:
    """Whether every test of a file passes, or all are skipped."""
    return pytest.main([*OPTIONS, str(path)]) in (0, pytest.ExitCode.NO_TESTS_COLLECTED)


def find() -> list[Path]:
    """All files of tests: the slow ones and the long ones first, so that none is left for the
    end."""
    found = (apart.ROOT / "tests").rglob("test_*.py")
    return sorted(found, key=lambda p: (p.stem not in SLOW, -p.stat().st_size, p))


if __name__ == "__main__":
    try:
        sys.exit(apart.main(__doc__ or "", "files of tests", find, run_tests, limit=3600))
    except KeyboardInterrupt:
        sys.exit(130)
