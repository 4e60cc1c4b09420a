"""The reference of the package, made from its text: a page a package, an entry a public name.

An entry has the signature, the docstring, what each argument is, and a link to the cell of the
book that defines it.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import bibliography
import book
from api import Entry, Function, Module, modules, short

FOLDER = "reference"
TOP = "config and isolation"  # the modules that stand in no package
SPECIAL = re.compile(r"(`[^`]*`)|[\^~$*<|\\]")  # what Markdown would read in a text of Python


def prose(text: str) -> str:
    """A docstring or comment as Markdown."""
    return SPECIAL.sub(lambda m: m[1] or f"\\{m[0]}", text)


def code(text: str) -> str:
    """A type or a value, never a link."""
    return f"`{text}`{{.nolink}}"


def package(module: Module) -> str:
    """The page that a module stands on."""
    return module.name.rpartition(".")[0] or TOP


def href(module: Module, entry: Entry | None = None) -> str:
    """The place of a module or an entry, from the root of the site."""
    page = package(module).replace(" ", "_")
    last = module.name.rpartition(".")[2]
    return f"/{FOLDER}/{page}.md#{last}" + (f".{entry.name}" if entry else "")


def signature(entry: Entry, owner: str = "") -> str:
    """How it is called, without types; a long one has a line for each argument."""
    name, node = (f"{owner}.{entry.name}" if owner else entry.name), entry.node
    if not isinstance(node, Function | ast.ClassDef):
        value = getattr(node, "value", None)
        text = short(ast.unparse(value)) if value else "..."
        return f"{name} = {text if len(text) <= 80 else text[:77] + '...'}"
    if entry.is_field or (isinstance(node, ast.ClassDef) and not entry.arguments):
        return name if entry.is_field else f"class {name}"
    given = [f"{a.name}={a.default}" if a.default else a.name for a in entry.arguments]
    if isinstance(node, Function) and node.args.kwonlyargs and not node.args.vararg:
        given.insert(len(given) - len(node.args.kwonlyargs) - bool(node.args.kwarg), "*")
    head = "class " if isinstance(node, ast.ClassDef) else ""
    name = f"{owner}(...)" if entry.name == "__call__" else name
    line = f"{head}{name}({', '.join(given)})"
    rows = "".join(f"    {argument},\n" for argument in given)
    return line if len(line) <= 90 else f"{head}{name}(\n{rows})"


def described(entry: Entry) -> list[str]:
    """A line for each argument, and one for the result."""
    lines = list[str]()
    for a in entry.arguments:
        default = f" = {code(a.default)}" if a.default else ""
        lines.append(f"- **{code(a.name)}** {code(a.type) if a.type else ''}{default}")
        lines[-1] += f": {prose(a.comment)}" if a.comment else ""
    kind, comment = entry.returns
    if kind:
        word = "is" if entry.is_field else "returns"
        lines += [f"- {word} {code(kind)}" + (f": {prose(comment)}" if comment else "")]
    return ["::: {.arguments}", "", *lines, "", ":::", ""] if lines else []


def body(entry: Entry, owner: str = "") -> list[str]:
    """Signature, docstring, arguments and result."""
    shown = ["```python", signature(entry, owner), "```", ""]
    return [*shown, prose(entry.doc), "", *described(entry)]


def section(entry: Entry, titles: dict[str, str]) -> list[str]:
    """The entry of a public name."""
    notebook, cell = entry.module.notebook, entry.module.cell(entry.node)
    anchor = href(entry.module, entry).split("#")[1]
    chapter = f"[{titles[notebook]}](/{notebook}#{cell})"
    lines = [f"### {code(entry.name)} {{#{anchor}}}", "", "::: {.defined}", chapter, ":::", ""]
    lines += body(entry)
    for method in entry.methods:
        lines += ["::: {.method}", "", *body(method, entry.name), ":::", ""]
    return lines


def page(root: Path, name: str, house: list[Module]) -> str:
    """The page of one package."""
    lines = ["---", f"title: {name}", "---", ""]
    lines += [] if name == TOP else [f"Import from {code(f'pc_transformer.{name}')}.", ""]
    notebooks = {module.notebook for module in house}
    titles = {n: book.title(root / n) for n in notebooks}
    for module in house:
        last = module.name.rpartition(".")[2]
        lines += [f"## {last} {{#{last}}}", "", prose(module.doc), ""]
        lines += [line for e in module.entries for line in section(e, titles)]
    return "\n".join(lines)


def imported(root: Path, house: dict[str, list[Module]]) -> list[str]:
    """A line about the names that stand in the package itself."""
    text = (root / "pc_transformer/__init__.py").read_text(encoding="utf-8")
    listed = re.search(r"^__all__ = (\[.*?\])", text, re.M | re.S)
    top = set(ast.literal_eval(listed[1])) if listed else set()
    names = [(e.name, href(m, e)) for inside in house.values() for m in inside for e in m.entries]
    links = ", ".join(f"[`{name}`]({to})" for name, to in names if name in top)
    return [f"`from pc_transformer import`{{.nolink}} gives {links}.", ""] if links else []


def front(root: Path, house: dict[str, list[Module]]) -> str:
    """The first page: every public name."""
    lines = ["---", "title: All names", "---", "", *imported(root, house)]
    lines += ["Below is every public name, by the package that it stands in.", ""]
    for name, inside in house.items():
        lines += [f"## [{name}]({name.replace(' ', '_')}.md)", ""]
        for m in inside:
            names = ", ".join(f"[`{e.name}`]({href(m, e)})" for e in m.entries)
            last = m.name.rpartition(".")[2]
            lines += [f"- [**{last}**]({href(m)}): {prose(m.doc)} {names}"] * bool(names)
        lines += [""]
    return "\n".join(lines)


def packages(root: Path) -> dict[str, list[Module]]:
    """The modules with public names, by their packages, in the order of the book."""
    found: dict[str, list[Module]] = {}
    for module in modules(root):
        if module.entries:
            found.setdefault(package(module), []).append(module)
    return dict(sorted(found.items(), key=lambda item: (item[0] == "theory", 0)))


def pages(root: Path) -> dict[str, str]:
    """All pages of the reference, by their paths."""
    house = packages(root)
    if not house:
        return {}
    made = {
        f"{FOLDER}/{n.replace(' ', '_')}.md": page(root, n, inside) for n, inside in house.items()
    }
    cited = {path: bibliography.cite(text, bibliography.read(root)) for path, text in made.items()}
    return {f"{FOLDER}/index.md": front(root, house), **cited}


def symbols(house: list[Module]) -> dict[str, str]:
    """Where classes and functions stand whose name is no other's: chapters link to it."""
    entries = [(e, m) for m in house for e in m.entries]
    names = [e.name for e, _ in entries]
    kept = [(e, m) for e, m in entries if isinstance(e.node, Function | ast.ClassDef)]
    return {e.name: href(m, e) for e, m in kept if names.count(e.name) == 1 and len(e.name) > 2}


def defined(house: list[Module]) -> dict[str, dict[str, str]]:
    """For every notebook, the entries of the names that it defines."""
    return {m.notebook: {e.name: href(m, e) for e in m.entries} for m in house}
