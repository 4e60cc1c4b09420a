#!/usr/bin/env python
"""Sizes that may only fall: what is longer or wider than the house wants, place by place.

Each rule has a file in `tools/sizes/` that lists the places which break it today, with how much. A
place that is not listed, or has grown, fails; one that has shrunk or gone fails too, until
`--update` has lowered the file, which it never raises. (It writes a file that is missing whole.)
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from api import undocumented

ROOT = Path(__file__).resolve().parents[1]
Places = dict[str, int]  # from where it is to how much it is
Function = ast.FunctionDef | ast.AsyncFunctionDef
LONGER = {"attention/kernels/triton_code.py": 500, "attention/kernels/chunked.py": 400}
BOUND = {"self", "cls", "ctx"}  # parameters that Python or PyTorch gives


def modules(root: Path) -> Iterator[tuple[str, str]]:
    """The path within the package and the text of every module that was written by hand."""
    house = root / "pc_transformer"
    for path in sorted(house.rglob("*.py")):
        if path.name != "_modidx.py":
            yield path.relative_to(house).as_posix(), path.read_text(encoding="utf-8")


def functions(tree: ast.AST, above: str = "") -> Iterator[tuple[str, Function]]:
    """Every function and its dotted name, but the kernels that Triton compiles: what they hold
    must stand in one."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, Function | ast.ClassDef):
            yield from functions(node, above)
            continue
        if any("jit" in ast.unparse(d) for d in node.decorator_list):
            continue
        name = f"{above}{node.name}"
        if isinstance(node, Function):
            yield name, node
        yield from functions(node, f"{name}.")


def all_functions(root: Path) -> Iterator[tuple[str, Function]]:
    """Those of the package and of the tools."""
    tools = [(f"tools/{p.name}", p) for p in sorted((root / "tools").glob("*.py"))]
    texts = [*modules(root), *((name, p.read_text(encoding="utf-8")) for name, p in tools)]
    for path, text in texts:
        for name, node in functions(ast.parse(text)):
            yield f"{path} {name}", node


def long_functions(root: Path) -> Places:
    """A function has at most 40 lines, its signature and docstring among them."""
    sizes = {at: (f.end_lineno or 0) - f.lineno + 1 for at, f in all_functions(root)}
    return {at: n for at, n in sizes.items() if n > 40}


def many_parameters(root: Path) -> Places:
    """A function has at most 6 parameters; what needs more takes an object."""

    def count(f: Function) -> int:
        given = [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs]
        return sum(a.arg not in BOUND for a in given)

    return {at: n for at, f in all_functions(root) if (n := count(f)) > 6}


