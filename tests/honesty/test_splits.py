"""Which text every number was read from: the splits have alphabets of their own, and a spy sees
what models read."""

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import stir
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from pc_transformer import ModelConfig, PCTransformer, save
from pc_transformer.cli import main
from pc_transformer.config import replace
from pc_transformer.data import CharTokenizer, Damaged, Text, TextData, baselines, damage, evaluate
from pc_transformer.experiments import (
    evidence_study,
    families,
    harness,
    settled_reading,
    settling,
    tinyshakespeare,
    uncertainty,
)
from pc_transformer.experiments.evidence import EvidenceTransformer
from pc_transformer.experiments.evidence_study import EvidenceBackprop
from pc_transformer.learning import Backprop, PredictiveCoding, gradient_cosine
from pc_transformer.monitoring import Monitor
from pc_transformer.training import (
    CheckpointError,
    Trainer,
    checkpoints,
    load,
    resume,
    save_checkpoint,
    start,
    train,
)
from pc_transformer.training.run import RunConfig

# ----------------------------------------------------------------------------
# A text whose parts can be told apart: training, choosing (first half of what validates), judging
# (second half)

LETTERS = {
    "train": "abcdef",
    "choose": "ghijkl",
    "judge": "mnopqr",
    "foreign, first": "stuv",
    "foreign, second": "wxyz",
}
HELD_OUT = {"choose", "judge"}
VOCABULARY = "\n " + "".join(LETTERS.values())


def written(letters: str, n: int, seed: int) -> str:
    "Words of these letters, `n` characters."
    draw = torch.Generator().manual_seed(seed)
    return "".join(
        (letters + "  ")[i] for i in torch.randint(len(letters) + 2, (n,), generator=draw).tolist()
    )


# every character stands in the training text, which alone makes the vocabulary; among five of its
# own letters each time
ROLL_CALL = "".join(f"ab{x}cde" for x in VOCABULARY if x not in LETTERS["train"])
TRAIN = ROLL_CALL + written(LETTERS["train"], 7200 - len(ROLL_CALL), 0)
VALID = written(LETTERS["choose"], 400, 1) + written(LETTERS["judge"], 400, 2)
OTHER_VALID = written(LETTERS["choose"], 400, 3) + written(LETTERS["judge"], 400, 4)
FOREIGN = written(LETTERS["foreign, first"], 600, 5) + written(LETTERS["foreign, second"], 600, 6)
DATA, OTHER_DATA = TextData.of(TRAIN + VALID), TextData.of(TRAIN + OTHER_VALID)
HALF = len(VALID) // 2
T, V = 16, len(VOCABULARY)
SIZES: dict[str, Any] = {"vocab_size": V, "block_size": T, "n_layer": 1, "n_head": 2, "d_model": 16}


def splits_of(tokens: Tensor) -> list[str]:
    "The split of every row, by most of its letters; rows without any are left out."
    kinds, names = torch.full((V,), len(LETTERS)), list(LETTERS)
    for i, letters in enumerate(LETTERS.values()):
        kinds[DATA.tokenizer.encode(letters)] = i
    counts = F.one_hot(kinds[tokens.reshape(-1, tokens.shape[-1]).cpu()], len(LETTERS) + 1).sum(1)[
        :, :-1
    ]
    return [names[i] for i in counts[counts.sum(1) > 0].argmax(1).tolist()]


class Spy:
    """Within the block, the splits that models read: `learned` while gradients are made,
    `looked` while they are not."""

    def __enter__(self) -> "Spy":
        self.learned, self.looked, self.rows = Counter[str](), Counter[str](), list[Tensor]()
        self.handle = register_module_forward_pre_hook(self.hear)
        return self

    def hear(self, module: nn.Module, args: Any) -> None:
        if isinstance(module, nn.Embedding):
            (self.learned if torch.is_grad_enabled() else self.looked).update(splits_of(args[0]))
            if torch.is_grad_enabled():
                self.rows += list(args[0])

    def __exit__(self, *_: Any) -> None:
        self.handle.remove()


def config(**changes: Any) -> RunConfig:
    "A run of six steps, measured after the third and the last."
    train = {
        "iters": 6,
        "batch_size": 4,
        "learning_rate": 0.01,
        "warmup_iters": 0,
        "eval_interval": 3,
    }
    settings = {f"model.{k}": v for k, v in SIZES.items()} | {
        f"train.{k}": v for k, v in train.items()
    }
    return replace(RunConfig(), **settings | {"learner.algorithm": "backprop"} | changes)


def by_hand(model: nn.Module, text: str, read: Callable[[Tensor], Tensor] = lambda x: x) -> float:
    "The loss of a text in windows that do not overlap, written once more."
    ids, model = DATA.tokenizer.encode(text), model.eval()
    rows = [(ids[i : i + T], ids[i + 1 : i + T + 1]) for i in range(0, len(ids) - 1, T)]
    with torch.no_grad():
        losses = [
            F.cross_entropy(model(read(x[: len(y)])[None])[0], y, reduction="sum").item()
            for x, y in rows
        ]
    return sum(losses) / (len(ids) - 1)


