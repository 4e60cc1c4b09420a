"""The scripts in tools/: what they keep, what they skip, and how they fail."""

import ast
import base64
import faulthandler
import io
import json
import os
import runpy
import subprocess
import sys
import time
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest

ROOT = Path(__file__).resolve().parents[2]
for name in ("nbformat", "jupytext", "nbclient", "nbdev"):
    pytest.importorskip(name, reason="the dev extra is not installed")
import nbformat  # noqa: E402
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output  # noqa: E402

Done = subprocess.CompletedProcess[str]


def process(name: str, *args: str) -> Done:
    """Run a script of tools/ in a process of its own."""
    env = {**os.environ, "JUPYTER_PLATFORM_DIRS": "1"}
    cmd = [sys.executable, str(ROOT / "tools" / name), *args]
    return subprocess.run(
        cmd, cwd=ROOT, capture_output=True, encoding="utf-8", check=False, env=env
    )


def tool(name: str, *args: str, cwd: Path = ROOT, stdin: str = "") -> Done:
    """Run a script of tools/ here, where all that it imports already is."""
    script, out, err = ROOT / "tools" / name, io.StringIO(), io.StringIO()
    status = 0
    with (
        chdir(cwd),
        redirect_stdout(out),
        redirect_stderr(err),
        patch.object(sys, "argv", [str(script), *args]),
        patch.object(sys, "path", [str(script.parent), *sys.path]),
        patch.object(sys, "stdin", io.StringIO(stdin)),
    ):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as stop:
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return subprocess.CompletedProcess([name, *args], status, out.getvalue(), err.getvalue())


def write(path: Path, *cells: nbformat.NotebookNode) -> Path:
    """Write a notebook with the ids c0, c1, ..."""
    nb = new_notebook(
        cells=list(cells), metadata={"kernelspec": {"display_name": "x", "name": "python3"}}
    )
    for n, cell in enumerate(nb.cells):
        cell.id = f"c{n}"
    nbformat.write(nb, path)
    return path


def shown(text: str) -> list[nbformat.NotebookNode]:
    """A saved output."""
    return [new_output("stream", text=text)]


def test_filter_drops_and_keeps() -> None:
    """Directives go, options stay, hidden cells and widgets vanish, and a source stays a list of
    lines."""
    widget = new_output(
        "display_data", {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}}
    )
    cells = [
        new_markdown_cell("# Title"),
        new_code_cell("#| default_exp x"),
        new_code_cell("#| hide\n1"),
        new_code_cell("#| export\n#| label: fig-x\n#| fig-cap:\n#|   - One: two\na = 1\nb = 2"),
        new_code_cell("#| output: false\ninteract(f)", outputs=[widget]),
        new_code_cell("#| slow\nlong()", outputs=shown("kept")),
    ]
    done = tool("nb_filter.py", stdin=json.dumps(new_notebook(cells=cells)))
    out = json.loads(done.stdout)["cells"]
    assert [isinstance(c["source"], list) for c in out[1:]] == [True, True, True]
    sources = ["".join(c["source"]) for c in out]
    assert sources[1] == "#| label: fig-x\n#| fig-cap:\n#|   - One: two\na = 1\nb = 2"
    assert sources[2:] == ["#| output: false\ninteract(f)", "long()"]
    assert out[2]["outputs"] == [] and out[3]["outputs"]


@pytest.mark.parametrize(
    ("code", "word"),
    [
        ("import os\nfrom a import b\nb.manual_seed(0)", "Imports"),
        ("%matplotlib inline\nimport os", "Imports"),
        ("import os\nx = 1", None),
        ("torch.manual_seed(0)", None),
        ("assert a\nrefused(f, 1)\ntorch.testing.assert_close(a, b)", "Check"),
        ("for a in b:\n    assert a", "Check"),
        ("a = 1\nassert a", None),
        ("%magic", None),
        ("a b", None),
    ],
)
def test_filter_folds_what_only_imports_or_checks(code: str, word: str | None) -> None:
    """Behind one word, and nothing else."""
    done = tool("nb_filter.py", stdin=json.dumps(new_notebook(cells=[new_code_cell(code)])))
    source = "".join(json.loads(done.stdout)["cells"][0]["source"])
    fold = f"#| code-fold: true\n#| code-summary: {word}\n" if word else ""
    assert source == fold + code


