"""Whatever `save` accepts, `load` gives back; whatever is damaged, foreign or no number is
refused in one sentence."""

import contextlib
import copy
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from common import ATTENTIONS, stir
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pc_transformer import ModelConfig, PCTransformer, load, save
from pc_transformer.config import ConfigError, TrainConfig, replace
from pc_transformer.data import CharTokenizer, Text, evaluate
from pc_transformer.learning import Backprop
from pc_transformer.learning.config import LearnerConfig
from pc_transformer.settling import SettlingError
from pc_transformer.training import (
    CheckpointError,
    Checkpoints,
    Trainer,
    checkpoints,
    digest,
    divergence,
    file_hash,
    load_tokenizer,
    read_run_config,
    resume,
    save_checkpoint,
    sole_run,
    step_of,
    train,
    write_run_config,
    write_text,
)
from pc_transformer.training.run import RunConfig

TINY = ModelConfig(7, 6, 1, 2, 8)
TOKENS = torch.randint(7, (2, 6), generator=torch.Generator().manual_seed(0))
IDS = torch.randint(7, (200,), generator=torch.Generator().manual_seed(1))
RUN = RunConfig(
    TINY,
    LearnerConfig(),
    TrainConfig(iters=6, batch_size=2, warmup_iters=2, eval_interval=2, checkpoint_interval=1),
)


def made(config: ModelConfig = TINY, seed: int = 0) -> PCTransformer:
    model = PCTransformer(config, seed).eval()
    stir(model, seed, 5.0)
    return model


def trainer(config: RunConfig = RUN, steps: int = 0) -> Trainer:
    new = Trainer(config, Text.of_ids(IDS, IDS[:50], config), torch.device("cpu"))
    for _ in range(steps):
        new.advance()
    return new


def one_sentence(error: pytest.ExceptionInfo[Any] | Exception) -> str:
    said = str(error.value if isinstance(error, pytest.ExceptionInfo) else error)
    assert 20 < len(said) < 1000 and "\n" not in said, said
    return said


def refused(
    call: Callable[..., Any], *args: Any, says: str = ".", kind: type[Exception] = CheckpointError
) -> str:
    with pytest.raises(kind, match=says) as error:
        call(*args)
    return one_sentence(error)


