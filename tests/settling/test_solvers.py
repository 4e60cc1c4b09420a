"""The honesty rules for every solver, node density and pathway, and that nothing diverges
silently."""

import dataclasses
import itertools
import linecache
import math
import warnings
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from common import stir
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pc_transformer import ModelConfig, PCTransformer
from pc_transformer.config import TrainConfig
from pc_transformer.data import Text
from pc_transformer.experiments.incremental import IncrementalPC
from pc_transformer.learning import (
    ENERGIES,
    Backprop,
    PredictiveCoding,
    Solver,
    gradient_cosine,
    gradients,
    local_gradient,
    nudged,
)
from pc_transformer.learning.config import LearnerConfig
from pc_transformer.model import Chain
from pc_transformer.settling import (
    ErrorSettling,
    FixedPrecisions,
    FreeEnergy,
    HighwaySettling,
    Pathway,
    SettlingError,
    StateSettling,
    StateWalk,
    SweepSettling,
    UnsettledWarning,
    curvatures,
    errors_down,
    predict_up,
    relevant_positions,
    rounds_down,
)
from pc_transformer.training import DataParallel, Trainer, resume, save_checkpoint
from pc_transformer.training.run import RunConfig

SIZES: dict[str, Any] = {"vocab_size": 9, "block_size": 6, "n_layer": 2, "n_head": 2, "d_model": 8}
SOLVERS: dict[str, Solver] = {
    "errors": ErrorSettling(),
    "errors, K = 3": ErrorSettling(FreeEnergy(30.0), steps=3),
    "errors, lean": ErrorSettling(steps=2, lean=True),
    "errors, tolerance": ErrorSettling(FreeEnergy(30.0), steps=9, tolerance=0.1),
    "errors, push": ErrorSettling(FreeEnergy(nudge=-0.5)),
    "errors, skip": ErrorSettling(FreeEnergy(1e4), pathway=Pathway(skip=True)),
    "errors, blocked": ErrorSettling(pathway=Pathway(blocked=(2,))),
    **{
        f"errors, {name}": ErrorSettling(FreeEnergy(30.0, family=family), steps=3)
        for name, family in ENERGIES.items()
    },
    "errors, per coordinate": ErrorSettling(FreeEnergy(per="coordinate"), steps=2),
    "errors, per token": ErrorSettling(FreeEnergy(per="token"), steps=2),
    "states": StateSettling(FreeEnergy(100.0), steps=5),
    "states, student_t": StateSettling(FreeEnergy(100.0, family=ENERGIES["student_t"]), steps=5),
    "sweep": SweepSettling(),
    "highway": HighwaySettling(steps=2),
    "states, lean": StateSettling(FreeEnergy(100.0), steps=5, lean=True),
    "highway, lean": HighwaySettling(steps=2, lean=True),
}


def build(seed: int = 1, **changes: Any) -> PCTransformer:
    "A random model in float64 in which every part matters."
    model = PCTransformer(ModelConfig(**(SIZES | changes)), seed).double()
    stir(model, seed, 5.0)
    return model


def batch(seed: int = 0, B: int = 2) -> tuple[Tensor, Tensor]:
    tokens, targets = torch.randint(
        9, (2, B, 6), generator=torch.Generator().manual_seed(seed)
    ).unbind()
    targets[-1, 2] = -100
    return tokens, targets


def energies_are_as_stated(model: Any, tokens: Tensor, settled: Any) -> None:
    "Every node's energy is that of its density, at its error and precision, for each target."
    family = settled.batch_energy.energy.family
    for l, f in enumerate(model.predictors):
        below = tokens if l == 0 else settled.states[l - 1]
        energy = family.energy(settled.states[l] - f(below), settled.batch_energy.precision[l])
        stated = energy.sum().detach() / settled.count
        torch.testing.assert_close(settled.node_energy[-1, l], stated, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SOLVERS)
def test_settling_reads_and_never_raises_the_energy(name: str) -> None:
    """Rules 1, 4 and 8: parameters, gradients, logits and the random state stay; every node's
    energy is the stated one."""
    model, (tokens, targets) = build(), batch()
    logits, before = model(tokens), {n: p.clone() for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    settled = SOLVERS[name](model, tokens, targets)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())
    assert torch.equal(model(tokens), logits)
    assert math.isclose(
        settled.loss, F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item(), rel_tol=1e-12
    )
    assert (settled.energy.diff() <= 1e-12 * settled.energy.abs().max()).all()
    solver = SOLVERS[name]
    if isinstance(solver, SweepSettling):  # not measured
        assert settled.residual is None
    else:
        assert settled.residual is not None and math.isfinite(settled.residual)
    if not solver.reads_feed_forward:
        energies_are_as_stated(model, tokens, settled)


