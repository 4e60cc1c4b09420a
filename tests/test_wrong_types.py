"""What is no model, no name of a file, no tensor or no sensible number is refused by name, in
one sentence."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pc_transformer import ModelConfig, PCTransformer, save
from pc_transformer.attention import attend
from pc_transformer.cli import main
from pc_transformer.config import ConfigError, TrainConfig
from pc_transformer.data import evaluate
from pc_transformer.inference import generate
from pc_transformer.interop import from_huggingface, from_nanogpt, to_huggingface
from pc_transformer.learning import Backprop, PredictiveCoding
from pc_transformer.model import convert
from pc_transformer.settling import ErrorSettling, FreeEnergy, SettlingError
from pc_transformer.training import load

X: Any = torch.randint(7, (2, 6), generator=torch.Generator().manual_seed(0))
Q: Any = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
BAD: Any = None
LINEAR: Any = nn.Linear(2, 2)
NO: Any = "no"


def model() -> PCTransformer:
    return PCTransformer(ModelConfig(7, 6, 1, 2, 8))


WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "save a word": (lambda: save(model(), "never", tokenizer=NO), AttributeError, "to_dict"),
    # pyright: ignore[reportArgumentType]
    "save to a number": (lambda: save(model(), 5), TypeError, "PathLike"),
    "save to the root": (lambda: save(model(), "/"), OSError, "root"),
    "save nothing": (lambda: save(BAD, "never"), ValueError, "NoneType"),
    "load nothing": (lambda: load(BAD), TypeError, "PathLike"),
    "nanoGPT": (lambda: from_nanogpt(BAD), TypeError, "PathLike"),
    "from Hugging Face": (lambda: from_huggingface(BAD), TypeError, "PathLike"),
    "to Hugging Face": (lambda: to_huggingface(BAD, "never"), ValueError, "NoneType"),
    "learn nothing": (lambda: PredictiveCoding().backward(BAD, X, X), TypeError, "predictors"),
    "learn a map": (lambda: PredictiveCoding().backward(LINEAR, X, X), TypeError, "Linear"),
    "backprop": (lambda: Backprop().backward(BAD, X, X), TypeError, "model"),
    "no solver": (lambda: PredictiveCoding(BAD), TypeError, "solver"),
    "convert": (lambda: convert(BAD, "dot"), TypeError, "PCTransformer"),
    "evaluate": (lambda: evaluate(BAD, X.flatten(), 6), TypeError, "model"),
    "attention": (lambda: attend(Q, Q, Q, return_attention=NO), TypeError, "return_attention"),
    "lse": (lambda: attend(Q, Q, Q, return_lse=NO), TypeError, "return_lse"),
    "sparse": (lambda: attend(Q.to_sparse(), Q, Q), TypeError, "dense"),
    "penalty": (
        lambda: generate(model(), X, 2, repetition_penalty=1e-320),
        ValueError,
        "repetition_penalty",
    ),
    "decay": (lambda: TrainConfig(weight_decay=1e308), ConfigError, "weight_decay"),
    "precision": (
        lambda: ErrorSettling(FreeEnergy(1e-300))(model(), X, X),
        SettlingError,
        "relative_precision = 1e-300",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_refused_by_name(what: str) -> None:
    call, kind, says = WRONG[what]
    with pytest.raises(kind, match=says) as error:
        call()
    assert 20 < len(str(error.value)) < 300 and "\n" not in str(error.value)


@pytest.mark.parametrize("name", [".", "../own", "there"])
def test_the_working_folder_is_not_replaced(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    "A program whose folder was swapped away would go on in one that no longer exists."
    (tmp_path / "own").mkdir()
    monkeypatch.chdir(tmp_path / "own")
    with pytest.raises(OSError, match="working folder"):
        save(model(), name if name != "there" else tmp_path / "own")
    assert not list((tmp_path / "own").iterdir())
    assert load(save(model(), "inside")).config == model().config


@pytest.mark.parametrize("text", ["to be or not to be\n" * 200, "a: b: c\n" * 99, "[1, 2]"])
@pytest.mark.parametrize("joined", [True, False])
def test_a_text_is_no_configuration(
    text: str, joined: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (file := tmp_path / "t.txt").write_text(text)
    given = [f"--config={file}"] if joined else ["--config", str(file)]
    assert main(["train", str(tmp_path / "run"), *given]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and len(said) < 300 and "--config" in said
