"""The notebooks of the book, in the order of reading."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any


def notebooks(root: Path) -> list[Path]:
    """Every notebook of the book, in the order of reading."""
    found = [p.relative_to(root / "nbs") for p in root.glob("nbs/**/*.ipynb")]
    found = sorted(p for p in found if not any(part[0] in "._" for part in p.parts))
    return [root / "nbs" / p for p in sorted(found, key=lambda p: p.as_posix() != "index.ipynb")]


def read(path: Path) -> dict[str, Any]:
    """The notebook, each source one text."""
    nb = json.loads(path.read_text(encoding="utf-8"))
    for cell in nb["cells"]:
        cell["source"] = "".join(cell["source"])
    return nb


def title(path: Path) -> str:
    """The heading that the notebook starts with."""
    cells = read(path)["cells"]
    found = (
        re.match(r"# +(.+)", cells[0]["source"])
        if cells and cells[0]["cell_type"] == "markdown"
        else None
    )
    if not found:
        raise SystemExit(f"{path} must start with a markdown cell whose first line is `# Title`")
    return found[1].strip()
