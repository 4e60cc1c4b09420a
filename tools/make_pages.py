#!/usr/bin/env python
"""Write the pages of the site that are no notebooks: Quarto runs this before it renders.

They are the reference of the package and the bibliography, in `reference/`, which git ignores.
`make docs` takes the same texts without writing them here.
"""

from __future__ import annotations

from pathlib import Path

import bibliography
import reference

ROOT = Path(__file__).resolve().parents[1]


def pages(root: Path) -> dict[str, str]:
    """Every such page, by its path: Markdown."""
    works = (
        {bibliography.PAGE: bibliography.page(root)} if (root / bibliography.FILE).exists() else {}
    )
    return {**reference.pages(root), **works}


def title(text: str) -> str:
    """The title of such a page."""
    return text.split("title: ", 1)[1].split("\n", 1)[0]


def main() -> None:
    """Write the pages."""
    for name, text in pages(ROOT).items():
        (ROOT / name).parent.mkdir(exist_ok=True)
        (ROOT / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
