"""The locality contract: a layer's update is the same when a fresh process computes it from
saved tensors."""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import stir
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pc_transformer import ModelConfig, PCTransformer
from pc_transformer.config import to_dict
from pc_transformer.energies import Laplace, StudentT
from pc_transformer.learning import PredictiveCoding, Solver, accumulate
from pc_transformer.settling import ErrorSettling, FreeEnergy, Settled, StateSettling

FAMILIES: dict[str, dict[str, Any]] = {
    "dot": {"attention": "dot"},
    "gaussian": {"attention": "gaussian"},
    "dot, learned scale": {"attention": "dot", "precision_init": 0.7},
    "student_t, per key": {"attention": "student_t", "precision": "key", "tail": 3.0},
    "laplace, diagonal, background": {
        "attention": "laplace",
        "precision": "diagonal",
        "background": True,
    },
    "mixture, mixing by key, shared keys": {
        "attention": "mixture",
        "mixing": "key",
        "n_kv_head": 1,
    },
}
SIZES = {"vocab_size": 9, "block_size": 6, "n_layer": 2, "n_head": 2, "d_model": 8}

# One process for all files: each is one layer, built alone from its class and read with nothing
# else in reach
FRESH = """
import sys
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from pc_transformer.config import ModelConfig
from pc_transformer.model import AttentionLayer, Embedding, FeedForwardLayer
from pc_transformer.energies import Gaussian, Laplace, StudentT
from pc_transformer.learning import local_gradient
assert "pc_transformer.experiments" not in sys.modules
for path in sys.argv[1:]:
    with safe_open(path, "pt") as file:
        about = file.metadata()
    saved = load_file(path)
    layer = eval(about["layer"]).double()
    layer.load_state_dict({n[2:]: t for n, t in saved.items() if n.startswith("W.")}, strict=True)
    sent = ("below", "error", "precision")
    assert set(saved) == {"W." + n for n in layer.state_dict()} | {*sent, "count"}
    seen = (saved[name] for name in sent)
    got = local_gradient(layer, *seen, int(saved["count"]), eval(about["family"]))
    save_file({n: g.contiguous() for n, g in got.items()}, path + ".gradient")
"""


def build(family: str, seed: int = 1) -> PCTransformer:
    "A random model in float64 in which every part matters."
    model = PCTransformer(ModelConfig(**SIZES, **FAMILIES[family]), seed).double()
    stir(model, seed, 5.0)
    return model


def batch() -> tuple[Tensor, Tensor]:
    tokens, targets = torch.randint(
        9, (2, 2, 6), generator=torch.Generator().manual_seed(0)
    ).unbind()
    targets[1, 2] = -100
    return tokens, targets


def constructor(model: PCTransformer, l: int) -> str:
    "The Python expression that builds layer l alone."
    c = model.config
    if l == 0:
        return f"Embedding({c.vocab_size}, {c.block_size}, {c.d_model})"
    if l % 2:
        return f"AttentionLayer(ModelConfig(**{to_dict(c)!r}))"
    return f"FeedForwardLayer({c.d_model})"


def write_layers(
    model: PCTransformer, settled: Settled, tokens: Tensor, folder: Path
) -> list[Path]:
    "One file a layer: its own weights, s_{l-1}, eps_l, Pi_l and the count."
    below = [tokens, *settled.states[:-1]]
    files = []
    for l, f in enumerate(model.predictors):
        what = {f"W.{n}": t.detach().clone() for n, t in f.state_dict().items()}
        what |= {
            "below": below[l],
            "error": settled.errors[l],
            "precision": settled.batch_energy.precision[l],
        }
        what["count"] = torch.tensor(settled.count)
        files.append(folder / f"layer-{l}.safetensors")
        about = {"layer": constructor(model, l), "family": repr(settled.batch_energy.energy.family)}
        save_file({n: t.contiguous() for n, t in what.items()}, files[-1], about)
    return files


def in_a_fresh_process(files: list[Path]) -> list[dict[str, Tensor]]:
    "What `local_gradient` says of each file, computed elsewhere."
    done = subprocess.run(
        [sys.executable, "-c", FRESH, *map(str, files)],
        capture_output=True,
        text=True,
        cwd=files[0].parent,
    )
    assert done.returncode == 0, done.stderr
    return [load_file(f"{file}.gradient") for file in files]


def output_share(model: PCTransformer, settled: Settled, targets: Tensor) -> Tensor:
    """The part of the token table's gradient that belongs to the output: it reads s_N and the
    targets."""
    loss = F.cross_entropy(model.output(settled.states[-1]).flatten(0, 1), targets.flatten())
    return torch.autograd.grad(loss, model.output.weight)[0]


SOLVERS: dict[str, Solver] = {
    "one step": ErrorSettling(),
    "soft": ErrorSettling(FreeEnergy(20.0), steps=3, step_size=0.5),
    "lean": ErrorSettling(FreeEnergy(20.0), steps=2, step_size=0.5, lean=True),
    "student_t nodes, per coordinate": ErrorSettling(
        FreeEnergy(20.0, per="coordinate", family=StudentT(nu=4.0)), steps=2, step_size=0.5
    ),
    "laplace nodes, per token": ErrorSettling(
        FreeEnergy(20.0, per="token", family=Laplace(eps=1.0)), steps=2, step_size=0.5
    ),
    "parallel states": StateSettling(FreeEnergy(100.0), steps=6),
}