@pytest.mark.parametrize("name", SOLVERS)
def test_learning_is_local(name: str) -> None:
    "Rule 7: what reaches p.grad is made of each node's own (s_{l-1}, eps_l, Pi_l) alone."
    model, (tokens, targets) = build(), batch()
    learner = PredictiveCoding(SOLVERS[name])
    got = gradients(learner, model, tokens, targets)
    settled = SOLVERS[name](model, tokens, targets)
    for l, f in enumerate(model.predictors):
        below = settled.up.inputs[l].detach()
        local = local_gradient(
            f,
            below,
            settled.errors[l],
            settled.batch_energy.precision[l],
            settled.count,
            settled.batch_energy.energy.family,
        )
        for key, g in local.items():
            if (l, key) != (0, "token.weight"):
                torch.testing.assert_close(got[f"predictors.{l}.{key}"], g, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("attention", ["dot", "gaussian", "student_t", "mixture"])
@pytest.mark.parametrize(
    "solver", ["errors", "lean", "coordinate", "token", "student_t", "sweep", "highway", "states"]
)
def test_backprop_limit(solver: str, attention: str) -> None:
    """Rule 10: stiff latents give backprop's direction; the sweep and the whole highway are
    backprop."""
    model, (tokens, targets) = build(attention=attention), batch()
    stiff = {
        "errors": ErrorSettling(FreeEnergy(1e7)),
        "lean": ErrorSettling(FreeEnergy(1e7), lean=True),
        "coordinate": ErrorSettling(FreeEnergy(1e7, per="coordinate")),
        "token": ErrorSettling(FreeEnergy(1e7, per="token")),
        "student_t": ErrorSettling(FreeEnergy(1e7, family=ENERGIES["student_t"])),
        "sweep": SweepSettling(FreeEnergy(0.01)),
        "highway": HighwaySettling(steps=4),
        "states": StateSettling(FreeEnergy(300.0), steps=1000),
    }[solver]
    exact = solver in ("sweep", "highway")
    floor = (
        1 - 1e-12 if exact else 0.9 if solver == "states" else 0.999
    )  # 1000 steps are not all the way for states
    assert gradient_cosine(PredictiveCoding(stiff), model, tokens, targets)["all"] > floor


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 99),
    beta=st.floats(-2, 4),
    eta=st.floats(0, 2),
    layers=st.integers(1, 4),
    name=st.sampled_from(["errors", "states", "highway"]),
    energy=st.sampled_from(list(ENERGIES)),
    scale=st.floats(0.1, 8.0),
)
def test_nothing_diverges_silently(
    seed: int, beta: float, eta: float, layers: int, name: str, energy: str, scale: float
) -> None:
    "Any precision, any step, any depth: a lower energy or one clear sentence."
    model = PCTransformer(ModelConfig(**(SIZES | {"n_layer": layers})), seed)
    stir(model, seed, scale)
    tokens, targets = batch(seed)
    k, b = 3, 10.0**beta
    solver: Solver = {
        "errors": ErrorSettling(FreeEnergy(b, family=ENERGIES[energy]), steps=k),
        "states": StateSettling(
            FreeEnergy(b, family=ENERGIES[energy]), steps=k, step_size=10.0**eta
        ),
        "highway": HighwaySettling(FreeEnergy(b), steps=k),
    }[name]
    try:
        settled = solver(model, tokens, targets)
    except SettlingError as error:
        assert len(str(error).splitlines()) == 1
        return
    assert settled.energy.isfinite().all()
    assert (
        settled.node_energy.double().sum(-1).diff()
        <= 1e-5 * settled.node_energy.abs().sum(-1).max()
    ).all()


def linear_chain(gains: tuple[float, ...]) -> PCTransformer:
    "A model whose layers are orthogonal maps times a gain: |J|^2 is the gain's square."
    model = build()
    for l, gain in enumerate(gains, 1):
        layer = torch.nn.Linear(8, 8, bias=False, dtype=torch.float64)
        torch.nn.init.orthogonal_(layer.weight, gain, generator=torch.Generator().manual_seed(l))
        model.predictors[l] = layer
    return model


def test_bounds_of_states_are_of_their_own_surroundings() -> None:
    """H_l of a chain of linear layers is Pi_l + |W_{l+1}|^2 Pi_{l+1}, each node with the
    precision of the next."""
    gains = (2.0, 0.5, 3.0, 1.5)
    model, (tokens, targets) = linear_chain(gains), batch()
    walk = StateWalk.begin(StateSettling(FreeEnergy(7.0)), model, tokens, targets)
    Pi = [7 / s.square().mean().item() for s in walk.up.states]
    assert max(Pi) > 3 * min(Pi)
    for l, gain in enumerate(gains):
        assert 1 - 1e-5 < (walk.bounds[l] - Pi[l]) / (gain**2 * Pi[l + 1]) < 2 ** (1 / 16) + 1e-5, l
    assert walk.bounds[-1] > Pi[-1]


