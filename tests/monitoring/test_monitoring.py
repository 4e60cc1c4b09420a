"""Watching a run changes nothing, a look survives the disk, and every diagnosis has a model that
deserves it."""

import copy
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from common import stir
from torch import Tensor, nn

from pc_transformer import ModelConfig, PCTransformer
from pc_transformer.config import TrainConfig, replace
from pc_transformer.data import Text
from pc_transformer.energies import StudentT
from pc_transformer.experiments.incremental import IncrementalPC
from pc_transformer.learning import Backprop, Learner, PredictiveCoding, compare_gradients
from pc_transformer.monitoring import (
    Diagnosis,
    Monitor,
    Snapshot,
    Thresholds,
    apply_rules,
    attention_rows,
    certain_outputs,
    curvature,
    dead_units,
    diagnose,
    evaluation_view,
    extreme_eigenvalues,
    json_ready,
    plot_alignment,
    plot_curvature,
    plot_energy,
    plot_heat,
    plot_loss,
    plot_monitor,
    plot_steps,
    read_snapshot,
    rejected,
    saturated_rows,
    scalars,
    snapshot_cost,
    status_line,
    take_snapshot,
)
from pc_transformer.settling import (
    ErrorSettling,
    FreeEnergy,
    HighwaySettling,
    Settled,
    StateSettling,
    SweepSettling,
)
from pc_transformer.training import CheckpointError, Trainer, train
from pc_transformer.training.run import RunConfig

SIZES: dict[str, Any] = {"vocab_size": 9, "block_size": 8, "n_layer": 2, "n_head": 2, "d_model": 16}
CONFIG = RunConfig(
    model=ModelConfig(**SIZES),
    train=TrainConfig(
        iters=8, batch_size=3, warmup_iters=2, eval_interval=8, checkpoint_interval=8
    ),
)
IDS = torch.randint(9, (400,), generator=torch.Generator().manual_seed(0))
LEARNERS: dict[str, Learner] = {
    "backprop": Backprop(),
    "predictive coding": PredictiveCoding(),
    "softer": PredictiveCoding(ErrorSettling(FreeEnergy(100.0), steps=3)),
}


def make(**changes: Any) -> Trainer:
    config = replace(CONFIG, **changes)
    return Trainer(config, Text.of_ids(IDS[:300], IDS[300:], config), torch.device("cpu"))


def build(seed: int = 1, scale: float = 3.0, **options: Any) -> PCTransformer:
    "A random model in which every part matters."
    model = PCTransformer(ModelConfig(**{**SIZES, **options}), seed)
    stir(model, seed, scale)
    return model


def batch() -> tuple[Tensor, Tensor]:
    tokens, targets = torch.randint(
        9, (2, 3, 8), generator=torch.Generator().manual_seed(0)
    ).unbind()
    targets[1, 2] = -100
    return tokens, targets


def spoil(model: nn.Module, edit: Callable[[Any], Any]) -> Any:
    model = copy.deepcopy(model)
    with torch.no_grad():
        edit(model)
    return model


RUNS: dict[str, dict[str, Any]] = {
    "predictive coding": {},
    "softer": {"learner.steps": 3, "learner.relative_precision": 100.0, "learner.step_size": 0.7},
    "backprop with dropout": {"learner.algorithm": "backprop", "model.dropout": 0.2},
}


@pytest.mark.parametrize("run", RUNS)
def test_a_watched_run_is_the_same_run(run: str) -> None:
    """Losses, record, weights, moments and the random state are bit for bit those of a run
    without a monitor."""
    torch.manual_seed(3)
    quiet = train(make(**RUNS[run]))
    after = torch.get_rng_state()
    torch.manual_seed(3)
    monitor = Monitor(interval=3, products=1)
    watched = train(make(**RUNS[run]), monitor)
    assert [look.step for look in monitor.history] == [3, 6, 8]
    assert watched.losses == quiet.losses and watched.record == quiet.record
    assert torch.equal(torch.get_rng_state(), after)
    for p, q in zip(watched.model.parameters(), quiet.model.parameters(), strict=True):
        assert torch.equal(p, q) and (p.grad is q.grad or torch.equal(p.grad, q.grad))  # type: ignore[arg-type]
        for name, moment in watched.optimizer.state[p].items():
            assert torch.equal(moment, quiet.optimizer.state[q][name])


