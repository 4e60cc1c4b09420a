#!/usr/bin/env python
"""Export the package: `nbdev_export`, then the two things that nbdev itself writes, its index
`_modidx.py` and every `__all__`, in lines that end by column 100."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from textwrap import TextWrapper

BIN = Path(sys.executable).parent
NAMES = re.compile(r"^__all__ = \[[^]]*\]$", re.M)
WRAPPER = TextWrapper(width=100, subsequent_indent=" ", break_long_words=False)


def wrapped(found: re.Match[str]) -> str:
    """The list of a module's public names, in lines."""
    return "\n".join(WRAPPER.wrap(" ".join(found[0].split())))


def main() -> None:
    """Export into the package of the present folder."""
    subprocess.run([BIN / "nbdev_export"], check=True)
    for path in Path("pc_transformer").rglob("*.py"):
        if path.name not in ("__init__.py", "_modidx.py"):
            text = path.read_text(encoding="utf-8")
            path.write_text(NAMES.sub(wrapped, text, count=1), encoding="utf-8")
    tidy = [BIN / "ruff", "format", "--isolated", "-q", "--line-length=100"]
    subprocess.run([*tidy, "pc_transformer/_modidx.py"], check=True)


if __name__ == "__main__":
    main()
