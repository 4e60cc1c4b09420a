"""The reference is made from the package's text, and what the text does not say is found."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
api = pytest.importorskip("api")
reference = pytest.importorskip("reference", reason="the docs extra is not installed")

HEAD = '''"""One module."""

# %% auto #0
__all__ = ['SIZE', 'Box', 'fill']

# %% ../../nbs/1_part/01_box.ipynb #ce11
from dataclasses import dataclass
'''
GOOD = '''
SIZE = 3  # sides of a box


def _check(n: int) -> None:
    if n < 0: raise ValueError(n)

# %% ../../nbs/1_part/01_box.ipynb #ce12
@dataclass
class Box:
    "A box. Raises `ValueError` for a width below zero."

    width: int              # in cm
    # of what it is made
    matter: str = "wood"

    def __post_init__(self):
        _check(self.width)

    @property
    def area(self) -> float:
        "In cm^2."
        return self.width**2


def fill(box: Box, *, n: int = SIZE) -> list[int]:  # one a row
    "Put `n` things into a box."
    return [n]
'''


def house(root: Path, text: str) -> Path:
    """A repository of one module and its notebook."""
    package, part = root / "pc_transformer/part", root / "nbs/1_part"
    package.mkdir(parents=True)
    part.mkdir(parents=True)
    (root / "pc_transformer/__init__.py").write_text('__all__ = ["Box"]', encoding="utf-8")
    (package / "box.py").write_text(HEAD + text, encoding="utf-8")
    cell = {"cell_type": "markdown", "id": "a", "metadata": {}, "source": "# Boxes"}
    nb = {"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (part / "01_box.ipynb").write_text(json.dumps(nb), encoding="utf-8")
    return root


def test_an_entry_says_all_of_a_name(tmp_path: Path) -> None:
    """Signature, docstring, arguments, result and the cell that defines it."""
    page = reference.pages(house(tmp_path, GOOD))["reference/part.md"]
    for line in (
        "### `Box`{.nolink} {#box.Box}",
        "[Boxes](/nbs/1_part/01_box.ipynb#ce12)",
        "class Box(width, matter='wood')",
        "- **`width`{.nolink}** `int`{.nolink}: in cm",
        "- **`matter`{.nolink}** `str`{.nolink} = `'wood'`{.nolink}: of what it is made",
        "In cm\\^2.",
        "fill(box, *, n=SIZE)",
        "- returns `list[int]`{.nolink}: one a row",
        "SIZE = 3",
    ):
        assert line in page.splitlines(), line


def test_the_first_page_lists_every_name(tmp_path: Path) -> None:
    """And first those that stand in the package itself."""
    page = reference.pages(house(tmp_path, GOOD))["reference/index.md"]
    assert "import`{.nolink} gives [`Box`](/reference/part.md#box.Box).\n" in page
    assert "[`SIZE`](/reference/part.md#box.SIZE), [`Box`]" in page


def test_names_lead_to_their_entries(tmp_path: Path) -> None:
    """From prose by name, and from the notebook that defines them."""
    root = house(tmp_path, GOOD)
    assert reference.symbols(api.modules(root))["Box"] == "/reference/part.md#box.Box"
    mine = reference.defined(api.modules(root))["nbs/1_part/01_box.ipynb"]
    assert mine["fill"] == "/reference/part.md#box.fill"


def test_what_is_described_has_no_gap(tmp_path: Path) -> None:
    """A comment, a type of the library, or a mention in the docstring explains an argument."""
    assert api.undocumented(house(tmp_path, GOOD)) == {}


@pytest.mark.parametrize(
    ("said", "unsaid", "gap"),
    [
        ('"Put `n` things into a box."', '"Put things into a box."', "fill: what is n?"),
        ("              # in cm", "", "Box: what is width?"),
        ("    # of what it is made\n", "", "Box: what is matter?"),
        (" Raises `ValueError` for a width below zero.", "", "Box: raises ValueError"),
        ('        "In cm^2."\n', "", "Box.area: no docstring"),
        ("  # sides of a box", "", "SIZE: no docstring"),
    ],
)
def test_what_is_not_described_is_found(tmp_path: Path, said: str, unsaid: str, gap: str) -> None:
    """One gap each, and it is named."""
    assert said in GOOD
    book = api.Book(house(tmp_path, GOOD.replace(said, unsaid)))
    assert [g for e in book.modules[0].entries for g in book.gaps(e)] == [gap]