def test_the_sentinels_themselves() -> None:
    "Splitting, vocabulary and ids come from where they should, and the spy sees what is read."
    assert (DATA.train_text, DATA.valid_text) == (
        TRAIN,
        VALID,
    ) and DATA.tokenizer == CharTokenizer.fit(TRAIN)
    assert (
        DATA.tokenizer.decode(DATA.train_ids) == TRAIN
        and DATA.tokenizer.decode(DATA.valid_ids) == VALID
    )
    for part, name in (
        (DATA.train_ids, "train"),
        (DATA.valid_ids[:HALF], "choose"),
        (DATA.valid_ids[HALF:], "judge"),
    ):
        assert set(splits_of(part.unfold(0, T, 1))) == {name}
    model = PCTransformer(config().model)
    with Spy() as spy:
        model(DATA.train_ids[None, :T])
        with torch.no_grad():
            model(DATA.valid_ids[-2 * T :].view(2, T))
    assert spy.learned == {"train": 1} and spy.looked == {"judge": 2}


# ----------------------------------------------------------------------------
# Trainers: they learn from the training text, and are measured on the validation text


def evidence_trainer(c: RunConfig, data: TextData) -> Trainer:
    t = Trainer(c, Text.of(data, c), torch.device("cpu"))
    evidence = EvidenceTransformer(t.model, 10.0)
    t.learner = EvidenceBackprop(evidence, torch.optim.Adam([evidence.log_beta], lr=0.1))
    return t


def altered(c: RunConfig, data: TextData, in_order: bool = False, **how: Any) -> Trainer:
    task = Damaged(Text.of(data, c, in_order), c.train.seed, **how)
    return Trainer(c, task, torch.device("cpu"))


def damaged(c: RunConfig, data: TextData) -> Trainer:
    return altered(c, data, input_noise=0.1)


def clean(t: Trainer, step: int) -> tuple[Tensor, Tensor]:
    "The batch of a step as it would be without damage."
    return (t.task.task if isinstance(t.task, Damaged) else t.task).batch(step)


PC = {"learner.algorithm": "predictive_coding"}
STATES = PC | {
    "learner.solver": "state",
    "learner.steps": 2,
    "learner.relative_precision": 10.0,
}
TRAINERS: dict[str, tuple[Callable[[RunConfig, TextData], Trainer], dict[str, Any]]] = {
    "backprop": (lambda c, data: start(c, data, "cpu"), {}),
    "predictive coding": (lambda c, data: start(c, data, "cpu"), PC),
    "states": (lambda c, data: start(c, data, "cpu"), STATES),
    "with dropout": (lambda c, data: start(c, data, "cpu"), PC | {"model.dropout": 0.3}),
    "in two parts": (lambda c, data: start(c, data, "cpu"), {"train.accumulate": 2}),
    "damaged context": (damaged, {}),
    "noisy labels and inputs": (
        lambda c, data: altered(c, data, label_noise=0.1, input_noise=0.1),
        PC,
    ),
    "in the order of the text": (lambda c, data: altered(c, data, in_order=True), {}),
    "evidence": (evidence_trainer, {}),
}


@pytest.fixture(params=TRAINERS)
def make_trainer(request: pytest.FixtureRequest) -> Callable[[TextData], Trainer]:
    make, changes = TRAINERS[request.param]
    return lambda data: make(config(**changes), data)


def test_learning_reads_the_training_text_and_nothing_else(
    make_trainer: Callable[[TextData], Trainer],
) -> None:
    t = make_trainer(DATA)
    with Spy() as spy:
        t.advance()
        t.advance()
    assert set(spy.learned) == {"train"} and set(spy.looked) <= {"train"}
    with Spy() as spy:
        entry = t.measure()
    # a past that settles is read without gradients too
    assert set(spy.learned) == {"train"} and set(spy.looked) - {"train"} == HELD_OUT
    first = t.batch(0)[0]
    assert all((row == first).all(1).any() for row in spy.rows), (
        "where the learner sits is measured on the first batch"
    )
    assert entry["valid_loss"] == pytest.approx(by_hand(t.model, VALID), rel=1e-5)


def test_the_validation_text_teaches_nothing(make_trainer: Callable[[TextData], Trainer]) -> None:
    "Two runs that differ in their validation text only differ in their validation loss only."
    runs = [train(make_trainer(data)) for data in (DATA, OTHER_DATA)]
    assert runs[0].losses == runs[1].losses
    assert all(
        torch.equal(p, q) for p, q in zip(*(t.model.parameters() for t in runs), strict=True)
    )
    for a, b in zip(*(t.record for t in runs), strict=True):
        seen = {"valid_loss", "accuracy", "bits_per_byte"} & a.keys()
        assert a["valid_loss"] != b["valid_loss"]
        assert {k: v for k, v in a.items() if k not in seen} == {
            k: v for k, v in b.items() if k not in seen
        }
    assert [e["step"] for e in runs[0].record] == [0, 3, 6]


def test_the_training_loss_is_that_of_the_training_batch() -> None:
    t = start(config(), DATA, "cpu")
    for step in range(3):
        tokens, targets = clean(t, step)
        with torch.no_grad():
            loss = F.cross_entropy(t.model(tokens).flatten(0, 1), targets.flatten()).item()
        assert t.advance() == pytest.approx(loss, rel=1e-6)


def test_every_step_has_a_batch_of_its_own() -> None:
    t = start(config(), DATA, "cpu")
    with Spy() as spy:
        for _ in range(4):
            t.advance()
    assert torch.equal(torch.stack(spy.rows), torch.cat([clean(t, i)[0] for i in range(4)]))
    assert len({tuple(row.tolist()) for row in spy.rows}) == 16


