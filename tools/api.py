#!/usr/bin/env python
"""What the package offers, read from its text: signatures, comments beside arguments, cells.

`tools/reference.py` makes the site's reference pages of it, and `tools/sizes.py` counts what is not
described. `api.py [PATH]` lists that in words, for the modules whose path contains PATH.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
Function = ast.FunctionDef | ast.AsyncFunctionDef
CELL = re.compile(r"^# %% (\S+\.ipynb) #(\S+)", re.M)
# a type made of these words alone does not say what an argument is
PLAIN = set(
    "int float str bool bytes object None Any Literal Tensor ndarray np dict list tuple set"
    " Sequence Iterable Iterator Mapping Callable Optional Union".split()
)
# what some names mean in the whole house: need not be said again
HOUSE = {
    ("B", "int"): "batch size",
    ("H", "int"): "number of heads",
    ("Tq", "int"): "number of queries",
    ("Tk", "int"): "number of keys",
    ("V", "int"): "size of the vocabulary",
    ("dim", "int"): "number of coordinates",
    ("l", "int"): "number of the node, from 0",
    ("q", "Tensor"): "queries",
    ("k", "Tensor"): "keys",
    ("v", "Tensor"): "values",
    ("seed", "int"): "of a private random generator",
    ("is_causal", "bool"): "query i sees keys 0..i only",
    ("dropout_p", "float"): "probability that a weight is dropped",
}
OWN_WORDS = {"__init__", "__post_init__", "__call__", "forward"}  # their class may speak for them
NO_PROMISE = {"NotImplementedError", "AssertionError", "StopIteration"}


def short(text: str) -> str:
    """A text in one line."""
    return " ".join(text.split())


@dataclass
class Argument:
    """One parameter or field: its type, its default and the comment beside it."""

    name: str
    type: str
    default: str
    comment: str

    @property
    def explained(self) -> bool:
        """Whether a comment or its type says what it is."""
        words = set(re.findall(r"[A-Za-z_]\w*", re.sub(r"'[^']*'|\"[^\"]*\"", "", self.type)))
        return bool(self.comment or words - PLAIN)


@dataclass
class Entry:
    """A public name, or a public method of one."""

    name: str
    node: ast.stmt
    module: Module
    methods: list[Entry] = field(default_factory=list)

    @cached_property
    def doc(self) -> str:
        """Its docstring; for a value, the comment above it or beside it."""
        if isinstance(self.node, Function | ast.ClassDef):
            return ast.get_docstring(self.node) or ""
        return self.module.comment(self.node.lineno, self.node.end_lineno or 0)

    @property
    def is_field(self) -> bool:
        """Whether it is read like a field."""
        decorators = getattr(self.node, "decorator_list", [])
        return any("property" in ast.unparse(d) for d in decorators)

    @cached_property
    def arguments(self) -> list[Argument]:
        """The parameters of a function, or what makes an object of a class."""
        if isinstance(self.node, Function):
            return [*self.module.parameters(self.node)]
        if not isinstance(self.node, ast.ClassDef):
            return []
        made = [n for n in self.node.body if isinstance(n, Function) and n.name == "__init__"]
        if made:
            return [*self.module.parameters(made[0])]
        fields = [n for n in self.node.body if isinstance(n, ast.AnnAssign)]
        data = any("dataclass" in ast.unparse(d) for d in self.node.decorator_list)
        return [*self.module.fields(fields)] if data else []

    @property
    def returns(self) -> tuple[str, str]:
        """The type of the result and the comment beside it."""
        node = self.node.returns if isinstance(self.node, Function) else None
        if node is None or ast.unparse(node) == "None":
            return "", ""
        return ast.unparse(node), self.module.comments.get(node.end_lineno or 0, "")

    @property
    def bodies(self) -> list[ast.stmt]:
        """What runs when it is called or made."""
        if not isinstance(self.node, ast.ClassDef):
            return [self.node]
        return [n for n in self.node.body if isinstance(n, Function) and n.name in OWN_WORDS]


@dataclass
class Module:
    """One module that a notebook exports."""

    path: Path
    name: str  # with its package: attention.head

    def __post_init__(self) -> None:
        self.text = self.path.read_text(encoding="utf-8")
        self.tree = ast.parse(self.text)
        self.comments: dict[int, str] = {}
        self.alone: set[int] = set()  # lines with a comment and nothing else
        functions = [n for n in ast.walk(self.tree) if isinstance(n, Function) and n.returns]
        # lines whose comment is about a result
        self.results = {n.returns.end_lineno for n in functions if n.returns}
        for kind, text, (line, column), _, whole in tokenize.generate_tokens(
            io.StringIO(self.text).readline
        ):
            if kind == tokenize.COMMENT and not text.startswith(("# %%", "#|")):
                self.comments[line] = re.sub(r"\s*type: ignore\S*|^#\s*", "", text).strip()
                if not whole[:column].strip():
                    self.alone.add(line)

    @cached_property
    def told(self) -> dict[tuple[str, str], str]:
        """What is said once in the module of a name and a type."""
        found: dict[tuple[str, str], str] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation:
                name = node.arg if isinstance(node, ast.arg) else ast.unparse(node.target)
                if comment := self.comment(node.lineno, node.end_lineno or 0):
                    found.setdefault((name, short(ast.unparse(node.annotation))), comment)
        return found

    @property
    def doc(self) -> str:
        """What the chapter promises."""
        return ast.get_docstring(self.tree) or ""

    def comment(self, first: int, last: int) -> str:
        """The comment at the end of a line, or else those that stand above the first."""
        lines = [n for n in (last, first) if n not in self.results]
        beside = [self.comments[n] for n in lines if n in self.comments]
        above, line = list[str](), first - 1
        while line in self.alone:
            above.insert(0, self.comments[line])
            line -= 1
        return beside[0] if beside else " ".join(above)

    def parameters(self, node: Function) -> Iterator[Argument]:
        """The parameters of a function, but `self`."""
        a = node.args
        given = [*a.posonlyargs, *a.args]
        gap: list[ast.expr | None] = [None] * (len(given) - len(a.defaults))
        pairs = [*zip(given, [*gap, *a.defaults], strict=True)]
        pairs += [(a.vararg, None)] if a.vararg else []
        pairs += zip(a.kwonlyargs, a.kw_defaults, strict=True)
        pairs += [(a.kwarg, None)] if a.kwarg else []
        for arg, default in pairs:
            stars = "*" if arg is a.vararg else "**" if arg is a.kwarg else ""
            if arg.arg not in ("self", "cls", "ctx"):
                yield self.argument(stars + arg.arg, arg.annotation, default, arg)

    def fields(self, nodes: list[ast.AnnAssign]) -> Iterator[Argument]:
        """The fields of a dataclass."""
        for node in nodes:
            name = ast.unparse(node.target)
            if not name.startswith("_") and "ClassVar" not in ast.unparse(node.annotation):
                yield self.argument(name, node.annotation, node.value, node)

    def argument(
        self, name: str, kind: ast.expr | None, default: ast.expr | None, node: ast.stmt | ast.arg
    ) -> Argument:
        """One of them."""
        last = (default or node).end_lineno or node.lineno
        said, preset = (short(ast.unparse(x)) if x else "" for x in (kind, default))
        key, comment = (name, said), self.comment(node.lineno, last)
        return Argument(name, said, preset, comment or self.told.get(key) or HOUSE.get(key, ""))

    @cached_property
    def notebook(self) -> str:
        """The path of its notebook from the root."""
        path = (self.path.parent / next(CELL.finditer(self.text))[1]).resolve()
        return path.relative_to(path.parents[2]).as_posix()

    def cell(self, node: ast.stmt) -> str:
        """The id of the cell that a statement was written in."""
        return [name for line, name in self.cells if line < node.lineno][-1]

    @cached_property
    def cells(self) -> list[tuple[int, str]]:
        """The line above every cell, and the cell's id."""
        marks = [(n, CELL.match(line)) for n, line in enumerate(self.text.splitlines(), 1)]
        return [(n, m[2]) for n, m in marks if m]

    @cached_property
    def entries(self) -> list[Entry]:
        """The public names, in the order of the text."""
        listed = set[str]()
        found = list[Entry]()
        for node in self.tree.body:
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            names = [node.name] if isinstance(node, Function | ast.ClassDef) else []
            names += [t.id for t in targets if isinstance(t, ast.Name)]
            if names == ["__all__"]:
                listed = set(ast.literal_eval(node.value))  # type: ignore[attr-defined]
            found += [Entry(n, node, self, self.methods(node)) for n in names if n in listed]
        return found

    def methods(self, node: ast.stmt) -> list[Entry]:
        """The public methods of a class, those among them that Python or PyTorch calls."""
        own = (
            [n for n in node.body if isinstance(n, Function)]
            if isinstance(node, ast.ClassDef)
            else []
        )
        kept = [n for n in own if not n.name.startswith("_") or n.name == "__call__"]
        return [Entry(n.name, n, self) for n in kept]


