"""Uncertainty: identities by brute force and by properties, honesty of the scores, the study
from its command line."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import SIZES, TOKENS, stir
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pc_transformer import ModelConfig, PCTransformer, save
from pc_transformer.attention import attend
from pc_transformer.cli import main
from pc_transformer.data import CharTokenizer, TextData
from pc_transformer.experiments.results import read
from pc_transformer.experiments.uncertainty import (
    DAMAGES,
    auroc,
    calibrated,
    damaged_windows,
    detection,
    detector,
    even_windows,
    foreign_tokens,
    shuffle_words,
    study_ensemble,
)
from pc_transformer.inference import (
    SCORES,
    StateGaussians,
    bootstrap_interval,
    calibration,
    decompose,
    ensemble_log_probs,
    entropy,
    fit_temperature,
    head_energies,
    node_states,
    reliability,
    risk_coverage,
    scaled_nll,
    token_scores,
)
from pc_transformer.model import convert
from pc_transformer.training import load

FAMILIES: dict[str, dict[str, Any]] = {
    "dot": {"attention": "dot"},
    "gaussian": {"attention": "gaussian"},
    "student_t": {"attention": "student_t", "window": 3},
    "mixture": {"attention": "mixture", "n_kv_head": 1},
    "by token": {"attention": "gaussian", "precision": "key", "mixing": "key", "bias": True},
    "diagonal": {"attention": "laplace", "precision": "diagonal", "background": True},
}
seeds = st.integers(0, 2**31)
few = settings(deadline=None, max_examples=25)


def build(family: str, seed: int = 1) -> PCTransformer:
    model = PCTransformer(ModelConfig(**SIZES, **FAMILIES[family]), seed)
    stir(model, seed, 10.0)
    return model


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- entropy and its parts


@few
@given(seeds, st.integers(1, 6), st.integers(2, 9), st.sampled_from([0.01, 1.0, 30.0]))
def test_decomposition(seed: int, S: int, V: int, scale: float) -> None:
    log_p = (scale * normal(seed, S, 3, 4, V)).log_softmax(-1)
    parts = decompose(log_p)
    mean = log_p.exp().mean(0)
    torch.testing.assert_close(
        parts.total, torch.distributions.Categorical(probs=mean).entropy(), rtol=1e-9, atol=1e-12
    )
    torch.testing.assert_close(
        parts.total, parts.aleatoric + parts.epistemic, rtol=1e-9, atol=1e-12
    )
    assert (parts.epistemic >= -1e-13).all() and (parts.epistemic <= math.log(S) + 1e-12).all()
    assert decompose(log_p[:1].expand(S, -1, -1, -1)).epistemic.abs().max() < 1e-13


def test_small_epistemic_parts_keep_their_digits() -> None:
    """For samples that differ by d, the mutual information is of order d^2, far below the
    rounding of an entropy."""
    base, direction = normal(0, 5), normal(1, 5)
    sizes = [
        decompose(
            torch.stack([base + d * direction, base - d * direction]).log_softmax(-1)
        ).epistemic.item()
        for d in (1e-3, 1e-5)
    ]
    assert sizes[0] / sizes[1] == pytest.approx(1e4, rel=1e-2)


@pytest.mark.parametrize("bad", [torch.zeros(2, 3), torch.zeros(3), torch.full((2, 3), math.nan)])
def test_samples_must_be_distributions(bad: Tensor) -> None:
    with pytest.raises(ValueError, match="sum to one"):
        decompose(bad)


def test_samples_leave_the_model_alone() -> None:
    model = build("gaussian").train()
    before, state = {n: p.clone() for n, p in model.named_parameters()}, torch.get_rng_state()
    samples = ensemble_log_probs([model], TOKENS)
    assert torch.equal(samples, ensemble_log_probs([model], TOKENS))
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


# ---- scores


@pytest.mark.parametrize("family", ["dot", "mixture"])
def test_scores_are_what_they_are_called(family: str) -> None:
    model = build(family)
    with torch.no_grad():
        log_p = model(TOKENS).double().log_softmax(-1)
    own = (
        convert(model, "gaussian") if family == "dot" else model
    )  # what the study fits its states with
    scores = token_scores(model, TOKENS, StateGaussians.fit(own, TOKENS))
    loss = F.nll_loss(log_p[:, :-1].mT, TOKENS[:, 1:], reduction="none")
    torch.testing.assert_close(scores["surprisal"], loss, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        scores["entropy"], -(log_p.exp() * log_p).sum(-1)[:, 1:], rtol=1e-4, atol=1e-4
    )
    with torch.no_grad():
        below = node_states(own, TOKENS)[::2]  # what each attention layer reads, and the last state
        heads = [
            head_energies(f.attention, f.norm(s))
            for f, s in zip(own.predictors[1::2], below, strict=False)
        ]
    assert len(heads) == 2 and heads[0].shape[1] == 2
    torch.testing.assert_close(
        scores["attention energy"], torch.cat(heads, 1).double().sum(1)[:, 1:], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_read_the_past_only(family: str) -> None:
    "Another token changes scores from its place on, and none before; parameters and modes stay."
    model = build(family)
    known = StateGaussians.fit(model, TOKENS.repeat(4, 1).roll(1, 1))
    before, scores = (
        {n: p.clone() for n, p in model.named_parameters()},
        token_scores(model, TOKENS, known),
    )
    assert set(scores) == set(SCORES)
    for t in (1, 5, 9):
        other = TOKENS.clone()
        other[:, t] = (other[:, t] + 1) % 13
        for n, s in token_scores(model, other, known).items():
            assert s.shape == (6, 9) and s.isfinite().all(), n
            torch.testing.assert_close(s[:, : t - 1], scores[n][:, : t - 1], rtol=1e-5, atol=1e-5)
            assert (s[:, t - 1] != scores[n][:, t - 1]).all(), n
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("family", ["gaussian", "by token", "student_t"])
def test_attention_energy_from_the_attention_itself(family: str) -> None:
    "Brute force: the density of each query under the normalised mixture of the keys that it sees."
    model = build(family).double()
    known = StateGaussians.fit(model, TOKENS.repeat(4, 1).roll(1, 1))
    total = torch.zeros(6, 10, dtype=torch.float64)
    with torch.no_grad():
        states = node_states(model, TOKENS)
        for f, s in zip(list(model.predictors)[1::2], states[::2], strict=False):
            a, x = f.attention, f.norm(s)
            q, keys = a.project(x)
            k, Lam, mix = keys.k[:, :, 0], keys.precision[:, :, 0, :, 0], keys.log_mix
            mix = torch.zeros(k.shape[:-1], dtype=k.dtype) if mix is None else mix[:, :, 0]
            Lam, mix = Lam.expand(k.shape[:-1]), mix.expand(k.shape[:-1])
            for b, h, t in [(b, h, t) for b in range(6) for h in range(2) for t in range(10)]:
                sees = slice(max(0, t + 1 - (a.window or 10)), t + 1)
                u = Lam[b, h, sees] * (q[b, h, t] - k[b, h, sees]).square().sum(-1)
                if a.log_tail is None:
                    log_p = 4 * (Lam[b, h, sees] / (2 * math.pi)).log() - u / 2
                else:
                    nu = a.log_tail.exp()[h, 0]
                    log_p = (
                        torch.lgamma((nu + 8) / 2) - torch.lgamma(nu / 2) - 4 * (nu * math.pi).log()
                    )
                    log_p = log_p + 4 * Lam[b, h, sees].log() - (nu + 8) / 2 * torch.log1p(u / nu)
                total[b, t] -= (log_p + mix[b, h, sees].log_softmax(-1)).logsumexp(-1)
    torch.testing.assert_close(
        token_scores(model, TOKENS, known)["attention energy"], total[:, 1:], rtol=1e-8, atol=1e-8
    )


def test_attention_energies_sum_over_shared_heads() -> None:
    "One key head for two query heads is the same as the head twice."
    q, k = normal(0, 1, 2, 5, 4), normal(1, 1, 1, 5, 4)
    shared = attend(q, k, k, is_causal=True, precision=torch.ones(1, 1), return_lse=True)
    twice = attend(
        q,
        k.repeat(1, 2, 1, 1),
        k.repeat(1, 2, 1, 1),
        is_causal=True,
        precision=torch.ones(2, 1),
        return_lse=True,
    )
    torch.testing.assert_close(shared[1], twice[1])


def test_state_gaussians() -> None:
    model = build("gaussian")
    text = torch.randint(13, (50, 10), generator=torch.Generator().manual_seed(3))
    known = StateGaussians.fit(model, text)
    with torch.no_grad():
        states = node_states(model, text)
    want = sum(
        -torch.distributions.Normal(s.double().mean((0, 1)), s.double().std((0, 1), unbiased=False))
        .log_prob(s.double())
        .sum(-1)
        for s in states
    )
    torch.testing.assert_close(known.energy(states), want, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="node 0 never varies"):
        StateGaussians.fit(model, torch.zeros(1, 1, dtype=torch.int64))


# ---- AUROC, intervals


@few
@given(seeds, st.integers(2, 60), st.integers(1, 8))
def test_auroc_counts_pairs(seed: int, n: int, values: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randint(values, (n,), generator=g).double(), torch.rand(n, generator=g) < 0.5
    y[0], y[1] = True, False
    pairs = [(a > b) + (a == b) / 2 for a in x[y].tolist() for b in x[~y].tolist()]
    assert auroc(x, y) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    assert auroc(-x, y) == pytest.approx(1 - auroc(x, y), abs=1e-12)


def test_bootstrap_of_a_mean_is_that_of_theory() -> None:
    x = normal(0, 400)
    low, high = bootstrap_interval(lambda a: a.mean().item(), x, draws=2000)
    half = 1.96 * x.std().item() / 20
    assert low == pytest.approx(x.mean().item() - half, abs=0.02) and high == pytest.approx(
        x.mean().item() + half, abs=0.02
    )
    assert bootstrap_interval(lambda a: a.mean().item(), x, seed=3) == bootstrap_interval(
        lambda a: a.mean().item(), x, seed=3
    )


# ---- calibration


def ece_by_hand(c: list[float], right: list[bool], bins: int) -> float:
    total = 0.0
    for g in range(bins):
        inside = [i for i, x in enumerate(c) if min(int(x * bins), bins - 1) == g]
        if inside:
            total += abs(sum(right[i] for i in inside) - sum(c[i] for i in inside)) / len(c)
    return total


@few
@given(seeds, st.integers(1, 80), st.integers(1, 20))
def test_ece_by_hand(seed: int, n: int, bins: int) -> None:
    g = torch.Generator().manual_seed(seed)
    c, right = torch.rand(n, generator=g, dtype=torch.float64), torch.rand(n, generator=g) < 0.5
    r = reliability(c, right, bins)
    assert r.ece == pytest.approx(ece_by_hand(c.tolist(), right.tolist(), bins), abs=1e-12)
    mass = reliability(c, right, bins, equal_mass=True)
    assert mass.count.sum() == r.count.sum() == n and mass.count.max() - mass.count.min() <= 1
    assert (mass.confidence.diff() >= 0).all()
    assert reliability(torch.ones(n), torch.ones(n, dtype=torch.bool), bins).ece == 0


def test_ece_of_a_calibrated_simulator_falls_as_the_square_root() -> None:
    g, found = torch.Generator().manual_seed(0), []
    for n in (200, 20_000):
        draws = [torch.rand(2, n, generator=g) for _ in range(40)]
        found.append(sum(reliability(c, u < c).ece for c, u in draws) / 40)
    assert found[0] / found[1] == pytest.approx(10, rel=0.25)


def test_reliability_refuses_what_is_no_probability() -> None:
    right = torch.tensor([True, False])
    for c in (
        torch.tensor([0.5, 1.5]),
        torch.tensor([0.5, math.nan]),
        torch.tensor([0.5]),
        torch.ones(2, 1),
    ):
        with pytest.raises(ValueError, match="confidences in"):
            reliability(c, right)


@few
@given(seeds, st.integers(1, 40), st.integers(2, 7), st.sampled_from([1e-3, 0.3, 1.0, 30.0]))
def test_temperature(seed: int, n: int, V: int, scale: float) -> None:
    """Never worse on its fitting set; a stationary point or the bound; no better one on a grid
    (the loss is convex)."""
    z = scale * normal(seed, n, V)
    y = torch.randint(V, (n,), generator=torch.Generator().manual_seed(seed))
    tau = fit_temperature(z, y)
    best = scaled_nll(z, y, 1 / tau)
    assert 1e-3 - 1e-12 <= tau <= 1e3 + 1e-9 and best <= scaled_nll(z, y, 1.0) + 1e-15
    inside = 2e-3 < tau < 500
    grid = torch.logspace(-2.5, 2.5, 60).tolist()
    if inside:
        assert best <= min(scaled_nll(z, y, b) for b in grid) + 1e-9
    b = torch.tensor(1 / tau, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(F.cross_entropy(b * z, y), b)
    if inside:
        assert slope.abs() < 1e-5 * max(1.0, scale)


def test_temperature_errors_and_nothing_to_do() -> None:
    y = torch.tensor([0, 1])
    assert fit_temperature(torch.zeros(2, 3), y) == 1.0
    for z in (torch.tensor([[0.0, math.inf], [0.0, 1.0]]), torch.zeros(0, 3)):
        with pytest.raises(ValueError, match="finite logits"):
            fit_temperature(z, y[: len(z)])


@few
@given(seeds, st.integers(1, 30), st.integers(2, 6))
def test_brier(seed: int, n: int, V: int) -> None:
    z, y = (
        3 * normal(seed, n, V),
        torch.randint(V, (n,), generator=torch.Generator().manual_seed(seed)),
    )
    found, p = calibration(z, y), z.softmax(-1)
    squares = (p - F.one_hot(y, V)).square().sum(-1).mean().item()
    assert found["brier"] == pytest.approx(squares, abs=1e-12)
    assert found["accuracy"] == pytest.approx((z.argmax(-1) == y).double().mean().item())
    assert calibration(z / 3, y)["accuracy"] == found["accuracy"]


@few
@given(seeds, st.integers(1, 40), st.integers(1, 6))
def test_risk_coverage(seed: int, n: int, values: int) -> None:
    """With ties the mean over all their orders; the oracle is best, its reverse worst; the end
    is the mean loss."""
    g = torch.Generator().manual_seed(seed)
    c, loss = torch.randint(values, (n,), generator=g).double(), torch.rand(n, generator=g).double()
    coverage, risk = risk_coverage(c, loss)
    assert coverage[-1] == 1 and risk[-1] == pytest.approx(loss.mean().item())
    best, worst = (risk_coverage(x, loss)[1].mean() for x in (-loss, loss))
    assert best <= risk.mean() + 1e-12 and risk.mean() <= worst + 1e-12
    orders = []
    for _ in range(200):
        shuffle = torch.randperm(n, generator=g)
        order = shuffle[torch.argsort(-c[shuffle], stable=True)]
        orders.append(loss[order].cumsum(0) / torch.arange(1, n + 1))
    torch.testing.assert_close(torch.stack(orders).mean(0), risk, rtol=0, atol=0.15)
    shuffle = torch.randperm(n, generator=g)
    torch.testing.assert_close(risk_coverage(c[shuffle], loss[shuffle])[1], risk)


def test_logistic_finds_the_weights_that_made_the_data() -> None:
    x = normal(0, 20_000, 2) * torch.tensor([1.0, 5.0]) + 3
    odds = 1.5 * (x[:, 0] - 3) - 0.2 * (x[:, 1] - 3) + 0.4
    y = (
        torch.rand(20_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        < odds.sigmoid()
    )
    found = torch.from_numpy(detector(x, y).decision_function(x.numpy()))
    torch.testing.assert_close(found, odds, rtol=0.1, atol=0.25)


# ---- damage, and the study


@given(st.text("ab \n.", max_size=40), seeds)
def test_shuffled_words_are_the_same_words(text: str, seed: int) -> None:
    new = shuffle_words(text, torch.Generator().manual_seed(seed))
    assert len(new) == len(text) and sorted(new) == sorted(text)
    assert [c for c in new if c.isspace()] == [c for c in text if c.isspace()]
    assert sorted(new.split()) == sorted(text.split())


def test_damage() -> None:
    tokenizer = CharTokenizer("\n abcdefg")
    clean = torch.randint(9, (50, 20), generator=torch.Generator().manual_seed(0))
    foreign = torch.randint(9, (1000,), generator=torch.Generator().manual_seed(1))
    for kind in DAMAGES:
        first, second = (
            damaged_windows(kind, clean, tokenizer, foreign, torch.Generator().manual_seed(5))
            for _ in range(2)
        )
        assert (
            torch.equal(first[0], second[0])
            and first[0].shape == clean.shape
            and 0 <= first[0].min()
            and first[0].max() < 9
        )
    draw = torch.Generator().manual_seed(0)
    new, where = damaged_windows("replaced characters", clean, tokenizer, foreign, draw)
    assert torch.equal(where, new != clean) and 0.05 < where.double().mean() < 0.15
    with pytest.raises(ValueError, match="100 characters of foreign text are too few"):
        damaged_windows("foreign text", clean, tokenizer, foreign[:100], torch.Generator())
    with pytest.raises(ValueError, match="at least two windows"):
        even_windows(torch.arange(10), 6, 5)
    rows = even_windows(torch.arange(103), 10, 7)
    assert len(rows) == 7 and len(rows.unique()) == 70 and rows[0, 0] == 0 and rows[-1, -1] == 102


TEXT = (
    "the cat sat on the mat and the dog lay by the door; a bird sang, and no one knew why it did"
    " so.\n" * 40
)
OTHER = (
    "42 STOCKS! prices on the market rose and the bank of land sold bonds; it was a day of high"
    " trade.\n" * 40
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TextData]:
    "Two saved models that nobody trained, a text, and another one."
    folder, data = tmp_path_factory.mktemp("world"), TextData.of(TEXT)
    (folder / "text.txt").write_text(TEXT)
    (folder / "other.txt").write_text(OTHER)
    for seed, family in ((1, "gaussian"), (2, "dot")):
        # pyright: ignore[reportArgumentType]
        model = PCTransformer(ModelConfig(data.tokenizer.vocab_size, 12, 1, 2, 16, family), seed)
        stir(model, seed, 10.0)
        save(model, folder / f"seed-{seed}", data.tokenizer)
    return folder, data


SMALL = {
    "model.n_layer": 1,
    "model.n_head": 2,
    "model.d_model": 16,
    "model.block_size": 12,
    "train.iters": 3,
    "train.eval_interval": 3,
    "windows": 10,
    "draws": 10,
}


def test_the_study_from_the_command_line(
    world: tuple[Path, TextData], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    "One model by seed and three together; a file of results like all others."
    folder, _ = world
    own = {"data": str(folder / "text.txt"), "foreign": str(folder / "other.txt")}
    args = ["run", "uncertainty", f"--out={tmp_path}", "--seeds=[1]"]
    assert main([*args, "--changes", json.dumps(SMALL | own)]) == 0, capsys.readouterr().err
    one, together = sorted(read(tmp_path / "results.json").runs, key=lambda r: r["arm"])
    assert set(together["ensemble"]) >= set(DAMAGES)
    assert set(one["detection"]) == set(DAMAGES) and 0 <= one["before"]["ece_equal_width"] <= 1
    assert one["before"]["accuracy"] == one["after"]["accuracy"], "a temperature changes no answer"
    assert sum(one["before"]["reliability"]["count"]) == one["before"]["predictions"]
    for levels in one["detection"].values():
        for found in levels.values():
            gain = found["combination"]["auroc"] - found["surprisal"]["auroc"]
            assert found["gain over surprisal"]["auroc"] == pytest.approx(gain)
    wrong = json.dumps(SMALL | own | {"foreign": str(tmp_path / "none.txt")})
    assert main([*args[:2], f"--out={tmp_path / 'no'}", "--changes", wrong]) == 1
    assert "no text file" in capsys.readouterr().err


def test_what_makes_no_sense_is_one_sentence() -> None:
    net = PCTransformer(ModelConfig(**SIZES), seed=0)
    nets = [net]
    for call, words in (
        (lambda: ensemble_log_probs([], TOKENS), "one model or more"),
        (lambda: ensemble_log_probs(nets, TOKENS + 13), "must lie in 0..12"),
        (lambda: node_states(net, TOKENS.float()), "tokens must be int64"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            call()


def sentinel_halves(fit: int, test: int) -> Tensor:
    """A text whose halves share no symbol: the first has 0..5, the second 6..11; the numbers are
    seeds."""
    halves = [
        torch.randint(6, (300,), generator=torch.Generator().manual_seed(seed))
        for seed in (fit, test)
    ]
    return torch.cat([halves[0], halves[1] + 6])


def found_in(m: dict[str, Any], *names: str) -> list[Any]:
    "What every detector of a study has under these names."
    return [
        found[name]
        for levels in m["detection"].values()
        for found in levels.values()
        for name in names
    ]


def test_what_is_fitted_is_judged_on_other_text(
    world: tuple[Path, TextData], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rule 15. Temperature and detectors come from the first half alone, every number that
    judges them from the second."""
    folder, data = world
    model, foreign = (
        load(folder / "seed-1"),
        torch.randint(12, (900,), generator=torch.Generator().manual_seed(9)),
    )
    seen: dict[str, list[Tensor]] = {"temperature": [], "states": []}
    fit, known = fit_temperature, StateGaussians.fit

    def spy(z: Tensor, y: Tensor) -> float:
        seen["temperature"].append(y)
        return fit(z, y)

    def spy_states(model: Any, tokens: Tensor) -> StateGaussians:
        seen["states"].append(tokens)
        return known(model, tokens)

    monkeypatch.setattr("pc_transformer.experiments.uncertainty.fit_temperature", spy)
    monkeypatch.setattr(StateGaussians, "fit", spy_states)

    def study(fit: int, test: int) -> tuple[dict[str, Any], dict[str, Any]]:
        train = 12 + torch.randint(
            len(data.tokenizer.vocabulary) - 12, (600,), generator=torch.Generator().manual_seed(0)
        )
        text = replace(data, train_ids=train, valid_ids=sentinel_halves(fit, test))
        found = calibrated(model, text.valid_ids)
        found["detection"] = detection(model, text, foreign, 12, 4, 0)
        return found, study_ensemble([model, model], text, foreign, 12, 4, 0)

    (base, group), (other_test, _), (other_fit, same_group) = study(1, 2), study(1, 3), study(4, 2)
    assert all(y.max() < 6 for y in seen["temperature"]) and len(seen["temperature"]) == 3
    assert all(x.min() >= 12 for x in seen["states"]) and len(seen["states"]) == 3
    assert base["temperature"] == other_test["temperature"] != other_fit["temperature"]
    assert found_in(base, "weights") == found_in(other_test, "weights")
    assert all(
        a != b
        for a, b in zip(found_in(base, "weights"), found_in(other_fit, "weights"), strict=True)
    )
    assert base["before"] == other_fit["before"] != other_test["before"]
    assert base["after"] != other_fit["after"] and base["after"] != other_test["after"]
    assert found_in(base, "surprisal") != found_in(other_test, "surprisal")
    # as many random numbers for any text, so the second half is damaged alike
    drawn = "replaced characters"
    scores = [[m["detection"][drawn]["window"][n] for n in SCORES] for m in (base, other_fit)]
    assert scores[0] == scores[1]
    assert group == same_group


def test_foreign_text_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pc_transformer.experiments import uncertainty

    tokenizer = CharTokenizer(" abc")
    (tmp_path / "mine.txt").write_text("a b, c d\n")
    assert tokenizer.decode(foreign_tokens(tokenizer, tmp_path / "mine.txt")) == "a b c "
    monkeypatch.setattr(uncertainty, "cache_folders", lambda: [tmp_path])
    with pytest.raises(FileNotFoundError, match="wikitext-2/valid.txt"):
        foreign_tokens(tokenizer)
    (tmp_path / "wikitext-2").mkdir()
    (tmp_path / "wikitext-2" / "valid.txt").write_text("not it")
    with pytest.raises(ValueError, match="not the published"):
        foreign_tokens(tokenizer)


def test_entropy_is_bounded() -> None:
    x = normal(0, 50, 7).mul(5).log_softmax(-1)
    assert (entropy(x) >= 0).all() and (entropy(x) <= math.log(7) + 1e-12).all()
