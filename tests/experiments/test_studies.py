"""What a study says of its numbers: verdicts, choices, spreads and tables, by hand."""

import math
from typing import Any

import pytest
import torch

from pc_transformer import ModelConfig, PCTransformer
from pc_transformer.attention import initial_precision
from pc_transformer.config import replace, to_dict
from pc_transformer.data import Batches, InOrder
from pc_transformer.experiments import evidence_study, uncertainty
from pc_transformer.experiments.costs import RATIOS, cost_table, ratio
from pc_transformer.experiments.families import arm, best_sharpness, damaged_loss, kind, sharpened
from pc_transformer.experiments.harness import grid
from pc_transformer.experiments.meters import spread
from pc_transformer.experiments.results import Results, Runs, verdict
from pc_transformer.experiments.settled_reading import (
    EnergyTemperature,
    best_of,
    judge_rule,
    paired_difference,
    read_text,
    tune,
)
from pc_transformer.experiments.settling import part_step, with_part_steps
from pc_transformer.experiments.tinyshakespeare import variants
from pc_transformer.training.run import RunConfig


@pytest.mark.parametrize(
    ("a", "b", "word"),
    [
        ([1.0, 1.1, 1.0], [2.0, 2.1, 2.0], "better"),
        ([2.0, 2.1, 2.0], [1.0, 1.1, 1.0], "worse"),
        # always below, by less than seeds differ
        ([1.00, 1.50, 1.10], [1.01, 1.52, 1.12], "no clear difference"),
        # far below on the whole, not always
        ([1.00, 1.02, 1.10], [1.20, 1.30, 1.05], "no clear difference"),
        ([1.0, 1.0], [2.0, 2.0], "too few seeds"),
        ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], "no clear difference"),
    ],
)
def test_a_verdict(a: list[float], b: list[float], word: str) -> None:
    difference, said, apart = verdict(a, b)
    assert (
        len(apart) == len(a)
        and said == word
        and difference == pytest.approx(sum(a) / len(a) - sum(b) / len(b))
    )
    other = {"better": "worse", "worse": "better"}
    assert verdict(b, a).word == other.get(word, word)
    with pytest.raises(ValueError):
        verdict(a, b[1:])


def results(runs: list[dict[str, Any]]) -> Results:
    return Results("", "", {}, to_dict(RunConfig()), {}, runs)


def fake(
    family: str, sharpness: float, seed: int, clean: float, hurt: float, **changes: Any
) -> dict[str, Any]:
    changed = {"learner.algorithm": "backprop", **arm(family, sharpness, changes).changes}
    numbers = {"loss": clean, "damaged": {"0.1": hurt}}
    return {"arm": family, "seed": seed, "changes": changed, **numbers}


def test_a_sharpness_is_chosen_by_the_mean_of_enough_seeds() -> None:
    runs = [
        fake("dot", s, n, clean, hurt)
        for s, clean, hurt in ((0.1, 1.0, 9.0), (0.5, 2.0, 1.0), (1.0, 3.0, 3.0))
        for n in (3, 1, 2)
    ]
    runs += [
        fake("dot", 2.0, 1, 0.1, 0.1),
        fake("dot", 2.0, 2, 0.1, 0.1),
    ]  # the best, with two seeds
    longer = {"train.iters": 4000}
    runs += [fake("dot", 0.7, n, 0.1, 0.1, **longer) for n in (1, 2, 3)]  # trained differently
    runs += [fake("laplace", 0.3, n, 0.1, 0.1) for n in (1, 2, 3)]  # another family
    found = results(runs)
    assert best_sharpness(found, "dot") == 0.1 and best_sharpness(found, "dot", 0.1) == 0.5
    assert best_sharpness(found, "dot", seeds=2) == 2.0 and best_sharpness(found, "laplace") == 0.3
    assert list(kind(found, "dot", 0.5)) == [1, 2, 3]
    assert len(kind(found, "dot", 0.7, iters=4000)) == 3 and not kind(found, "dot", 0.7)
    hurt = kind(found, "dot", 0.1).values_of(damaged_loss(0.1))
    assert hurt == {1: 9.0, 2: 9.0, 3: 9.0} and damaged_loss(0.0) == "loss"
    with pytest.raises(ValueError, match="no sharpness of mixture was run with 3 seeds"):
        best_sharpness(found, "mixture")