@lru_cache
def read(path: Path, name: str, _changed: int) -> Module | None:
    """A module, or None when no notebook exports it."""
    return Module(path, name) if CELL.search(path.read_text(encoding="utf-8")) else None


def modules(root: Path) -> list[Module]:
    """Every module that a notebook exports, in the order of the notebooks."""
    house = root / "pc_transformer"
    paths = [p for p in sorted(house.rglob("*.py")) if not p.name.startswith("_")]
    names = [".".join(p.relative_to(house).with_suffix("").parts) for p in paths]
    found = [read(p, n, p.stat().st_mtime_ns) for p, n in zip(paths, names, strict=True)]
    return sorted((m for m in found if m), key=lambda m: m.notebook)


class Book:
    """All modules together: which function raises what, and which method is described above."""

    def __init__(self, root: Path):
        self.modules = modules(root)
        trees = [node for m in self.modules for node in m.tree.body]
        functions = {n.name: n for n in trees if isinstance(n, Function)}
        self.classes = {n.name: n for n in trees if isinstance(n, ast.ClassDef)}
        # helpers that only check: they return nothing, and raise
        nothing = {
            k: n for k, n in functions.items() if n.returns and ast.unparse(n.returns) == "None"
        }
        self.helpers = {
            k: n
            for k, n in nothing.items()
            if re.match(r"_?(check|demand|refuse|need|positive|not_negative)(_|$)", k)
        }

    def raises(self, node: ast.AST, seen: frozenset[str] = frozenset()) -> set[str]:
        """The exceptions that a body raises, itself or through a helper that only checks."""
        found = set[str]()
        for n in ast.walk(node):
            if isinstance(n, ast.Raise) and n.exc:
                found |= {re.match(r"[\w.]*", ast.unparse(n.exc))[0].split(".")[-1]}  # type: ignore[index]
            elif isinstance(n, ast.Call) and isinstance(n.func, ast.Name):
                if n.func.id in self.helpers and n.func.id not in seen:
                    found |= self.raises(self.helpers[n.func.id], seen | {n.func.id})
        return {name for name in found if name[:1].isupper()} - NO_PROMISE

    def inherited(self, owner: ast.AST, method: str) -> str:
        """What a class above says of a method."""
        for base in getattr(owner, "bases", []):
            above = self.classes.get(ast.unparse(base))
            for n in getattr(above, "body", []):
                if isinstance(n, Function) and n.name == method and ast.get_docstring(n):
                    return ast.get_docstring(n) or ""
            if above and (found := self.inherited(above, method)):
                return found
        return ""

    def gaps(self, entry: Entry, owner: Entry | None = None) -> list[str]:
        """What its text does not say: what it is, what an argument is, what it raises."""
        above = self.inherited(owner.node, entry.name) if owner else ""
        kernel = any("jit" in ast.unparse(d) for d in getattr(entry.node, "decorator_list", ()))
        silent = entry.name in OWN_WORDS
        doc = " ".join([entry.doc, above, owner.doc if owner and silent else ""])
        at = f"{owner.name}.{entry.name}" if owner else entry.name
        bad = [] if doc.strip() else [f"{at}: no docstring"]
        told = re.findall(r"`(\w+)`", doc)
        for a in [] if above or kernel else entry.arguments:
            if not a.explained and a.name.strip("*") not in told:
                bad.append(f"{at}: what is {a.name}?")
        for name in sorted({e for body in entry.bodies for e in self.raises(body)}):
            if name not in doc:
                bad.append(f"{at}: raises {name}")
        return bad + [line for m in entry.methods for line in self.gaps(m, entry)]


def undocumented(root: Path) -> dict[str, int]:
    """A public name says what it is, what its arguments are unless their types do, and what it
    raises (`tools/api.py` says where)."""
    house, found = Book(root), dict[str, int]()
    for module in house.modules:
        for entry in module.entries:
            if n := len(house.gaps(entry)):
                found[f"{module.name} {entry.name}"] = n
    return found


def main() -> None:
    """List the gaps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", nargs="?", default="", help="part of a module's path")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository (default: this)")
    args = parser.parse_args()
    root = args.root.resolve()
    house = Book(root)
    for module in house.modules:
        if args.path in module.path.relative_to(root).as_posix():
            for line in (line for e in module.entries for line in house.gaps(e)):
                print(f"{module.name}: {line}")


if __name__ == "__main__":
    main()