def steepness(model: PCTransformer, tokens: Tensor, targets: Tensor) -> list[float]:
    "What power iteration finds around every node of a batch."
    up = predict_up(model, tokens, targets)
    return curvatures(up, mask=relevant_positions(targets, errors_down(up, keep_graph=True)))


def test_bounds_do_not_jump() -> None:
    "In float32, rows in another order move a curvature by rounding only, wherever its value lies."
    gains = (2.0, 0.5, 1.0, 2**0.5)
    model = linear_chain(gains).float()
    tokens, targets = batch(B=5)
    for seed in range(20):
        order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
        curves = steepness(model, tokens[order], targets[order])
        assert curves[:4] == pytest.approx([g**2 for g in gains], rel=1e-4)


@pytest.mark.parametrize("nudge", [1.0, 2.0, 0.5, -0.5])
def test_stiff_learning_is_backprops_times_the_nudge(nudge: float) -> None:
    "Every weight's gradient, the output's included, in direction and length; centred or not."
    model = build()
    exact = gradients(Backprop(), model, *batch())
    for centred in (False, True):
        found = gradients(
            PredictiveCoding(ErrorSettling(FreeEnergy(1e8, nudge=nudge)), centred),
            model,
            *batch(),
        )
        for name, g in exact.items():
            torch.testing.assert_close(
                found[name], nudge * g, rtol=1e-5, atol=1e-5 * g.abs().max().item(), msg=name
            )


def test_centred_learning_is_the_difference_of_two_nudges() -> None:
    model, soft = build(), ErrorSettling(FreeEnergy(30.0), steps=3, step_size=0.5)
    both = gradients(PredictiveCoding(soft, centred=True), model, *batch())
    pull, push = (
        gradients(PredictiveCoding(nudged(soft, n)), model, *batch()) for n in (0.5, -0.5)
    )
    one = gradients(PredictiveCoding(soft), model, *batch())
    for name, g in both.items():
        torch.testing.assert_close(g, pull[name] - push[name], rtol=1e-9, atol=1e-12)
    assert any((both[n] - one[n]).abs().max() > 1e-3 * one[n].abs().max() for n in one), (
        "a single nudge is another rule"
    )


def test_tolerance_stops_early_and_keeps_the_graph() -> None:
    model, (tokens, targets) = build(), batch()
    solver = ErrorSettling(FreeEnergy(300.0), steps=20, tolerance=1e-3)
    free, early = (
        dataclasses.replace(solver, tolerance=0.0)(model, tokens, targets),
        solver(model, tokens, targets),
    )
    assert len(early.step_sizes) < 20 == len(free.step_sizes)
    assert early.residual is not None and early.residual <= 1e-3
    gradients(PredictiveCoding(solver), model, tokens, targets)


def test_lean_is_the_same() -> None:
    "Lean passes change memory, not numbers."
    model, (tokens, targets) = build(), batch()
    for solver in (
        ErrorSettling(FreeEnergy(30.0), steps=3),
        StateSettling(FreeEnergy(30.0), steps=4),
        HighwaySettling(steps=2),
    ):
        full = gradients(PredictiveCoding(solver), model, tokens, targets)
        lean = gradients(
            PredictiveCoding(dataclasses.replace(solver, lean=True)), model, tokens, targets
        )
        for name in full:
            torch.testing.assert_close(lean[name], full[name], rtol=1e-9, atol=1e-13)


def test_dropout_stands_still_while_settling() -> None:
    """In training the masks are one draw for a settling, so the energy is one function and never
    rises."""
    model, (tokens, targets) = build(dropout=0.4), batch()
    torch.manual_seed(3)
    settled = ErrorSettling(FreeEnergy(30.0), steps=6)(model, tokens, targets)
    assert (
        (settled.energy.diff() <= 1e-9).all()
        and settled.residual is not None
        and settled.residual < 0.5
    )
    other = ErrorSettling(FreeEnergy(30.0), steps=6)(model, tokens, targets)
    assert other.loss != settled.loss, "another settling draws other masks"
    model.eval()
    a, b = (ErrorSettling()(model, tokens, targets).loss for _ in range(2))
    assert a == b


def test_incremental_moves_weights_within_a_batch() -> None:
    model, (tokens, targets) = build(), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    calls = []

    def apply() -> None:
        calls.append({n: p.clone() for n, p in model.named_parameters()})
        optimizer.step()
        optimizer.zero_grad()

    report = IncrementalPC(StateSettling(FreeEnergy(100.0), steps=4), apply).backward(
        model, tokens, targets
    )
    assert len(calls) == 3 and report.step_sizes is not None and len(report.step_sizes) == 4
    moved = [
        any(not torch.equal(a[n], b[n]) for n in a) for a, b in zip(calls, calls[1:], strict=False)
    ]
    assert all(moved) and all(p.grad is not None for p in model.parameters())