def same(a: PCTransformer, b: PCTransformer) -> None:
    """Equal weights in equal precision, tied alike; equal logits where this precision can
    compute them."""
    assert a.config == b.config and b.output.weight is b.predictors[0].token.weight
    for (name, p), (other, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert name == other and p.dtype == q.dtype and torch.equal(p, q), name
        assert p.requires_grad == q.requires_grad, name
        p.data = p.data.contiguous()  # a product of matrices rounds by their layout
    if len({p.dtype for p in a.parameters()}) == 1:
        with torch.no_grad():
            try:
                want = a.eval()(TOKENS)
            except RuntimeError:  # a precision that this family does not compute in, here as there
                return
            assert torch.equal(want, b.eval()(TOKENS))


# ---- what is saved comes back

ChangeModel = Callable[[PCTransformer], Any]


def shared(model: PCTransformer) -> None:
    "All matrices of a layer in one piece of memory."
    layer = model.predictors[2]
    whole = torch.cat([layer.up.weight.detach().flatten(), layer.down.weight.detach().flatten()])
    n = layer.up.weight.numel()
    layer.up.weight.data, layer.down.weight.data = (
        whole[:n].view_as(layer.up.weight),
        whole[n:].view_as(layer.down.weight),
    )


def same_memory(model: PCTransformer) -> None:
    "Two parameters in the very same memory."
    model.predictors[1].norm.weight.data = model.predictors[2].norm.weight.data


def narrow_norms(model: PCTransformer) -> None:
    model.output.norm.to(torch.float64)


def turned(model: PCTransformer) -> None:
    p = model.predictors[2].up.weight
    p.data = p.data.mT.contiguous().mT


ACCEPTED: dict[str, ChangeModel] = {
    "as it is": lambda m: None,
    "float64": lambda m: m.double(),
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "float16": lambda m: m.half(),
    "two precisions": narrow_norms,
    "frozen": lambda m: m.requires_grad_(False),
    "not contiguous": turned,
    "memory in one piece": shared,
    "memory used twice": same_memory,
    "loaded with assign and tied again": lambda m: (
        m.load_state_dict(m.state_dict(), assign=True),
        setattr(m.output, "weight", m.predictors[0].token.weight),
    ),
    "partly frozen": lambda m: m.predictors[1].requires_grad_(False),
    "with a gradient": lambda m: m(TOKENS).sum().backward(),
}


class Other(PCTransformer):
    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * 2


class Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


def set_to(name: str, value: Any) -> ChangeModel:
    def change(model: PCTransformer) -> None:
        *path, last = name.split(".")
        part = model
        for step in path:
            part = getattr(part, step)
        setattr(part, last, value)

    return change


REFUSED: dict[str, tuple[ChangeModel, str]] = {
    "with a hook": (
        lambda m: m.register_forward_hook(lambda m, x, y: 2 * y),
        "forward is changed by a hook",
    ),
    "a layer with a hook": (
        lambda m: m.predictors[2].up.register_forward_pre_hook(lambda m, x: (2 * x[0],)),
        r"predictors\.2\.up\.forward",
    ),
    "another forward": (set_to("forward", lambda tokens: tokens), "forward is"),
    "a layer's other forward": (
        set_to("predictors.1.forward", lambda s: s),
        r"predictors\.1\.forward",
    ),
    "another method": (set_to("predictors.1.attention.split", lambda x: x), r"attention\.split"),
    "loaded with assign": (
        lambda m: m.load_state_dict(m.state_dict(), assign=True),
        "embedding's table",
    ),
    "an output of its own": (
        set_to("output.weight", nn.Parameter(torch.ones(7, 8))),
        "embedding's table",
    ),
    "another class": (lambda m: setattr(m, "__class__", Other), "Other"),
    "a layer replaced": (lambda m: m.predictors.__setitem__(1, nn.Identity()), r"predictors\.1"),
    "a layer more": (lambda m: m.predictors.append(nn.Identity()), r"predictors\.3"),
    "a layer less": (lambda m: m.predictors.__delitem__(2), r"predictors\.2"),
    "a module more": (lambda m: m.add_module("head", nn.Linear(8, 2)), "head"),
    "a parameter more": (
        lambda m: m.register_parameter("extra", nn.Parameter(torch.ones(2))),
        "extra",
    ),
    "a buffer more": (lambda m: m.register_buffer("seen", torch.ones(2)), "seen"),
    "a parameter less": (set_to("predictors.1.norm.weight", None), r"predictors\.1\.norm"),
    "a parametrization": (
        lambda m: parametrize.register_parametrization(m.predictors[2].up, "weight", Halved()),
        r"predictors\.2\.up",
    ),
    "another shape": (
        set_to("predictors.2.up.weight", nn.Parameter(torch.ones(3, 8))),
        r"predictors\.2\.up\.weight",
    ),
    "one parameter twice": (
        lambda m: set_to("predictors.1.norm.weight", m.predictors[2].norm.weight)(m),
        "norm",
    ),
    "another configuration": (
        set_to("config", replace(TINY, n_head=1)),
        r"predictors\.1\.attention\.d ",
    ),
    "no configuration": (set_to("config", None), "PCTransformer"),
    "another window": (set_to("predictors.1.attention.window", 2), "window"),
    "another activation": (set_to("predictors.2.approximate", "tanh"), "approximate"),
    "no values": (lambda m: m.to("meta"), "embedding's table"),
    "one without values": (
        set_to("predictors.1.norm.weight", nn.Parameter(torch.ones(8, device="meta"))),
        "no values",
    ),
    "complex": (lambda m: m.to(torch.complex64), "complex64"),
    "float8": (
        set_to("predictors.1.norm.weight", nn.Parameter(torch.ones(8).to(torch.float8_e5m2))),
        "float8",
    ),
}


@pytest.mark.parametrize("family", ATTENTIONS)
@pytest.mark.parametrize("what", ACCEPTED)
def test_what_save_accepts_load_gives_back(what: str, family: Any, tmp_path: Path) -> None:
    model = made(replace(TINY, attention=family), seed=3)
    ACCEPTED[what](model)
    same(model, load(save(model, tmp_path / "model")))


@pytest.mark.parametrize("what", REFUSED)
def test_what_load_could_not_give_back_is_refused(what: str, tmp_path: Path) -> None:
    change, says = REFUSED[what]
    model = made()
    change(model)
    refused(save, model, tmp_path / "deep" / "model", says=says, kind=ValueError)
    assert not list(tmp_path.iterdir()), "nothing may be written"
    good = made(seed=1)
    save(good, tmp_path / "model")
    refused(save, model, tmp_path / "model", says=says, kind=ValueError)
    same(good, load(tmp_path / "model"))


@settings(max_examples=60)
@given(data=st.data())
def test_any_model_with_any_changes(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    "Saved and the same again, or refused and nothing written: there is no third."
    family = data.draw(st.sampled_from(ATTENTIONS))
    extras = st.fixed_dictionaries(
        {
            "bias": st.booleans(),
            "background": st.booleans(),
            "coordinates": st.sampled_from(
                ("together",) if family == "dot" else ("together", "independent")
            ),
            "qk_norm": st.booleans(),
            "window": st.sampled_from((None, 3)),
            "n_kv_head": st.sampled_from((None, 1)),
            "dropout": st.sampled_from((0.0, 0.2)),
            "gelu": st.sampled_from(("exact", "tanh")),
            "precision": st.sampled_from(
                ("head",) if family == "dot" else ("head", "key", "diagonal")
            ),
            "mixing": st.sampled_from(
                ("equal", "key") if family == "dot" else ("equal", "norm", "key")
            ),
            "precision_init": st.sampled_from((None, 0.7)),
        }
    )
    model = made(
        replace(TINY, attention=family, **data.draw(extras)), seed=data.draw(st.integers(0, 9))
    )
    for change in data.draw(
        st.lists(
            st.sampled_from([*ACCEPTED.values(), *(c for c, _ in REFUSED.values())]), max_size=2
        )
    ):
        try:
            change(model)
        except Exception:  # some changes do not go together
            return
    folder = tmp_path_factory.mktemp("any")
    try:
        save(model, folder / "model")
    except (ValueError, FloatingPointError) as error:
        one_sentence(error)
        assert not list(folder.iterdir())
        return
    same(model, load(folder / "model"))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers(bad: float, tmp_path: Path) -> None:
    "Neither saved nor loaded nor given a loss; the sentence names them."
    model = made()
    folder = save(model, tmp_path / "model")
    with torch.no_grad():
        model.predictors[1].attention.out.weight[0, 1] = bad
    name = r"predictors\.1\.attention\.out\.weight"
    refused(save, model, tmp_path / "other", says=name, kind=FloatingPointError)
    refused(evaluate, model, IDS, 6, says=name, kind=FloatingPointError)
    tensors = load_file(folder / "model.safetensors")
    tensors["predictors.1.attention.out.weight"][0, 1] = bad
    save_file(tensors, folder / "model.safetensors")
    reseal(folder / "config.json")
    refused(load, folder, says=name + ".*finite")


def test_a_loss_that_overflows_is_no_result() -> None:
    model = made()
    with torch.no_grad():
        model.predictors[0].token.weight.fill_(3e38)
    refused(evaluate, model, IDS, 6, says="so large", kind=FloatingPointError)


def test_tokenizers_that_would_come_back_as_others(tmp_path: Path) -> None:
    class Lower(CharTokenizer):
        def to_dict(self) -> dict[str, str]:
            return {"type": "char", "vocabulary": self.vocabulary[:-1], "lower": "yes"}

    refused(save, made(), tmp_path / "model", Lower("abcdefg"), says="tokenizer", kind=ValueError)
    assert not list(tmp_path.iterdir())
    for vocabulary in ("abcdef\ud800", "\x00\n ab\u2028\U0001f642"):
        assert load_tokenizer(
            save(made(), tmp_path / "model", CharTokenizer(vocabulary))
        ) == CharTokenizer(vocabulary)


# ---- folders


def test_nothing_of_the_process_is_changed_and_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files get the mode that the process's mask leaves, and nobody sets that mask, not even for
    a moment."""
    before = os.umask(0o027)
    try:
        monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the mask was set"))
        save(made(), tmp_path / "a" / "model")
        write_text(tmp_path / "b" / "text", "words")
        modes = {
            p.name: p.stat().st_mode & 0o777
            for p in (tmp_path / "a" / "model", tmp_path / "b" / "text")
        }
    finally:
        monkeypatch.undo()
        os.umask(before)
    assert modes == {"model": 0o750, "text": 0o640}


def test_threads_write_side_by_side(tmp_path: Path) -> None:
    "Work in progress of one process is not that of another thread."
    models = [made(seed=s) for s in range(4)]

    def write(model: PCTransformer) -> None:
        for _ in range(5):
            save(model, tmp_path / "model")
            write_text(tmp_path / "text", str(len(model.predictors)) * 1000)

    threads = [threading.Thread(target=write, args=(m,)) for m in models]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "text"]
    assert any(torch.equal(load(tmp_path / "model")(TOKENS), m(TOKENS)) for m in models)


def test_what_is_not_ours_is_not_replaced(tmp_path: Path) -> None:
    "A folder with other files in it, and a file where a folder is meant."
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years")
    assert "thesis.txt" in refused(save, made(), tmp_path / "home", kind=OSError)
    refused(save, made(), tmp_path / "home" / "thesis.txt", says="is a file", kind=OSError)
    assert [p.name for p in (tmp_path / "home").iterdir()] == ["thesis.txt"]
    assert (tmp_path / "home" / "thesis.txt").read_text() == "years" and len(
        list(tmp_path.iterdir())
    ) == 1


def test_a_link_to_a_folder_stays_one(tmp_path: Path) -> None:
    save(made(), tmp_path / "model")
    (tmp_path / "latest").symlink_to("model")
    save(made(seed=1), tmp_path / "latest")
    assert (tmp_path / "latest").is_symlink() and sorted(p.name for p in tmp_path.iterdir()) == [
        "latest",
        "model",
    ]
    same(made(seed=1), load(tmp_path / "model"))


def test_a_text_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "text", "a" * 5000 + "\ud800")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_where_a_folder_is_meant_and_the_reverse(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    refused(load, tmp_path / "file", says="is a file")
    for call in (load, load_tokenizer):
        refused(call, tmp_path / "file" / "below")
    refused(read_run_config, tmp_path / "file")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        refused(train, trainer(), Checkpoints(place), says="cannot be the folder of a run")
    folder = save(made(), tmp_path / "model")
    (folder / name).unlink()
    (folder / name).mkdir()
    refused(load, folder, says=name)
    run = tmp_path / "run"
    write_run_config(RUN, run)
    (run / "config.yaml").unlink()
    (run / "config.yaml").mkdir()
    refused(read_run_config, run, says=r"config\.yaml")


# ---- damage


def reseal(path: Path, **changes: Any) -> None:
    "Change JSON and give it and its files the hashes that they would have had: what a forger does."
    about = json.loads(path.read_text()) | changes
    about["files"] = {name: file_hash(path.with_name(name)) for name in about["files"]}
    path.write_text(json.dumps(about | {"sha256": digest(about)}))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A run that stopped after four of six steps."
    run = tmp_path_factory.mktemp("whole") / "run"
    first = trainer(steps=3)
    first.measure()
    save_checkpoint(first, run, CharTokenizer("abcdefg"))
    first.advance()
    save_checkpoint(first, run, CharTokenizer("abcdefg"))
    return run


def take_all(run: Path) -> None:
    "Everything that reads a checkpoint."
    load(run)
    load_tokenizer(run)
    resume(trainer(), run, CharTokenizer("abcdefg"))


def outcome(run: Path) -> str:
    """`read`, or the one sentence of a CheckpointError or ConfigError; anything else is a
    failure of the test."""
    try:
        take_all(run)
    except (CheckpointError, ConfigError) as error:
        return one_sentence(error)
    return "read"


FILES = ["config.json", "model.safetensors", "optimizer.safetensors", "training.json"]


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_found(name: str, whole: Path, tmp_path: Path) -> None:
    "A hundred and fifty bits of each file, alone; an edit of white space is all that may pass."
    file = shutil.copytree(whole, tmp_path / "run") / "step-000004" / name
    intact, draw = file.read_bytes(), random.Random(name)
    for _ in range(150):
        place = draw.randrange(8 * len(intact))
        data = bytearray(intact)
        data[place // 8] ^= 1 << place % 8
        file.write_bytes(data)
        if outcome(tmp_path / "run") == "read":
            assert name.endswith("json") and json.loads(data) == json.loads(intact), (
                f"bit {place} of {name}"
            )
    file.write_bytes(intact)
    take_all(tmp_path / "run")


@pytest.mark.parametrize("name", FILES)
def test_every_truncation_is_found(name: str, whole: Path, tmp_path: Path) -> None:
    file = shutil.copytree(whole, tmp_path / "run") / "step-000004" / name
    intact = file.read_bytes()
    for length in {*range(0, len(intact), len(intact) // 40 + 1), 1, 7, 8, 9, len(intact) - 2}:
        file.write_bytes(intact[:length])
        assert outcome(tmp_path / "run") != "read", length
    for more in (b" ", b"\x00", b"{}", intact):
        file.write_bytes(intact + more)
        assert outcome(tmp_path / "run") != "read" or (name.endswith("json") and more == b" ")


VALUES = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2**70,
    10**310,
    1.5,
    -0.5,
    1e308,
    "",
    "x",
    "1",
    [],
    [1],
    [[]],
    {},
    {"a": 1},
)


def places(about: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    "Where something stands in JSON."
    yield path
    inside = (
        about.items()
        if isinstance(about, dict)
        else enumerate(about)
        if isinstance(about, list)
        else ()
    )
    for key, value in list(inside)[:6] if isinstance(about, list) else list(inside):
        yield from places(value, (*path, key))


def put(about: Any, path: tuple[Any, ...], value: Any) -> Any:
    "JSON with another value in one place."
    if not path:
        return value
    new = copy.copy(about)
    new[path[0]] = put(about[path[0]], path[1:], value)
    return new


@pytest.mark.parametrize("name", ["config.json", "training.json"])
def test_every_edited_value_is_found(name: str, whole: Path, tmp_path: Path) -> None:
    "Each value replaced by another kind of value: one sentence."
    file = shutil.copytree(whole, tmp_path / "run") / "step-000004" / name
    about, draw = json.loads(file.read_text()), random.Random(name)
    for path in places(about):
        for value in draw.sample(VALUES, 2):
            new = put(about, path, value)
            file.write_text(json.dumps(new))
            if outcome(tmp_path / "run") == "read":
                assert json.dumps(new, sort_keys=True) == json.dumps(about, sort_keys=True), (
                    path,
                    value,
                )


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"data": 3}, "other data"), ({"run": {"model": 3}}, "another configuration")],
)
def test_a_checkpoint_of_another_run(
    changes: dict[str, Any], says: str, whole: Path, tmp_path: Path
) -> None:
    file = shutil.copytree(whole, tmp_path / "run") / "step-000004" / "training.json"
    reseal(file, **changes)
    fresh = trainer()
    before = [p.clone() for p in fresh.model.parameters()]
    refused(resume, fresh, tmp_path / "run", says=says)
    assert (
        fresh.step == 0
        and all(map(torch.equal, before, fresh.model.parameters()))
        and not fresh.optimizer.state
    )


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"config":' * 5000 + "1" + "}" * 5000,
        "9" * 5000,
        '{"a": ' + "9" * 5000 + "}",
    ],
)
@pytest.mark.parametrize("name", ["config.json", "training.json"])
def test_deep_and_endless_json(name: str, text: str, whole: Path, tmp_path: Path) -> None:
    file = shutil.copytree(whole, tmp_path / "run") / "step-000004" / name
    file.write_text(text)
    assert name in outcome(tmp_path / "run")


@pytest.mark.parametrize("depth", [50, 300, 600, 900, 980])
@pytest.mark.parametrize(
    "place",
    [
        ("config.json", "tokenizer"),
        ("config.json", "config"),
        ("training.json", "record"),
        ("training.json", "run"),
        ("training.json", "extra"),
    ],
)
def test_json_that_is_deep_in_one_place(
    place: tuple[str, str], depth: int, whole: Path, tmp_path: Path
) -> None:
    "Deep enough to be read and too deep to be looked at."
    file = shutil.copytree(whole, tmp_path / "run") / "step-000004" / place[0]
    about = json.loads(file.read_text())
    about[place[1]] = "HERE"
    file.write_text(json.dumps(about).replace('"HERE"', "[" * depth + "]" * depth))
    assert outcome(tmp_path / "run") != "read"


@pytest.mark.parametrize("size", ["vocab_size", "block_size", "n_layer", "d_model", "n_component"])
def test_a_configuration_that_asks_for_the_moon(
    size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    "Compared with the file before anything is made: no memory, no time."

    def built(*args: Any) -> PCTransformer:
        assert torch.empty(0).is_meta, "a model was built before it was compared"
        return PCTransformer(*args)

    folder = save(made(replace(TINY, attention="mixture")), tmp_path / "model")
    saved = json.loads((folder / "config.json").read_text())["config"]
    for huge in (10**9, 10**12, 2**63, 10**30):
        reseal(folder / "config.json", config=saved | {size: huge})
        began = time.process_time()
        refused(load, folder, says="too few|must be below 2")
        assert time.process_time() - began < 5
    monkeypatch.setattr(
        import_module("pc_transformer.training.checkpoints"), "PCTransformer", built
    )
    for other in (3, 5, 11):
        reseal(
            folder / "config.json", config=saved | {size: other * (2 if size == "d_model" else 1)}
        )
        refused(load, folder, says="has shape|lacks|too few")


def test_files_of_two_models_are_not_mixed(tmp_path: Path) -> None:
    """The same names and shapes, other weights; and a configuration that the tensors cannot
    contradict."""
    one, two = (
        save(made(replace(TINY, attention="dot"), seed=s), tmp_path / f"{s}") for s in (1, 2)
    )
    shutil.copy(two / "model.safetensors", one)
    refused(load, one, says="SHA-256")
    about = json.loads((two / "config.json").read_text())
    for change in (
        {"n_head": 4},
        {"window": 3},
        {"gelu": "tanh"},
        {"dropout": 0.5},
        {"qk_norm": True},
    ):
        (two / "config.json").write_text(json.dumps(about | {"config": about["config"] | change}))
        refused(load, two, says="SHA-256")


# ---- runs


def test_before_the_first_step(tmp_path: Path) -> None:
    "A run without moments can be saved and resumed as well."
    save_checkpoint(trainer(), tmp_path)
    again, other = trainer(), trainer(steps=2)
    resume(again, tmp_path)
    again.advance(), again.advance()
    assert again.losses == other.losses


def test_a_run_in_another_precision_goes_on_in_it(tmp_path: Path) -> None:
    first = trainer()
    first.model.double()
    first.advance(), first.advance()
    save_checkpoint(first, tmp_path)
    again = trainer()
    resume(again, tmp_path)
    again.advance(), first.advance()
    assert again.losses == first.losses and next(again.model.parameters()).dtype == torch.float64


def freeze(t: Trainer) -> None:
    t.model.predictors[1].norm.weight.requires_grad_(False)


def plain_descent(t: Trainer) -> None:
    t.optimizer = torch.optim.SGD([{"params": list(t.model.parameters()), "scale": 1.0}], 0.1)


@pytest.mark.parametrize("change", [freeze, plain_descent])
def test_a_run_that_could_not_be_resumed_is_not_saved(
    change: Callable[[Trainer], None], tmp_path: Path
) -> None:
    run = trainer()
    change(run)
    run.learner = Backprop()
    run.config = replace(run.config, **{"learner.algorithm": "backprop"})
    run.advance()
    refused(save_checkpoint, run, tmp_path / "run", says="optimiser", kind=ValueError)
    assert not (tmp_path / "run").exists()


def test_moments_that_are_no_numbers(whole: Path, tmp_path: Path) -> None:
    run = trainer(steps=2)
    p = run.model.predictors[1].norm.weight
    run.optimizer.state[p]["exp_avg_sq"][0] = math.inf
    refused(
        save_checkpoint,
        run,
        tmp_path / "new",
        says=r"exp_avg_sq:predictors\.1\.norm",
        kind=FloatingPointError,
    )
    assert not (tmp_path / "new").exists()
    place = shutil.copytree(whole, tmp_path / "run") / "step-000004"
    moments = load_file(place / "optimizer.safetensors")
    moments["exp_avg:output.norm.weight"][0] = math.nan
    save_file(moments, place / "optimizer.safetensors")
    reseal(place / "training.json")
    refused(resume, trainer(), tmp_path / "run", says=r"exp_avg:output\.norm\.weight.*finite")


WILD = {
    "train.learning_rate": 300.0,
    "train.warmup_iters": 600,
    "train.iters": 900,
    "train.eval_interval": 900,
}


@pytest.mark.parametrize("algorithm", ["backprop", "predictive_coding"])
def test_a_diverged_run_keeps_its_last_good_state(algorithm: str, tmp_path: Path) -> None:
    """The checkpoints that stay are finite, one of them from before the loss exploded; the cause
    is named, not the symptom."""
    run = trainer(replace(RUN, **WILD, **{"learner.algorithm": algorithm}))
    said = refused(
        train,
        run,
        Checkpoints(tmp_path / "run"),
        says="diverged by step .* lower the learning rate",
        kind=FloatingPointError,
    )
    assert "precision" not in said and "step-" in said
    kept = checkpoints(tmp_path / "run")
    assert 2 <= len(kept) <= 3 and all(
        p.isfinite().all() for f in kept for p in load(f).parameters()
    )
    finite = []
    for place in kept:
        with contextlib.suppress(FloatingPointError):  # weights so large that logits overflow
            finite.append((evaluate(load(place), IDS, 6), place.name))
    loss, good = min(finite)
    assert loss < 3 * math.log(7) and max(run.losses) > 100 and good in said
    assert not list((tmp_path / "run").glob(".*-*"))


def test_weights_that_overflow_are_not_saved(tmp_path: Path) -> None:
    """The update itself overflows: the checkpoint of the step before stays, the sentence names
    the weights and the rate."""

    def overflow(t: Trainer) -> None:
        if t.step == 3:
            with torch.no_grad():
                t.model.predictors[2].up.weight.fill_(math.inf)

    said = refused(
        lambda: train(
            trainer(replace(RUN, **{"train.eval_interval": 100})),
            overflow,
            Checkpoints(tmp_path / "run"),
        ),
        says=r"predictors\.2\.up\.weight.*lower the learning rate",
        kind=FloatingPointError,
    )
    assert "by step 3" in said and [p.name for p in checkpoints(tmp_path / "run")] == [
        "step-000001",
        "step-000002",
    ]


def test_settling_that_fails_without_divergence_keeps_its_own_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = trainer(steps=1)

    def fail(*args: Any) -> float:
        raise SettlingError("raise relative_precision above 10")

    monkeypatch.setattr(run, "learn", fail)
    refused(run.advance, says="raise relative_precision", kind=SettlingError)
    with torch.no_grad():
        for n, p in run.model.named_parameters():
            p.mul_(1 if "precision" in n else 100)  # an overflowing precision has words of its own
    refused(run.advance, says="diverged by step 1", kind=FloatingPointError)


@pytest.mark.parametrize(
    "losses",
    [[1.0, 2, 3, 9, 4, 3.5, 9], [3.0, 2, 1.2, 1.3, 1.6, 1.9, 2.5], [4.0, 3, 2, 1.5, 1, 0.9, 0.5]],
)
def test_the_best_checkpoint_stays_however_slowly_a_run_diverges(
    losses: list[float], tmp_path: Path
) -> None:
    "Training loss k is that of the weights after k steps."
    run = trainer()
    for step in range(1, 8):
        run.advance()
        run.losses[-1] = losses[step - 1]
        save_checkpoint(run, tmp_path)
    best = min(range(1, 7), key=lambda k: losses[k])
    assert {step_of(p) for p in checkpoints(tmp_path)} == {best, 6, 7}


def test_a_model_without_a_loss_is_not_saved(tmp_path: Path) -> None:
    run = trainer(steps=1)
    with torch.no_grad():
        run.model.predictors[1].attention.log_precision.fill_(1e4)
    refused(
        save_checkpoint,
        run,
        tmp_path / "run",
        says="diverged by step 1, .*lower",
        kind=FloatingPointError,
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("algorithm", ["backprop", "predictive_coding"])
def test_a_wrong_batch_is_no_divergence(
    algorithm: str, accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unknown tokens, nothing to predict, targets out of range: their own sentence, also where
    weights are large but finite."""
    for large in (False, True):
        run = trainer(
            replace(RUN, **{"learner.algorithm": algorithm, "train.accumulate": accumulate}),
            steps=1,
        )
        tokens, targets = run.batch(1)
        if large:
            with torch.no_grad():
                run.model.predictors[0].token.weight.mul_(1000)
        for wrong, says in (
            ((torch.full_like(tokens, 50), targets), "50"),
            ((tokens, torch.full_like(targets, 50)), "50"),
            ((tokens, torch.full_like(targets, -100)), "predicts nothing"),
        ):
            monkeypatch.setattr(run, "batch", lambda _, both=wrong: both)
            said = refused(run.advance, says=says, kind=ValueError)
            assert "diverged" not in said and "learning rate" not in said


def test_large_weights_alone_are_no_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the plain loss is no worse than guessing, whatever failed keeps its own words; where
    it is, divergence is named."""
    run = trainer(steps=1)

    def fail(*args: Any) -> float:
        raise SettlingError("raise relative_precision above 10")

    monkeypatch.setattr(run, "learn", fail)
    with torch.no_grad():
        for f in run.model.predictors[
            1:
        ]:  # in front of a norm, and back: the output is what it was
            for p in f.parameters():
                p.mul_(3 if p.dim() >= 2 else 1)
        run.model.predictors[0].position.weight.fill_(5.0)
    assert divergence(run.model, run.batch(run.step)) is None
    refused(run.advance, says="raise relative_precision", kind=SettlingError)


def test_the_last_two_checkpoints_stay(tmp_path: Path) -> None:
    train(trainer(), Checkpoints(tmp_path))
    assert [p.name for p in checkpoints(tmp_path)] == ["step-000005", "step-000006"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".lock",
        "config.yaml",
        "step-000005",
        "step-000006",
    ]


def test_a_damaged_newest_checkpoint_costs_one_interval(tmp_path: Path) -> None:
    train(whole := trainer(), Checkpoints(tmp_path))
    (tmp_path / "step-000006" / "optimizer.safetensors").unlink()
    refused(resume, trainer(), tmp_path, says="step-000006")
    shutil.rmtree(tmp_path / "step-000006")
    again = trainer()
    resume(again, tmp_path)
    train(again, Checkpoints(tmp_path))
    assert again.losses == whole.losses


def renew(run: Path, until: Any) -> None:
    "A run that writes a checkpoint as fast as it can."
    t = trainer(replace(RUN, **{"train.iters": 10**6}))
    while not until.is_set():
        t.advance()
        save_checkpoint(t, run, CharTokenizer("abcdefg"))


def test_reading_while_the_run_goes_on(tmp_path: Path) -> None:
    """The newest checkpoint is replaced under the reader's hands, again and again: each read is
    whole."""
    context = multiprocessing.get_context("fork")
    until = context.Event()
    writer = context.Process(target=renew, args=(tmp_path / "run", until))
    writer.start()
    try:
        limit = time.monotonic() + 30
        while not checkpoints(tmp_path / "run") and time.monotonic() < limit:
            time.sleep(0.01)
        for _ in range(60):
            assert all(p.isfinite().all() for p in load(tmp_path / "run").parameters())
            assert load_tokenizer(tmp_path / "run").vocab_size == 7
    finally:
        until.set()
        writer.join(30)
        writer.kill()


def test_reading_a_model_that_is_saved_again(tmp_path: Path) -> None:
    "Half of the old model and half of the new one is no model: the reader gets one of them."
    models = [made(seed=s) for s in (1, 2)]
    save(models[0], tmp_path / "model")
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for m in models:
                save(m, tmp_path / "model")

    thread = threading.Thread(target=write)
    thread.start()
    try:
        found = [load(tmp_path / "model")(TOKENS) for _ in range(30)]
    finally:
        stop.set()
        thread.join()
    assert all(any(torch.equal(f, m(TOKENS)) for m in models) for f in found)


# ---- one run in a folder

HOLDER = """
import sys, time
from pathlib import Path
from pc_transformer.training import sole_run
with sole_run(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(120)
"""


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    """The second is refused with the first's number and changes nothing; a killed first one
    leaves the folder free."""
    run = tmp_path / "run"
    write_run_config(RUN, run)
    before = (run / "config.yaml").read_text()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        other = replace(RUN, **{"train.seed": 5})
        for call in (
            lambda: train(trainer(other), Checkpoints(run)),
            lambda: write_run_config(other, run),
        ):
            assert f"process {holder.pid} " in refused(call, says=str(run))
        assert (run / "config.yaml").read_text() == before and not checkpoints(run)
        train(trainer(other), Checkpoints(tmp_path / "elsewhere"))
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    train(trainer(), Checkpoints(run))
    assert [p.name for p in checkpoints(run)] == ["step-000005", "step-000006"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_the_folder_is_given_back_however_training_ends(
    error: type[BaseException], tmp_path: Path
) -> None:
    def fail(t: Trainer) -> None:
        raise error

    with pytest.raises(error):
        train(trainer(), fail, Checkpoints(tmp_path / "run"))
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [".lock", "config.yaml"]
    train(trainer(), Checkpoints(tmp_path / "run"))


def test_many_ask_for_one_folder(tmp_path: Path) -> None:
    "Threads that take and give back: never two at a time, and never an error but the one sentence."
    inside, most, wrong = [0], [0], []

    def use() -> None:
        for _ in range(40):
            try:
                with sole_run(tmp_path / "run"):
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    time.sleep(0.001)
                    inside[0] -= 1
            except CheckpointError:
                time.sleep(0.0005)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert most == [1] and not wrong


def test_a_run_does_not_go_on_with_anothers_checkpoints(tmp_path: Path) -> None:
    "A fresh run, or one resumed before the other went on, into a folder that holds later steps."
    train(trainer(), Checkpoints(tmp_path))
    kept = {p: p.stat().st_ino for p in checkpoints(tmp_path)}
    other = replace(RUN, **{"train.seed": 5})
    for fresh in (trainer(other), trainer(steps=3)):
        refused(train, fresh, Checkpoints(tmp_path), says="step-000006.*did not write")
    assert (
        kept == {p: p.stat().st_ino for p in checkpoints(tmp_path)}
        and read_run_config(tmp_path) == RUN
    )


def test_what_train_writes_can_be_resumed_from_its_folder_alone(tmp_path: Path) -> None:
    "Also when it was called from Python, and when the folder vanished while it ran."

    def vanish(t: Trainer) -> None:
        if t.step == 2:
            shutil.rmtree(tmp_path / "run")

    train(trainer(), Checkpoints(tmp_path / "run"), vanish)
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["step-000005", "step-000006"]
    assert read_run_config(tmp_path / "run") == RUN
