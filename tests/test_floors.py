"""The house has floors: a module imports from floors below its own, files form no circle, and theory stands apart."""

import ast
import shutil
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
LEVEL = {room: level for level, floor in enumerate(FLOORS.split("\n")[-2:0:-1]) for room in floor.split(" | ")}
APART = "theory"  # derivations that a machine checks: nothing imports them
Graph = dict[str, set[str]]  # from a module to what it imports, "" being the package itself


def modules(house: Path) -> dict[str, Path]:
    "Every file of the package, by its dotted name within it; a face `__init__.py` has the name of its folder."
    parts = {path: path.relative_to(house).with_suffix("").parts for path in sorted(house.rglob("*.py"))}
    return {".".join(p for p in where if p != "__init__"): path for path, where in parts.items() if where != ("_modidx",)}


def targets(node: ast.AST, package: list[str], known: dict[str, Path]) -> set[str]:
    "What an import of a module in this package names: the file itself, or the face that it reads."
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
        words = ast.literal_eval(node.args[0]).split(".")
        return {".".join(words[1:])} if words[0] == HOUSE.name else set()
    if isinstance(node, ast.Import):
        names = [alias.name.split(".") for alias in node.names]
        return {".".join(name[1:]) for name in names if name[0] == HOUSE.name}
    if not isinstance(node, ast.ImportFrom):
        return set()
    words = (node.module or "").split(".") if node.module else []
    if node.level:
        words = [HOUSE.name, *package[: len(package) + 1 - node.level], *words]
    if not words or words[0] != HOUSE.name:
        return set()
    base = words[1:]
    deep = {".".join([*base, alias.name]) for alias in node.names}
    return {name if name in known else ".".join(base) for name in deep}


def imports(house: Path) -> Graph:
    "Who imports whom, at the top of a file or within a function; what lies behind a face is not followed."
    known, graph = modules(house), {}
    for name, path in known.items():
        package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
        tree = ast.parse(path.read_text(encoding="utf-8"))
        graph[name] = set().union(*(targets(node, [p for p in package if p], known) for node in ast.walk(tree)))
    return graph


def complaints(house: Path) -> list[str]:
    "One sentence for everything that is not as the floors say."
    graph, known = imports(house), modules(house)
    inner = {name: found for name, found in graph.items() if name}      # the package's own face is for its users
    room = lambda name: name.partition(".")[0]
    said = [f"{name} is on no floor" for name in inner if room(name) not in {*LEVEL, APART}]
    for name, found in inner.items():
        for other in found:
            a, b = room(name), room(other)
            if other not in known:
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
    assert not complaints(HOUSE)


def test_the_graph_is_the_one_that_is_meant() -> None:
    """So that nothing holds because nothing was seen: every room has files, every floor leans on one below."""
    graph = imports(HOUSE)
    rooms = {name.partition(".")[0] for name in graph if name}
    assert rooms == {*LEVEL, APART} and len(graph) > 70
    used = {(name.partition(".")[0], other.partition(".")[0]) for name, found in graph.items() for other in found}
    assert {("cli", "training"), ("training", "learning"), ("learning", "settling"), ("settling", "model"),
            ("model", "attention"), ("attention", "energies"), ("inference", "model")} <= used  # fmt: skip
    assert graph["attention.kernels.choose"] >= {"attention.kernels.masks", "energies.families"}, "relative names are resolved"


MUTANTS = {
    "upwards": ("energies/families.py", "from ..attention.scores import reference", "no floor below"),
    "upwards, in a function": ("settling/chain.py", "def late():\n    from pc_transformer.training import save", "no floor below"),
    "upwards, by its full name": ("model/layers.py", "import pc_transformer.cli", "no floor below"),
    "upwards, as a string": ("model/layers.py", "importlib.import_module('pc_transformer.training.loop')", "no floor below"),
    "upwards, a whole package": ("attention/scores.py", "from .. import inference", "no floor below"),
    "to the side": ("learning/make.py", "from ..inference import generate", "no floor below"),
    "theory": ("experiments/costs.py", "from ..theory import symbolic", "stands apart"),
    "the package's face": ("training/loop.py", "from pc_transformer import load", "own face"),
    "its own face": ("training/loop.py", "from . import save", "face of its own folder"),
    "a circle": ("settling/chain.py", "from .errors import ErrorSettling", "a circle"),
    "a name that is gone": ("settling/chain.py", "import pc_transformer.solvers", "does not exist"),
    "a room without a floor": ("cellar.py", "", "on no floor"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_arrow_is_noticed(name: str, tmp_path: Path) -> None:
    """A copy of the package with one wrong line gets its sentence."""
    file, line, words = MUTANTS[name]
    house = shutil.copytree(HOUSE, tmp_path / HOUSE.name, ignore=shutil.ignore_patterns("__pycache__"))
    with open(house / file, "a", encoding="utf-8") as out:
        out.write(f"\n{line}\n")
    assert any(words in said for said in complaints(house)), complaints(house)
