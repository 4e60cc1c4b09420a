#!/usr/bin/env python
"""Write README.md from nbs/index.ipynb; `--check` only says whether it is in step.

First, in the index and the notebooks beside it: the table of chapters (titles and promises of all
notebooks, in order), and the minutes at the end of each row of a table that begins with a chapter.
Pictures go to README_files/, links to other notebooks get their folder in front, and formulas stay
as TeX, which GitHub shows.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import bibliography
import nbformat
from execnb.nbio import nb2str
from nb_filter import filter_notebook
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]
HEAD = "<!-- Generated from nbs/index.ipynb by `make readme`: edit the notebook. -->\n\n"
LINK = re.compile(r"(\]\()(?!https?:|#|/|mailto:|README_files/|data:)([^)\s]+)(\))")
CAPTION = re.compile(r"^#\|\s*fig-(?:alt|cap):\s*(.+?)\s*$", re.M)
SILENT = re.compile(r"^#\|\s*echo:\s*false", re.M)
IMAGE = re.compile(r"!\[\w+\]\((README_files/README_(\d+)_\d+\.\w+)\)")
TABLE = re.compile(r"^\| part \|.*?(?=^(?!\|)|\Z)", re.M | re.S)  # the table of chapters
TIMED = re.compile(r"^(\| \[[^\]]*\]\(([^)]+\.ipynb)\) \|.*\| )\d+ \|$", re.M)  # ends in minutes
UNSEEN = re.compile(r"^#\|\s*(?:hide|echo: false)", re.M)
STYLE = re.compile(r"<style\b.*?</style>\s*", re.S)  # GitHub would print it


def repo_link(match: re.Match[str]) -> str:
    """The link as seen from the root: `../x` is a file of the root, anything else lies beside
    the notebook."""
    target = match[2]
    return match[1] + (target[3:] if target.startswith("../") else f"nbs/{target}") + match[3]


def title_and_promise(path: Path) -> tuple[str, str]:
    """The first heading of a notebook, and the quotation below it, which says what the chapter
    teaches."""
    first = nbformat.read(path, as_version=4).cells[0].source.splitlines()
    promise = " ".join(line.lstrip("> ") for line in first if line.startswith(">"))
    if not first[0].startswith("# ") or not promise:
        raise SystemExit(
            f"{path} must begin with '# Title' and a '> promise' that says what it teaches"
        )
    return first[0][2:], promise


def chapters(root: Path) -> str:
    """The table of all chapters: parts and notebooks in their order, with a line for each."""
    rows, before = ["| part | chapter | teaches |", "|---|---|---|"], ""
    for path in sorted((root / "nbs").glob("[0-9]*_*/[0-9]*.ipynb")):
        part = path.parent.name.split("_", 1)[1].capitalize()
        title, promise = title_and_promise(path)
        link = f"[{title}]({path.parent.name}/{path.name})"
        rows.append(f"| {'' if part == before else part} | {link} | {promise} |")
        before = part
    return "\n".join(rows) + "\n"


def minutes(path: Path) -> int:
    """How long a chapter takes to read, to five: 150 words a minute, or 20 lines of code."""
    cells = nbformat.read(path, as_version=4).cells
    words = sum(len(c.source.split()) for c in cells if c.cell_type == "markdown")
    code = [c.source for c in cells if c.cell_type == "code" and not UNSEEN.search(c.source)]
    lines = sum(bool(line.strip()) for source in code for line in source.splitlines())
    return max(5, 5 * round((words / 150 + lines / 20) / 5))


def in_step(root: Path, text: str) -> str:
    """A text with its table of chapters, and the minutes of each chapter that is timed."""
    text = TIMED.sub(lambda m: f"{m[1]}{minutes(root / 'nbs' / m[2])} |", text)
    return TABLE.sub(lambda _: chapters(root), f"{text}\n")[:-1]


def out_of_step(root: Path) -> dict[Path, str]:
    """The index, and the notebooks beside it, that are not in step, as they should be."""
    found: dict[Path, str] = {}
    for path in sorted((root / "nbs").glob("*.ipynb")):
        nb = nbformat.read(path, as_version=4)
        before = [cell.source for cell in nb.cells]
        for cell in nb.cells:
            if cell.cell_type == "markdown":
                cell.source = in_step(root, cell.source)
        if [cell.source for cell in nb.cells] != before:
            found[path] = nb2str(json.loads(nbformat.writes(nb)))
    return found


def render(root: Path) -> dict[str, bytes]:
    """README.md and its pictures, by path from the root."""
    nb = json.loads((root / "nbs/index.ipynb").read_text(encoding="utf-8"))
    entries = bibliography.read(root)
    for cell in nb["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = bibliography.cite("".join(cell["source"]), entries, link=None)
    nb = filter_notebook(nb, entries)
    nb["metadata"]["language_info"] = {"name": "python"}  # the code fences say so
    captions: dict[str, str] = {}
    for n, cell in enumerate(nb["cells"]):
        src = "".join(cell["source"])
        caption = CAPTION.search(src)
        captions[str(n)] = caption[1].strip("\"'") if caption else "figure"
        if SILENT.search(src):
            cell["metadata"]["transient"] = {"remove_source": True}
        if cell["cell_type"] == "code":
            src = "\n".join(ln for ln in src.splitlines() if not ln.startswith("#|"))
        else:
            src = LINK.sub(repo_link, src)
        cell["source"] = src
    resources = {"unique_key": "README", "output_files_dir": "README_files"}
    node = nbformat.reads(json.dumps(nb), as_version=4)
    body, res = MarkdownExporter().from_notebook_node(node, resources=resources)
    body = STYLE.sub("", body)
    body = IMAGE.sub(lambda m: f"![{captions[m[2]]}]({m[1]})", body)
    body = re.sub(r"[ \t]+$", "", body, flags=re.M)
    body = re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"
    return {"README.md": (HEAD + body).encode(), **res.get("outputs", {})}


def on_disk(root: Path) -> dict[str, bytes]:
    """What the repository has now."""
    files = [root / "README.md", *sorted((root / "README_files").glob("*"))]
    return {f.relative_to(root).as_posix(): f.read_bytes() for f in files if f.is_file()}


def replace(root: Path, want: dict[str, bytes], stale: list[str]) -> None:
    """Write the files that are wanted, and delete those that no longer are."""
    for name in stale:
        path = root / name
        if name in want:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(want[name])
        else:
            path.unlink()


def main() -> int:
    """Write or check the README."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 when README.md is out of step"
    )
    parser.add_argument(
        "--root", type=Path, default=ROOT, help="the repository (default: this one)"
    )
    args = parser.parse_args()
    if not (args.root / "nbs/index.ipynb").is_file():
        print("nbs/index.ipynb is missing: README.md is made from it", file=sys.stderr)
        return 1
    for path, text in out_of_step(args.root).items():
        if args.check:
            name = path.relative_to(args.root).as_posix()
            advice = "its table of chapters is out of step (run `make readme`)"
            print(f"{name}: {advice}", file=sys.stderr)
            return 1
        path.write_text(text, encoding="utf-8")
    want, have = render(args.root), on_disk(args.root)
    stale = sorted(k for k in want.keys() | have.keys() if want.get(k) != have.get(k))
    if not args.check:
        replace(args.root, want, stale)
        print(f"README.md: {len(want) - 1} picture(s), {len(stale)} file(s) changed")
        return 0
    if stale:
        advice = f"out of step with nbs/index.ipynb: {', '.join(stale)} (run `make readme`)"
        print(advice, file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
