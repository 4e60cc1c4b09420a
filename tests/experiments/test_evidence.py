"""Evidence: columns settle and are sampled as their energy says, in the order of time, with the
present weights and split."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import stir
from torch import Tensor

from pc_transformer import ModelConfig, PCTransformer
from pc_transformer.attention import Keys
from pc_transformer.config import replace
from pc_transformer.data import CharTokenizer, Text, TextData
from pc_transformer.experiments import evidence_study as study
from pc_transformer.experiments import harness
from pc_transformer.experiments.columns import (
    at_the_mode,
    column_energy,
    resample,
    sample_columns,
    settle_columns,
)
from pc_transformer.experiments.evidence import (
    EvidenceSettler,
    EvidenceTransformer,
    make_settler,
    pick,
    read_in_order,
    thin,
)
from pc_transformer.experiments.evidence_study import gains, read_losses, some_windows
from pc_transformer.inference import generate
from pc_transformer.settling import SettlingError
from pc_transformer.training import Trainer
from pc_transformer.training.run import RunConfig

SIZES: dict[str, Any] = {"vocab_size": 7, "block_size": 6, "n_layer": 2, "n_head": 2, "d_model": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "dot": {},
    "by key": {"attention": "student_t", "precision": "key", "mixing": "key", "bias": True},
    "mixture": {"attention": "mixture", "precision": "key", "n_kv_head": 1},
    "window": {"attention": "gaussian", "window": 2, "mixing": "norm", "background": True},
}
TOKENS = torch.randint(7, (3, 6), generator=torch.Generator().manual_seed(0))


def made(family: str = "dot", seed: int = 0, scale: float = 6.0, **sizes: Any) -> PCTransformer:
    model = (
        PCTransformer(ModelConfig(**(SIZES | sizes), **FAMILIES[family]), seed=seed)
        .double()
        .eval()
        .requires_grad_(False)
    )
    stir(model, seed, scale)
    return model


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> PCTransformer:
    return made(request.param)


# The oracle: whole layers of the model over the states of all columns so far. No memory, no merged
# attention, no cache.

States = list[Tensor]  # of every node, `(B, columns, D)`


def climb(
    model: PCTransformer, past: States | None, token: Tensor, i: int, errors: States
) -> tuple[States, States]:
    "Predictions and states of column i over the states of the columns before it."
    embedding: Any = model.predictors[0]
    predictions, states = [embedding.token(token) + embedding.position.weight[i]], []
    for l, e in enumerate(errors):
        if l:
            below = states[-1] if past is None else torch.cat([past[l - 1], states[-1]], 1)
            predictions.append(model.predictors[l](below)[:, -1:])
        states.append(predictions[-1] + e)
    return predictions, states


def none(model: PCTransformer, rows: int) -> States:
    return [torch.zeros(rows, 1, model.config.d_model, dtype=torch.float64)] * len(model.predictors)


def energy_of(
    model: PCTransformer,
    past: States | None,
    token: Tensor,
    i: int,
    errors: States,
    v: States,
    after: Tensor,
) -> Tensor:
    "Equation (1), written out."
    states = climb(model, past, token, i, errors)[1]
    prior = torch.stack(
        [(e.square() / (2 * x)).sum(-1)[:, 0] for e, x in zip(errors, v, strict=True)]
    ).sum(0)
    return prior - model.output(states[-1])[:, 0].log_softmax(-1).gather(-1, after)[:, 0]


def variances_of(predictions: States, beta: float) -> States:
    return [mu.square().mean(-1, keepdim=True) / beta for mu in predictions]


def filtered(model: PCTransformer, tokens: Tensor, beta: float, steps: int) -> Tensor:
    """Logits of unsettled columns over a past that took full steps; fails where a full step
    would climb."""
    past, logits = None, []
    for i in range(tokens.shape[1]):
        token, errors = tokens[:, i : i + 1], none(model, len(tokens))
        predictions, states = climb(model, past, token, i, errors)
        logits.append(model.output(states[-1])[:, 0])
        if i + 1 < tokens.shape[1]:
            v, after = variances_of(predictions, beta), tokens[:, i + 1 : i + 2]
            for _ in range(steps):
                leaves = [e.clone().requires_grad_() for e in errors]
                before = energy_of(model, past, token, i, leaves, v, after)
                slopes = torch.autograd.grad(before.sum(), leaves)
                errors = [e - x * g for e, x, g in zip(errors, v, slopes, strict=True)]
                assert (energy_of(model, past, token, i, errors, v, after) <= before).all()
            states = climb(model, past, token, i, errors)[1]
        past = (
            states
            if past is None
            else [torch.cat(pair, 1) for pair in zip(past, states, strict=True)]
        )
    return torch.stack(logits, 1)


# ---- the energy and its descent


def test_the_energy_of_a_column_is_equation_one(model: PCTransformer) -> None:
    "With its halves, for errors and variances that are not small."
    g = torch.Generator().manual_seed(1)
    errors = [torch.randn(3, 1, 8, dtype=torch.float64, generator=g) for _ in model.predictors]
    v = [0.1 + torch.rand(3, 1, 1, dtype=torch.float64, generator=g) for _ in model.predictors]
    token, after = TOKENS[:, :1], TOKENS[:, 1:2]
    ours = column_energy(model, token, after, [None] * 2, v)(errors)
    torch.testing.assert_close(
        ours[:, 0], energy_of(model, None, token, 0, errors, v, after), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("steps", [1, 2])
def test_reading_in_order_is_the_filter_of_whole_layers(model: PCTransformer, steps: int) -> None:
    "Memories, cuts, merges and the state that goes on from token to token, against none of them."
    beta = 100.0
    truth = filtered(model, TOKENS, beta, steps)
    ours = EvidenceTransformer(model, beta, steps).double()
    torch.testing.assert_close(read_in_order(ours, TOKENS), truth, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(ours(TOKENS, rounds=6), truth, rtol=1e-8, atol=1e-8)
    settler = EvidenceSettler(steps=steps, relative_precision=beta)
    for t in range(1, 7):  # token by token from the past that is kept, and each prefix anew
        kept, anew = (
            settler.logits(model, TOKENS[:, :t]),
            EvidenceSettler(steps, beta).logits(model, TOKENS[:, :t]),
        )
        assert torch.equal(kept, anew)
        torch.testing.assert_close(kept, truth[:, t - 1].log_softmax(-1), rtol=1e-8, atol=1e-8)
    assert not torch.allclose(truth, model(TOKENS), atol=1e-4)


def test_no_logit_looks_ahead_and_every_token_is_evidence(model: PCTransformer) -> None:
    soft = EvidenceTransformer(model, 30.0, steps=2, rounds=2).double()
    ways: list[Callable[[Tensor], Tensor]] = [lambda x: read_in_order(soft, x), soft]
    for read in ways:
        before = read(TOKENS)
        for t in range(6):
            later = TOKENS.clone()
            later[:, t:] = (later[:, t:] + 1) % 7
            assert torch.equal(read(later)[:, :t], before[:, :t])
    # the token after a column moves what later columns read of it: put it to the model that reads
    # the same inputs
    settled = soft.settle(TOKENS)[0]
    changed = TOKENS.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 7
    assert settled is not None
    for a, b in zip(settled, soft.settle(changed)[0] or [], strict=True):
        assert (
            torch.equal(a[:, :2], b[:, :2])
            and not torch.equal(a[:, 2], b[:, 2])
            and (a[:, -1] == 0).all()
        )


def test_rows_and_their_order_do_not_matter(model: PCTransformer) -> None:
    soft, order = EvidenceTransformer(model, 10.0, steps=3).double(), torch.tensor([2, 0, 1])
    whole = read_in_order(soft, TOKENS)
    torch.testing.assert_close(
        read_in_order(soft, TOKENS[order]), whole[order], rtol=1e-10, atol=1e-10
    )
    for row in range(3):
        torch.testing.assert_close(
            read_in_order(soft, TOKENS[row : row + 1])[0], whole[row], rtol=1e-10, atol=1e-10
        )
    x, y = TOKENS[:, :5], TOKENS[:, 1:]
    for size in (1, 2, 3):
        one = read_losses(soft, x, y, size)
        torch.testing.assert_close(
            one, F.cross_entropy(read_in_order(soft, x).mT, y, reduction="none").mean(1)
        )


def test_settling_never_raises_the_energy_of_a_column() -> None:
    """Waves under a prior that is far too wide: full steps climb in most columns, and each
    answers for itself."""
    g = torch.Generator().manual_seed(3)
    a, phase = (
        3 * torch.randn(4, 50, 5, dtype=torch.float64, generator=g),
        torch.randn(4, 50, dtype=torch.float64, generator=g),
    )
    v = [torch.rand(4, 50, 1, dtype=torch.float64, generator=g).mul(20)]

    def energy(errors: list[Tensor]) -> Tensor:
        return (errors[0].square() / (2 * v[0])).sum(-1) + 4 * (
            (errors[0] * a).sum(-1) + phase
        ).sin()

    start = [torch.randn(4, 50, 5, dtype=torch.float64, generator=g)]
    for halvings in (0, 1, 6):
        errors, trace = settle_columns(energy, start, v, 8, 1.0, halvings)
        rises = torch.stack(trace).diff(dim=0)
        assert (
            (rises <= 0).all()
            and torch.equal(energy(errors), trace[-1])
            and torch.equal(energy(start), trace[0])
        )
        stays = (errors[0] == start[0]).all(-1)
        assert stays.any() and not stays.all() or halvings == 6
    padded = lambda e: energy([torch.cat([e[0], start[0][:, 1:]], 1)])[:, :1]
    alone, _ = settle_columns(padded, [start[0][:, :1]], [v[0][:, :1]], 8)
    assert torch.equal(alone[0], settle_columns(energy, start, v, 8)[0][0][:, :1])
    with pytest.raises(SettlingError, match="not finite"):
        settle_columns(lambda e: energy(e) + math.nan, start, v, 1)


def test_memories_are_cut_joined_and_picked_by_column_and_row() -> None:
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g)
    for own in (True, False):
        p, w = (draw(3, 2, 1, 5, 1), draw(3, 2, 1, 5)) if own else (draw(1, 2, 1, 1, 1), None)
        by_key = ("precision", "log_mix") if own else ()
        memory = Keys(draw(3, 2, 1, 5, 4), draw(3, 2, 5, 4), p, w, by_key)
        parts = memory[:2].append(memory[2:3]).append(memory[3:5])
        for name in ("k", "v", "precision", "log_mix"):
            whole, joined = getattr(memory, name), getattr(parts, name)
            assert (whole is None and joined is None) or torch.equal(whole, joined), name
        cut, row = memory[1:3], pick(memory, torch.tensor([2]))
        assert torch.equal(cut.k, memory.k[:, :, :, 1:3]) and torch.equal(
            cut.v, memory.v[:, :, 1:3]
        )
        assert torch.equal(row.k, memory.k[2:]) and torch.equal(row.v, memory.v[2:])
        if own:
            assert (
                cut.precision is not None
                and torch.equal(cut.precision, p[:, :, :, 1:3])
                and row.log_mix is not None
            )
            assert w is not None and torch.equal(row.log_mix, w[2:])
        else:
            assert cut.precision is p and row.precision is p


# ---- what a settler keeps


def same_class(model: PCTransformer) -> dict[str, Tensor]:
    return copy.deepcopy(made(seed=9).state_dict())


CHANGES: dict[str, Callable[[PCTransformer, EvidenceSettler], Any]] = {
    "a weight in place": lambda m, s: m.predictors[1].attention.qkv.weight.mul_(1.5),
    "loaded in place": lambda m, s: m.load_state_dict(same_class(m)),
    "loaded by assignment": lambda m, s: m.load_state_dict(same_class(m), assign=True),
    "steps": lambda m, s: setattr(s, "steps", 2),
    "precision": lambda m, s: setattr(s, "relative_precision", 3.0),
    "step size": lambda m, s: setattr(s, "step_size", 0.25),
    "seed": lambda m, s: setattr(s, "seed", 5),
    "samples": lambda m, s: setattr(s, "samples", 6),
}


@pytest.mark.parametrize("what", CHANGES)
def test_nothing_stale_is_read(what: str) -> None:
    "After any change the next logits are those of a new settler."
    model = made()
    settler = EvidenceSettler(1, 10.0, temperature=1.0, samples=4, seed=1)
    for t in (3, 4):
        settler.logits(model, TOKENS[:, :t])
    with torch.no_grad():
        CHANGES[what](model, settler)
    fresh = EvidenceSettler(
        settler.steps,
        settler.relative_precision,
        settler.step_size,
        1.0,
        settler.samples,
        settler.seed,
    )
    assert torch.equal(settler.logits(model, TOKENS[:, :5]), fresh.logits(model, TOKENS[:, :5]))


def test_a_settler_reads_on_and_starts_anew_for_another_text() -> None:
    model, calls = made(), []
    settler = EvidenceSettler(1, 10.0)
    settle = settler.settle
    # pyright: ignore[reportAttributeAccessIssue]
    settler.settle = lambda *column: (calls.append(1), settle(*column))[1]
    settler.logits(model, TOKENS[:, :4])
    settler.logits(model, TOKENS[:, :5])
    assert len(calls) == 3 + 1
    settler.logits(model, TOKENS[:, :5])  # nothing is new: from the start
    settler.logits(model, TOKENS.flip(1)[:, :3])
    assert len(calls) == 4 + 4 + 2
    other = made(seed=4)
    assert torch.equal(
        settler.logits(other, TOKENS), EvidenceSettler(1, 10.0).logits(other, TOKENS)
    )


def test_an_error_on_the_way_leaves_no_half_past() -> None:
    "The same call again gives what a new settler gives."
    model = made()
    settler = EvidenceSettler(1, 10.0, temperature=1.0, samples=4)
    settler.logits(model, TOKENS[:, :2])
    settle = settler.settle

    def broken(*column: Any) -> Any:
        settle(*column)
        raise SettlingError("stop")

    settler.settle = broken  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(SettlingError, match="stop"):
        settler.logits(model, TOKENS[:, :4])
    settler.settle = settle  # pyright: ignore[reportAttributeAccessIssue]
    fresh = EvidenceSettler(1, 10.0, temperature=1.0, samples=4)
    assert torch.equal(settler.logits(model, TOKENS[:, :4]), fresh.logits(model, TOKENS[:, :4]))


# ---- sampling: against posteriors that are known


def chain(length: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Law, gain and observations of a scalar chain: s_i = a_i s_(i-1) + N(0, 1), x_i = c_i s_i +
    N(0, 1)."""
    a, c, x = torch.randn(
        3, length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    return a, 1.5 * c, 2 * x


def exact(a: Tensor, c: Tensor, x: Tensor) -> tuple[Tensor, Tensor, float]:
    """Mean and covariance of all states given all observations, and the log-evidence: one
    Gaussian, solved whole."""
    n = len(a)
    law = torch.eye(n, dtype=torch.float64) - torch.diag(a[1:], -1)
    prior = torch.linalg.inv(law.T @ law)
    total = c[:, None] * prior * c + torch.eye(n, dtype=torch.float64)
    gain = prior * c @ torch.linalg.inv(total)
    log_z = torch.distributions.MultivariateNormal(
        torch.zeros(n, dtype=torch.float64), total
    ).log_prob(x)
    return gain @ x, prior - gain @ (c[:, None] * prior), log_z.item()


def in_order(
    a: Tensor, c: Tensor, x: Tensor, draws: int, steps: int | None, resampled: bool
) -> tuple[Tensor, Tensor, float]:
    """States `(draws, columns)` sampled in the order of time, their weights, and the estimated
    log-evidence."""
    g, zero = torch.Generator().manual_seed(0), torch.zeros(draws, 1, 1, dtype=torch.float64)
    one = torch.ones_like(zero)
    states, log_w, log_z = (
        torch.zeros(draws, 0, dtype=torch.float64),
        torch.zeros(draws, dtype=torch.float64),
        0.0,
    )
    for a_i, c_i, x_i in zip(a, c, x, strict=True):
        mu = a_i * states[:, -1:] if states.shape[1] else zero[:, 0]

        def energy(
            e: list[Tensor], mu: Tensor = mu, c_i: Tensor = c_i, x_i: Tensor = x_i
        ) -> Tensor:
            return (
                e[0].square()[..., 0] / 2
                + (x_i - c_i * (mu + e[0][..., 0])).square() / 2
                + math.log(2 * math.pi) / 2
            )

        (e,), _, new = sample_columns(
            energy, [zero], [one], 1 if steps is None else steps, generator=g
        )
        states, log_w = torch.cat([states, mu + e[..., 0]], 1), log_w + new[:, 0]
        if resampled:
            log_z += log_w.logsumexp(0).item() - math.log(draws)
            states, log_w = states[resample(log_w[:, None], g)[:, 0]], torch.zeros_like(log_w)
    return states, log_w.softmax(0), log_z or log_w.logsumexp(0).item() - math.log(draws)


@pytest.mark.parametrize("steps", [0, None, 4])
@pytest.mark.parametrize("resampled", [False, True])
def test_sampled_columns_have_the_posterior_of_a_linear_chain(
    steps: int | None, resampled: bool
) -> None:
    """Variances within 5 %, means and covariances within 0.04, at the default of one step too;
    the past hears later tokens."""
    a, c, x = chain(4, seed=1)
    mean, cov, log_z = exact(a, c, x)
    states, W, found = in_order(a, c, x, 60_000, steps, resampled)
    got = W @ states
    apart = (states - got) * W[:, None].sqrt()
    torch.testing.assert_close(got, mean, rtol=0, atol=0.04)
    torch.testing.assert_close(
        (apart.T @ apart).diag() / cov.diag(), torch.ones(4, dtype=torch.float64), rtol=0, atol=0.05
    )
    torch.testing.assert_close(apart.T @ apart, cov, rtol=0, atol=0.04)
    assert abs(found - log_z) < 0.05


def test_a_temperature_widens_prior_and_noise_alike() -> None:
    """A quadratic at temperature two: the same mean, twice the variance, and the integral of the
    tempered likelihood."""
    n, tau, v, c, x = 60_000, 2.0, 0.7, 1.5, 2.0
    zero, variances = (
        torch.zeros(n, 1, 1, dtype=torch.float64),
        [torch.full((n, 1, 1), v, dtype=torch.float64)],
    )
    energy = lambda e: e[0].square()[..., 0] / (2 * v) + (x - c * e[0][..., 0]).square() / 2
    posterior = 1 / (1 / v + c * c)
    z = (1 + c * c * v) ** -0.5 * math.exp(-x * x / (2 * tau * (1 + c * c * v)))
    for steps in (0, 1, 3):
        g = torch.Generator().manual_seed(0)
        (e,), _, log_w = sample_columns(
            energy, [zero], variances, steps, temperature=tau, generator=g
        )
        W = log_w[:, 0].softmax(0)
        mean = W @ e[:, 0, 0]
        assert mean.item() == pytest.approx(posterior * c * x, abs=0.03)
        assert (W @ (e[:, 0, 0] - mean).square()).item() == pytest.approx(tau * posterior, rel=0.05)
        assert log_w.exp().mean().item() == pytest.approx(z, rel=0.03)


def test_a_step_leaves_the_prior_exactly_as_it_is() -> None:
    "Without evidence every step of any size is taken, nothing is weighed, and the spread stays."
    zero, variances = (
        torch.zeros(5000, 1, 4, dtype=torch.float64),
        [torch.full((5000, 1, 1), 0.5, dtype=torch.float64)],
    )
    for size in (0.1, 0.5, 1.0):
        prior = lambda e: (e[0].square() / (2 * 0.5)).sum(-1)
        g = torch.Generator().manual_seed(0)
        (e,), trace, log_w = sample_columns(prior, [zero], variances, 3, size, generator=g)
        assert (torch.stack(trace).diff(dim=0) != 0).all() and log_w.abs().max() < 1e-12
        assert e.var().item() == pytest.approx(0.5, rel=0.04)


def test_a_proposal_that_overflows_is_rejected() -> None:
    "Only a start that overflows is an error; draws have the moments that quadrature gives."
    steep = lambda e: (e[0].square() / 2 + (10 * e[0]).exp()).sum(-1)
    zero, four = [torch.zeros(4000, 1, 1)], [torch.full((4000, 1, 1), 4.0)]
    (e,), trace, log_w = sample_columns(
        steep, zero, four, 40, generator=torch.Generator().manual_seed(0)
    )
    assert e.isfinite().all() and log_w.isfinite().all() and all(t.isfinite().all() for t in trace)
    x = torch.linspace(-9, 3, 20_001, dtype=torch.float64)
    p = (-x.square() / 2 - (10 * x).exp()).softmax(0)
    want, w = (p * x).sum(), log_w.flatten().double().softmax(0)
    mean = (w * e.flatten()).sum()
    assert (
        abs(mean - want) < 0.06
        and abs((w * (e.flatten() - mean).square()).sum() - (p * (x - want).square()).sum()) < 0.06
    )
    bottomless = lambda e: torch.where(e[0] > 9.0, -math.inf, e[0].square() / 8).sum(
        -1
    )  # no place to be in
    (e,), trace, _ = sample_columns(
        bottomless, zero, four, 40, generator=torch.Generator().manual_seed(0)
    )
    assert (e < 9).all() and all(t.isfinite().all() for t in trace)
    for start in (lambda e: (e[0] + math.inf).sum(-1), lambda e: (0 * e[0]).sqrt().sum(-1)):
        with pytest.raises(SettlingError, match="not finite"):
            sample_columns(start, zero, four, 1)


def test_a_settler_leaves_the_numbers_of_the_model_alone() -> None:
    """Only the precision that is new takes the dtype of the model's output; the model stays the
    caller's."""
    model = made("by key").float()
    model.predictors[1].attention.log_precision.data = model.predictors[
        1
    ].attention.log_precision.data.double()
    kept = {n: (p.dtype, p.data_ptr()) for n, p in model.named_parameters()}
    settled = EvidenceSettler().evidence(model)
    assert settled.log_beta.dtype == torch.float32
    own = EvidenceTransformer(model)
    own.log_beta.data = own.log_beta.data.double()
    assert EvidenceSettler().evidence(own).log_beta is own.log_beta
    gains(own, TOKENS, TOKENS, [1])
    assert kept == {n: (p.dtype, p.data_ptr()) for n, p in model.named_parameters()}


def test_without_weights_the_past_is_not_the_posterior() -> None:
    """The walk that is known: means .25 and .5 and a variance of .625 where Kalman has .2, .6
    and .6."""
    one = torch.ones(2, dtype=torch.float64)
    for x, right, bare in (((1.0, 0.0), 0.2, 0.25), ((0.0, 1.0), 0.6, 0.5)):
        observed = torch.tensor(x, dtype=torch.float64)
        mean, cov, _ = exact(one, one, observed)
        assert mean[1] == pytest.approx(right) and cov[1, 1] == pytest.approx(0.6)
        states, W, _ = in_order(one, one, observed, 60_000, 16, False)
        assert (W @ states)[1] == pytest.approx(right, abs=0.01)
        assert (W @ (states[:, 1] - right).square()) == pytest.approx(0.6, abs=0.01)
        assert states[:, 1].mean() == pytest.approx(bare, abs=0.01) and states[
            :, 1
        ].var() == pytest.approx(0.625, abs=0.01)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sampled_pasts_predict_as_the_posterior_of_the_transformer(temperature: float) -> None:
    """The default of one step, against a hundred thousand whole pasts drawn from the prior and
    weighed by all their tokens."""
    model = made(n_layer=1, seed=3, scale=20.0)
    tokens, beta, n = torch.tensor([[1, 4, 2, 2]]), 3.0, 100_000
    g, past, log_w = torch.Generator().manual_seed(0), None, torch.zeros(n, dtype=torch.float64)
    for i in range(3):
        token, zero = tokens[:, i : i + 1].expand(n, 1), none(model, n)
        v = variances_of(
            climb(model, past, token, i, zero)[0], beta
        )  # of the column without errors
        xi = [torch.randn(e.shape, dtype=torch.float64, generator=g) for e in zero]
        errors = [(temperature * x).sqrt() * e for x, e in zip(v, xi, strict=True)]
        states = climb(model, past, token, i, errors)[1]
        log_w += model.output(states[-1])[:, 0].log_softmax(-1)[:, tokens[0, i + 1]] / temperature
        past = (
            states
            if past is None
            else [torch.cat(pair, 1) for pair in zip(past, states, strict=True)]
        )
    states = climb(model, past, tokens[:, 3:].expand(n, 1), 3, none(model, n))[1]
    p = model.output(states[-1])[:, 0].softmax(-1)
    truth, bare = log_w.softmax(0) @ p, p.mean(0)
    ours = (
        EvidenceSettler(1, beta, temperature=temperature, samples=30_000)
        .logits(model, tokens)[0]
        .exp()
    )
    torch.testing.assert_close(ours, truth, rtol=0, atol=0.006)
    assert (bare - truth).abs().max() > 0.012 and ours.sum() == pytest.approx(1.0)


def test_the_weights_are_used_and_kept_apart_by_row() -> None:
    """`logits` is the weighted mean; rows resample by themselves; the default has eight pasts at
    temperature one."""
    model = made(seed=3)
    settler = make_settler("langevin")
    assert (settler.temperature, settler.samples, settler.steps) == (1.0, 8, 1)
    settler.relative_precision = 3.0
    log_p, log_w = copy.copy(settler).log_probabilities(model, TOKENS)
    assert log_w.shape == (8, 3) and (log_w.std(0) > 0).any()
    torch.testing.assert_close(log_w.logsumexp(0), torch.zeros(3, dtype=torch.float64))
    settler.generator.manual_seed(0)
    torch.testing.assert_close(
        settler.logits(model, TOKENS), (log_p + log_w[..., None]).logsumexp(0)
    )
    past = settler.kept and settler.kept.past
    assert past is not None
    past.log_weights = torch.zeros(24, dtype=torch.float64).view(8, 3)
    past.log_weights[:, 1] = torch.tensor(
        [0.0] + [-50.0] * 7
    )  # row 1 has one past left; the others are even
    past.log_weights[:, 2] = torch.linspace(0, 1.5, 8).double()  # row 2 is uneven, and good enough
    past.log_weights = past.log_weights.flatten()
    thinned = thin(past, 8, settler.generator)
    left = thinned.log_weights.view(8, 3)
    assert (left[:, :2] == 0).all() and torch.equal(left[:, 2], past.log_weights.view(8, 3)[:, 2])
    keys, new = past.memories[0], thinned.memories[0]
    assert keys is not None and new is not None
    before, after = keys.k.view(8, 3, *keys.k.shape[1:]), new.k.view(8, 3, *keys.k.shape[1:])
    assert torch.equal(after[:, 0], before[:, 0]) and torch.equal(after[:, 2], before[:, 2])
    assert all(torch.equal(after[s, 1], before[0, 1]) for s in range(8)) and torch.equal(
        thinned.tokens, past.tokens
    )


def test_resampling_keeps_every_draw_as_often_as_it_weighs() -> None:
    W = torch.rand(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    g, total = torch.Generator().manual_seed(1), torch.zeros(8, 5)
    for _ in range(4000):
        found = resample(W.log(), g)
        count = torch.stack([torch.bincount(found[:, b], minlength=8) for b in range(5)], 1)
        assert ((count - 8 * W / W.sum(0)).abs() < 1).all()
        total += count
    torch.testing.assert_close((total / 4000).double(), 8 * W / W.sum(0), rtol=0, atol=0.04)


def test_the_mode_has_no_weight_and_generation_reads_by_the_settler() -> None:
    model = made()
    zero = none(model, 3)
    v = variances_of(climb(model, None, TOKENS[:, :1], 0, zero)[0], 10.0)
    energy = column_energy(model, TOKENS[:, :1], TOKENS[:, 1:2], [None] * 2, v)
    errors, trace, log_w = at_the_mode(energy, zero, v, 2, 1.0)
    assert (log_w == 0).all() and len(trace) == 3 and (errors[0] != 0).any()
    for name in ("evidence", "langevin"):
        text = generate(model, TOKENS[:1, :2], 3, temperature=0, settle=make_settler(name))
        for t in range(2, 5):
            assert text[0, t] == make_settler(name).logits(model, text[:, :t])[0].argmax()
    # the same seed, the same text; nothing of the model or of torch's own generator moves
    state, weights = torch.get_rng_state(), [p.clone() for p in model.parameters()]
    assert torch.equal(
        *(
            generate(model, TOKENS[:1, :2], 3, seed=1, settle=make_settler("langevin"))
            for _ in range(2)
        )
    )
    assert torch.equal(torch.get_rng_state(), state) and all(
        map(torch.equal, weights, model.parameters())
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 1.5},
        {"steps": True},
        {"steps": None},
        {"step_size": "1"},
        {"step_size": math.nan},
        {"relative_precision": "stiff"},
        {"relative_precision": math.nan},
        {"samples": "8"},
        {"temperature": "hot"},
        {"temperature": math.inf},
        {"seed": 2**70},
        {"seed": "1"},
        {"samples": 2},
    ],
)
def test_settlers_refuse_in_a_sentence(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a settler needs"):
        EvidenceSettler(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": "1"},
        {"rounds": 1.0},
        {"relative_precision": None},
        {"step_size": "1"},
        {"steps": True},
    ],
)
def test_evidence_models_refuse_in_a_sentence(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="evidence needs whole steps and rounds"):
        EvidenceTransformer(made(), **wrong)
    with pytest.raises(TypeError, match="evidence settles a PCTransformer, not a Linear"):
        EvidenceTransformer(torch.nn.Linear(2, 2))  # pyright: ignore[reportArgumentType]