def test_runner_stores_light_pictures(tmp_path: Path) -> None:
    """A palette for lines, every colour for a picture of many; a second run changes nothing."""
    draw = "import matplotlib.pyplot as plt, numpy as np\n"
    lines = new_code_cell(draw + "plt.plot([1, 2], [3, 1]);")
    blend = new_code_cell("plt.imshow(np.random.default_rng(0).random((200, 200, 3)));")
    path = write(tmp_path / "a.ipynb", lines, blend)
    assert process("run_notebooks.py", str(path)).returncode == 0
    text = path.read_bytes()
    cells = nbformat.read(path, 4).cells
    pngs = [base64.b64decode(c.outputs[0].data["image/png"]) for c in cells]
    assert [png[25] for png in pngs] == [3, 6], "a palette, and colours in full"
    assert process("run_notebooks.py", str(path)).returncode == 0
    assert path.read_bytes() == text


def test_runner_skips_keeps_and_repeats(tmp_path: Path) -> None:
    """Marked cells keep what was saved; ids stay; a second run changes no byte."""
    path = write(
        tmp_path / "a.ipynb",
        new_code_cell("import os\nprint(os.environ['OMP_NUM_THREADS'], object())"),
        new_code_cell("#| eval: false\nraise ValueError", outputs=shown("kept")),
        new_code_cell("#| slow\nraise ValueError"),
        new_code_cell("#| cuda\nraise ValueError"),
    )
    first = process("run_notebooks.py", str(path))
    assert first.returncode == 0, first.stderr
    assert "a.ipynb: " in first.stdout
    nb, text = nbformat.read(path, 4), path.read_bytes()
    assert [c.id for c in nb.cells] == ["c0", "c1", "c2", "c3"]
    assert nb.cells[0].outputs[0].text == "1 <object object>\n"
    assert nb.cells[1].outputs[0].text == "kept"
    assert not any(c.execution_count for c in nb.cells)
    assert process("run_notebooks.py", str(path)).returncode == 0
    assert path.read_bytes() == text


def test_runner_names_the_cell_that_failed(tmp_path: Path) -> None:
    """A failure ends with exit 1, and leaves the notebook as it was."""
    path = write(
        tmp_path / "a.ipynb", new_code_cell("print(1)"), new_code_cell("assert 1 == 2, 'odd'")
    )
    before = path.read_bytes()
    done = process("run_notebooks.py", str(path))
    assert done.returncode == 1
    assert "assert 1 == 2, 'odd'" in done.stderr and "AssertionError: odd" in done.stderr
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.ipynb"]


def test_percent_and_back(tmp_path: Path) -> None:
    """Ids stay, unchanged cells keep their outputs, changed ones lose them, new ones get an id."""
    (tmp_path / "nbs/1_part").mkdir(parents=True)
    write(
        tmp_path / "nbs/1_part/a.ipynb",
        new_markdown_cell("# Title $x_l$"),
        new_code_cell("#| export\nx = 1", outputs=shown("one")),
        new_code_cell("x", outputs=shown("two")),
    )
    assert tool("percent.py", "to", "nbs/1_part/a.ipynb", cwd=tmp_path).returncode == 0
    script = tmp_path / ".nbpy/1_part/a.py"
    text = script.read_text(encoding="utf-8")
    assert '# %% id="c1"\n#| export\nx = 1' in text
    script.write_text(text.replace("\nx\n", "\nx + 1\n") + "\n# %%\nnew = 3\n", encoding="utf-8")
    assert tool("percent.py", "from", "nbs/1_part/a.ipynb", cwd=tmp_path).returncode == 0
    cells = nbformat.read(tmp_path / "nbs/1_part/a.ipynb", 4).cells
    assert [c.id for c in cells[:3]] == ["c0", "c1", "c2"] and len(cells) == 4
    assert [c.source for c in cells] == ["# Title $x_l$", "#| export\nx = 1", "x + 1", "new = 3"]
    assert [len(c.outputs) for c in cells[1:]] == [1, 0, 0]