def test_a_learner_that_moves_weights_and_remembers_is_not_heard() -> None:
    """What a learner does to weights, buffers and modes is done to a copy, and a look talks to a
    copy of the learner."""

    class Restless(Learner):
        calls = 0

        def backward(
            self, model: Any, tokens: Tensor, targets: Tensor, measure: bool = False
        ) -> Any:
            self.calls += 1
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(torch.rand(p.shape, generator=torch.Generator().manual_seed(self.calls)))
            model.train()
            return Backprop().backward(model, tokens, targets)

        @property
        def solver(self) -> ErrorSettling:
            return ErrorSettling()

    model, learner = build().eval(), Restless()
    model.predictors[1].train()
    model.register_buffer("memory", torch.ones(3))
    before, state = copy.deepcopy(model), torch.get_rng_state()
    take_snapshot(model, learner, *batch(), products=1)  # type: ignore[arg-type]
    assert learner.calls == 0 and torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    for (name, a), b in zip(model.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    Backprop().backward(model, *batch())
    kept = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    still = evaluation_view(model)
    still.memory.zero_()
    still.predictors[2].train()
    Backprop().backward(still, *batch())
    assert torch.equal(model.memory, torch.ones(3))
    assert all(
        p.grad is not None and torch.equal(p.grad, g)
        for p, g in zip(model.parameters(), kept, strict=True)
    )
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]


@pytest.mark.parametrize("learner", LEARNERS)
def test_a_look_survives_json(learner: str) -> None:
    """What was measured and what was not, and every kind of number, come back."""
    look = take_snapshot(build(), LEARNERS[learner], *batch())
    assert (look.signal == []) == (learner == "backprop") and look.broken is None
    assert read_snapshot(json.loads(json.dumps(json_ready(asdict(look)), allow_nan=False))) == look
    look.residual, look.signal, look.cosine = -math.inf, [math.inf, math.nan], {"all": math.nan}
    again = read_snapshot(json.loads(json.dumps(json_ready(asdict(look)), allow_nan=False)))
    assert again.residual == -math.inf and again.signal[0] == math.inf
    assert math.isnan(again.signal[1]) and math.isnan(again.cosine["all"])