def test_windows_refuse_in_a_sentence() -> None:
    for count in (0, 7):
        with pytest.raises(ValueError, match="windows of 16, so not"):
            some_windows(torch.arange(100), 16, count)


# ---- which text a number comes from


def split_apart() -> TextData:
    "Training text of the first four letters only, validation text of the last four only."
    g = torch.Generator().manual_seed(0)
    tokenizer = CharTokenizer("abcdefgh")
    train, valid = (
        torch.randint(0, 4, (400,), generator=g),
        torch.randint(4, 8, (200,), generator=g),
    )
    return TextData(tokenizer, tokenizer.decode(train), tokenizer.decode(valid), train, valid)


def test_the_study_trains_on_one_split_and_judges_on_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = split_apart()
    sizes = {"model.block_size": 8, "model.n_layer": 1, "model.n_head": 2, "model.d_model": 8}
    c = replace(
        RunConfig(),
        **sizes,
        **{"model.vocab_size": 8, "train.iters": 2, "train.batch_size": 2},
        **{"learner.algorithm": "backprop"},
    )
    job = harness.Job(c, Text.of(data, c), torch.device("cpu"), tmp_path)
    trained, judged = [], []
    batch, gain = Trainer.batch, study.gains

    def watched(self: Trainer, step: int) -> tuple[Tensor, Tensor]:
        trained.append(batch(self, step))
        return trained[-1]

    def reading(model: EvidenceTransformer, x: Tensor, y: Tensor, steps: Any) -> Any:
        judged.append((x, y))
        return gain(model, x, y, steps)

    monkeypatch.setattr(Trainer, "batch", watched)
    monkeypatch.setattr(study, "gains", reading)
    plain, ours = (study.evidence_run(job, beta, 6, 2) for beta in (None, 3.0))
    assert len(trained) == 8 and all((x < 4).all() and (y < 4).all() for x, y in trained)
    for a, b in zip(trained[:4], trained[4:], strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]), "on the same batches"
    x, y = some_windows(data.valid_ids, 8, 6)
    assert len(judged) == 2 * (3 + 1) and all(torch.equal(b, y) for _, b in judged)
    assert (x >= 4).all() and (y >= 4).all() and torch.equal(x[:, 1:], y[:, :-1])
    for (clean, _), (hurt, _) in zip(judged[::2], judged[1::2], strict=True):
        assert torch.equal(clean, x) and 0 < (hurt != x).double().mean() < 0.3
    assert set(plain["readings"]) == {"beta 1000", "beta 100", "beta 10"} and not plain["beta"]
    assert set(ours["readings"]) == {"learned"} and ours["beta"][0] != 3.0


