#!/usr/bin/env python
"""Edit a notebook as a plain Python script, and bring it back: ids and unchanged outputs stay.

`percent.py to nbs/1_model/14_layers.ipynb` writes `.nbpy/1_model/14_layers.py` in the percent
format (`# %%` starts a cell; its id is beside it; leave the id away for a new cell). `percent.py
from nbs/1_model/14_layers.ipynb` writes the notebook from it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import jupytext
import nbformat
from execnb.nbio import nb2str
from nbdev.clean import clean_nb
from nbformat import NotebookNode

FORMAT = {"extension": ".py", "format_name": "percent"}
KERNEL = {"display_name": "python3", "language": "python", "name": "python3"}


def script_of(path: Path) -> Path:
    """Where the script of a notebook lies: in `.nbpy` as the notebook in `nbs`."""
    parts = path.parent.parts
    folder = parts[parts.index("nbs") + 1 :] if "nbs" in parts else ()
    return Path(".nbpy", *folder, f"{path.stem}.py")


def to_script(path: Path) -> Path:
    """Write the notebook as a script."""
    nb = nbformat.read(path, as_version=4)
    nb.metadata = NotebookNode(
        jupytext={"cell_metadata_filter": "all", "notebook_metadata_filter": "-all"}
    )
    for cell in nb.cells:
        cell.metadata["id"] = cell.id
    script = script_of(path)
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(jupytext.writes(nb, FORMAT), encoding="utf-8")
    return script


def from_script(path: Path) -> Path:
    """Write the notebook from its script; a cell whose source is unchanged keeps its outputs."""
    nb = jupytext.reads(script_of(path).read_text(encoding="utf-8"), FORMAT)
    old = {c.id: c for c in nbformat.read(path, as_version=4).cells} if path.exists() else {}
    seen: set[str] = set()
    for cell in nb.cells:
        key = cell.metadata.pop("id", cell.id)
        cell.id = key if key not in seen else cell.id  # a cell that was copied together with its id
        seen.add(cell.id)
        before = old.get(cell.id)
        if (
            before is not None
            and before.source == cell.source
            and "outputs" in before
            and "outputs" in cell
        ):
            cell.outputs = before.outputs
            cell.metadata = before.metadata
    nb.metadata = NotebookNode(kernelspec=KERNEL)
    nb.nbformat, nb.nbformat_minor = 4, 5
    clean = json.loads(nbformat.writes(nb))
    clean_nb(clean, allowed_cell_metadata_keys=["tags"])
    part = path.with_name(f".{path.name}.part")
    part.write_text(nb2str(clean), encoding="utf-8")
    part.replace(path)
    return path


def main() -> None:
    """Convert the notebooks that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("direction", choices=["to", "from"], help="to the script, or from it")
    parser.add_argument(
        "notebooks", nargs="+", type=Path, help="paths such as nbs/1_model/14_layers.ipynb"
    )
    args = parser.parse_args()
    for path in args.notebooks:
        source = path if args.direction == "to" else script_of(path)
        if not source.is_file():
            parser.error(f"{source} is not a file")
        print(to_script(path) if args.direction == "to" else from_script(path))


if __name__ == "__main__":
    main()
