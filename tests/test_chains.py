"""Any stack of modules, and a model of `transformers` where it stands, learn by predictive coding:
backprop's gradient in the limit, a falling energy at soft precision, local updates."""

import copy
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pc_transformer.energies import StudentT
from pc_transformer.interop.chains import ModelChain, shifted
from pc_transformer.learning import Backprop, PredictiveCoding, gradient_cosine, gradients
from pc_transformer.model import Chain
from pc_transformer.monitoring import take_snapshot
from pc_transformer.settling import (
    BatchEnergy,
    ErrorSettling,
    FreeEnergy,
    HighwaySettling,
    SettlingError,
    StateSettling,
    SweepSettling,
)

transformers = pytest.importorskip("transformers")


@dataclass
class Case:
    "A model of somebody's, its chain, one batch, and the loss that its owner would write."

    model: nn.Module
    chain: Chain
    inputs: Any
    targets: Tensor
    loss: Callable[[], Tensor]


def mlp() -> Case:
    layers = [
        nn.Sequential(nn.Linear(5, 8), nn.Tanh()),
        nn.Sequential(nn.Linear(8, 7), nn.GELU()),
        nn.Linear(7, 4),
    ]
    model = nn.Sequential(*layers).double()
    x, y = torch.randn(6, 5).double(), torch.randint(4, (6,))
    y[2] = -100
    return Case(model, Chain(layers[:-1], layers[-1]), x, y, lambda: F.cross_entropy(model(x), y))


def cnn() -> Case:
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.GELU()),
        nn.Sequential(nn.Conv2d(4, 6, 3, stride=2), nn.BatchNorm2d(6).eval(), nn.GELU()),
        nn.Sequential(nn.Flatten(), nn.Linear(54, 8), nn.Tanh()),
        nn.Linear(8, 3),
    ).double()
    x, y = torch.randn(4, 2, 8, 8).double(), torch.randint(3, (4,))
    return Case(model, Chain(model[:-1], model[-1]), x, y, lambda: F.cross_entropy(model(x), y))


def regression() -> Case:
    "Numbers with heavy tails as targets."
    model = nn.Sequential(
        nn.Sequential(nn.Linear(5, 8), nn.Tanh()),
        nn.Sequential(nn.Linear(8, 8), nn.Tanh()),
        nn.Linear(8, 2),
    ).double()
    x, y, tails = torch.randn(6, 5).double(), torch.randn(6, 2).double(), StudentT(nu=3.0)
    loss = lambda: tails.energy(y - model(x), 1.0).mean()
    return Case(model, Chain(model[:-1], model[-1], tails), x, y, loss)