def ends(root: Path, name: str) -> list[str]:
    """The sources of a notebook after the title."""
    return [c.source for c in nbformat.read(root / "nbs" / name, 4).cells][1:]


def test_one_order_of_reading(tmp_path: Path) -> None:
    """Numbers are the order of the sidebar and of the `Next` lines; stale ones are named and
    written anew."""
    config, root = tmp_path / "_quarto.yml", ("--root", str(tmp_path))
    for folder in ("nbs/0_theory", "nbs/1_first_model"):
        (tmp_path / folder).mkdir(parents=True)
    config.write_text(
        "sidebar:\n    contents:\n      - {text: old, href: nbs/old.ipynb}\n\nformat: html\n",
        encoding="utf-8",
    )
    write(
        tmp_path / "nbs/index.ipynb",
        new_markdown_cell("# Home"),
        new_code_cell("1", outputs=shown("one")),
    )
    old = "Next: [Gone](../gone.ipynb) says more.\n\n<details>\nA proof.\n</details>"
    write(
        tmp_path / "nbs/0_theory/02_b.ipynb",
        new_markdown_cell('# It\'s "b"\n\n> why'),
        new_markdown_cell(old),
    )
    write(
        tmp_path / "nbs/0_theory/10_c.ipynb", new_markdown_cell("# C"), new_markdown_cell("Words.")
    )
    write(
        tmp_path / "nbs/1_first_model/01_d.ipynb",
        new_markdown_cell("# D"),
        new_markdown_cell("**Next.** [A](a.ipynb)"),
    )
    stale = tool("make_order.py", "--check", *root)
    assert (
        stale.returncode == 1
        and "_quarto.yml" in stale.stderr
        and "nbs/1_first_model/01_d.ipynb" in stale.stderr
    )
    assert tool("make_order.py", *root).returncode == 0
    assert (
        config.read_text(encoding="utf-8")
        == """sidebar:
    contents:
      - {text: "Home", href: nbs/index.ipynb}
      - section: "0 · Theory"
        contents:
          - {text: "It's \\"b\\"", href: nbs/0_theory/02_b.ipynb}
          - {text: "C", href: nbs/0_theory/10_c.ipynb}
      - section: "1 · First model"
        contents:
          - {text: "D", href: nbs/1_first_model/01_d.ipynb}

format: html
"""
    )
    assert ends(tmp_path, "index.ipynb") == ["1", 'Next: [It\'s "b"](0_theory/02_b.ipynb)']
    assert ends(tmp_path, "0_theory/02_b.ipynb") == [
        "<details>\nA proof.\n</details>\n\nNext: [C](10_c.ipynb)"
    ]
    assert ends(tmp_path, "0_theory/10_c.ipynb") == [
        "Words.\n\nNext: [D](../1_first_model/01_d.ipynb)"
    ]
    assert ends(tmp_path, "1_first_model/01_d.ipynb") == [], "the last chapter leads nowhere"
    done = tool("make_order.py", "--check", *root)
    assert done.returncode == 0, done.stderr
    assert (
        tool("make_order.py", *root).stdout == "order of reading: 4 notebooks, 0 file(s) changed\n"
    )