def notebooks(root: Path) -> Iterator[tuple[str, dict[str, str], str]]:
    """The path of every notebook, its exported cells by their ids, and its prose."""
    for path in sorted((root / "nbs").glob("*/[0-9]*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        texts = {cell["id"]: "".join(cell["source"]).strip() for cell in cells}
        exported = {i: text for i, text in texts.items() if text.startswith("#| export")}
        prose = "\n".join(texts[c["id"]] for c in cells if c["cell_type"] == "markdown")
        yield path.relative_to(root).as_posix(), exported, prose


def long_cells(root: Path) -> Places:
    """An exported cell has at most 25 lines: one idea, its check right below."""
    sizes = {
        f"{path} {name}": text.count("\n")
        for path, exported, _ in notebooks(root)
        for name, text in exported.items()
    }
    return {at: n for at, n in sizes.items() if n > 25}


def long_modules(root: Path) -> Places:
    """A module has at most 300 lines; the GPU's kernels 500, the row chunks 400."""
    sizes = {path: text.count("\n") for path, text in modules(root)}
    return {path: n for path, n in sizes.items() if n > LONGER.get(path, 300)}


def public(tree: ast.Module) -> set[str]:
    """The names without an underscore that a module defines."""
    names = set()
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
    return {name for name in names if not name.startswith("_")}


def shared_names(root: Path) -> Places:
    """A public name stands in one module; the verbs of the command line may share theirs."""
    homes: dict[str, list[str]] = {}
    for path, text in modules(root):
        for name in public(ast.parse(text)) if path != "cli.py" else ():
            homes.setdefault(name, []).append(path)
    shared = {name: paths for name, paths in homes.items() if len(paths) > 1}
    return {f"{name} in {', '.join(shared[name])}": len(shared[name]) for name in sorted(shared)}


def numbered_chapters(root: Path) -> Places:
    """Exported code names a notebook by its title: numbers change."""
    counts = {
        path: len(re.findall(r"\bchapters? \d", text, re.IGNORECASE))
        for path, text in modules(root)
    }
    return {path: n for path, n in counts.items() if n}


# a number, unless it is told where: "`attend`, equation (2)", "equation (2) of `scores`"
CITED = re.compile(r"(`[\w.]+`,? )?equations? \((\d+)\)(?: (?:and|to) \((\d+)\))?(\s+of\s+`)?")


def lost_equations(root: Path) -> Places:
    """An equation that exported code cites by its number alone stands in the same notebook."""
    found = {}
    for path, exported, prose in notebooks(root):
        here = set(re.findall(r"\\q?quad\s*\((\d+)\)", prose))
        for name, text in exported.items():
            cited = [m for m in CITED.finditer(text) if not (m[1] or m[4])]
            found[f"{path} {name}"] = len({n for m in cited for n in m.groups()[1:3] if n} - here)
    return {at: n for at, n in found.items() if n}


def without_caption(root: Path) -> Places:
    """A picture has a caption in its cell, `#| fig-cap: what is seen`, its text for who sees
    none."""
    found = {}
    for path in sorted((root / "nbs").rglob("*.ipynb")):
        if not any(part.startswith(".") for part in path.parts):
            for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
                pictures = sum("image/png" in o.get("data", {}) for o in cell.get("outputs", ()))
                if pictures and "#| fig-" not in "".join(cell["source"]):
                    found[f"{path.relative_to(root).as_posix()} {cell['id']}"] = pictures
    return found


RULES: list[Callable[[Path], Places]] = [
    long_functions,
    many_parameters,
    long_cells,
    long_modules,
    shared_names,
    numbered_chapters,
    lost_equations,
    undocumented,
    without_caption,
]


def read(path: Path) -> Places:
    """The places that a file lists, one a line: how much, then where."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return {at: int(n) for n, at in (line.split(" ", 1) for line in lines)}


def write(path: Path, places: Places) -> None:
    """List places, sorted, so that two branches that lower a file merge."""
    path.parent.mkdir(exist_ok=True)
    lines = [f"{n} {at}\n" for at, n in sorted(places.items())]
    path.write_text("".join(lines), encoding="utf-8")


def judge(rule: Callable[[Path], Places], root: Path, update: bool) -> list[str]:
    """One line for each place that is not as listed; with `update`, for each that is worse."""
    path = root / "tools" / "sizes" / f"{rule.__name__}.txt"
    found = rule(root)
    if update:
        allowed = read(path) if path.exists() else found
        write(path, {at: min(n, found[at]) for at, n in allowed.items() if at in found})
    allowed = read(path)
    print(f"{len(allowed):4} {rule.__name__}: {rule.__doc__}")
    more = {at: n for at, n in found.items() if n > allowed.get(at, 0)}
    less = {at: n for at, n in allowed.items() if found.get(at, 0) < n}
    before = lambda at: f"was {allowed[at]}" if at in allowed else "new"
    return [
        *(f"{at}: {n}, {before(at)}" for at, n in more.items()),
        *(f"{at}: {n} no longer, run `tools/sizes.py --update`" for at, n in less.items()),
    ]


def main() -> int:
    """Compare every rule's places with those of its file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--update", action="store_true", help="lower the files to what is found")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository (default: this)")
    args = parser.parse_args()
    wrong = [line for rule in RULES for line in judge(rule, args.root, args.update)]
    print("\n".join(f"  {line}" for line in wrong) or "no place is new or has grown")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