def decoder(model: Any, padded: bool) -> Case:
    "A decoder; if padded, one row from the left, one from the right, and a token without a label."
    model = model.double()
    ids, mask = torch.randint(61, (3, 8)), torch.ones(3, 8, dtype=torch.int64)
    if padded:
        mask[0, :3] = mask[1, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[2, 4] = -100
    inputs = {"input_ids": ids, "attention_mask": mask} if padded else ids
    named = inputs if padded else {"input_ids": ids}
    return Case(
        model,
        ModelChain(model),
        inputs,
        shifted(labels),
        lambda: model(**named, labels=labels).loss,
    )


def gpt2(padded: bool = False) -> Case:
    size = {"n_positions": 16, "n_embd": 16, "n_layer": 3, "n_head": 2}
    config = transformers.GPT2Config(vocab_size=61, **size, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4 if p.dim() > 1 else 1)
    return decoder(model, padded)


def llama(padded: bool = False, tied: bool = False) -> Case:
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": tied}
    config = transformers.LlamaConfig(vocab_size=61, **size, **heads)
    model = transformers.LlamaForCausalLM(config).eval()
    for f in model.modules():  # its own norm computes in float32, and energies would be as coarse
        for name, norm in list(f.named_children()):
            if name.endswith("norm"):
                setattr(f, name, nn.RMSNorm(norm.weight.shape, norm.variance_epsilon))
    return decoder(model, padded)


CASES: dict[str, Callable[[], Case]] = {
    "mlp": mlp,
    "cnn": cnn,
    "regression": regression,
    "gpt2": gpt2,
    "gpt2, padded": lambda: gpt2(True),
    "llama": llama,
    "llama, padded, tied": lambda: llama(True, True),
}


def make(name: str) -> Case:
    torch.manual_seed(3)
    return CASES[name]()


def flat(model: nn.Module) -> Tensor:
    "All gradients of a model, one after the other; they are cleared."
    found = torch.cat([p.grad.flatten() for p in model.parameters()])  # type: ignore[union-attr]
    model.zero_grad()
    return found


def apart(case: Case, learner: Any) -> float:
    "How far what is learned is from the gradient of the owner's loss, relative to its norm."
    case.loss().backward()
    want = flat(case.model)
    learner.backward(case.chain, case.inputs, case.targets)
    return ((flat(case.model) - want).norm() / want.norm()).item()


def settling(beta: float, steps: int = 1, eta: float = 1.0, **more: Any) -> ErrorSettling:
    return ErrorSettling(FreeEnergy(beta, **more), steps, eta)


@pytest.mark.parametrize("name", CASES)
def test_stiff_chains_learn_backprops_gradient(name: str) -> None:
    "All parameters, tied ones too; the distance falls as one over the relative precision."
    case = make(name)
    at = [apart(case, PredictiveCoding(settling(beta))) for beta in (1e3, 1e5, 1e7)]
    assert 50 < at[0] / at[1] < 200 and at[2] < 2e-5, at
    # a model of `transformers` computes its loss in float32
    assert apart(case, Backprop()) < (1e-12 if name in ("mlp", "cnn", "regression") else 1e-6)


@pytest.mark.parametrize("name", CASES)
def test_a_sweep_is_backprop(name: str) -> None:
    limit = 1e-12 if name in ("mlp", "cnn", "regression") else 1e-6
    assert apart(make(name), PredictiveCoding(SweepSettling())) < limit


SOFT = {
    "gaussian": {},
    "per coordinate": {"per": "coordinate"},
    "student_t, per token": {"per": "token", "family": StudentT(nu=4.0)},
}


@pytest.mark.parametrize("kind", SOFT)
@pytest.mark.parametrize("name", CASES)
def test_the_energy_falls_at_every_step(name: str, kind: str) -> None:
    "At soft precision every sweep lowers it, and what is learned is no longer backprop's."
    case = make(name)
    settled = settling(20.0, 6, 0.5, **SOFT[kind])(case.chain, case.inputs, case.targets)
    energy = settled.energy.diff()
    assert (energy < 0).all() and settled.residual < 0.2, (energy, settled.residual)
    assert [s.shape for s in settled.states] == [e.shape for e in settled.errors]
    assert apart(case, PredictiveCoding(settling(20.0, 6, 0.5, **SOFT[kind]))) > 1e-4


class Uphill(FreeEnergy):
    "A mutant: errors are sent where the energy rises."

    def at(self, *args: Any) -> BatchEnergy:
        return Away(self, super().at(*args).precision)


class Away(BatchEnergy):
    def step(self, errors: Any, deltas: Any, eta: float) -> list[Tensor]:
        return super().step(errors, [-d for d in deltas], eta)


@pytest.mark.parametrize("name", ["cnn", "llama"])
def test_climbing_is_noticed(name: str) -> None:
    case = make(name)
    with pytest.raises(SettlingError, match="lowered the energy"):
        ErrorSettling(Uphill(20.0), 6, 0.5)(case.chain, case.inputs, case.targets)


@pytest.mark.parametrize("name", CASES)
def test_parallel_states_go_down_too(name: str) -> None:
    case = make(name)
    solver = StateSettling(FreeEnergy(20.0), 60)
    settled = solver(case.chain, case.inputs, case.targets)
    far = settling(20.0, 60, 0.5)(case.chain, case.inputs, case.targets)
    assert (settled.energy.diff() < 1e-9).all()
    start, end = far.energy[0] - far.energy[-1], settled.energy[0] - settled.energy[-1]
    assert 0.5 * start < end <= 1.001 * start, (start, end)


def test_the_highway_needs_states_of_one_shape() -> None:
    case = make("gpt2, padded")
    assert apart(case, PredictiveCoding(HighwaySettling(steps=3))) < 1e-6
    case = make("mlp")
    with pytest.raises(ValueError, match="one shape"):
        HighwaySettling()(case.chain, case.inputs, case.targets)


@pytest.mark.parametrize("name", CASES)
def test_lean_passes_learn_the_same(name: str) -> None:
    case = make(name)
    found = []
    for lean in (False, True):
        PredictiveCoding(ErrorSettling(FreeEnergy(50.0), 2, lean=lean)).backward(
            case.chain, case.inputs, case.targets
        )
        found.append(flat(case.model))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def test_padding_changes_nothing() -> None:
    "Tokens behind the last target, and tokens that a mask hides, may be any."
    for name in ("gpt2, padded", "llama, padded, tied"):
        case = make(name)
        learner = PredictiveCoding(settling(50.0, 3, per="token"))
        learner.backward(case.chain, case.inputs, case.targets)
        first, hidden = flat(case.model), case.inputs["attention_mask"] == 0
        hidden[0] = False  # the padding on the left has a place in the statistics, not in the sum
        ids = case.inputs["input_ids"].masked_fill(hidden, 7)
        learner.backward(case.chain, case.inputs | {"input_ids": ids}, case.targets)
        torch.testing.assert_close(flat(case.model), first, rtol=1e-6, atol=1e-9)


# Locality. One fresh process gets, case by case and layer by layer, what that layer was called
# with.

FRESH = """
import sys
import torch
from pc_transformer.learning import local_gradient
found = {}
for name, layers in torch.load(sys.argv[1], weights_only=False).items():
    found[name] = []
    for f, weights, *quantities in layers:
        assert sum(p.numel() for p in f.parameters()) == weights, "a layer that brings others along"
        found[name].append(local_gradient(f, *quantities))
torch.save(found, sys.argv[2])
"""
LOCAL = ("mlp", "cnn", "regression", "gpt2", "llama, padded, tied")
SOLVER = settling(20.0, 3, 0.5)


class Table(nn.Module):
    "The embedding of a decoder, written once more by hand: node 0 needs no model either."

    def __init__(self, part: nn.Module, T: int):
        super().__init__()
        self.tables, self.T = nn.ParameterList(part.parameters()), T

    def forward(self, ids: Tensor) -> Tensor:
        token, *position = self.tables
        return token[ids] + (position[0][: self.T] if position else 0)


def alone(case: Case) -> tuple[list[Any], Tensor]:
    "Each layer by itself, and what the first one reads."
    layers, first = list(case.chain.at(case.inputs).predictors), case.inputs
    if isinstance(case.chain, ModelChain):
        first = first["input_ids"] if isinstance(first, dict) else first
        layers[0] = Table(case.chain.predictors[0], first.shape[1])
    return layers, first


@lru_cache
def elsewhere() -> dict[str, list[dict[str, Tensor]]]:
    "The gradients of every layer from its state below, its error and its precision alone."
    saved = {}
    for name in LOCAL:
        case = make(name)
        (layers, first), settled = alone(case), SOLVER(case.chain, case.inputs, case.targets)
        below = [first, *settled.states[:-1]]
        own = zip(layers, below, settled.errors, settled.batch_energy.precision, strict=True)
        saved[name] = [
            (f, sum(p.numel() for p in f.parameters()), below, error, precision, settled.count)
            for f, below, error, precision in own
        ]
    with tempfile.TemporaryDirectory() as place:
        torch.save(saved, f"{place}/layers")
        found = subprocess.run(
            [sys.executable, "-c", FRESH, f"{place}/layers", f"{place}/found"],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert found.returncode == 0, found.stderr
        return torch.load(f"{place}/found")


def check_local(name: str, learner: Any) -> None:
    "p.grad of every predictor is what a process that knows that layer alone computes."
    case = make(name)
    settled = SOLVER(case.chain, case.inputs, case.targets)
    learner.backward(case.chain, case.inputs, case.targets)
    ends = {id(p) for p in case.chain.output.parameters()}
    for l, (f, found) in enumerate(zip(alone(case)[0], elsewhere()[name], strict=True)):
        for p, local in zip(f.parameters(), found.values(), strict=True):
            assert p.grad is not None
            got = p.grad
            if id(p) in ends:  # tied: the output's own share is taken away
                own = settled.up.output_graph() * (1 / settled.count)
                got = got - torch.autograd.grad(own, p, retain_graph=True)[0]
            assert (got - local).abs().max() <= 1e-9 * p.grad.abs().max(), f"layer {l} is not local"


@pytest.mark.parametrize("name", LOCAL)
def test_updates_are_local(name: str) -> None:
    check_local(name, PredictiveCoding(SOLVER))


class NotLocal(PredictiveCoding):
    "A mutant: a layer's update also reads the error of the layer above."

    def backward(self, model: Any, inputs: Any, targets: Tensor, measure: bool = False) -> Any:
        report = super().backward(model, inputs, targets, measure)
        for f, above in zip(model.predictors, model.predictors[1:], strict=False):
            size = next(above.parameters()).grad.abs().mean()
            for p in f.parameters():
                p.grad += 1e-6 * size
        return report


@pytest.mark.parametrize("name", ["mlp", "llama, padded, tied"])
def test_a_rule_that_is_not_local_is_noticed(name: str) -> None:
    with pytest.raises(AssertionError, match="is not local"):
        check_local(name, NotLocal(SOLVER))


# Mutants of the chain: each wrong in one place, each noticed by the comparison with backprop.


class Deaf(ModelChain):
    "Every block is called without its mask."

    def at(self, inputs: Any) -> Chain:
        chain = super().at(inputs)
        for f in chain.predictors[1:]:
            f.named = f.named | ({"attention_mask": None} if not f.others else {})
            f.others = [None for _ in f.others]
        return chain


class Stale(ModelChain):
    "Every block is called as in the first batch."

    def at(self, inputs: Any) -> Chain:
        ids = inputs["input_ids"]
        return super().at({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


class Untied(ModelChain):
    "The output forgets that the token table is its own, too."

    def __init__(self, model: nn.Module):
        super().__init__(model)
        for name in [n for n, _ in self.output.named_parameters() if "wte" in n or "embed" in n]:
            del self.output._parameters[name]


MUTANTS = {
    "gpt2, padded": (Deaf, Stale, Untied),
    "llama, padded, tied": (Deaf, Stale, Untied),
}


@pytest.mark.parametrize(("name", "mutant"), [(n, m) for n, ms in MUTANTS.items() for m in ms])
def test_a_wrong_chain_is_noticed(name: str, mutant: Any) -> None:
    case = make(name)
    case.chain = mutant(case.model)
    assert apart(case, PredictiveCoding(settling(1e7))) > 1e-3


def test_the_wrong_energy_is_noticed() -> None:
    case = make("regression")
    case.chain.density = StudentT(nu=30.0)
    assert apart(case, PredictiveCoding(settling(1e7))) > 1e-3


# What is not touched, and what is refused.


@pytest.mark.parametrize("name", ["gpt2, padded", "llama"])
def test_the_model_stays_as_it_is(name: str) -> None:
    "The weights are its own; no hook, no attribute and no buffer is left behind."
    case = make(name)
    about = lambda: {
        n: {
            k: v if not isinstance(v, dict) else {a: id(b) for a, b in v.items()}
            for k, v in vars(m).items()
        }
        for n, m in case.model.named_modules()
    }
    before, weights = about(), copy.deepcopy(case.model.state_dict())
    own = {id(p) for p in case.model.parameters()}
    assert {id(p) for p in case.chain.parameters()} == own
    PredictiveCoding(settling(50.0, 2)).backward(case.chain, case.inputs, case.targets)
    assert about() == before
    assert all(torch.equal(t, weights[n]) for n, t in case.model.state_dict().items())
    torch.optim.SGD(case.chain.parameters(), lr=0.1).step()
    assert any(not torch.equal(t, weights[n]) for n, t in case.model.state_dict().items())


@pytest.mark.parametrize("name", CASES)
def test_a_chain_is_compared_without_being_touched(name: str) -> None:
    case = make(name)
    learner = PredictiveCoding(settling(1e6))
    cosine = gradient_cosine(learner, case.chain, case.inputs, case.targets)
    assert all(c > 1 - 1e-6 for c in cosine.values()), cosine
    assert len(cosine) >= len(case.chain.predictors) + 1
    assert all(p.grad is None for p in case.model.parameters())
    assert any(g.any() for g in gradients(learner, case.chain, case.inputs, case.targets).values())


def test_what_is_done_to_the_chain_is_done_to_the_model() -> None:
    case = make("llama")
    chain = case.chain.float()
    assert {t.dtype for t in case.model.state_dict().values()} == {torch.float32}
    assert {id(p) for p in chain.parameters()} == {id(p) for p in case.model.parameters()}
    assert chain(case.inputs).dtype == torch.float32


def test_frozen_weights_stay_and_idle_ones_are_passed_over() -> None:
    case = make("gpt2, padded")
    case.model.transformer.wte.weight.requires_grad_(False)
    for p in case.model.transformer.h[1].parameters():
        p.requires_grad_(False)
    case.model.transformer.h[0].idle = nn.Parameter(torch.ones(2))
    PredictiveCoding(settling(1e7)).backward(case.chain, case.inputs, case.targets)
    ours = {n: p.grad for n, p in case.model.named_parameters()}
    case.model.zero_grad()
    case.loss().backward()
    for n, p in case.model.named_parameters():
        assert (ours[n] is None) == (p.grad is None), n
        if p.grad is not None:
            torch.testing.assert_close(ours[n], p.grad, rtol=1e-4, atol=1e-6)
    assert case.model.transformer.h[0].idle.grad is None


@pytest.mark.parametrize("name", CASES)
def test_the_monitor_looks_at_any_chain(name: str) -> None:
    "Its measures of nodes and settling; what belongs to our own layers is left out."
    case = make(name)
    look = take_snapshot(
        case.chain, PredictiveCoding(settling(50.0, 2, 0.5)), case.inputs, case.targets
    )
    N = len(case.chain.predictors)
    assert look.broken is None and look.stuck is None
    assert abs(look.loss - case.loss().item()) < 1e-5 and look.cosine["all"] > 0.5  # type: ignore[operator]
    assert len(look.signal) == len(look.scale) == len(look.outlier) == len(look.nodes) == N
    assert look.curvature is not None and 0 < look.curvature[0] < look.curvature[1] < 10
    assert (look.chance is None) == (name == "regression") and set(look.dead) == {None}
    with torch.no_grad():
        next(case.chain.predictors[1].parameters()).fill_(torch.nan)
    broken = take_snapshot(case.chain, PredictiveCoding(), case.inputs, case.targets).broken
    assert broken is not None and broken.startswith("the prediction of node 1")


def test_the_mode_is_the_models() -> None:
    case = make("gpt2")
    with pytest.raises(ValueError, match="call eval"):
        PredictiveCoding().backward(case.chain.train(), case.inputs, case.targets)
    assert case.model.training
    PredictiveCoding().backward(case.chain.eval(), case.inputs, case.targets)
    assert not case.model.transformer.h[0].attn.training


def test_what_moves_by_itself_is_refused() -> None:
    x, y = torch.randn(4, 3), torch.randint(2, (4,))
    norm = Chain([nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))], nn.Linear(4, 2))
    with pytest.raises(ValueError, match="running statistics"):
        PredictiveCoding().backward(norm, x, y)
    before = norm.predictors[0][1].running_mean.clone()
    PredictiveCoding().backward(norm.eval(), x, y)
    assert torch.equal(before, norm.predictors[0][1].running_mean)
    drop = Chain([nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5))], nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"isolation\.Dropout"):
        PredictiveCoding().backward(drop, x, y)
    case = make("llama")
    case.model.config.attention_dropout = 0.1
    with pytest.raises(ValueError, match="attention_dropout"):
        PredictiveCoding().backward(case.chain.train(), case.inputs, case.targets)