def test_highway_error_is_bounded() -> None:
    """The bound of the notebook on stability: what is left after k rounds is at most the tail of
    the binomial series in the branch norms."""
    model, (tokens, targets) = build(), batch(B=1)
    up = predict_up(model, tokens, targets)
    exact = errors_down(up, keep_graph=True)
    norms = []
    for l, f in enumerate(model.predictors[1:], 1):
        J = torch.autograd.functional.jacobian(f, up.states[l - 1]).reshape(48, 48)
        norms.append(torch.linalg.matrix_norm(J - torch.eye(48).double(), 2).item())
    g, N = max(norms), len(norms)
    for k in range(N + 1):
        got = rounds_down(predict_up(model, tokens, targets), k)
        for l in range(N + 1):
            bound = exact[-1].norm().item() * sum(
                math.comb(N - l, j) * g**j for j in range(k + 1, N - l + 1)
            )
            assert (got[l] - exact[l]).norm().item() <= bound + 1e-9


def trainer(learner: LearnerConfig, **changes: Any) -> Trainer:
    train = TrainConfig(iters=6, batch_size=4, warmup_iters=2, eval_interval=6)
    model = ModelConfig(**SIZES, dropout=changes.pop("dropout", 0.0))
    config = RunConfig(model, learner, dataclasses.replace(train, **changes))
    ids = torch.randint(9, (400,), generator=torch.Generator().manual_seed(0))
    return Trainer(config, Text.of_ids(ids[:300], ids[300:], config), torch.device("cpu"))


LEARNERS = {
    "sweep": LearnerConfig(solver="sweep"),
    "state": LearnerConfig(solver="state", steps=4),
    "highway": LearnerConfig(solver="highway", steps=3),
    "centred": LearnerConfig(centred=True, relative_precision=30.0),
    "annealed": LearnerConfig(
        steps=3, steps_end=1, relative_precision=30.0, relative_precision_end=3000.0
    ),
    "student_t": LearnerConfig(energy="student_t", per="coordinate", steps=2),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_every_learner_trains_and_resumes(name: str, tmp_path: Any) -> None:
    """Rule 6 for every solver: a resumed run's losses are an uninterrupted run's, bit for bit;
    with dropout too."""
    for dropout in (0.0, 0.3):
        whole, first = (
            trainer(LEARNERS[name], dropout=dropout),
            trainer(LEARNERS[name], dropout=dropout),
        )
        for _ in range(6):
            whole.advance()
        for _ in range(3):
            first.advance()
        save_checkpoint(first, tmp_path / f"{dropout}")
        again = trainer(LEARNERS[name], dropout=dropout)
        resume(again, tmp_path / f"{dropout}")
        torch.manual_seed(99)
        for _ in range(3):
            again.advance()
        assert again.losses == whole.losses
        assert math.isfinite(again.measure()["cosine"])


def test_schedules_are_functions_of_progress() -> None:
    t = trainer(LEARNERS["annealed"])
    now = lambda learner: (learner.solver.steps, learner.solver.energy.relative_precision)
    assert t.config.train.iters == 6
    for step in range(6):
        wanted = round(3 - 2 * step / 6), pytest.approx(30.0 * 100.0 ** (step / 6))
        assert now(t.alone()) == wanted, "a look settles as the next step will"
        t.advance()
    assert now(t.alone()) == (1, pytest.approx(3000.0))


def test_parts_of_a_batch_make_the_batch() -> None:
    "Accumulation: the gradient over parts is that of the whole."
    for learner, tol in (
        (LearnerConfig(algorithm="backprop"), 1e-5),
        (LearnerConfig(solver="sweep"), 1e-5),
    ):
        whole, parts = trainer(learner), trainer(learner, accumulate=4)
        for t in (whole, parts):
            t.backward()
        for p, q in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
            assert p.grad is not None and q.grad is not None
            torch.testing.assert_close(p.grad, q.grad, rtol=tol, atol=1e-7)


@pytest.mark.parametrize("ragged_rows", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"per": "coordinate"},
        {"per": "token"},
        {"energy": "student_t"},
        {"centred": True},
        {"lean": True},
    ],
)
def test_parts_of_a_batch_settle_as_one(changes: dict[str, Any], ragged_rows: bool) -> None:
    "At soft latents, too: every part's precisions are in units of the whole batch's mean squares."
    learner = LearnerConfig(**({"steps": 2, "relative_precision": 1.0, "step_size": 0.2} | changes))
    found = []
    for accumulate in (1, 4):
        t = trainer(learner, accumulate=accumulate)
        t.model.double()
        tokens, targets = t.batch(0)
        if ragged_rows:
            targets[0, 1:], targets[2, 3:], targets[3, 5] = -100, -100, -100
        t.batch = lambda _, both=(tokens, targets): both  # type: ignore[method-assign]
        t.backward()
        found.append({n: p.grad for n, p in t.model.named_parameters()})
    assert apart(*found) < 1e-5