@lru_cache
def elsewhere(family: str) -> dict[Solver, list[dict[str, Tensor]]]:
    "For each solver, layer by layer: the gradients as one fresh process computes them."
    model, (tokens, targets) = build(family), batch()
    with tempfile.TemporaryDirectory() as place:
        files: dict[Solver, list[Path]] = {}
        for i, solver in enumerate(SOLVERS.values()):
            (folder := Path(place) / str(i)).mkdir()
            files[solver] = write_layers(model, solver(model, tokens, targets), tokens, folder)
        found = iter(in_a_fresh_process([f for fs in files.values() for f in fs]))
        return {solver: [next(found) for _ in fs] for solver, fs in files.items()}


def check_locality(family: str, learner: Any) -> None:
    "p.grad of every predictor is what a process that knows that layer alone computes."
    model, (tokens, targets) = build(family), batch()
    settled = learner.solver(model, tokens, targets)
    learner.backward(model, tokens, targets)
    for l, (f, local) in enumerate(
        zip(model.predictors, elsewhere(family)[learner.solver], strict=True)
    ):
        names = {n for n, _ in f.named_parameters()}
        assert names == local.keys(), (
            f"layer {l}: parameters {names}, computed elsewhere {set(local)}"
        )
        for name, p in f.named_parameters():
            assert p.grad is not None, f"layer {l}: {name} has no gradient"
            tied = p is model.output.weight
            got = p.grad - output_share(model, settled, targets) if tied else p.grad
            apart, size = (got - local[name]).abs().max().item(), p.grad.abs().max().item()
            limit = 1e-12 * size
            assert apart <= limit, (
                f"layer {l}: {name} is off by {apart:.3g} (largest {size:.3g}) from its local"
                " gradient"
            )


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_updates_are_local(family: str, solver: str) -> None:
    check_locality(family, PredictiveCoding(SOLVERS[solver]))


@pytest.mark.parametrize("family", FAMILIES)
def test_untied_layers_are_bit_equal(family: str) -> None:
    "The same machine, the same operations in the same order: not even rounding differs."
    model, learner = build(family), PredictiveCoding()
    learner.backward(model, *batch())
    for l, (f, local) in enumerate(
        zip(model.predictors, elsewhere(family)[learner.solver], strict=True)
    ):
        for name, p in f.named_parameters():
            if p is not model.output.weight:
                assert torch.equal(p.grad, local[name]), f"layer {l}: {name}"


class NotLocal(PredictiveCoding):
    "A mutant: its update of layer l also reads `extra(l, settled, model)`."

    def __init__(self, extra: Callable[[int, Settled, Any], Tensor | float]):
        super().__init__(ErrorSettling())
        object.__setattr__(self, "extra", extra)

    def backward(self, model: Any, tokens: Tensor, targets: Tensor, measure: bool = False) -> Any:
        settled = self.solver(model, tokens, targets, measure)
        for l, (f, mu) in enumerate(zip(model.predictors, settled.predictions, strict=True)):
            push = -settled.batch_energy.precision[l] * settled.errors[l] / settled.count
            parameters = list(f.parameters())
            accumulate(
                parameters,
                torch.autograd.grad(mu, parameters, push + self.extra(l, settled, model)),
            )
        parameters = list(model.output.parameters())
        accumulate(
            parameters, torch.autograd.grad(settled.up.output_energy / settled.count, parameters)
        )


EXTRAS: dict[str, Callable[[int, Settled, Any], Tensor | float]] = {
    # the error of the layer above, as in rules that are backprop under another name
    "the error above": lambda l, s, m: 1e-3 * s.errors[min(l + 1, len(s.errors) - 1)],
    # a global signal: the loss scales every layer's update
    "the loss": lambda l, s, m: -1e-6 * s.loss * s.batch_energy.precision[l] * s.errors[l],
    # another layer's weights
    "other weights": lambda l, s, m: 1e-9 * next(m.predictors[-1].parameters()).sum().item(),
}


def test_the_rule_of_the_mutants_is_local() -> None:
    check_locality("gaussian", NotLocal(lambda l, s, m: 0.0))


@pytest.mark.parametrize("extra", EXTRAS.values(), ids=EXTRAS.keys())
def test_mutants_are_caught(extra: Callable[..., Any]) -> None:
    with pytest.raises(AssertionError, match="from its local gradient"):
        check_locality("gaussian", NotLocal(extra))


def test_a_layer_needs_no_model() -> None:
    "No layer holds a reference to another one, but for the tied token table of the output."
    model = build("gaussian")
    parts = {f"layer {l}": f for l, f in enumerate(model.predictors)} | {"output": model.output}
    owners: dict[int, list[str]] = {}
    for name, part in parts.items():
        assert isinstance(part, nn.Module)
        for p in part.parameters():
            owners.setdefault(id(p), []).append(name)
    shared = [who for who in owners.values() if len(who) > 1]
    assert shared == [["layer 0", "output"]], f"weights are shared by {shared}"