class Block(nn.Linear):
    "A block of a decoder, which may be handed more than a state."

    def forward(self, s: Tensor, more: Any = 0) -> Tensor:  # type: ignore[override]
        return s + torch.tanh(super().forward(s)) + more


class Toy(nn.Module):
    "A decoder of blocks in one list, that may do something which no chain does."

    def __init__(self, odd: str = ""):
        super().__init__()
        self.token, self.odd = nn.Embedding(11, 8), odd
        self.blocks = nn.ModuleList(Block(8, 8) for _ in range(3))
        self.bias, self.head = nn.Linear(8, 8), nn.Linear(8, 11)

    def forward(self, ids: Tensor) -> Tensor:
        first = s = self.token(ids)
        order = {"reversed": [2, 1, 0], "twice": [0, 1, 1, 2], "one left out": [0, 1]}
        for l in order.get(self.odd, [0, 1, 2]):
            if self.odd == "by name":
                s = self.blocks[l](s=s)
            elif self.odd == "reads the embedding":
                s = self.blocks[l](s, self.bias(first))
            else:
                s = self.blocks[l](s)
            if self.odd == "something between":
                s = 2 * s
        return self.head(s)


def test_a_plain_decoder_is_a_chain() -> None:
    toy = Toy()
    ids = torch.randint(11, (2, 5))
    torch.testing.assert_close(ModelChain(toy)(ids), toy(ids))


ODD = {
    "reversed": "out of order",
    "twice": "out of order",
    "one left out": "not every block",
    "by name": "without a state",
    "reads the embedding": "more than the state",
    "something between": "does not read what block 0 gave",
}


@pytest.mark.parametrize("odd", ODD)
def test_what_is_no_chain_is_refused(odd: str) -> None:
    with pytest.raises(ValueError, match=f"Toy is no chain: .*{ODD[odd]}"):
        ModelChain(Toy(odd))


def test_other_refusals() -> None:
    size = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=61, **size))
    with pytest.raises(ValueError, match=r"one list of blocks.*encoder\.block, decoder\.block"):
        ModelChain(t5)
    with pytest.raises(ValueError, match="has none"):
        ModelChain(nn.Linear(2, 2))
    case = make("gpt2")
    with pytest.raises(ValueError, match="shifted"):
        case.chain({"input_ids": case.inputs, "labels": case.inputs})
    case = make("regression")
    with pytest.raises(ValueError, match="do not fit outputs"):
        PredictiveCoding().backward(case.chain, case.inputs, case.targets[:, 0])