def test_parts_count_by_what_they_predict() -> None:
    """Accumulation where rows have different numbers of targets, and one part has none: the
    whole batch's gradient and loss."""
    for learner, limit in (
        (LearnerConfig(algorithm="backprop"), 1e-6),
        (LearnerConfig(solver="sweep"), 1e-6),
        (LearnerConfig(solver="highway", steps=4), 1e-6),
        (LearnerConfig(), 1e-5),
    ):
        runs = [trainer(learner), trainer(learner, accumulate=4), trainer(learner, accumulate=2)]
        losses = []
        for t in runs:
            tokens, targets = t.batch(0)
            targets[0, 1:], targets[2], targets[3, 4:] = -100, -100, -100
            t.batch = lambda _, both=(tokens, targets): both  # type: ignore[method-assign]
            losses.append(t.backward())
        found = [{n: p.grad for n, p in t.model.named_parameters()} for t in runs]
        assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
        assert max(apart(found[0], other) for other in found[1:]) < limit  # type: ignore[arg-type]
    targets[:] = -100
    with pytest.raises(ValueError, match="predicts nothing"):
        runs[2].backward()


@pytest.mark.parametrize(
    "learner",
    [
        LearnerConfig(algorithm="backprop"),
        *(LearnerConfig(solver=s) for s in ("sweep", "highway", "error")),
    ],
)
def test_a_share_that_predicts_nothing(
    learner: LearnerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a team the process whose rows have no targets adds nothing and goes on; a batch without
    any stops all of them."""
    t = trainer(learner)
    t.team = DataParallel(1, 2)
    tokens, targets = t.batch(0)
    targets[2:] = -100
    t.batch = lambda _: (tokens, targets)  # type: ignore[method-assign]
    first = (targets[:2] != -100).sum()
    others = lambda x: (
        x + (first.to(x) if x.numel() == 1 and x.dim() == 0 else torch.ones_like(x))
    )  # what number 0 has
    monkeypatch.setattr("pc_transformer.training.parallel.all_sum", others)
    monkeypatch.setattr("pc_transformer.training.trainer.all_sum", others)
    synced = "pc_transformer.training.trainer.sync_gradients"
    monkeypatch.setattr(synced, lambda model, count: count)
    t.backward()
    assert all(p.grad is None or not p.grad.any() for p in t.model.parameters())
    targets[:] = -100
    first.zero_()
    with pytest.raises(ValueError, match="predicts nothing"):
        t.backward()


def test_mixed_precision_stays_close() -> None:
    "bfloat16 inside, float32 weights and gradients."
    for learner in (LearnerConfig(), LearnerConfig(algorithm="backprop")):
        full, short = trainer(learner), trainer(learner, dtype="bfloat16")
        for t in (full, short):
            for _ in range(6):
                t.advance()
        assert all(p.dtype == torch.float32 for p in short.model.parameters())
        assert short.losses != full.losses
        torch.testing.assert_close(
            torch.tensor(short.losses), torch.tensor(full.losses), rtol=0.01, atol=0
        )


def test_mixed_precision_takes_full_steps() -> None:
    """A stiff step gains less than bfloat16's rounding of the energy: it is taken whole, and
    teaches what backprop does."""
    t = trainer(LearnerConfig(algorithm="backprop"))
    for iters in (0, 30):
        while t.step < iters:
            t.advance()
        for step in range(3):
            tokens, targets = t.batch(step)
            with torch.autocast("cpu", torch.bfloat16):
                for beta in (1e3, 1e4, 1e5):
                    solver = ErrorSettling(FreeEnergy(beta))
                    assert solver(t.model, tokens, targets).step_sizes == [1.0]
                    assert (
                        gradient_cosine(PredictiveCoding(solver), t.model, tokens, targets)["all"]
                        > 0.999
                    )
                soft = ErrorSettling(FreeEnergy(0.3), steps=8)(t.model, tokens, targets)
            assert soft.energy[-1] < soft.energy[0]


def test_bounds_are_those_of_each_nodes_own_block() -> None:
    """Equation (2): a node's block of the Hessian has its own precision and that of the node
    above, never another's."""
    model, (tokens, targets) = build(n_layer=1), batch(B=1)
    given = [torch.tensor(p).double() for p in (3.0, 500.0, 0.02)]
    walk = StateWalk.begin(StateSettling(FixedPrecisions(given=given)), model, tokens, targets)

    def energy(states: list[Tensor]) -> Tensor:
        below = [tokens, *states[:-1]]
        trios = zip(states, model.predictors, below, given, strict=True)
        logits = model.output(states[-1])
        judged = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        return judged + sum(
            (p * (s - f(b)).square().sum() / 2 for s, f, b, p in trios), torch.zeros(())
        )

    reference = patch("pc_transformer.attention.kernels.choose", lambda *_, **__: ("reference", ""))
    for l, s in enumerate(walk.up.states):

        def along(x: Tensor, l: int = l) -> Tensor:
            return energy([x if m == l else t for m, t in enumerate(walk.up.states)])

        with reference:  # which has second derivatives
            block = torch.autograd.functional.hessian(along, s).reshape(48, 48)  # type: ignore[arg-type]
        above = torch.linalg.matrix_norm(block - given[l] * torch.eye(48).double(), 2)
        assert 0.97 < walk.bounds[l] / (given[l] + above) < 1.05


def masks(model: PCTransformer) -> dict[str, list[Tensor]]:
    "What every dropout module drops, at each look, from now on."
    seen: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(
                lambda _, __, out, name=name: seen.setdefault(name, []).append(out.detach() == 0)
            )
    return seen


@pytest.mark.parametrize("name", ["errors, K = 3", "states", "highway", "sweep"])
def test_dropout_differs_between_layers_and_settlings(name: str) -> None:
    """Within a settling a layer drops the same at every look; another layer, and another
    settling, something else."""
    torch.manual_seed(3)
    model, (tokens, targets) = build(dropout=0.4), batch()
    seen, first = masks(model), {}
    for turn in range(2):
        seen.clear()
        SOLVERS[name](model, tokens, targets)
        assert len(seen) == 1 + len(model.predictors[1:]) and all(
            torch.equal(m, all_[0]) for all_ in seen.values() for m in all_
        )
        now = {where: looks[0] for where, looks in seen.items()}
        for a, b in itertools.combinations(now, 2):
            assert (now[a] != now[b]).double().mean() > 0.2, f"{a} and {b} drop the same"
        if turn:
            assert all((now[a] != first[a]).any() for a in now)
        first = now


@pytest.mark.parametrize(
    "learner", [LearnerConfig(algorithm="backprop"), LearnerConfig(), LearnerConfig(solver="sweep")]
)
def test_dropout_differs_between_steps(learner: LearnerConfig) -> None:
    "Training drops something else at every step, though each is a function of the seed."
    runs = []
    for _ in range(2):
        t = trainer(learner, dropout=0.4)
        seen, steps = masks(t.model), []
        for _ in range(3):
            t.advance()
            steps.append({where: looks[0] for where, looks in seen.items()})
            seen.clear()
        for a, b in itertools.combinations(steps, 2):
            assert all((a[where] != b[where]).double().mean() > 0.2 for where in a)
        runs.append(steps)
    for a, b in zip(*runs, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[where], b[where]) for where in a)