def test_only_the_last_cell_leads_on(tmp_path: Path) -> None:
    """A written line moves down when cells follow it; one in an author's words is named and
    left."""
    (tmp_path / "nbs").mkdir()
    (tmp_path / "_quarto.yml").write_text("sidebar:\n    contents:\n", encoding="utf-8")
    ours, theirs = (
        new_markdown_cell("Next: [Old](old.ipynb)"),
        new_markdown_cell("**Next:** [B](b.ipynb), which is hard."),
    )
    write(tmp_path / "nbs/a.ipynb", new_markdown_cell("# A"), ours, theirs, new_code_cell("1"))
    write(tmp_path / "nbs/b.ipynb", new_markdown_cell("# B"))
    done = tool("make_order.py", "--root", str(tmp_path))
    assert done.returncode == 1 and "nbs/a.ipynb: delete this line of cell c2" in done.stderr
    assert ends(tmp_path, "a.ipynb") == [theirs.source, "1", "Next: [B](b.ipynb)"]


def test_readme_follows_the_index(tmp_path: Path) -> None:
    """Links gain their folder; `--check` tells when README.md is old."""
    (tmp_path / "nbs").mkdir()
    cells = [
        new_markdown_cell("# T\n\n[a](0_part/00_a.ipynb) [l](../LICENSE) [w](https://example.org)"),
        new_code_cell("1"),
    ]
    write(tmp_path / "nbs/index.ipynb", *cells)
    root = ("--root", str(tmp_path))
    assert tool("make_readme.py", "--check", *root).returncode == 1
    assert tool("make_readme.py", *root).returncode == 0
    assert tool("make_readme.py", "--check", *root).returncode == 0
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert (
        "[a](nbs/0_part/00_a.ipynb) [l](LICENSE) [w](https://example.org)" in text
        and "```python\n1\n```" in text
    )
    (tmp_path / "README.md").write_text(text + "edited", encoding="utf-8")
    done = tool("make_readme.py", "--check", *root)
    assert done.returncode == 1 and "README.md" in done.stderr


def test_the_front_page_says_how_long_a_chapter_takes(tmp_path: Path) -> None:
    """The number at the end of a row is made of the chapter's words and visible lines."""
    row = "| [A](0_part/00_a.ipynb) | it | 5 |"
    table = f"# T\n\n| chapter | for | minutes |\n|---|---|---:|\n{row}"
    hidden = new_code_cell("#| hide\n" + "x = 1\n" * 999)
    chapter = [new_markdown_cell("# A\n\n> Asks." + " word" * 1496), hidden, new_code_cell("1")]
    (tmp_path / "nbs/0_part").mkdir(parents=True)
    write(tmp_path / "nbs/0_part/00_a.ipynb", *chapter)
    write(tmp_path / "nbs/index.ipynb", new_markdown_cell(table))
    root = ("--root", str(tmp_path))
    assert tool("make_readme.py", "--check", *root).returncode == 1
    assert tool("make_readme.py", *root).returncode == 0
    assert "| [A](nbs/0_part/00_a.ipynb) | it | 10 |" in (tmp_path / "README.md").read_text()


def test_the_index_lists_every_chapter(tmp_path: Path) -> None:
    """Parts and chapters in order, each with its own promise; a new one puts the table out of
    step."""
    (tmp_path / "nbs/1_model").mkdir(parents=True)
    (tmp_path / "nbs/0_theory").mkdir()
    table = (
        "# T\n\n| part | chapter | teaches |\n|---|---|---|\n| old | [x](x.ipynb) | y |\n\nAfter"
        " the table."
    )
    write(tmp_path / "nbs/index.ipynb", new_markdown_cell(table))
    write(tmp_path / "nbs/1_model/01_b.ipynb", new_markdown_cell("# B\n\n> Builds."))
    write(tmp_path / "nbs/1_model/02_c.ipynb", new_markdown_cell("# C\n\n> Counts."))
    root = ("--root", str(tmp_path))
    assert tool("make_readme.py", *root).returncode == 0
    write(tmp_path / "nbs/0_theory/00_a.ipynb", new_markdown_cell("# A\n\n> Asks."))
    done = tool("make_readme.py", "--check", *root)
    assert done.returncode == 1 and "table of chapters" in done.stderr
    assert tool("make_readme.py", *root).returncode == 0
    assert tool("make_readme.py", "--check", *root).returncode == 0
    rows = [
        "| Theory | [A](nbs/0_theory/00_a.ipynb) | Asks. |",
        "| Model | [B](nbs/1_model/01_b.ipynb) | Builds. |",
        "|  | [C](nbs/1_model/02_c.ipynb) | Counts. |",
    ]
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "|---|---|---|\n" + "\n".join(rows) + "\n\nAfter the table." in text
    write(tmp_path / "nbs/0_theory/01_d.ipynb", new_markdown_cell("# No promise"))
    done = tool("make_readme.py", *root)
    assert done.returncode == 1 and "01_d.ipynb must begin with" in done.stderr