def test_gains_are_losses_of_these_windows_with_these_steps() -> None:
    model, beta = made(), 30.0
    x, y = TOKENS[:, :5], TOKENS[:, 1:]
    found = gains(EvidenceTransformer(model, beta).double(), x, y, (2, 1))
    losses = {
        k: F.cross_entropy(filtered(model, x, beta, k).mT, y, reduction="none").mean(1)
        for k in (0, 1, 2)
    }
    assert list(found) == ["0", "1", "2"]
    for k, loss in losses.items():
        apart = loss - losses[0]
        assert found[str(k)]["loss"] == pytest.approx(loss.mean().item(), rel=1e-8)
        assert found[str(k)]["difference"] == pytest.approx(apart.mean().item(), abs=1e-8)
        assert found[str(k)]["standard_error"] == pytest.approx(
            apart.std().item() / math.sqrt(3), abs=1e-8
        )


# ---- half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("name", ["evidence", "langevin"])
def test_half_models_settle(name: str, background: bool, dtype: torch.dtype) -> None:
    "Variances of 1e-6 and energies of thousands of nats are no numbers of half precision."
    config = ModelConfig(**SIZES, attention="gaussian", background=background)
    model = PCTransformer(config).to(dtype).eval()
    for steps in (1, 2, 8):
        out = generate(model, TOKENS[0, :3], 3, settle=make_settler(name, steps))
        assert out.shape == (1, 6)
    loss = read_losses(EvidenceTransformer(model), TOKENS[:, :-1], TOKENS[:, 1:])
    assert loss.dtype == torch.float32 and loss.isfinite().all()
    gains(EvidenceTransformer(model), TOKENS[:, :-1], TOKENS[:, 1:], [1])
    assert model.output.weight.dtype == dtype, "the model is shared, and stays as it is"


@pytest.mark.parametrize("family", FAMILIES)
def test_errors_in_half_precision_are_those_of_full(family: str) -> None:
    half = made(family, scale=2.0).half()
    full = copy.deepcopy(half).float()
    for beta in (1.0, 100.0, 1e4):
        found, want = (
            EvidenceTransformer(m, beta, steps=2).settle(TOKENS)[0] for m in (half, full)
        )
        assert found is not None and want is not None
        for a, b in zip(found, want, strict=True):
            assert a.dtype == torch.float32 and abs(a.norm() / b.norm() - 1) < 0.01
