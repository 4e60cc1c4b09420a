"""Settled reading: honesty for every attention family, the temperature rule, the study from its
command line."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from common import SIZES, TOKENS, stir

from pc_transformer import ModelConfig, PCTransformer
from pc_transformer.attention.scores import components, spread
from pc_transformer.cli import main
from pc_transformer.experiments.results import read
from pc_transformer.experiments.settled_reading import (
    DRIVERS,
    STEPS,
    EnergyTemperature,
    SettledQueries,
    best_of,
    energies,
    query_looks,
    read_text,
    temperature_study,
    tune,
)
from pc_transformer.inference import SamplingConfig, generate
from pc_transformer.inference.uncertainty import node_states
from pc_transformer.model.layers import AttentionLayer

FAMILIES: dict[str, dict[str, Any]] = {
    "gaussian": {"attention": "gaussian"},
    "norm": {"attention": "gaussian", "mixing": "norm"},
    "student_t": {"attention": "student_t", "window": 3},
    "mixture": {"attention": "mixture", "n_kv_head": 1},
    "by token": {"attention": "gaussian", "precision": "key", "mixing": "key", "bias": True},
    "each coordinate": {"attention": "student_t", "coordinates": "independent", "mixing": "norm"},
    "diagonal": {"attention": "laplace", "precision": "diagonal", "background": True},
}


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> PCTransformer:
    net = (
        PCTransformer(ModelConfig(**SIZES, **FAMILIES[request.param]), seed=0)
        .eval()
        .requires_grad_(False)
    )
    stir(net, seed=0, scale=8.0)
    return net


def test_no_step_is_the_model_and_no_step_looks_ahead(model: PCTransformer) -> None:
    with torch.no_grad():
        assert torch.equal(SettledQueries(model, 0)(TOKENS), model(TOKENS))
    later = TOKENS.clone()
    later[:, 6:] = (later[:, 6:] + 1) % 13
    before = [p.clone() for p in model.parameters()]
    for n in STEPS:
        z = SettledQueries(model, n)(TOKENS)
        assert z.isfinite().all() and torch.equal(SettledQueries(model, n)(later)[:, :6], z[:, :6])
        assert n == 0 or not torch.equal(z, SettledQueries(model, 0)(TOKENS))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_the_energy_never_rises(model: PCTransformer) -> None:
    looks = query_looks(model, TOKENS)
    energy = torch.tensor([looks[str(n)]["energy"] for n in STEPS])
    assert (energy.diff(dim=0) < 1e-4).all() and (energy[0] > energy[-1]).all()


def test_drivers_know_the_past_only(model: PCTransformer) -> None:
    later = TOKENS.clone()
    later[:, 6:] = (later[:, 6:] + 1) % 13
    a, b = (read_text(model, x, TOKENS) for x in (TOKENS, later))
    assert set(a.drivers) == set(DRIVERS)
    assert all(
        torch.equal(a.drivers[n][:, :6], b.drivers[n][:, :6]) and a.drivers[n].isfinite().all()
        for n in DRIVERS
    )


def written_out(model: PCTransformer) -> torch.Tensor:
    """What `energies` says of `TOKENS`, `(2, B, T)`, from log densities of single errors."""
    found, ahead = [], torch.arange(10)[:, None] - torch.arange(10)
    layers = [f for f in model.predictors if isinstance(f, AttentionLayer)]
    for layer, state in zip(layers, node_states(model, TOKENS)[::2], strict=False):
        a = layer.attention
        q, keys = a.project(layer.norm(state))
        keys, unseen = spread(keys, a.n_head), (ahead < 0) | (ahead >= (a.window or 10))
        joint, prior = [], []
        for k, Lam, log_mix in components(keys):
            b = torch.zeros(1, 1, 1, 1) if log_mix is None else log_mix[:, :, None]
            log_p = a.likelihood.log_prob(q[:, :, :, None] - k[:, :, None], Lam[:, :, None])
            prior.append(b.expand_as(log_p).masked_fill(unseen, -math.inf))
            joint.append(log_p + prior[-1])
        total, weight = (torch.cat(x, -1).logsumexp(-1) for x in (joint, prior))
        found.append(torch.stack([-total.mean(1), (weight - total).mean(1)]))
    return torch.stack(found).mean(0)


def test_energies_are_of_the_scores_themselves(model: PCTransformer) -> None:
    """-log sum_j pi_j p(q | k_j) with the density written out, and what its prior adds."""
    found = energies(model, TOKENS)
    torch.testing.assert_close(found, written_out(model), rtol=1e-4, atol=1e-3)
    assert found.shape == (2, *TOKENS.shape) and not torch.equal(found[0], found[1])


def test_a_rule_writes_what_it_says(model: PCTransformer) -> None:
    """`generate` reads by the rule: each greedy or drawn token is of the scaled logits, a slope of
    zero is no rule, and the energy is that of the newest token."""
    rule = EnergyTemperature(-0.4, 20.0, 5.0, temperature=0.7)
    text, logs = generate(model, TOKENS[:, :4], 6, seed=1, settle=rule, log_probs=True)
    for t in range(4, 10):
        z, E = model(text[:, :t])[:, -1].double(), energies(model, text[:, :t])[0, :, -1].double()
        zeta = ((E - 20) / 5).clamp(-5, 5)
        expected = (z * (-0.4 * zeta).exp()[:, None] / 0.7).log_softmax(-1)
        found = expected.gather(-1, text[:, t : t + 1])[:, 0]
        torch.testing.assert_close(logs[:, t - 4], found, rtol=1e-4, atol=1e-4)
    off = generate(model, TOKENS[:, :4], 6, seed=1, settle=EnergyTemperature())
    assert torch.equal(off, generate(model, TOKENS[:, :4], 6, seed=1))


def test_tune_is_no_worse_than_one_temperature_where_it_is_chosen(model: PCTransformer) -> None:
    z, y, e = read_text(model, TOKENS, TOKENS.flip(0)).flat("energy")
    rules = tune(z, y, e)
    best = best_of(rules)
    assert all(rules[best.slope][1] <= loss for _, loss in rules.values())
    fixed = rules[0.0][0]
    plain = SamplingConfig(temperature=fixed.temperature).choices(z).log()
    torch.testing.assert_close(fixed.scaled(z, e).log_softmax(-1), plain)


def test_rules_are_chosen_on_other_text_than_they_are_judged_on() -> None:
    """Rule 15. Halves without a common symbol: slopes and temperatures follow the first, losses
    and intervals the second."""
    net = (
        PCTransformer(ModelConfig(**SIZES, attention="gaussian"), seed=0)
        .eval()
        .requires_grad_(False)
    )
    stir(net, seed=0, scale=8.0)

    def study(fit: int, test: int) -> dict[str, Any]:
        halves = [
            torch.randint(6, (200,), generator=torch.Generator().manual_seed(seed))
            for seed in (fit, test)
        ]
        return temperature_study(net, torch.cat([halves[0], halves[1] + 6]), 10, 4, 0)

    base, other_test, other_fit = study(1, 2), study(1, 3), study(4, 2)
    chosen = lambda m: {
        name: {k: r[k] for k in ("slope", "temperature", "mean", "sd")}
        for name, r in m["rules"].items()
    }
    on_fit = lambda m: [c["fit"] for curve in m["curves"].values() for c in curve.values()]
    assert chosen(base) == chosen(other_test) and on_fit(base) == on_fit(other_test)
    assert chosen(base) != chosen(other_fit) and on_fit(base) != on_fit(other_fit)
    plain = [m["rules"]["temperature 1"] for m in (base, other_test, other_fit)]
    for name in ("clean", "10 % replaced"):
        assert plain[0][name]["nll"] == plain[2][name]["nll"] != plain[1][name]["nll"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    "A model of dot products, which is read as the Gaussian that it equals."
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog.\n" * 60)
    small = {
        "model.n_layer": 1,
        "model.n_head": 2,
        "model.d_model": 16,
        "model.block_size": 12,
        "model.attention": "dot",
        "train.iters": 2,
        "train.eval_interval": 2,
        "windows": 8,
        "draws": 10,
        "data": str(tmp_path / "text.txt"),
    }
    args = ["run", "settled_reading", f"--out={tmp_path}", "--changes", json.dumps(small)]
    assert main([*args, "--seeds=[1]"]) == 0, capsys.readouterr().err
    (run,) = read(tmp_path / "results.json").runs
    assert set(run["losses"]) == {"0.0", "0.1"}
    assert set(run["losses"]["0.0"]) == {str(n) for n in STEPS}
    fixed = run["temperature"]["rules"]["one temperature"]
    assert fixed["clean"]["against one temperature"]["difference"] == 0
    for rule in run["temperature"]["rules"].values():
        assert rule["clean"]["nll"] > 0 and 0 <= rule["10 % replaced"]["ece_equal_width"] <= 1