def test_every_notebook_is_tested_whatever_becomes_of_the_others(tmp_path: Path) -> None:
    """One that fails, one that hangs, one that dies: each is named with what it said, and the
    others are tested."""
    paths = {
        "bad": write(
            tmp_path / "bad.ipynb",
            new_code_cell("print('so far')"),
            new_code_cell("assert 1 == 2, 'odd'"),
        ),
        "dead": write(tmp_path / "dead.ipynb", new_code_cell("import os; os.kill(os.getpid(), 9)")),
        "hangs": write(
            tmp_path / "hangs.ipynb",
            new_code_cell("def wait(): time.sleep(600)\nimport time; wait()"),
        ),
        "good": write(
            tmp_path / "good.ipynb",
            new_code_cell("x = 1"),
            new_code_cell("#| slow\nraise ValueError"),
        ),
        "after": write(tmp_path / "after.ipynb", new_code_cell("assert 'x' not in globals()")),
    }
    report, begin = tmp_path / "failed", time.monotonic()
    names = (*map(str, paths.values()), "--timeout", "8", "--failed", str(report))
    done = process("check_notebooks.py", *names)
    assert done.returncode == 1 and time.monotonic() - begin < 120, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if " s  " in line]
    assert {(line[3], line[0]) for line in lines if line[0] in ("ok", "FAIL")} == {
        (f"{name}.ipynb", "ok" if name in ("good", "after") else "FAIL") for name in paths
    }
    assert "AssertionError: odd" in done.stdout and "in wait" in done.stdout, (
        "the cause, and where it hung"
    )
    assert sorted(report.read_text(encoding="utf-8").splitlines()) == [
        "bad.ipynb failed",
        "dead.ipynb killed by signal 9",
        "hangs.ipynb took more than 8 s",
    ]
    assert "2 of 5 notebooks passed" in done.stdout
    done = process("check_notebooks.py", str(paths["good"]))
    assert done.returncode == 0 and "1 of 1 notebooks passed" in done.stdout