def test_results_file_is_whole_or_absent(tmp_path: Path) -> None:
    """A history goes to disk and back; a failed write leaves the old file; a damaged file is one
    clear sentence."""
    monitor = Monitor(interval=4, products=1)
    train(make(), monitor)
    place = monitor.save(tmp_path / "deep" / "monitor.json")
    again = Monitor.load(place)
    assert (
        again.history == monitor.history
        and again.about == monitor.about
        and again.interval == 4
        and again.products == 1
    )
    assert again.about["config"]["train"]["iters"] == 8
    text = place.read_text()
    with (
        patch("os.replace", side_effect=OSError("disk full")),
        pytest.raises(OSError, match="disk full"),
    ):
        Monitor().save(place)
    assert place.read_text() == text
    for cut in (0, 1, len(text) // 2, len(text) - 2):
        (tmp_path / "cut.json").write_text(text[:cut])
        with pytest.raises(CheckpointError, match="damaged"):
            Monitor.load(tmp_path / "cut.json")
    other = json.loads(text)
    other["history"][0]["new"] = 1
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(CheckpointError, match="'new' is missing or unknown"):
        Monitor.load(tmp_path / "other.json")
    with pytest.raises(CheckpointError, match="there is no absent.json"):
        Monitor.load(tmp_path / "absent.json")


def test_a_resumed_run_continues_its_history() -> None:
    """Looks that are made again replace the old ones, so steps never repeat."""
    monitor = Monitor(interval=3, products=0)
    train(make(), monitor)
    first = copy.deepcopy(monitor.history)
    train(make(), monitor)
    assert monitor.history == first and [look.step for look in first] == [3, 6, 8]


@pytest.mark.parametrize("arguments", [{"interval": 0}, {"products": -1}])
def test_a_monitor_refuses_nonsense(arguments: dict[str, int]) -> None:
    """One clear sentence."""
    with pytest.raises(ValueError, match="interval >= 1 and products >= 0"):
        Monitor(**arguments)


class Notes(list[tuple[str, float, int]]):
    "Anything with add_scalar will do."

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.append((name, value, step))


@pytest.mark.parametrize("learner", LEARNERS)
def test_scalars(learner: str) -> None:
    """Live and afterwards a writer gets the same plain numbers, one name each, and none that was
    not measured."""
    look = take_snapshot(build(), LEARNERS[learner], *batch(), step=7)
    live, late = Notes(), Notes()
    monitor = Monitor(writer=live, products=1)
    monitor.measure(make())
    monitor.to_tensorboard(late)
    assert live == late and live and all(isinstance(v, float) and k == 0 for _, v, k in live)
    found = scalars(look)
    assert found["loss"] == look.loss and found["scale/04_feed-forward"] == look.scale[4]
    assert ("residual" in found) == (learner != "backprop") and not any(
        " " in name for name in found
    )


def test_tensorboard(tmp_path: Path) -> None:
    """Without the package one sentence says what to install; with it, files appear."""
    monitor = Monitor(history=[take_snapshot(build(), Backprop(), *batch())])
    with patch.dict(sys.modules, {"torch.utils.tensorboard": None}):
        with pytest.raises(ModuleNotFoundError, match="pip install tensorboard"):
            monitor.to_tensorboard(tmp_path / "board")
    pytest.importorskip("tensorboard")
    monitor.to_tensorboard(tmp_path / "board")
    assert list((tmp_path / "board").glob("events*"))


def test_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    """Outside a notebook a shown monitor prints one line a look."""
    monitor = Monitor(interval=4, products=0)
    monitor.show()
    train(make(), monitor)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "4/8" in lines[0] and "8/8" in lines[1] and "signal 1.00" in lines[1]
    assert status_line(monitor.history[0]).startswith("step 4  loss")


FAMILIES: dict[str, dict[str, Any]] = {
    "dot": {"attention": "dot"},
    "gaussian": {},
    "student_t": {"attention": "student_t"},
    "mixture": {"attention": "mixture"},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_rows_are_the_layers_own(family: str) -> None:
    """Values averaged by the rows are what the layer adds to its state, for every kind of
    attention."""
    layer: Any = build(**FAMILIES[family]).double().predictors[1]
    s = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    r, seen = attention_rows(layer, s)
    v = layer.attention.project(layer.norm(s))[1].v
    torch.testing.assert_close(
        s + layer.attention.out((r @ v).transpose(1, 2).flatten(2)), layer(s), rtol=1e-9, atol=1e-12
    )
    some, few = attention_rows(layer, s, most=2 * 8 * 8 * 4)
    assert some.shape[0] == 1 and 0 < len(few) <= 8 and seen.tolist() == list(range(1, 9))


def test_dead_means_at_every_token() -> None:
    """A unit that speaks at one token of the batch is alive; one that is merely silent at zero
    can still learn."""
    layer: Any = build().predictors[2]
    with torch.no_grad():
        layer.norm.weight.fill_(1)
        layer.up.weight.zero_()
        assert dead_units(layer, torch.randn(2, 8, 16)) == 0
        layer.up.weight[:16, 0] = -10
    s = 0.1 * torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))
    s[..., 0] = 5
    assert dead_units(layer, s) == 16 / 64
    s[1, 3, 0] = -5
    assert dead_units(layer, s) == 0


def test_rows_that_see_one_key_are_not_saturated() -> None:
    """The first row of every sequence has no choice, so it does not count; nor does a window of
    one key."""
    flat = spoil(build(), lambda m: m.predictors[1].attention.log_precision.fill_(-30.0))
    s = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))
    assert saturated_rows(flat.predictors[1], s) == 0
    assert saturated_rows(spoil(build(), sharpen).predictors[1], s) == 1
    assert saturated_rows(build(window=1).predictors[1], s) == 0  # type: ignore[arg-type]


