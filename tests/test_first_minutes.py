"""The first five minutes: what the front page and the quick start tell a newcomer to type is run,
word for word, from an empty folder. The commands are read from the pages themselves."""

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
QUICK, FRONT = ROOT / "nbs/00_quick_start.ipynb", ROOT / "nbs/index.ipynb"
SHELL = re.compile(r"^```sh\n(.*?)^```$", re.M | re.S)
UNSEEN = re.compile(r"^#\|\s*(?:hide|echo: false)", re.M)
ENV = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    "OMP_NUM_THREADS": "1",
    "MPLBACKEND": "agg",
    "TQDM_DISABLE": "1",
}


def cells(path: Path) -> list[tuple[str, str]]:
    """Kind and source of each cell that a reader sees."""
    read = json.loads(path.read_text(encoding="utf-8"))["cells"]
    found = [(cell["cell_type"], "".join(cell["source"])) for cell in read]
    return [(kind, text) for kind, text in found if kind == "markdown" or not UNSEEN.search(text)]


def words(path: Path) -> str:
    """What a page says, without its Python."""
    return "\n".join(text for kind, text in cells(path) if kind == "markdown")


def in_order(path: Path) -> list[str]:
    """A page's terminal commands and its Python, as one Python script."""
    script = ["import subprocess"]
    for kind, text in cells(path):
        if kind == "code":
            script.append(text)
        script += [
            f"subprocess.run({block!r}, shell=True, check=True)"
            for block in (SHELL.findall(text) if kind == "markdown" else ())
        ]
    return script


def run(*command: str, cwd: Path) -> str:
    """What a command prints; its own words when it fails."""
    done = subprocess.run(command, cwd=cwd, env=ENV, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@cache
def help_of(verb: str) -> str:
    """The help of a command."""
    return run("pct", verb, "--help", cwd=ROOT)


def commands(path: Path) -> list[str]:
    """The terminal commands of a page, continued lines joined."""
    blocks: list[str] = SHELL.findall(words(path))
    return "".join(blocks).replace("\\\n", "").splitlines()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder that was empty before the quick start ran in it, and what that printed."""
    script, folder = tmp_path_factory.mktemp("page") / "page.py", tmp_path_factory.mktemp("empty")
    script.write_text("\n".join(in_order(QUICK)), encoding="utf-8")
    return folder, run(sys.executable, "-u", str(script), cwd=folder)


def test_the_quick_start_runs_from_an_empty_folder(place: tuple[Path, str]) -> None:
    """Every command and every visible cell, in the order of the page."""
    losses = [float(x) for x in re.findall(r"validation loss (\d\.\d+)", place[1])]
    assert len(losses) == 2 and losses[0] == losses[1] < 0.5  # the terminal and Python agree
    assert place[1].count("the old") >= 3 and "this model" in place[1]


def test_the_front_page_trains_and_samples(place: tuple[Path, str]) -> None:
    """Its first command is the quick start's, which has run; the next follows it."""
    first, *rest = commands(FRONT)
    assert first in commands(QUICK) and first.startswith("pct train run --data own.txt")
    said = [run("sh", "-ec", command, cwd=place[0]) for command in rest]
    assert len(said) == 1 and said[0].startswith("the") and len(said[0]) > 200


@pytest.mark.parametrize("path", [QUICK, FRONT], ids=lambda p: p.stem)
def test_what_a_page_names_exists(path: Path) -> None:
    """Options in its text are options of `pct`, and targets of make are targets."""
    text = words(path)
    known = help_of("train") + help_of("sample") + help_of("evaluate")
    assert [o for o in re.findall(r"(?<![\w-])--[a-z_.]+", text) if o not in known] == []
    targets = re.findall(r"^make ([\w-]+)", text, re.M)
    assert "install" in targets
    run("make", "-n", *targets, cwd=ROOT)


def test_the_front_page_is_short() -> None:
    """A page, tables included."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1200