def test_every_file_of_tests_is_run(tmp_path: Path) -> None:
    """One that fails is named with what it said; one without a test, as all skipped, is no
    failure."""
    files = {
        "test_bad.py": "def test_odd():\n    assert 1 == 2, 'odd'",
        "test_good.py": "def test_one(): pass\ndef test_two(): pass",
        "test_none.py": "import pytest\npytest.importorskip('no_such_package')",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    report = tmp_path / "failed"
    names = [str(tmp_path / name) for name in files]
    done = process("check_tests.py", *names, "--failed", str(report))
    assert done.returncode == 1 and "AssertionError: odd" in done.stdout, done.stdout + done.stderr
    assert report.read_text(encoding="utf-8") == "test_bad.py failed\n"
    assert "2 of 3 files of tests passed" in done.stdout and "2 passed in" in done.stdout


def house(root: Path, lines: int, place: str = "a") -> Path:
    """A repository with one module, whose one function has so many lines."""
    package = root / "pc_transformer"
    body = "\n    x = 1" * (lines - 1)
    (package / f"{place}.py").write_text(f"def f(x):{body}\n", encoding="utf-8")
    return root


def sizes(root: Path, *args: str) -> str:
    """What `sizes.py` says of a repository, with its exit status before it."""
    done = tool("sizes.py", "--root", str(root), *args)
    return f"{done.returncode} {done.stdout}"


def test_what_is_too_long_may_only_shrink(tmp_path: Path) -> None:
    """A listed place passes; one that is new or grows is named; one that shrank is taken off the
    list, and cannot come back."""
    for folder in ("tools", "nbs/1_part", "pc_transformer"):
        (tmp_path / folder).mkdir(parents=True)
    house(tmp_path, 50)
    assert sizes(tmp_path, "--update").startswith("0")  # the first list is what there is
    listed = tmp_path / "tools/sizes/long_functions.txt"
    assert listed.read_text(encoding="utf-8") == "50 a.py f\n"
    assert sizes(house(tmp_path, 50)).startswith("0")
    assert "a.py f: 51, was 50" in (said := sizes(house(tmp_path, 51))) and said.startswith("1")
    assert sizes(tmp_path, "--update").startswith("1"), "it is never raised"
    assert listed.read_text(encoding="utf-8") == "50 a.py f\n"
    house(tmp_path, 50)
    assert "b.py f: 41, new" in sizes(house(tmp_path, 41, "b"))
    (tmp_path / "pc_transformer/b.py").unlink()
    assert "--update" in (said := sizes(house(tmp_path, 45))) and said.startswith("1")
    assert sizes(tmp_path, "--update").startswith("0")
    assert listed.read_text(encoding="utf-8") == "45 a.py f\n"
    assert sizes(house(tmp_path, 40), "--update").startswith("0")
    assert "a.py f: 41, new" in sizes(house(tmp_path, 41))


LONG = "#| export\n" + "x = 1\n" * 26
BROKEN = {  # a text for the module, a cell, and what is said
    "parameters": ("def g(self, a, b, c, d, *, e, f, g): ...", "", "a.py g: 7, new"),
    "method": ("class A:\n    def g(self, a, b, c, d, e, f, g): ...", "", "a.py A.g: 7, new"),
    "module": ("x = 1\n" * 300, "", "a.py: 301, new"),
    "numbers": ("# as chapter 12 says", "", "a.py: 1, new"),
    "names": ("def shared(): ...\n_own = 1", "", "shared in a.py, b.py: 2, new"),
    "cell": ("", LONG, "nbs/1_part/01_a.ipynb c0: 26, new"),
    "equation": ("", "#| export\n# equation (3)", "nbs/1_part/01_a.ipynb c0: 1, new"),
}
FINE = [
    ("@jit\ndef g(a, b, c, d, e, f, g, h): ...", ""),  # a kernel
    ("x = 1\n" * 299 + "def _own(): ...", LONG.replace("#| export\n", "")),
    ("def h(self, a, b, c, d, e, f): ...", "#| export\n# equation (2), `b.f`, equation (9)"),
]


@pytest.mark.parametrize("name", [*BROKEN, *range(len(FINE))])
def test_every_size_is_measured(name: str | int, tmp_path: Path) -> None:
    """Each rule notices one place, and lets be what only looks like one."""
    text, cell, says = BROKEN[name] if isinstance(name, str) else (*FINE[name], "no place is new")
    for folder in ("tools", "nbs/1_part", "pc_transformer"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "pc_transformer/b.py").write_text("def shared(): ...\n_own = 1", encoding="utf-8")
    assert sizes(tmp_path, "--update").startswith("0")
    (tmp_path / "pc_transformer/a.py").write_text(f"{text}\n", encoding="utf-8")
    cells = [new_code_cell(cell), new_markdown_cell(r"$$a = b \qquad (2)$$")]
    write(tmp_path / "nbs/1_part/01_a.ipynb", *cells)
    said = sizes(tmp_path)
    assert says in said, said


def test_a_failing_check_does_not_hide_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All checks run, the last line names those that failed, the exit status is 1; no check has
    a limit on the whole."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    with patch.dict(os.environ):  # it says how many threads the others have
        import check

    done: list[str] = []

    def notebooks() -> str:
        "Fails."
        done.append("notebooks")
        raise check.Failed("a.ipynb failed")

    def tests() -> str:
        "Passes."
        done.append("tests")
        return "12 tests"

    def lint() -> str:
        "Fails, beside the next."
        raise check.Failed("a line is too long")

    def order() -> str:
        "Passes."
        return "87 notebooks"

    # pytest's watchdog is a thread, which a forked process lacks but would wait for
    faulthandler.cancel_dump_traceback_later()
    monkeypatch.setattr(check, "TOGETHER", [lint, order])
    monkeypatch.setattr(check, "CHECKS", [lint, order, notebooks, tests, notebooks])
    monkeypatch.setattr(sys, "argv", ["check.py"])
    assert check.main() == 1 and done == ["notebooks", "tests", "notebooks"]
    out = capsys.readouterr().out
    assert (
        "FAIL  notebooks" in out
        and "a.ipynb failed" in out
        and "ok    tests" in out
        and "FAILED: lint, notebooks" in out
        and "a line is too long" in out
        and "order  87 notebooks" in out
    )
    monkeypatch.setattr(check, "CHECKS", [tests])
    assert check.main() == 0 and "All checks passed" in capsys.readouterr().out
    with pytest.raises(check.Failed, match="ended with exit 3"):
        check.sh(sys.executable, "-c", "raise SystemExit(3)")
    assert "timeout" not in (ROOT / "tools" / "check.py").read_text(encoding="utf-8")


def unnamed(path: Path) -> list[str]:
    """Calls that read or write text in whatever encoding the platform has."""
    found = []
    for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(call, ast.Call):
            continue
        keys = {k.arg: k.value for k in call.keywords}
        name = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
        modes = [
            a.value
            for a in [*call.args, *keys.values()]
            if isinstance(a, ast.Constant) and isinstance(a.value, str)
        ]
        binary = any("b" in m and set(m) <= set("rwxab+") for m in modes)
        text = (
            name in ("open", "fdopen", "NamedTemporaryFile", "TemporaryFile")
            and not binary
            and call.args
        )
        text = text or name in ("read_text", "write_text") and isinstance(call.func, ast.Attribute)
        text = text or any(k in keys for k in ("text", "universal_newlines"))
        ours = ast.unparse(call.func) in ("corpora.read_text", "os.open")
        if text and "encoding" not in keys and not ours:
            found.append(f"{path.name}:{call.lineno} {ast.unparse(call)[:80]}")
    return found


def test_every_text_has_its_encoding_by_name() -> None:
    """A file that is right here is wrong under Windows or the C locale, unless its encoding is
    written down."""
    paths = [
        *sorted((ROOT / "pc_transformer").rglob("*.py")),
        *sorted((ROOT / "tools").glob("*.py")),
    ]
    assert len(paths) > 30 and [line for path in paths for line in unnamed(path)] == []


def test_the_search_for_unnamed_encodings_finds_them(tmp_path: Path) -> None:
    """Each kind of call, with and without."""
    bad = [
        "open('x')",
        "open('x', 'w')",
        "Path('x').read_text()",
        "p.write_text(t)",
        "os.fdopen(3)",
        "run(c, text=True)",
    ]
    good = [
        "open('x', 'rb')",
        "open('x', encoding='utf-8')",
        "p.read_text(encoding='utf-8')",
        "p.read_bytes()",
        "run(c, text=True, encoding='utf-8')",
        "corpora.read_text(name)",
        "write_text(p, t)",
    ]
    (tmp_path / "a.py").write_text("\n".join(bad), encoding="utf-8")
    (tmp_path / "b.py").write_text("\n".join(good), encoding="utf-8")
    assert len(unnamed(tmp_path / "a.py")) == len(bad) and unnamed(tmp_path / "b.py") == []