# ---- positions that predict nothing and are not seen


def ragged(
    dtype: torch.dtype = torch.float64, pad: float = 1e4, **changes: Any
) -> tuple[PCTransformer, Tensor, Tensor]:
    """A model with room for padding, whose embedding is `pad` times as large; one row ends
    early, one predicts nothing."""
    model = PCTransformer(ModelConfig(**(SIZES | {"block_size": 32} | changes)), seed=1).to(dtype)
    stir(model, 1, 5.0)
    tokens, targets = torch.randint(
        8, (2, 4, 8), generator=torch.Generator().manual_seed(0)
    ).unbind()
    targets[0, 1], targets[1, 5:], targets[3] = -100, -100, -100
    with torch.no_grad():
        model.predictors[0].position.weight[8:] *= pad
    return model, tokens, targets


def padded(tokens: Tensor, targets: Tensor, to: int = 32) -> tuple[Tensor, Tensor]:
    more = to - tokens.shape[1]
    return F.pad(tokens, (0, more), value=8), F.pad(targets, (0, more), value=-100)


def apart(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    "The largest difference in units of the largest entry of the whole gradient."
    return max((one[n] - two[n]).abs().max().item() for n in one) / max(
        g.abs().max().item() for g in one.values()
    )


PADDED: dict[str, Any] = {
    "backprop": Backprop(),
    "centred": PredictiveCoding(
        ErrorSettling(FreeEnergy(1.0), steps=3, step_size=0.5), centred=True
    ),
    **{
        f"{kind}, per {per}, {name}": PredictiveCoding(
            ErrorSettling(
                FreeEnergy(1.0, per=per, family=ENERGIES[name]),
                steps=4,
                step_size=0.5,
                max_halvings=30,
            )
            if kind == "soft"
            else StateSettling(FreeEnergy(3.0, per=per, family=ENERGIES[name]), steps=4)
        )
        for kind in ("soft", "states")
        for per, name in (
            ("node", "huber"),
            ("coordinate", "gaussian"),
            ("token", "gaussian"),
            ("token", "student_t"),
        )
    },
    **{name: PredictiveCoding(solver) for name, solver in SOLVERS.items()},
    "incremental": IncrementalPC(StateSettling(FreeEnergy(3.0), steps=4), lambda: None),
}


@pytest.mark.parametrize("name", PADDED)
def test_padding_changes_nothing(name: str) -> None:
    """What stands behind a row's last target, and is seen by nothing that is predicted, has no
    part in any statistic."""
    model, tokens, targets = ragged()
    whole = padded(tokens, targets)
    short, long = (gradients(PADDED[name], model, x, y) for x, y in ((tokens, targets), whole))
    assert apart(short, long) < 1e-12
    if isinstance(learner := PADDED[name], PredictiveCoding):
        one, two = (learner.solver(model, x, y) for x, y in ((tokens, targets), whole))
        torch.testing.assert_close(one.node_energy, two.node_energy, rtol=1e-11, atol=1e-11)
        assert one.step_sizes == two.step_sizes and one.loss == pytest.approx(two.loss, rel=1e-13)
        if one.residual is not None:
            assert one.residual == pytest.approx(two.residual, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("attention", ["dot", "student_t", "mixture"])
@pytest.mark.parametrize(
    "name", ["errors", "soft, per coordinate, gaussian", "sweep", "highway", "states"]
)
def test_padding_changes_nothing_in_float32(name: str, attention: str) -> None:
    """Beyond 1e-6 only what rounding to float32 does anyway: the padded batch is no further off
    than the short one."""
    model, tokens, targets = ragged(torch.float32, attention=attention)
    exact = gradients(PADDED[name], ragged(attention=attention)[0], tokens, targets)
    short, long = (
        gradients(PADDED[name], model, x, y)
        for x, y in ((tokens, targets), padded(tokens, targets))
    )
    rounded = apart(exact, {n: g.double() for n, g in short.items()})
    assert apart(short, long) < 1e-6 + 4 * rounded < (0.1 if name == "states" else 1e-3)


class LooksAhead(torch.nn.Linear):
    """A layer that is not this library's: every position reads the mean of all, those behind the
    last target too."""

    def forward(self, s: Tensor) -> Tensor:
        return s + (super().forward(s) + s.mean(1, keepdim=True)).tanh()


def looks_ahead() -> Chain:
    layers = [torch.nn.Embedding(9, 8), LooksAhead(8, 8), LooksAhead(8, 8)]
    chain = Chain(layers, torch.nn.Linear(8, 9)).double()
    stir(chain, 3, 2.0)
    return chain


@pytest.mark.parametrize("per", ["node", "coordinate", "token"])
@pytest.mark.parametrize("kind", ["errors", "states", "sweep"])
def test_a_chain_that_looks_ahead_stays_right(kind: str, per: Any) -> None:
    """Where positions behind the last target are read, they settle, cost energy and teach like
    any other."""
    model, (tokens, targets) = looks_ahead(), batch()
    targets[:, 3:] = -100
    solver: Any = {
        "errors": ErrorSettling(FreeEnergy(30.0, per=per), steps=3),
        "states": StateSettling(FreeEnergy(30.0, per=per), steps=30),
        "sweep": SweepSettling(),
    }[kind]
    settled = solver(model, tokens, targets)
    assert all(e[:, 3:].abs().max() > 0 for e in settled.errors[:-1])
    assert (settled.energy.diff() <= 1e-12 * settled.energy.abs().max()).all()
    if kind != "sweep":
        energies_are_as_stated(model, tokens, settled)
    stiff: Any = ErrorSettling(FreeEnergy(1e9, per=per)) if kind != "sweep" else solver
    learner: Any = PredictiveCoding(stiff)
    ours, theirs = (gradients(x, model, tokens, targets) for x in (learner, Backprop()))  # type: ignore[arg-type]
    assert apart(theirs, ours) < 1e-6


@pytest.mark.parametrize("name", ["states", "errors, K = 3", "highway"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_order_of_rows_does_not_matter(name: str, dtype: torch.dtype) -> None:
    """Statistics are sums over rows, and power iteration starts alike in every row: another
    order, the same gradient."""
    # a state's error is a difference: rounding is amplified
    limit = (1e-3 if name == "states" else 1e-6) if dtype == torch.float32 else 1e-11
    model, (tokens, targets) = build().to(dtype), batch(B=5)
    targets[3, 4:] = -100
    first = gradients(PredictiveCoding(SOLVERS[name]), model, tokens, targets)
    curves = steepness(model, tokens, targets)
    for seed in range(3):
        order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
        other = gradients(PredictiveCoding(SOLVERS[name]), model, tokens[order], targets[order])
        assert apart(first, other) < limit
        assert steepness(model, tokens[order], targets[order]) == pytest.approx(curves, rel=1e-4)


# ---- what a solver refuses, says and measures


def fed(dtype: torch.dtype) -> tuple[PCTransformer, Tensor, Tensor]:
    "A model as its constructor makes it, at one dtype."
    tokens, targets = batch(B=4)
    return PCTransformer(ModelConfig(**SIZES), seed=1).to(dtype), tokens, targets


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_learns(dtype: torch.dtype) -> None:
    """Precisions and errors are kept in float32: a stiff node's precision is beyond float16, its
    errors below it."""
    full = gradients(Backprop(), *fed(torch.float32))
    for name in (
        "errors",
        "errors, K = 3",
        "errors, lean",
        "errors, per coordinate",
        "errors, per token",
        "errors, student_t",
        "sweep",
        "highway",
        "highway, lean",
    ):
        model, tokens, targets = fed(dtype)
        settled = SOLVERS[name](model, tokens, targets)
        assert all(
            x.dtype == torch.float32 for x in (*settled.errors, *settled.batch_energy.precision)
        )
        assert all(s.dtype == dtype for s in settled.states) and settled.energy.isfinite().all()
        found = gradients(PredictiveCoding(SOLVERS[name]), model, tokens, targets)
        flat = [torch.cat([g[n].double().flatten() for n in full]) for g in (found, full)]
        assert F.cosine_similarity(*flat, dim=0) > 0.999, name
        assert all(g.dtype == dtype for g in found.values())
    with pytest.raises(TypeError, match="too few digits"):
        StateSettling(FreeEnergy(100.0))(*fed(dtype))


def test_a_sweep_measures_no_residual() -> None:
    """At fixed predictions a second sweep is the first again: it is neither made nor called a
    measurement."""
    model, (tokens, targets) = build(), batch()
    calls: list[int] = []
    model.predictors[1].register_full_backward_pre_hook(lambda *_: calls.append(1))
    for lean in (False, True):
        calls.clear()
        assert (
            SweepSettling(lean=lean)(model, tokens, targets, measure_residual=True).residual is None
        )
        assert len(calls) == 1, "one sweep"
    right, weak = (
        HighwaySettling(steps=rounds)(model, tokens, targets).residual for rounds in (4, 1)
    )
    assert right is not None and weak is not None and right < 1e-12 < 1e-3 < weak, (
        "the highway's is measured"
    )


def test_parallel_states_say_that_they_are_far_from_rest() -> None:
    "Once, not at every batch; and only where the residual is measured and large."
    model = build()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for seed in range(4):
            settled = StateSettling(FreeEnergy(100.0), steps=2)(model, *batch(seed))
            assert settled.residual is not None and settled.residual > 0.5
    assert [w.category for w in said] == [UnsettledWarning] and len(
        str(said[0].message).splitlines()
    ) == 1
    line = linecache.getline(said[0].filename, said[0].lineno)
    assert said[0].filename == __file__ and "steps=2)(model" in line, "the caller's line is named"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        StateSettling(FreeEnergy(100.0), steps=2)(model, *batch(), measure_residual=False)
        ErrorSettling(FreeEnergy(1.0), steps=1, max_halvings=30)(model, *batch())
        near = StateSettling(FreeEnergy(30.0), steps=600)(model, *batch())
    assert near.residual is not None and near.residual < 0.5


@pytest.mark.parametrize(
    "kind", [ErrorSettling, StateSettling, SweepSettling, HighwaySettling, Pathway, FreeEnergy]
)
def test_types_of_settings_come_first(kind: Any) -> None:
    """Whatever is no number, name or function where one belongs: one sentence that names the
    setting."""
    for f in dataclasses.fields(kind):
        wrong = [object(), {}, [3], torch.ones(2, 3), "0.1", b"x", 1 + 0j, math.nan, math.inf]
        wrong += [2.0] if f.type is int else []
        wrong += [True] if f.type in (int, float) else [1] if f.type is bool else []
        for value in wrong:
            with pytest.raises(ValueError) as caught:
                kind(**{f.name: value})
            assert f.name in str(caught.value) and len(str(caught.value).splitlines()) == 1
    kind(**{f.name: f.default for f in dataclasses.fields(kind)})


def test_batches_that_are_no_tensors() -> None:
    model, (tokens, targets) = build(), batch()
    for solver in (
        ErrorSettling(),
        StateSettling(FreeEnergy(100.0)),
        SweepSettling(),
        HighwaySettling(),
    ):
        for x, y in ((tokens.tolist(), targets), (tokens, None), (tokens.numpy(), targets)):
            with pytest.raises(TypeError, match="must be an? .*tensor"):
                solver(model, x, y)  # type: ignore[arg-type]