def test_batches_are_a_function_of_the_runs_seed() -> None:
    a, b = (start(config(**{"train.seed": s}), DATA, "cpu") for s in (1, 2))
    assert not torch.equal(a.batch(0)[0], b.batch(0)[0])
    assert not torch.equal(a.model.output.weight, b.model.output.weight)


def test_a_run_goes_on_with_its_own_splits(tmp_path: Path) -> None:
    t = start(config(), DATA, "cpu")
    t.advance()
    save_checkpoint(t, tmp_path)
    resume(start(config(), DATA, "cpu"), tmp_path)
    end = 3 * T  # the same characters, split elsewhere
    moved = changed(
        DATA,
        train_ids=torch.cat([DATA.train_ids, DATA.valid_ids[:end]]),
        valid_ids=DATA.valid_ids[end:],
    )
    for other in (OTHER_DATA, changed(DATA, train_ids=DATA.train_ids[:-1]), moved):
        with pytest.raises(CheckpointError, match="other data"):
            resume(start(config(), other, "cpu"), tmp_path)


# ----------------------------------------------------------------------------
# Looks: without dropout, on what they are said to read


def lively(dropout: float = 0.0, seed: int = 0, **options: Any) -> PCTransformer:
    "A model in training mode in which every part matters."
    model = PCTransformer(ModelConfig(**SIZES, dropout=dropout, **options), seed=seed)
    stir(model, seed, 8.0)
    return model


@pytest.mark.parametrize("text", [VALID, TRAIN[: 3 * T + 5], VALID[: T + 1]])
def test_a_loss_is_of_every_token_and_without_dropout(text: str) -> None:
    model = lively(dropout=0.5)
    found = [evaluate(model, DATA.tokenizer.encode(text), T, batch_size=7) for _ in range(2)]
    assert model.training and found[0] == found[1] == pytest.approx(by_hand(model, text), rel=1e-5)


def test_a_cosine_is_without_dropout() -> None:
    model, (tokens, targets) = (
        lively(dropout=0.5),
        (DATA.train_ids[: 2 * T].view(2, T), DATA.train_ids[1 : 2 * T + 1].view(2, T)),
    )
    assert gradient_cosine(Backprop(), model, tokens, targets)["all"] == pytest.approx(1, abs=1e-6)
    stiff = PredictiveCoding()
    found, still = (gradient_cosine(stiff, m, tokens, targets) for m in (model, lively()))
    assert found == pytest.approx(still, abs=1e-6) and found["all"] > 0.99 and model.training


def test_other_looks_are_without_dropout() -> None:
    still, drops = lively().eval(), lively(dropout=0.5)
    ids, windows = DATA.valid_ids, DATA.valid_ids[: 8 * T].view(8, T)
    assert families.evaluate_damaged(drops, ids, T, V, 0.1) == families.evaluate_damaged(
        still, ids, T, V, 0.1
    )
    assert settled_reading.query_looks(drops, windows) == settled_reading.query_looks(
        still, windows
    )
    a, b = (settled_reading.read_text(m, windows, windows) for m in (drops, still))
    assert torch.equal(a.logits, b.logits) and all(
        torch.equal(a.drivers[n], b.drivers[n]) for n in a.drivers
    )
    assert torch.equal(
        uncertainty.flat_predictions(drops, windows)[0],
        uncertainty.flat_predictions(still, windows)[0],
    )
    look = uncertainty.ensemble_log_probs
    assert torch.equal(look([drops], windows), look([still], windows))
    known = [uncertainty.StateGaussians.fit(m, windows) for m in (drops, still)]
    assert all(
        torch.equal(p, q) for p, q in zip(known[0].precision, known[1].precision, strict=True)
    )
    scores = [uncertainty.token_scores(m, windows, known[1]) for m in (drops, still)]
    assert all(torch.equal(scores[0][n], scores[1][n]) for n in scores[0])
    past = [EvidenceTransformer(m, 10.0) for m in (drops, still)]
    assert torch.equal(*(evidence_study.read_losses(m, windows, windows) for m in past))


def test_a_damaged_loss_is_that_of_damaged_context_and_clean_targets() -> None:
    model = lively()
    assert families.evaluate_damaged(model, DATA.valid_ids, T, V, 0.0) == evaluate(
        model, DATA.valid_ids, T
    )
    draw = torch.Generator().manual_seed(3)
    hurt = by_hand(model, VALID[: T + 1], lambda x: damage(x[None], V, 0.5, draw)[0])
    assert families.evaluate_damaged(model, DATA.valid_ids[: T + 1], T, V, 0.5, 3) == pytest.approx(
        hurt, rel=1e-6
    )
    losses = {
        families.evaluate_damaged(model, DATA.valid_ids, T, V, 0.5, seed) for seed in (0, 1, 2)
    }
    assert len(losses) == 3, "the damage is a function of its seed"


