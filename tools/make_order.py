#!/usr/bin/env python
"""Write the order of reading wherever it is shown; `--check` only says what is stale.

Folders and files are numbered, and that is the order (the index comes first). From it are made the
sidebar in `_quarto.yml`, which also names the pages that the build makes, and the last line of each
notebook, `Next: [Title](path)`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path

import make_pages
from book import notebooks, read, title
from execnb.nbio import nb2str

ROOT = Path(__file__).resolve().parents[1]
SIDEBAR = re.compile(r"(?<=\n    contents:\n)(?:      .*\n)*")
NEXT = re.compile(r"^(?:\*\*)?Next(?::|\.\*\*|\*\*:).*$\n*", re.M)
OURS = re.compile(r"^Next: \[[^]\n]*\]\([^)\s]*\)\.?$\n*", re.M)  # nothing but the link


def sidebar(root: Path, paths: list[Path]) -> str:
    """The entries of the sidebar: a section for each folder."""
    lines, folder = list[str](), root / "nbs"
    for path in paths:
        inside = path.parent != root / "nbs"
        if inside and path.parent != folder:
            folder = path.parent
            number, _, name = folder.name.partition("_")
            section = f"{number} · {name.replace('_', ' ').capitalize()}"
            lines += [
                f"      - section: {json.dumps(section, ensure_ascii=False)}",
                "        contents:",
            ]
        href, text = path.relative_to(root).as_posix(), json.dumps(title(path), ensure_ascii=False)
        lines.append(f"{'          ' if inside else '      '}- {{text: {text}, href: {href}}}")
    made = make_pages.pages(root)
    if made:
        lines += ["      - section: Reference", "        contents:"]
    for href, page in made.items():
        text = json.dumps(make_pages.title(page), ensure_ascii=False)
        lines.append(f"          - {{text: {text}, href: {href}}}")
    return "".join(f"{line}\n" for line in lines)


def with_next(path: Path, after: Path | None) -> str:
    """The notebook with the line that leads on as the last of its last cell."""
    nb = read(path)
    cells = nb["cells"]
    for cell in cells[:-1]:
        if cell["cell_type"] == "markdown":
            cell["source"] = (
                OURS.sub("", cell["source"]).rstrip()
                if OURS.search(cell["source"])
                else cell["source"]
            )
    if cells[-1]["cell_type"] != "markdown":
        cells.append({"cell_type": "markdown", "id": "next", "metadata": {}, "source": ""})
    text = NEXT.sub("", cells[-1]["source"]).rstrip()
    link = (
        f"Next: [{title(after)}]({Path(os.path.relpath(after, path.parent)).as_posix()})"
        if after
        else ""
    )
    cells[-1]["source"] = f"{text}\n\n{link}".strip()
    cells = [c for c in cells if c["source"] or c["cell_type"] == "code"]
    nb["cells"] = [c | {"source": c["source"].splitlines(keepends=True)} for c in cells]
    return nb2str(nb)


def astray(root: Path, path: Path) -> list[str]:
    """Lines before the last cell that lead on in words of their own: nobody but their author can
    say what to keep."""
    cells = [c for c in read(path)["cells"][:-1] if c["cell_type"] == "markdown"]
    lines = [
        (c["id"], line)
        for c in cells
        for line in c["source"].splitlines()
        if NEXT.match(line) and not OURS.match(line)
    ]
    name = path.relative_to(root).as_posix()
    return [
        f"{name}: delete this line of cell {key}, only the last cell leads on: {line}"
        for key, line in lines
    ]


def render(root: Path) -> dict[Path, str]:
    """The files that show the order, as they should be."""
    paths, config = notebooks(root), root / "_quarto.yml"
    text, count = SIDEBAR.subn(lambda _: sidebar(root, paths), config.read_text(encoding="utf-8"))
    if count != 1:
        raise SystemExit(
            f"{config} must have one sidebar, with a line `    contents:` above its entries; it has"
            f" {count}"
        )
    return {config: text} | {
        a: with_next(a, b) for a, b in zip(paths, [*paths[1:], None], strict=True)
    }


def main() -> int:
    """Write or check the order."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 when something is stale"
    )
    parser.add_argument(
        "--root", type=Path, default=ROOT, help="the repository (default: this one)"
    )
    args = parser.parse_args()
    want, bad = (
        render(args.root),
        [x for path in notebooks(args.root) for x in astray(args.root, path)],
    )
    stale = [p for p, text in want.items() if p.read_text(encoding="utf-8") != text]
    if not args.check:
        for path in stale:
            path.write_text(want[path], encoding="utf-8")
        print(f"order of reading: {len(want) - 1} notebooks, {len(stale)} file(s) changed")
    elif stale:
        names = ", ".join(p.relative_to(args.root).as_posix() for p in stale)
        bad.append(f"not in the order of reading: {names} (run `make export`)")
    for line in bad:
        print(line, file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