def test_arms_of_a_study_are_told_apart() -> None:
    more = ({}, {"train.iters": 3}, {"train_damage": 0.1})
    arms = [arm(f, s, m) for f in ("dot", "laplace") for s in (None, 0.5) for m in more]
    assert len({a.name for a in arms}) == 12
    base = replace(RunConfig(), **{"model.attention": "student_t"})
    soft, sharp = (sharpened(base, s).model.precision_init for s in (0.25, 0.5))
    assert soft is not None and sharp is not None and sharp > soft
    with pytest.raises(ValueError, match="give student_t a sharpness"):
        sharpened(base, None)


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({}, 1.0),
        ({"learner.steps": 2}, 0.7),
        ({"learner.steps": 3}, 0.5),
        ({"learner.steps": 16}, 0.5),
        ({"learner.steps": 4, "learner.step_size": 0.9}, 0.9),
        ({"learner.steps": 4, "learner.algorithm": "backprop"}, 1.0),
        ({"learner.steps": 4, "learner.solver": "state"}, 1.0),
        ({"learner.steps": 2, "learner.steps_end": 8}, 0.5),
        ({"learner.steps": 8, "learner.steps_end": 1}, 1.0),
    ],
)
def test_part_steps(changes: dict[str, Any], size: float) -> None:
    assert with_part_steps(replace(RunConfig(), **changes)).learner.step_size == size
    assert [part_step(k) for k in (1, 2, 3, 100)] == [1.0, 0.7, 0.5, 0.5]


def test_a_grid_and_the_runs_of_one_kind() -> None:
    arms = grid({"learner.steps": [1, 4], "label_noise": 0.1}, (1, 2, 3))
    assert len(arms) == 2 and arms[1].changes == {"learner.steps": 4, "label_noise": 0.1}
    assert arms[0].name != arms[1].name and arms[0].seeds == (1, 2, 3)
    runs = [
        {"arm": a.name, "seed": n, "changes": {**a.changes, "train.eval_interval": 7}, "loss": n}
        for a in arms
        for n in (3, 1, 2)
    ]
    found = results(runs).select(steps=4, label_noise=0.1)
    assert list(found) == [1, 2, 3]
    assert all(r["changes"]["learner.steps"] == 4 for r in found.values())
    assert not results(runs).select(steps=4)
    assert not results(runs).select(steps=4, label_noise=0.1, iters=1)


def test_runs_without_a_loss_are_left_out() -> None:
    "A run that ended in an error has no number, and no verdict is made of it."
    run = lambda loss: {"loss": loss, "halves": {"loss": loss} if loss else None}
    a = Runs({n: run(x) for n, x in ((1, 1.0), (2, 1.2), (3, None), (4, 1.1))})
    b = Runs({n: run(2.0) for n in (1, 2, 3, 4, 5)})
    assert a.values_of("halves/loss") == {1: 1.0, 2: 1.2, 4: 1.1} and a.mean() == pytest.approx(1.1)
    assert a.against(b).word == "better" and len(a.against(b).apart) == 3
    assert Runs({3: run(None)}).spread() == "" and a.spread(digits=1) == "1.1 ± 0.1"
    assert Runs({3: run(None)}).against(b).word == "too few seeds"


def test_windows_in_the_order_of_the_text() -> None:
    row = torch.arange(26)  # five whole windows of five, and one target more
    batches = InOrder(**vars(Batches(row, 5, 2, 3)))
    read = torch.cat([batches[i][0] for i in range(5)])
    assert torch.equal(read[:5].flatten(), row[:25]) and torch.equal(read[5:].flatten(), row[:25])
    assert torch.equal(batches[4][1], batches[4][0] + 1)


