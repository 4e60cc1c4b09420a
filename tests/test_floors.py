"""The house has floors: a module imports from floors below its own, files form no circle, and
theory stands apart."""

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import pc_transformer

HOUSE = Path(pc_transformer.__file__).parent
FLOORS = """
cli
experiments | monitoring | interop
training
inference | learning
settling
model
attention | data
energies | config | isolation
"""
LEVEL = {
    room: level
    for level, floor in enumerate(FLOORS.split("\n")[-2:0:-1])
    for room in floor.split(" | ")
}
APART = "theory"  # derivations that a machine checks: nothing imports them
Graph = dict[str, set[str]]  # from a module to what it imports, "" being the package itself
Copy = dict[str, str]  # from a file's path within the package to its text


def sources() -> Copy:
    "Every file of the package."
    found = {
        path.relative_to(HOUSE).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(HOUSE.rglob("*.py"))
    }
    return {path: text for path, text in found.items() if path != "_modidx.py"}


def dotted(path: str) -> str:
    "The name of a module within the package; a face `__init__.py` has the name of its folder."
    return path.removesuffix(".py").removesuffix("__init__").rstrip("/").replace("/", ".")


@cache
def statements(text: str) -> list[ast.Import | ast.ImportFrom | ast.Call]:
    "All that imports, at the top of a file or within a function."
    # what is looked up by a name that somebody gives, as a study is, is no arrow
    asks = lambda node: (
        isinstance(node, ast.Call)
        and ast.unparse(node.func).endswith("import_module")
        and isinstance(node.args[0], ast.Constant)
    )
    return [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom) or asks(node)
    ]


def targets(
    node: ast.Import | ast.ImportFrom | ast.Call, package: list[str], known: set[str]
) -> set[str]:
    "What an import of a module in this package names: the file itself, or the face that it reads."
    if isinstance(node, ast.ImportFrom):
        above = [HOUSE.name, *package[: len(package) + 1 - node.level]] if node.level else []
        base = [*above, *(node.module.split(".") if node.module else [])]
        names = [
            [*base, alias.name] if ".".join([*base[1:], alias.name]) in known else base
            for alias in node.names
        ]
    elif isinstance(node, ast.Import):
        names = [alias.name.split(".") for alias in node.names]
    else:
        names = [ast.literal_eval(node.args[0]).split(".")]
    return {".".join(name[1:]) for name in names if name[0] == HOUSE.name}


def imports(copy: Copy) -> Graph:
    "Who imports whom; what lies behind a face is not followed."
    known = {dotted(path) for path in copy}
    package = lambda path: path.split("/")[:-1]
    return {
        dotted(path): (
            set().union(*(targets(node, package(path), known) for node in statements(text)))
        )
        for path, text in copy.items()
    }


def complaints(copy: Copy) -> list[str]:
    "One sentence for everything that is not as the floors say."
    graph = imports(copy)
    inner = {
        name: found for name, found in graph.items() if name
    }  # the package's own face is for its users
    room = lambda name: name.partition(".")[0]
    said = [f"{name} is on no floor" for name in inner if room(name) not in {*LEVEL, APART}]
    for name, found in inner.items():
        for other in found:
            a, b = room(name), room(other)
            if other not in graph:
                said.append(f"{name} imports {other}, which does not exist")
            elif not other:
                said.append(f"{name} imports the package's own face")
            elif a != b and APART in (a, b):
                said.append(f"{name} imports {other}, but {APART} stands apart")
            elif a != b and LEVEL.get(b, 0) >= LEVEL.get(a, 0):
                said.append(f"{name} imports {other}, which is no floor below")
            elif name.startswith(f"{other}."):
                said.append(f"{name} imports {other}, the face of its own folder")
    try:
        TopologicalSorter(inner).prepare()
    except CycleError as error:
        said.append(f"a circle: {' <- '.join(error.args[1])}")
    return said


def test_every_arrow_runs_down() -> None:
    """No circle of files, no arrow upwards or to the side, no detour through one's own face."""
    assert not complaints(sources())


def test_the_graph_is_the_one_that_is_meant() -> None:
    """So that nothing holds because nothing was seen: every room has files, every floor leans on
    one below."""
    graph = imports(sources())
    rooms = {name.partition(".")[0] for name in graph if name}
    assert rooms == {*LEVEL, APART} and len(graph) > 70
    used = {
        (name.partition(".")[0], other.partition(".")[0])
        for name, found in graph.items()
        for other in found
    }
    assert {
        ("cli", "training"),
        ("training", "learning"),
        ("learning", "settling"),
        ("settling", "model"),
        ("model", "attention"),
        ("attention", "energies"),
        ("inference", "model"),
    } <= used
    assert graph["attention.kernels.choose"] >= {"attention.kernels.masks", "energies.families"}, (
        "relative names are resolved"
    )


MUTANTS = {
    "upwards": (
        "energies/families.py",
        "from ..attention.scores import reference",
        "no floor below",
    ),
    "upwards, in a function": (
        "settling/chain.py",
        "def f():\n    from pc_transformer.training import save",
        "no floor below",
    ),
    "upwards, by its full name": ("model/layers.py", "import pc_transformer.cli", "no floor below"),
    "upwards, as a string": (
        "model/layers.py",
        "importlib.import_module('pc_transformer.training.loop')",
        "no floor below",
    ),
    "upwards, a whole package": (
        "attention/scores.py",
        "from .. import inference",
        "no floor below",
    ),
    "to the side": ("learning/config.py", "from ..inference import generate", "no floor below"),
    "theory": ("experiments/costs.py", "from ..theory import symbolic", "stands apart"),
    "the package's face": ("training/loop.py", "from pc_transformer import load", "own face"),
    "its own face": ("training/loop.py", "from . import save", "face of its own folder"),
    "a circle": ("settling/chain.py", "from .errors import ErrorSettling", "a circle"),
    "a name that is gone": ("settling/chain.py", "import pc_transformer.solvers", "does not exist"),
    "a room without a floor": ("cellar.py", "", "on no floor"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_arrow_is_noticed(name: str) -> None:
    """A copy of the package with one wrong line gets its sentence."""
    file, line, words = MUTANTS[name]
    copy = sources()
    copy[file] = f"{copy.get(file, '')}\n{line}\n"
    assert any(words in said for said in complaints(copy))