def test_a_monitor_looks_at_the_training_text() -> None:
    looks = []
    for data in (DATA, OTHER_DATA):
        watch = Monitor(interval=3, products=1)
        t = train(start(config(**PC), data, "cpu"))
        with Spy() as spy:
            looks.append(watch.measure(t))
        assert set(spy.learned + spy.looked) == {"train"}
        assert all((row == t.batch(0)[0]).all(1).any() for row in spy.rows), (
            "every look is at the same, first batch"
        )
    assert looks[0] == looks[1]
    batch = DATA.valid_ids[: 2 * T].view(2, T), DATA.valid_ids[1 : 2 * T + 1].view(2, T)
    with Spy() as spy:
        Monitor(products=0, batch=batch).measure(start(config(**PC), DATA, "cpu"))
    assert set(spy.learned + spy.looked) == {"choose"}, (
        "a batch that is given is the batch that is looked at"
    )


# ----------------------------------------------------------------------------
# Noise: anew in every step and layer, the same again in the same step


def one_batch(**changes: Any) -> RunConfig:
    """A run that does not move: with a text of one window every step has the same batch and the
    same weights."""
    still = {
        "train.min_learning_rate": 0.0,
        "train.learning_rate": 1e-30,
        "train.weight_decay": 0.0,
    }
    return config(**still | changes)


WINDOW = changed(DATA, train_ids=DATA.train_ids[: T + 1])


@pytest.mark.parametrize(
    "learner", [{}, PC, PC | {"learner.lean": True}, PC | {"learner.centred": True}], ids=str
)
def test_dropout_is_drawn_anew_in_every_step(learner: dict[str, Any]) -> None:
    """Same weights, same batch: only dropout can make losses differ, and it does, as a function
    of seed and step."""
    t = start(one_batch(**learner, **{"model.dropout": 0.5, "train.iters": 4}), WINDOW, "cpu")
    stir(t.model, 0, 8.0)
    losses = [t.advance() for _ in range(4)]
    assert len(set(losses)) == 4, losses
    again = start(t.config, WINDOW, "cpu")
    stir(again.model, 0, 8.0)
    assert [again.advance() for _ in range(4)] == losses, "a run that is repeated repeats it"
    other = start(replace(t.config, **{"train.seed": 2}), WINDOW, "cpu")
    other.model.load_state_dict(again.model.state_dict())
    assert not {other.advance() for _ in range(4)} & set(losses), "another seed drops out others"
    dry = start(one_batch(**learner), WINDOW, "cpu")
    stir(dry.model, 0, 8.0)
    assert dry.advance() == dry.advance() == dry.advance(), "without dropout nothing differs"


@pytest.mark.parametrize("learner", [{}, PC, STATES], ids=str)
def test_dropout_is_drawn_anew_in_every_layer(learner: dict[str, Any]) -> None:
    "Where a branch is dropped out, a layer hands on what it has read."
    t = start(config(**learner, **{"model.dropout": 0.5, "model.n_layer": 3}), DATA, "cpu")
    masks: dict[int, list[Tensor]] = {}
    for l, f in enumerate(t.model.predictors):
        if l:
            hear = lambda module, args, out, l=l: masks.setdefault(l, []).append(
                (out == args[0]).detach()
            )
            f.register_forward_hook(hear)
    t.advance()
    first = [masks[l][0] for l in range(1, 7)]
    assert all(0.4 < m.double().mean() < 0.6 for m in first)
    same = [(a == b).double().mean().item() for i, a in enumerate(first) for b in first[:i]]
    assert max(same) < 0.6, f"two layers have the same mask: {same}"
    rows = first[0]
    assert (rows[0] == rows[1]).double().mean() < 0.7 and (
        rows[:, 0] == rows[:, 1]
    ).double().mean() < 0.7


def shares(trainer: Trainer, steps: int = 40) -> tuple[float, float, int]:
    """Parts of tokens and of targets that differ from the run's own batch, and how many
    different batches there were."""
    pairs = [(trainer.batch(i), clean(trainer, i)) for i in range(steps)]
    parts = [
        torch.stack([(a[n] != b[n]).double().mean() for a, b in pairs]).mean().item()
        for n in (0, 1)
    ]
    return (
        parts[0],
        parts[1],
        len({(*a[0].flatten().tolist(), *a[1].flatten().tolist()) for a, _ in pairs}),
    )


NOISY: dict[str, tuple[Callable[[RunConfig], Trainer], tuple[float, float]]] = {
    "damaged context": (lambda c: damaged(c, WINDOW), (0.1, 0.0)),
    "label noise": (lambda c: altered(c, WINDOW, label_noise=0.3), (0.0, 0.3)),
    "input noise": (lambda c: altered(c, WINDOW, input_noise=0.2), (0.2, 0.0)),
    "both": (lambda c: altered(c, WINDOW, label_noise=0.1, input_noise=0.2), (0.2, 0.1)),
}


@pytest.mark.parametrize("kind", NOISY)
def test_noise_is_drawn_anew_in_every_step(kind: str) -> None:
    make, wanted = NOISY[kind]
    t, again, other = (make(config(**{"train.seed": s})) for s in (1, 1, 2))
    inputs, labels, batches = shares(t)
    assert (inputs, labels) == (
        pytest.approx(wanted[0], abs=0.03),
        pytest.approx(wanted[1], abs=0.03),
    )
    assert batches == 40, "the noise of two steps is the same"
    assert all(torch.equal(t.batch(3)[n], again.batch(3)[n]) for n in (0, 1)), (
        "a step that is repeated repeats its noise"
    )
    assert any(not torch.equal(t.batch(3)[n], other.batch(3)[n]) for n in (0, 1)), (
        "the noise does not know the run's seed"
    )
    losses = [t.advance() for _ in range(3)]
    t = make(one_batch())
    assert len({t.advance() for _ in range(5)}) == 5, (
        f"what is learned from is not what `batch` says: {losses}"
    )