def test_where_variants_start() -> None:
    base = RunConfig()
    d, D = base.model.d_head, base.model.d_model
    soft, sharp = 1 / math.sqrt(d), initial_precision("gaussian", D, d)
    starts = {
        "GPT, backprop": ("dot", None),
        "ours, backprop": ("gaussian", None),
        "ours from 1/sqrt(d), backprop": ("gaussian", soft),
        "GPT with learned scale, backprop": ("dot", soft),
        "GPT with learned scale from sharp, backprop": ("dot", pytest.approx(sharp, rel=1e-3)),
        "ours, predictive coding": ("gaussian", None),
    }
    assert set(starts) == set(variants(base))
    for name, (family, start) in starts.items():
        c = replace(base, **variants(base)[name])
        assert (c.model.attention, c.model.precision_init) == (family, start), name
        assert c.learner.algorithm == ("predictive_coding" if "predictive" in name else "backprop")
    assert sharp != pytest.approx(soft, rel=0.1)


def test_spreads_and_ratios() -> None:
    assert spread([1.0, 2.0, 6.0]) == "3.000 ± 3.000" and spread([2.0], 1) == "2.0"
    times = [{"a": 2.0, "b": 1.0}, {"a": 9.0, "b": 3.0}, {"a": 40.0, "b": 10.0}]
    found = ratio(times, {"a": 6, "b": 2}, {"a": 10, "b": 2}, "a", "b")
    assert found == {"time": 3.0, "memory": 3.0, "memory_with_resident": 4.0}


def test_the_cost_table_names_the_worst() -> None:
    entry = lambda c, r: {"cosine": c, "residual": r}
    runs = Runs({1: {"record": [entry(0.9, 0.1), entry(0.99, 0.7)]},
                 2: {"record": [entry(0.95, 0.2)]}})
    costs = {
        f"{a} / {b}": {"time": i + 0.5, "memory": 2.0, "memory_with_resident": 3.0}
        for i, (a, b) in enumerate(RATIOS)
    }
    text = cost_table(costs, runs)
    assert (
        "Over 3 evaluations" in text and "backprop is 0.90000" in text and "residual 0.700" in text
    )
    for i, (a, b) in enumerate(RATIOS):
        assert f"| {a} / {b} | {i + 0.5:.2f} | 2.00 | 3.00 |" in text


# ------------------------------------------------------------------------------------------------
# Settled reading, uncertainty and evidence


def test_a_difference_is_of_a_minus_b_over_windows() -> None:
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(40, 5, generator=draw).double().log_softmax(-1) for _ in range(2))
    y = torch.randint(5, (10, 4), generator=draw)
    found = paired_difference(a, b, y, 50, 0)
    loss = lambda p: -p.gather(-1, y.flatten()[:, None]).mean().item()
    assert found["difference"] == pytest.approx(loss(a) - loss(b))
    low, high = found["interval"]
    assert low < found["difference"] < high
    assert paired_difference(a, b, y, 50, 1)["interval"] != found["interval"], (
        "the bootstrap does not know its seed"
    )


def test_the_rule_with_the_least_loss_of_equal_ones_the_flattest() -> None:
    rule = EnergyTemperature
    assert (
        best_of(
            {a: (rule(a), loss) for a, loss in ((-0.4, 2.0), (0.1, 1.0), (0.4, 3.0))}
        ).slope
        == 0.1
    )
    assert best_of({a: (rule(a), 1.0) for a in (-0.4, 0.1, 0.4)}).slope == 0.1


def test_a_rule_is_judged_against_the_fixed_one() -> None:
    "A rule beside itself gains nothing; a worse one loses what its own loss says."
    model = PCTransformer(ModelConfig(13, 10, 1, 2, 16), seed=0).eval()
    tokens = torch.randint(13, (6, 10), generator=torch.Generator().manual_seed(0))
    tests = {"clean": read_text(model, tokens, tokens.flip(0))}
    z, y, e = tests["clean"].flat("energy")
    fixed = tune(z, y, e)[0.0][0]
    hot = EnergyTemperature(temperature=5.0)
    same, worse = (judge_rule(how, fixed, tests, "energy", 20, 0)["clean"] for how in (fixed, hot))
    assert same["against one temperature"] == {"difference": 0.0, "interval": (0.0, 0.0)}
    assert worse["against one temperature"]["difference"] == pytest.approx(
        worse["nll"] - same["nll"], abs=1e-9
    )
    assert worse["nll"] != same["nll"]