def test_attention_rows_respect_the_window() -> None:
    """A row sees no further back than its layer does."""
    r, seen = attention_rows(build(window=3).predictors[1], torch.randn(1, 8, 16))  # type: ignore[arg-type]
    assert seen.tolist() == [1, 2, 3, 3, 3, 3, 3, 3] and (r[0, 0, 7, :5] == 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_curvature_is_that_of_the_energy(family: str) -> None:
    """Both ends of the spectrum equal the dense Hessian's, by automatic differentiation through
    reference attention."""
    model = build(scale=2.0, n_layer=1, d_model=4, block_size=4, **FAMILIES[family]).double()
    tokens, targets = torch.randint(9, (2, 1, 4), generator=torch.Generator().manual_seed(1))
    settled = ErrorSettling(FreeEnergy(5.0), steps=2)(model, tokens, targets)
    roots = [p.sqrt() for p in settled.batch_energy.precision]

    def energy(x: Tensor) -> Tensor:
        parts = [t.view(1, 4, 4) / r for t, r in zip(x.split(16), roots, strict=True)]
        s = model.predictors[0](tokens) + parts[0]
        for f, e in zip(model.predictors[1:], parts[1:], strict=True):
            s = f(s) + e
        return x.square().sum() / 2 + F.cross_entropy(
            model.output(s).flatten(0, 1), targets.flatten(), reduction="sum"
        )

    at = torch.cat([(e * r).flatten() for e, r in zip(settled.errors, roots, strict=True)])
    with patch("pc_transformer.attention.kernels.choose", lambda *_, **__: ("reference", "")):
        exact = torch.linalg.eigvalsh(torch.autograd.functional.hessian(energy, at))  # type: ignore[arg-type]
    low, high = curvature(model, tokens, targets, settled, products=40)
    assert high == pytest.approx(exact[-1].item(), rel=1e-5) and low == pytest.approx(
        exact[0].item(), abs=1e-3 * high
    )
    assert exact[-1] > 1.01


def test_lanczos_finds_both_ends() -> None:
    """A spectrum with a known end, a negative one, and a start that spans too little."""
    spectrum = torch.cat([torch.linspace(0.9, 1.1, 200), torch.tensor([-3.0, 7.0])]).double()
    start = torch.randn(202, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = extreme_eigenvalues(lambda v: spectrum * v, start, 8)
    assert low == pytest.approx(-3, abs=1e-6) and high == pytest.approx(7, abs=1e-6)
    assert extreme_eigenvalues(lambda v: 2 * v, start, 8) == (pytest.approx(2), pytest.approx(2))
    assert math.isnan(extreme_eigenvalues(lambda v: v * math.nan, start, 3)[0])


SOLVERS: dict[str, ErrorSettling] = {
    "several steps": ErrorSettling(FreeEnergy(1e4), steps=3),
    "tails": ErrorSettling(FreeEnergy(family=StudentT(4.0))),
    "per token": ErrorSettling(FreeEnergy(per="token")),
    "per coordinate": ErrorSettling(FreeEnergy(per="coordinate")),
    "lean": ErrorSettling(lean=True),
}


@pytest.mark.parametrize("solver", SOLVERS)
def test_stiff_solvers_keep_the_whole_message(solver: str) -> None:
    """Whatever the shape of the precision or the density, a stiff full step hands on backprop's
    message."""
    look = take_snapshot(build(scale=1.0), PredictiveCoding(SOLVERS[solver]), *batch(), products=3)
    assert look.signal == pytest.approx([1.0] * 5, rel=0.05) and look.ratio["all"] == pytest.approx(
        1, rel=0.05
    )
    assert look.curvature is not None and 0.5 < look.curvature[0] <= look.curvature[1] < 1.5
    assert not apply_rules(look).problems


def test_numbers_of_a_look_by_hand() -> None:
    """Every number of the target-free pass and of settling, from its definition; halves of a
    nudge count as whole."""
    model, (tokens, targets) = build(), batch()
    solver = ErrorSettling(FreeEnergy(30.0, nudge=-0.5), steps=3, step_size=0.6)
    look = take_snapshot(model, PredictiveCoding(solver), tokens, targets, products=0)
    states = [tokens]
    for f in model.predictors:
        states.append(f(states[-1]))
    states = states[1:]
    logits, asked = model.output(states[-1]), targets != -100
    assert look.loss == pytest.approx(
        F.cross_entropy(logits[asked], targets[asked]).item(), rel=1e-5
    )
    assert look.chance == math.log(9) and look.steps == 3 and look.step_size == 0.6
    rms = lambda x, over=(0, 1, 2): x.detach().double().square().mean(over).sqrt()
    assert look.scale == pytest.approx([rms(s).item() for s in states], rel=1e-5)
    each = [rms(s, (0, 1)) for s in states]
    assert look.outlier == pytest.approx([(e.max() / e.median()).item() for e in each], rel=1e-5)
    settled = solver(model, tokens, targets)
    length = lambda x: x.detach().double().square().sum(-1).mean().sqrt().item()  # of a token
    assert look.error == pytest.approx([length(e) for e in settled.errors], rel=1e-4)
    wanted = [length(e) / length(s) for e, s in zip(settled.errors, settled.states, strict=True)]
    assert look.displacement == pytest.approx(wanted, rel=1e-4)
    assert look.precision == pytest.approx(
        [p.item() for p in settled.batch_energy.precision], rel=1e-5
    )
    assert (
        len({f"{p:.3g}" for p in look.precision})
        == len({f"{x:.3g}" for x in look.displacement})
        == 5
    )
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    deltas = torch.autograd.grad(loss, states)
    assert look.message == pytest.approx([length(d) for d in deltas], rel=1e-4)
    told = [
        length(p * e) / 0.5
        for p, e in zip(settled.batch_energy.precision, settled.errors, strict=True)
    ]
    assert look.signal == pytest.approx(
        [a / length(d) for a, d in zip(told, deltas, strict=True)], rel=1e-4
    )


def test_gradients_beside_backprops() -> None:
    """Cosine and ratio of parts: ours over backprop's, zero over zero is zero."""
    draw = torch.Generator().manual_seed(0)
    names = (
        "predictors.0.token.weight",
        "predictors.1.up.weight",
        "predictors.1.down.weight",
        "output.norm.weight",
    )
    theirs = {n: torch.randn(4, 3, generator=draw) for n in names}
    ours = {n: 3 * g for n, g in theirs.items()} | {
        "output.norm.weight": -theirs["output.norm.weight"]
    }
    cosine, ratio = compare_gradients(ours, theirs)
    assert cosine["predictors.1"] == pytest.approx(1) and cosine["output.norm"] == pytest.approx(-1)
    assert ratio == pytest.approx(
        {"predictors.0": 3, "predictors.1": 3, "output.norm": 1, "all": ratio["all"]}
    )
    flat = lambda g: torch.cat([g[n].flatten() for n in names])
    assert ratio["all"] == pytest.approx((flat(ours).norm() / flat(theirs).norm()).item(), rel=1e-5)
    assert cosine["all"] == pytest.approx(
        F.cosine_similarity(flat(ours), flat(theirs), dim=0).item(), rel=1e-5
    )
    nothing = {n: torch.zeros_like(g) for n, g in theirs.items()}
    assert (
        compare_gradients(nothing, nothing)[1]["all"] == 0
        and compare_gradients(ours, nothing)[1]["all"] == math.inf
    )


def test_certain_and_wrong_are_shares_of_what_is_asked() -> None:
    logits = torch.zeros(1, 5, 3)
    logits[0, :4, 0] = 30  # four of five are certain of the first symbol
    targets = torch.tensor([[0, 1, -100, -100, 2]])
    assert certain_outputs(logits, targets) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert certain_outputs(logits, torch.full((1, 5), -100)) == (0, 0)


def test_halvings_are_counted() -> None:
    assert (
        rejected(0.8, [0.8, 0.4, 0.1]) == 0 + 1 + 3
        and rejected(None, [0.5]) == 0
        and rejected(1.0, []) == 0
    )


OTHERS: dict[str, Learner] = {
    "sweep": PredictiveCoding(SweepSettling()),
    "highway": PredictiveCoding(HighwaySettling(steps=5)),
    "states": PredictiveCoding(StateSettling(FreeEnergy(100.0), steps=3)),
    "centred": PredictiveCoding(ErrorSettling(), centred=True),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_solvers(name: str) -> None:
    """Every solver of the library can be looked at; those that are backprop say so, parallel
    states lose the signal."""
    found = diagnose(build(scale=1.0), *batch(), OTHERS[name], products=2)
    look = found.snapshot
    assert len(look.signal) == len(look.displacement) == 5 and not look.stuck and scalars(look)
    assert (look.curvature is None) == (
        name != "centred"
    )  # the bound of `ErrorSettling` is not theirs
    assert ("signal" in found.rules) == (name == "states")
    if name != "states":
        assert (
            not found.problems
            and look.cosine["all"] > 0.9999
            and look.signal == pytest.approx([1.0] * 5, rel=0.01)
        )


def test_incremental_learning_cannot_reach_the_run() -> None:
    """A learner that applies its own updates is looked at without any update being applied."""

    def apply() -> None:
        raise AssertionError("the run was touched")

    model = build()
    before = copy.deepcopy(model)
    look = take_snapshot(
        model, IncrementalPC(StateSettling(FreeEnergy(100.0), steps=3), apply), *batch()
    )
    assert look.cosine and "apply" not in look.learner and look.steps == 3
    assert all(
        torch.equal(p, q) and p.grad is None
        for p, q in zip(model.parameters(), before.parameters(), strict=True)
    )


def test_any_solver_will_do() -> None:
    """A solver is whatever returns `Settled`; one without settings is reported without them."""

    class Deaf:
        "Forgets nine tenths of the message."

        def __call__(
            self, model: Any, tokens: Tensor, targets: Tensor, measure_residual: bool = True
        ) -> Settled:
            settled = ErrorSettling()(model, tokens, targets, measure_residual)
            settled.errors = [e / 20 for e in settled.errors]
            return settled

    learner = PredictiveCoding(Deaf())  # type: ignore[arg-type]
    found = diagnose(build(), *batch(), learner)
    assert (
        {"signal", "ratio"} == set(found.rules)
        and "steps" in str(found)
        and found.snapshot.halvings == 0
    )


def nan_weight(m: Any) -> None:
    m.predictors[2].down.weight[0, 0] = math.nan


def infinite_output(m: Any) -> None:
    m.output.norm.weight[0] = math.inf


def explode(m: Any) -> None:
    m.predictors[2].down.weight.mul_(1e5)


def one_large(m: Any) -> None:
    m.predictors[0].token.weight[:, 7] = 50.0


def sharpen(m: Any) -> None:
    m.predictors[1].attention.log_precision.fill_(30.0)


def shout(m: Any) -> None:
    m.output.norm.weight.fill_(1e4)


def kill(m: Any) -> None:
    m.predictors[0].position.weight[:, 0] = 9.0
    m.predictors[2].norm.weight.fill_(1)
    m.predictors[2].up.weight[:20] = -10 * torch.eye(16)[0]


def solver(beta: float = 1e4, **options: Any) -> PredictiveCoding:
    return PredictiveCoding(ErrorSettling(FreeEnergy(beta), **options))


CASES: list[tuple[str, Learner, Any, str]] = [
    (
        "finite",
        Backprop(),
        nan_weight,
        r"node 2 \(feed-forward\) is not finite \(its weight down.weight is not\)",
    ),
    ("finite", PredictiveCoding(), nan_weight, r"node 2 \(feed-forward\)"),
    (
        "finite",
        PredictiveCoding(),
        infinite_output,
        "the prediction of the output|The prediction of the output",
    ),
    (
        "stuck",
        solver(1e-3, steps=6, max_halvings=0),
        None,
        "Settling gave up.*[Rr]aise `relative_precision`",
    ),
    (
        "signal",
        solver(steps=1, step_size=0.05),
        None,
        r"lost at node 4 \(feed-forward\): 5.0% .*step_size 1",
    ),
    (
        "halvings",
        solver(0.01, steps=4, max_halvings=30),
        None,
        "raised the energy and was halved",
    ),
    (
        "curvature",
        solver(0.01, steps=4, max_halvings=30),
        None,
        "largest curvature is .*, the bound 0",
    ),
    ("residual", solver(steps=2, step_size=0.05), None, "far from equilibrium"),
    (
        "displacement",
        solver(0.01, steps=4, max_halvings=30),
        None,
        "too soft.*Raise `relative_precision`",
    ),
    ("ratio", solver(steps=1, step_size=0.05), None, "0.05 times as long as backprop's"),
    ("scale", Backprop(), explode, r"explode on the way up: from node 2 \(feed-forward\)"),
    ("outlier", Backprop(), one_large, r"One coordinate of node \d .* times the median one"),
    (
        "dead",
        Backprop(),
        kill,
        r"Of the hidden units in node 2 \(feed-forward\) \d+% are never active",
    ),
    ("saturated", Backprop(), sharpen, r"Of the attention rows in node 1 \(attention\) 100%"),
    ("wrong", Backprop(), shout, "certain and wrong"),
    ("chance", Backprop(), shout, "worse than knowing nothing"),
]


@pytest.mark.parametrize(
    ("rule", "learner", "edit", "sentence"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)]
)
def test_every_rule_has_a_case(rule: str, learner: Learner, edit: Any, sentence: str) -> None:
    """The spoiled model or setting sets off its rule, in words, and only then."""
    model = build(scale=1.0)
    found = diagnose(spoil(model, edit) if edit else model, *batch(), learner, products=4)
    said = [str(f) for f in found.problems if f.rule == rule]
    assert len(said) == 1 and re.search(sentence, said[0]), found
    assert said[0] in str(found) and said[0][0].isupper() and said[0].endswith(".")
    assert rule not in diagnose(model, *batch(), PredictiveCoding(), products=1).rules


@pytest.mark.parametrize("learner", LEARNERS)
def test_the_healthy_are_left_alone(learner: str) -> None:
    """Nothing is wrong with an untrained model, nor with one that has trained a little."""
    for trainer in (make(), train(make())):
        found = diagnose(trainer.model, *trainer.batch(0), LEARNERS[learner])
        assert not found.problems and str(found).startswith("Nothing is wrong.")
        assert ("backprop's (cosine" in str(found)) == (learner != "backprop")


def test_thresholds_and_numbers_that_are_not_finite() -> None:
    """Limits are the reader's; a NaN that was measured is never taken for healthy."""
    look = take_snapshot(build(scale=1.0), PredictiveCoding(), *batch(), products=1)
    assert apply_rules(look, Thresholds(displacement=0.0)).rules == ["displacement"]
    for name, value in (
        ("residual", math.nan),
        ("signal", [math.nan] * 5),
        ("scale", [1.0, math.inf, 1.0, 1.0, 1.0]),
    ):
        odd = copy.deepcopy(look)
        setattr(odd, name, value)
        found = apply_rules(odd)
        assert isinstance(found, Diagnosis) and "finite" in found.rules and f"{name}" in str(found)


@pytest.mark.parametrize("history", ["none", "backprop", "predictive coding", "broken"])
def test_every_picture_can_be_drawn(history: str) -> None:
    """From nothing, from backprop, from predictive coding, and with a broken model among them."""
    pytest.importorskip("matplotlib").use("Agg")
    import matplotlib.pyplot as plt

    model = build()
    bad = take_snapshot(spoil(model, nan_weight), PredictiveCoding(), *batch(), step=2)
    good = take_snapshot(
        model, LEARNERS.get(history, PredictiveCoding()), *batch(), step=1, products=1
    )
    looks: list[Snapshot] = {"none": [], "broken": [good, bad, bad]}.get(history, [good])
    for draw in (plot_energy, plot_alignment, plot_curvature, plot_steps, plot_loss, plot_heat):
        assert draw(looks) is not None
    plot_monitor(looks).canvas.draw()
    plt.close("all")


def test_the_cost_that_is_stated() -> None:
    """Equation (7) in numbers: more steps and more products cost more, linearly."""
    assert snapshot_cost(1, 0) == pytest.approx(16 / 3) and snapshot_cost(2, 1) - snapshot_cost(
        1, 1
    ) == pytest.approx(4 / 3)
    assert snapshot_cost(1, 3) - snapshot_cost(1, 2) == pytest.approx(4 / 3)