def test_a_foreign_start_is_over_in_time() -> None:
    t = altered(config(**{"train.iters": 10}), DATA, foreign_steps=3)
    plain, (written_, _) = clean(t, 0), t.batch(0)
    assert not torch.equal(written_, plain[0])
    pairs = set(zip(plain[0].flatten().tolist(), written_.flatten().tolist(), strict=True))
    assert len(pairs) == len(plain[0].unique()) == len({b for _, b in pairs}), (
        "every token is written as one other"
    )
    changed_ = [not torch.equal(t.batch(i)[0], clean(t, i)[0]) for i in range(10)]
    assert changed_ == [True] * 3 + [False] * 7
    t.step = 5
    assert torch.equal(t.task.batch_for_measuring(t.step)[0], plain[0]), (
        "a late look reads an early batch as the run does by then"
    )


# ----------------------------------------------------------------------------
# Baselines and studies


def unigram(train_text: str, valid_text: str) -> float:
    "Witten and Bell's unigram over a uniform vocabulary, by hand."
    counts = Counter(train_text)
    N, kinds = len(train_text), len(counts)
    return -sum(math.log((counts[c] + 1) / (N + kinds)) for c in valid_text[1:]) / (
        len(valid_text) - 1
    )


BASELINES = baselines(TRAIN, VALID)
KNOWN = {
    name: {"loss": b["nats_per_char"], "bits_per_byte": b["bits_per_byte"]}
    for name, b in BASELINES.items()
}


def test_baselines_count_the_training_text_and_score_the_validation_text() -> None:
    assert BASELINES["unigram"]["nats_per_char"] == pytest.approx(unigram(TRAIN, VALID), rel=1e-12)
    assert BASELINES["uniform"]["nats_per_char"] == pytest.approx(math.log(V))
    assert (
        BASELINES["5-gram"]["nats_per_char"]
        > math.log(V)
        > baselines(TRAIN, TRAIN)["5-gram"]["nats_per_char"]
    )
    assert abs(unigram(TRAIN, VALID) - unigram(VALID, VALID)) > 1, (
        "the splits differ so much that no other could be meant"
    )


def on_data(of: harness.Study) -> harness.Study:
    "The study, on the text with sentinels."
    return changed(of, task=lambda c: Text.of(DATA, c))


def small(**changes: Any) -> dict[str, Any]:
    "The sizes of `config` as changes for all arms."
    own = ("iters", "batch_size", "learning_rate", "warmup_iters", "eval_interval")
    train = {f"train.{k}": getattr(config().train, k) for k in own}
    return {f"model.{k}": v for k, v in SIZES.items() if k != "vocab_size"} | train | changes


def test_a_comparison_reads_every_number_from_its_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    traces = tinyshakespeare.settling_traces
    hear = lambda model, batch, *rest: (
        seen.append(splits_of(batch[0])) or traces(model, batch, *rest)
    )
    monkeypatch.setattr(tinyshakespeare, "settling_traces", hear)
    demo = on_data(tinyshakespeare.DEMONSTRATION)
    with Spy() as spy:
        found = harness.run(demo, tmp_path, (1, 2), changes=small(), device="cpu")
    assert set(spy.learned) == {"train"} and set(sum(seen, [])) == {"train"}
    assert found.baselines == KNOWN and len({r["loss"] for r in found.runs}) == 6
    assert [r["seed"] for r in found.runs] == [1, 1, 1, 2, 2, 2]
    for run in found.runs:
        assert run["loss"] == run["record"][-1]["valid_loss"] and run["tokens"] == 6 * 4 * T
        bits = run["loss"] / math.log(2)  # one byte a character
        assert run["bits_per_byte"] == pytest.approx(bits)
        assert [e["step"] for e in run["record"]] == [0, 3, 6]
    models = sorted((tmp_path / "models").iterdir())
    losses = sorted(by_hand(load(folder), VALID) for folder in models)
    assert losses == pytest.approx(sorted(r["loss"] for r in found.runs), rel=1e-5)


def job(**changes: Any) -> harness.Job:
    c = config(**changes)
    return harness.Job(c, Text.of(DATA, c), torch.device("cpu"), Path("nowhere"))


def test_runs_of_the_studies_read_every_number_from_its_split() -> None:
    for page, run in (
        (families, lambda: families.family_run(job(), None, 0.1)),
        (settling, lambda: settling.settled_run(job(**PC), label_noise=0.1)),
    ):
        kept: list[Trainer] = []
        measure = Trainer.measure
        with pytest.MonkeyPatch.context() as patch, Spy() as spy:
            patch.setattr(families, "sharpened", lambda c, s: c)
            patch.setattr(
                Trainer,
                "measure",
                lambda t, kept=kept, measure=measure: kept.append(t) or measure(t),
            )
            found = run()
        assert set(spy.learned) == {"train"} and set(spy.looked) == HELD_OUT, page.__name__
        t = kept[-1]
        assert found["loss"] == pytest.approx(by_hand(t.model, VALID), rel=1e-5) and t.step == 6
        assert [e["step"] for e in found["record"]][-2:] == [3, 6]
        assert found["tokens"] == 6 * 4 * T
        if page is families:
            assert found["damaged"] == {
                str(f): families.evaluate_damaged(t.model, DATA.valid_ids, T, V, f)
                for f in families.DAMAGE
            }


