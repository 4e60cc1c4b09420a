"""The package as its users get it: light to import, and free of the tools that made it."""

import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pc_transformer

ROOT = Path(__file__).resolve().parents[1]
TOOLS = {"nbdev", "fastcore", "execnb", "IPython"}  # what made the package
LAZY = {
    "matplotlib",
    "jsonargparse",
    "pooch",
    "ipywidgets",
    "transformers",
    "accelerate",
    "tokenizers",
    "triton",
    "tqdm",
    "tensorboard",
}
UNASKED = {
    f"pc_transformer.{room}" for room in ("cli", "experiments", "interop", "monitoring", "theory")
}


def modules_after(code: str) -> set[str]:
    """The modules that a fresh Python has loaded after running the code."""
    code = f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def top(modules: set[str]) -> set[str]:
    """The names of the packages that the modules belong to."""
    return {m.partition(".")[0] for m in modules}


def names() -> list[str]:
    """Every module of the package that is meant to be imported."""
    found = pkgutil.walk_packages(pc_transformer.__path__, "pc_transformer.")
    return [m.name for m in found if not m.name.endswith(("._modidx", ".__main__"))]


def test_every_module_imports_without_the_tools() -> None:
    """No exported module needs nbdev, IPython, or matplotlib before it draws."""
    modules = names()
    assert modules, "the package has no modules"
    loaded = top(modules_after("\n".join(f"import {m}" for m in modules)))
    assert not loaded & (TOOLS | {"matplotlib"})


def test_import_costs_little_more_than_torch() -> None:
    """`import pc_transformer` adds a few modules to those of torch: none of the heavy ones, and
    no room that it does not need."""
    before = modules_after("import torch, numpy")
    added = modules_after("import pc_transformer") - before
    foreign = {m for m in added if not m.startswith("pc_transformer")}
    assert not {".".join(m.split(".")[:2]) for m in added - foreign} & UNASKED
    assert not {m for m in added if "triton" in m}
    assert not top(added) & (TOOLS | LAZY | (set() if "sympy" in top(before) else {"sympy"}))
    assert len(foreign) < 150, f"{len(foreign)} modules beside torch's own: {sorted(top(foreign))}"


def test_version_is_that_of_the_settings() -> None:
    """The version has one source."""
    assert f"version = {pc_transformer.__version__}\n" in (ROOT / "settings.ini").read_text(
        encoding="utf-8"
    )
