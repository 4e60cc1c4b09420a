"""`pct` explains every option, and answers a mistake with one sentence."""

import inspect
from pathlib import Path
from typing import Any

import pytest

from pc_transformer.cli import COMMANDS, RESEARCH, USE, main
from pc_transformer.cli.program import comments, options_of


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_option_of_every_verb_has_a_help_text(verb: str) -> None:
    "And a verb has one line of docstring, since its parameters explain themselves."
    about = inspect.getdoc(COMMANDS[verb]) or ""
    assert about.endswith((".", "?")) and "\n" not in about
    silent = [o.dest for o in options_of(verb)._actions if not o.help]
    assert not silent, f"pct {verb} --help says nothing of {silent}"
    own = {n for n in inspect.signature(COMMANDS[verb]).parameters if n[0] != "_"}
    assert own <= comments(COMMANDS[verb]).keys()


def test_help_is_the_comment_beside_the_parameter(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert "H, attention heads per block (type: int, default: 4)" in said
    assert "in tokens; null: the whole past (type: int | null, default: null)" in said


def test_verbs_for_users_come_before_those_for_research(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    places = [said.index(f"\n  {f.__name__.replace('_', '-')} ") for f in (*USE, *RESEARCH)]
    assert places == sorted(places) and said.index("Research:") > places[len(USE) - 1]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["train", "x", "--model.n_layers", "3"], "did you mean --model.n_layer?"),
        (["train", "x", "--model.attention", "studentt"], "did you mean student_t?"),
        (["train", "x", "--learner.solver=swep"], "did you mean sweep?"),
        (["trian", "x"], "did you mean train?"),
        (["train", "x", "--train.iters", "many"], "Expected int"),
        (["train"], "required"),
        (["data", "tinyshakespeare", "--threads", "many"], "positive whole number"),
        (["data", "shakespear"], "neither a known corpus"),
        (["run", "everything"], "choose from"),
        (["run", "demo", "--changes", '{"train.iter": 3}'], "did you mean iters?"),
        (["run", "demo", "--seeds", "[]"], "--seeds must name at least one"),
        (["bench-attention", "--lengths", "[0]"], "lengths of at least 1"),
    ],
)
def test_a_mistake_is_one_sentence(
    args: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(args) in (1, 2)
    said = capsys.readouterr().err
    assert said.startswith("pct: ") and said.count("\n") == 1 and says in said, said