def test_seeds_are_runs_of_their_own(tmp_path: Path) -> None:
    for of in (families.STUDY, settling.MAP):
        few = small(**{"train.iters": 1})
        only = "dot, sharpness of" if of is families.STUDY else "sweep"
        found = harness.run(on_data(of), tmp_path / of.name, (1, 2), only, few, "cpu")
        assert found.baselines == KNOWN and len({r["loss"] for r in found.runs}) == 2


# ----------------------------------------------------------------------------
# Uncertainty and settled reading: fitted on one half, judged on the other


def only(tokens: Tensor, name: str) -> None:
    "Every letter among these tokens belongs to this split."
    letters = set(DATA.tokenizer.decode(tokens.flatten())) - set(" \n")
    assert letters and letters <= set(LETTERS[name]), f"{sorted(letters)} should be of {name}"


def sentinel_scores(tokens: Tensor, known: Any) -> dict[str, Tensor]:
    "Scores that tell what they were read from: thousands, one for every split."
    kinds, draw = (
        torch.tensor([1000.0 * list(LETTERS).index(s) for s in splits_of(tokens)]),
        torch.Generator().manual_seed(0),
    )
    rows = lambda: kinds[:, None] + torch.rand(len(tokens), T - 1, generator=draw)
    return {n: rows().double() for n in uncertainty.SCORES}


