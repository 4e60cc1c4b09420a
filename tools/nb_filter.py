#!/usr/bin/env python
"""Prepare a notebook for the docs site: stdin to stdout, as Quarto's `ipynb-filters` wants it.

Quarto reads `#| key: value` lines as YAML, so nbdev's bare directives (`#| export`, `#| slow`, ...)
would garble a cell. This filter deletes those lines, keeps the Quarto options (`#| label: fig-x`),
and drops the cells that are marked `#| hide`, `#| default_exp`, or have nothing else in them. Live
widgets become nothing: a page shows the saved picture beside them. Citations, `[@key]`, become
links to the bibliography. Code that only imports or only checks is folded behind a word.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from pathlib import Path
from typing import Any

import bibliography
from bibliography import Entries

ROOT = Path(__file__).resolve().parents[1]
DROP = re.compile(r"^#\|\s*(hide|default_exp)\b", re.M)
OPTION = re.compile(r"^#\|\s*[\w-]+:(\s|$)|^#\|\s+- ")  # a Quarto option, or one entry of its list
MAGIC = re.compile(r"^[%!].*$", re.M)
CHECKS = {"refused", "assert_close", "close", "agrees_with_torch"}
SETTINGS = {"manual_seed", "set_default_dtype", "set_num_threads", "update", "filterwarnings"}
WIDGET = "application/vnd.jupyter.widget-view+json"


def text_of(cell: dict[str, Any]) -> str:
    """The cell's source as one string."""
    src = cell.get("source", "")
    return src if isinstance(src, str) else "".join(src)


def calls(node: ast.stmt, names: set[str]) -> bool:
    """Whether a statement is nothing but the call of one of these functions."""
    if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Call):
        return False
    return ast.unparse(node.value.func).split(".")[-1] in names


def checks(node: ast.stmt) -> bool:
    """Whether a statement only checks."""
    if isinstance(node, ast.For | ast.With):
        return all(map(checks, node.body))
    return isinstance(node, ast.Assert) or calls(node, CHECKS)


def imports(node: ast.stmt) -> bool:
    """Whether a statement imports, or sets up what was imported."""
    return isinstance(node, ast.Import | ast.ImportFrom) or calls(node, SETTINGS)


def folded(code: str) -> str:
    """The word that a cell's code is folded behind, if it is."""
    try:
        body = ast.parse(MAGIC.sub("", code)).body
    except SyntaxError:
        return ""
    if body and isinstance(body[0], ast.Import | ast.ImportFrom) and all(map(imports, body)):
        return "Imports"
    return "Check" if body and all(map(checks, body)) else ""


def filter_cell(cell: dict[str, Any], entries: Entries) -> dict[str, Any] | None:
    """The cell without nbdev directives, or None when the site does not show it."""
    if cell["cell_type"] != "code":
        text = bibliography.cite(text_of(cell), entries)
        return {**cell, "source": text.splitlines(keepends=True)}
    src = text_of(cell)
    if DROP.search(src):
        return None
    lines = [ln for ln in src.splitlines() if not ln.startswith("#|") or OPTION.match(ln)]
    options = [ln for ln in lines if ln.startswith("#|")]
    code = "\n".join(ln for ln in lines if not ln.startswith("#|")).strip("\n")
    if (word := folded(code)) and not any("code-fold" in ln for ln in options):
        options += ["#| code-fold: true", f"#| code-summary: {word}"]
    outputs = [o for o in cell.get("outputs", []) if WIDGET not in o.get("data", {})]
    if not code and not outputs:
        return None
    source = "\n".join([*options, code]).splitlines(
        keepends=True
    )  # a list of lines: Quarto needs it so
    return {**cell, "source": source, "outputs": outputs}


def filter_notebook(nb: dict[str, Any], entries: Entries) -> dict[str, Any]:
    """A copy of the notebook for the site."""
    cells = [filter_cell(cell, entries) for cell in nb["cells"]]
    return {**nb, "cells": [c for c in cells if c is not None]}


def main() -> None:
    """Filter stdin to stdout."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_known_args()
    page = filter_notebook(json.load(sys.stdin), bibliography.read(ROOT))
    json.dump(page, sys.stdout, ensure_ascii=False, indent=1)


if __name__ == "__main__":
    main()