def test_calibration_by_hand() -> None:
    "Five predictions of two symbols, sure in this order; the surest and the third are wrong."
    p = torch.tensor([0.99, 0.95, 0.8, 0.7, 0.6], dtype=torch.float64)
    logits, targets = torch.stack([p, 1 - p], 1).log(), torch.tensor([1, 0, 1, 0, 0])
    found = uncertainty.calibration(logits, targets)
    came = torch.where(targets == 0, p, 1 - p)
    right = (targets == 0).double()
    assert found["nll"] == pytest.approx(-came.log().mean().item()) and found[
        "accuracy"
    ] == pytest.approx(0.6)
    assert (
        found["brier"] == pytest.approx((2 * (1 - came).square()).mean().item())
        and found["predictions"] == 5
    )
    by_size = [1.0, 1 / 2, 2 / 3, 2 / 4, 2 / 5]
    assert found["aurc"] == pytest.approx(sum(by_size) / 5)
    wide = [[i for i in range(5) if int(p[i] * 15) == g] for g in sorted({int(x * 15) for x in p})]
    gap = lambda group: abs(right[group].mean().item() - p[group].mean().item()) * len(group) / 5
    assert found["ece_equal_width"] == pytest.approx(sum(map(gap, wide)))
    assert found["ece_equal_mass"] == pytest.approx(sum(gap([i]) for i in range(5)))
    assert found["ece_equal_width"] != pytest.approx(found["ece_equal_mass"])
    assert found["reliability"]["count"] == [len(g) for g in wide]


def test_windows_and_tokens_that_a_detector_sees() -> None:
    draw = torch.Generator().manual_seed(0)
    calm, hurt = (
        {n: torch.randn(3, 5, generator=draw).double() for n in uncertainty.SCORES}
        for _ in range(2)
    )
    where = torch.rand(3, 5, generator=draw) < 0.5
    x, y = uncertainty.at_level(calm, hurt, where, "token")
    assert torch.equal(y, where) and all(
        torch.equal(x[..., i], hurt[n]) for i, n in enumerate(uncertainty.SCORES)
    )
    x, y = uncertainty.at_level(calm, hurt, where, "window")
    assert x.shape == (3, 2, 4) and y.tolist() == [[False, True]] * 3
    for i, n in enumerate(uncertainty.SCORES):
        assert torch.equal(x[..., i], torch.stack([calm[n].mean(1), hurt[n].mean(1)], 1))


def test_a_detector_has_likelihood_and_both_energies() -> None:
    "Entropy alone would find everything, but is not combined."
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(200).view(100, 2) % 2 == 1
    x = torch.randn(100, 2, 4, generator=draw, dtype=torch.float64)
    x[..., uncertainty.SCORES.index("entropy")] += 20 * y
    found = uncertainty.judge((x, y), (x, y), 10, 0)
    assert set(found["weights"]) == {"surprisal", "attention energy", "state energy"}
    assert found["entropy"]["auroc"] == 1 and found["combination"]["auroc"] < 0.8
    gain = found["combination"]["auroc"] - found["surprisal"]["auroc"]
    assert found["gain over surprisal"]["auroc"] == pytest.approx(gain)


def test_intervals_know_their_seed() -> None:
    x = torch.randn(50, generator=torch.Generator().manual_seed(0)).double()
    interval = lambda seed: uncertainty.bootstrap_interval(
        lambda a: a.mean().item(), x, seed=seed
    )
    assert interval(1) != interval(0) == interval(0)


def test_windows_of_validation_text_are_spread_over_all_of_it() -> None:
    x, y = evidence_study.some_windows(torch.arange(101), 10, 4)
    assert x[:, 0].tolist() == [0, 30, 60, 90] and torch.equal(y, x + 1) and x.shape == (4, 10)
    with pytest.raises(ValueError, match="10 windows of 10, so not 11"):
        evidence_study.some_windows(torch.arange(101), 10, 11)