def bands(x: Tensor) -> set[str]:
    "The splits that sentinel scores name."
    return {list(LETTERS)[int(i)] for i in (x // 1000).flatten().unique()}


def test_uncertainty_is_fitted_on_one_half_and_judged_on_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heard: dict[str, list[Any]] = {
        "temperature": [],
        "calibration": [],
        "fit": [],
        "judged": [],
        "states": [],
    }
    old = {
        n: getattr(uncertainty, n) for n in ("fit_temperature", "calibration", "detector", "judge")
    }

    def fit_temperature(z: Tensor, t: Tensor) -> float:
        heard["temperature"].append(t)
        return old["fit_temperature"](z, t)

    def calibration(z: Tensor, t: Tensor) -> Any:
        heard["calibration"].append((z, t))
        return old["calibration"](z, t)

    def detector(x: Tensor, y: Tensor) -> Any:
        heard["fit"].append(bands(x))
        return old["detector"](x, y)

    def judge(fit: Any, test: Any, *rest: Any) -> Any:
        heard["judged"].append(bands(test[0]))
        return old["judge"](fit, test, *rest)

    fit_states = uncertainty.StateGaussians.fit
    monkeypatch.setattr(
        uncertainty.StateGaussians,
        "fit",
        lambda m, x: heard["states"].append(x) or fit_states(m, x),
    )
    for f in (fit_temperature, calibration, detector, judge):
        monkeypatch.setattr(uncertainty, f.__name__, f)
    monkeypatch.setattr(
        uncertainty, "token_scores", lambda model, tokens, known: sentinel_scores(tokens, known)
    )
    monkeypatch.setattr(
        uncertainty, "DAMAGES", ("replaced characters", "shuffled words", "foreign text")
    )
    model = lively().eval()
    foreign = DATA.tokenizer.encode(FOREIGN)
    found = uncertainty.calibrated(model, DATA.valid_ids)
    found["detection"] = uncertainty.detection(model, DATA, foreign, 10, 5, 0)
    (chosen,) = heard["temperature"]
    only(chosen, "choose")
    for _, t in heard["calibration"]:
        only(t, "judge")
    (before, targets), (after, _) = heard["calibration"]
    assert torch.equal(before / found["temperature"], after)
    assert before.shape[0] == len(targets) == HALF // (T + 1) * T, (
        "all windows of the second half are judged"
    )
    fit = uncertainty.flat_predictions(
        model, uncertainty.even_windows(DATA.valid_ids[:HALF], T + 1, HALF)
    )
    assert found["temperature"] == pytest.approx(old["fit_temperature"](*fit))
    only_ = [set(splits_of(x)) for x in heard["states"]]
    assert only_ == [{"train"}], "what states look like is learned from the training text"
    assert heard["fit"] == [{"choose"}] * 3 + [{"choose", "foreign, first"}]
    assert heard["judged"] == [{"judge"}] * 3 + [{"judge", "foreign, second"}]
    assert set(found["detection"]["replaced characters"]) == {"window", "token"}


def test_a_study_of_uncertainty_is_a_function_of_its_seed() -> None:
    text, model = DATA.tokenizer.encode(FOREIGN), lively().eval()
    found = [uncertainty.detection(model, DATA, text, 10, 5, seed) for seed in (0, 0, 1)]
    assert found[0] == found[1]
    for kind in ("replaced characters", "shuffled words", "random characters"):
        numbers = [f[kind]["window"]["surprisal"]["auroc"] for f in found] + [
            f[kind]["window"]["weights"] for f in found
        ]
        assert numbers[0] != numbers[2] or numbers[3] != numbers[5], kind


def test_a_detector_is_fitted_on_the_text_that_is_given_to_fit() -> None:
    """Scores that help on the first text and mislead on the second: weights of the first,
    numbers of the second."""
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(400).view(200, 2) % 2 == 1
    fit = torch.randn(200, 2, 4, generator=draw, dtype=torch.float64) + 3 * y[..., None]
    test = torch.randn(200, 2, 4, generator=draw, dtype=torch.float64) - 3 * y[..., None]
    found = uncertainty.judge((fit, y), (test, y), 5, 0)
    assert all(w > 0 for w in found["weights"].values()) and found["combination"]["auroc"] < 0.05
    assert all(found[n]["auroc"] < 0.1 for n in uncertainty.SCORES)


def test_an_ensemble_is_judged_on_the_second_half(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        uncertainty, "DAMAGES", ("replaced characters", "shuffled words", "foreign text")
    )
    models = [lively(), lively(seed=1)]
    with Spy() as spy:
        found = uncertainty.study_ensemble(models, DATA, DATA.tokenizer.encode(FOREIGN), 10, 5, 0)
    assert set(spy.looked) == {"judge", "foreign, second"} and not spy.learned
    clean = uncertainty.even_windows(DATA.valid_ids[HALF:], T, 10)
    parts = uncertainty.decompose(uncertainty.ensemble_log_probs(models, clean))
    for name in ("total", "aleatoric", "epistemic"):
        assert found["clean, nats per token"][name] == pytest.approx(
            getattr(parts, name).mean().item()
        )
        for kind in uncertainty.DAMAGES:
            assert 0 <= found[kind][name]["auroc"] <= 1


def test_settled_reading_is_chosen_on_one_half_and_judged_on_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen, judged, fixed_at = [], [], []
    tune, judge_rule, curves = (
        settled_reading.tune,
        settled_reading.judge_rule,
        settled_reading.curve_losses,
    )

    def judging(how: Any, fixed: Any, tests: Any, *rest: Any) -> Any:
        judged.extend(r.targets for r in tests.values())
        fixed_at.append(fixed)
        return judge_rule(how, fixed, tests, *rest)

    def losses(how: Any, tests: Any, *rest: Any) -> Any:
        judged.extend(r.targets for r in tests.values())
        return curves(how, tests, *rest)

    monkeypatch.setattr(
        settled_reading, "tune", lambda z, y, e: chosen.append((z, y, e)) or tune(z, y, e)
    )
    monkeypatch.setattr(settled_reading, "judge_rule", judging)
    monkeypatch.setattr(settled_reading, "curve_losses", losses)
    model = lively(attention="student_t").eval()
    with Spy() as spy:
        found = settled_reading.temperature_study(model, DATA.valid_ids, 20, 5, 0)
    assert set(spy.looked + spy.learned) == HELD_OUT
    assert len(chosen) == 6 and len(judged) == 2 * (4 * 11 + 4 + 2 + 2)
    for _, y, _ in chosen:
        only(y, "choose")
    for y in judged:
        only(y, "judge")
    for driver, (_, _, e) in zip(settled_reading.DRIVERS, chosen[:4], strict=True):
        rule = found["rules"][driver]
        assert (rule["mean"], rule["sd"]) == (
            pytest.approx(e.mean().item()),
            pytest.approx(e.std().item()),
        )
        best = min(found["curves"][driver].items(), key=lambda a: (a[1]["fit"], abs(float(a[0]))))
        assert rule["slope"] == float(best[0]), "the slope is chosen where it is fitted"
        assert rule["clean"]["nll"] == pytest.approx(best[1]["clean"]), (
            "and judged on the other half"
        )


def test_damage_of_settled_reading_is_a_function_of_its_seed() -> None:
    model = lively(attention="gaussian").eval()
    rules = [
        settled_reading.temperature_study(model, DATA.valid_ids, 5, 5, seed)["rules"]["entropy"]
        for seed in (0, 0, 1)
    ]
    hurt = [r["10 % replaced"]["nll"] for r in rules]
    assert (
        hurt[0] == hurt[1] != hurt[2]
        and rules[0]["clean"]["nll"] == rules[2]["clean"]["nll"] != hurt[0]
    )
    losses = [
        settled_reading.settled_losses(model, DATA.valid_ids[:100], seed) for seed in (0, 0, 1)
    ]
    assert (
        losses[0] == losses[1]
        and losses[0]["0.0"] == losses[2]["0.0"]
        and losses[0]["0.1"] != losses[2]["0.1"]
    )


def test_losses_of_settled_reading_are_of_the_whole_validation_text() -> None:
    model = lively(attention="gaussian")
    with Spy() as spy:
        found = settled_reading.settled_losses(model, DATA.valid_ids)
    assert set(spy.looked) == HELD_OUT and not spy.learned
    assert found["0.0"]["0"] == pytest.approx(by_hand(model, VALID), rel=1e-5)
    steps = found["0.0"]
    assert len(set(steps.values())) == len(steps) and len(set(found["0.1"].values())) == len(steps)


# ----------------------------------------------------------------------------
# Evidence: trained further on the training text, read on the validation text


def test_evidence_goes_on_with_the_training_text(tmp_path: Path) -> None:
    save(lively(), tmp_path / "model", DATA.tokenizer)
    for beta in (None, 10.0):
        found = []
        for data in (DATA, OTHER_DATA):
            with Spy() as spy:
                c = config(**{"train.iters": 2})
                net, t = evidence_study.go_on(c, Text.of(data, c), load(tmp_path / "model"), beta)
            assert set(spy.learned) == {"train"} and set(spy.looked) <= {"train"}
            assert net.model is t.model and (beta is None or net.log_beta[0].exp() != beta)
            found.append([*net.parameters()])
        assert all(torch.equal(p, q) for p, q in zip(*found, strict=True)), (
            "the validation text has taught"
        )
        moved = [
            not torch.equal(p, q)
            for p, q in zip(net.model.parameters(), lively().parameters(), strict=True)
        ]
        assert any(moved)


def test_evidence_reads_the_validation_text(monkeypatch: pytest.MonkeyPatch) -> None:
    read, gains = [], evidence_study.gains

    def reading(model: Any, x: Tensor, y: Tensor, steps: Any) -> Any:
        read.append((x, y))
        return gains(model, x, y, steps)

    monkeypatch.setattr(evidence_study, "gains", reading)
    monkeypatch.setattr(evidence_study, "UNTRAINED", (10.0,))
    for beta in (None, 10.0):
        found = evidence_study.evidence_run(job(**{"train.iters": 1}), beta, 20, 1)
        for reads in found["readings"].values():
            assert reads["clean"]["0"]["loss"] != reads["10 % replaced"]["0"]["loss"]
    rows = DATA.valid_ids.unfold(0, T, 1)
    for (x, y), (hurt, z) in zip(read[::2], read[1::2], strict=True):
        assert (
            set(splits_of(y)) == HELD_OUT and torch.equal(y, z) and torch.equal(x[:, 1:], y[:, :-1])
        )
        assert all((rows == w).all(1).any() for w in torch.cat([x, y]))
        assert 0.05 < (hurt != x).double().mean() < 0.15 and len(x) == 20


# ----------------------------------------------------------------------------
# The command line


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Spy]:
    "A text file, a run's folder that `pct train` made of it, and what was read."
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text(TRAIN + VALID)
    options = [f"--model.{k}={v}" for k, v in SIZES.items()]
    options += [
        "--train.iters=4",
        "--train.eval_interval=2",
        "--train.batch_size=4",
        "--train.checkpoint_interval=2",
    ]
    with Spy() as spy:
        assert (
            main(
                [
                    "train",
                    str(folder / "run"),
                    f"--data={folder / 'text.txt'}",
                    "--device=cpu",
                    "--progress=false",
                    *options,
                ]
            )
            == 0
        )
    return folder / "text.txt", folder / "run", spy


def numbers(out: str, name: str) -> list[float]:
    "The numbers behind a name in a printed table."
    (line,) = [x for x in out.splitlines() if x.startswith(name + " ")]
    return [float(x) for x in line.removeprefix(name).split()]


def test_training_and_evaluating_from_the_command_line(
    run: tuple[Path, Path, Spy], capsys: pytest.CaptureFixture[str]
) -> None:
    text, folder, read = run
    assert set(read.learned) == {"train"}
    assert set(read.looked) == HELD_OUT | {
        "train"
    }  # a checkpoint looks at the next batch before it is written
    progress = json.loads((checkpoints(folder)[-1] / "training.json").read_text())
    model = load(checkpoints(folder)[-1])
    loss = by_hand(model, VALID)
    assert progress["record"][-1]["valid_loss"] == pytest.approx(loss, rel=1e-5)
    for more in ([], [f"--data={text}"]):
        with Spy() as spy:
            assert main(["evaluate", str(folder), "--device=cpu", *more]) == 0
        assert set(spy.looked) == HELD_OUT and not spy.learned
        out = capsys.readouterr().out
        nats, bits, perplexity = numbers(out, "this model")
        assert nats == pytest.approx(loss, abs=1e-4) and bits == pytest.approx(
            loss / math.log(2), abs=1e-4
        )
        assert perplexity == pytest.approx(math.exp(loss), abs=2e-3)
        for name, b in BASELINES.items():
            assert numbers(out, name)[:2] == pytest.approx(
                [b["nats_per_char"], b["bits_per_byte"]], abs=1e-4
            )


def test_studies_from_the_command_line(run: tuple[Path, Path, Spy], tmp_path: Path) -> None:
    text, _, _ = run
    changes = json.dumps({**small(**{"train.iters": 1}), "data": str(text)})
    for name, only in (("families", "dot, sharpness of"), ("settle", "sweep"), ("demo", "GPT")):
        out = tmp_path / name
        asked = ["run", name, f"--out={out}", f"--only={only}", f"--changes={changes}"]
        with Spy() as spy:
            assert main([*asked, "--seeds=[1]", "--device=cpu"]) == 0
        assert set(spy.learned) == {"train"}, name
        assert json.loads((out / "results.json").read_text())["baselines"] == KNOWN


def test_the_vocabulary_is_that_of_the_training_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(TRAIN + VALID)
    assert main(["data", str(tmp_path / "text.txt")]) == 0
    out = capsys.readouterr().out
    assert (
        f"{len(TRAIN):,} train, {len(VALID):,} validation" in out
        and f"{V} characters, from the training split" in out
    )
    for name, b in BASELINES.items():
        assert f"{b['nats_per_char']:.3f}" in next(
            x for x in out.splitlines() if x.startswith(name)
        )
