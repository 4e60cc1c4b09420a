"""What is new costs one file: a task, a study, a likelihood and a solver that the package knows
nothing of, each written in a file of its own and used."""

import importlib
import json
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pc_transformer import ModelConfig, generate
from pc_transformer.attention import Keys, Mask, PCAttention, attend, read
from pc_transformer.cli import COMMANDS, main
from pc_transformer.config import ConfigError, TrainConfig, replace
from pc_transformer.data import Damaged
from pc_transformer.energies import StudentT
from pc_transformer.experiments import harness
from pc_transformer.learning import Backprop, PredictiveCoding, gradients
from pc_transformer.monitoring import Monitor
from pc_transformer.settling import ErrorSettling, FreeEnergy
from pc_transformer.training import (
    CheckpointError,
    Checkpoints,
    Interrupted,
    Trainer,
    resume,
    train,
)
from pc_transformer.training.run import RunConfig

TASK = '''
"Which of two symbols came first? One target, at the last place."
from dataclasses import dataclass

import torch
from pc_transformer.data import Task, held_out


@dataclass
class First(Task):
    length: int
    batch_size: int
    seed: int = 0
    vocab_size: int = 3          # two symbols, and the question

    @property
    def n_target(self): return 2

    def rows(self, n, draw):
        tokens = torch.randint(2, (n, self.length), generator=draw)
        tokens[:, -1] = 2
        targets = torch.full_like(tokens, -100)
        targets[:, -1] = tokens[:, 0]
        return tokens, targets

    def batch(self, step):
        return self.rows(self.batch_size, torch.Generator().manual_seed(self.seed * 10**6 + step))

    def evaluate(self, model):
        return held_out(model, [self.rows(500, torch.Generator().manual_seed(2**40))])

    def baselines(self): return {"a coin": {"loss": 0.6931, "accuracy": 0.5}}
'''

STUDY = '''
"Does a wider model remember better?"
from one_edit_tasks.first import First
from pc_transformer.experiments.harness import Arm, grid, study


@study(
    "first", "Does a wider model remember better?", seeds=(1, 2, 3),
    task=lambda c: First(c.model.block_size, c.train.batch_size, c.train.seed),
    base={"model.block_size": 8, "model.n_layer": 1, "model.n_head": 1, "train.iters": 2,
          "train.eval_interval": 1},
)
def arms(base):
    return grid({"model.d_model": [4, 8]}) + [Arm("slow", {"train.learning_rate": 1e-4}, (7,))]
'''

LIKELIHOOD = '''
"The Cauchy density, heavy-tailed: half of its mass lies within one unit, and it has no mean."
import math
from dataclasses import dataclass

import torch
from pc_transformer.attention import PCAttention
from pc_transformer.energies import Elliptical


@dataclass(frozen=True)
class Cauchy(Elliptical):
    def link(self, u, dim): return -(1 + dim) / 2 * torch.log1p(u)
    def weight(self, u, dim): return (1 + dim) / (1 + u)

    def log_normaliser(self, dim):
        return (1 + dim) / 2 * math.log(math.pi) - math.lgamma((1 + dim) / 2)

    def standard(self, like, generator):
        normal = lambda *shape: torch.randn(*shape, generator=generator).to(like)
        return normal(*like.shape) / normal(*like.shape[:-1], 1).abs()


class CauchyHead(PCAttention):
    likelihood = Cauchy()
'''

SOLVER = '''
"A part of one step from the feed-forward states, at fixed predictions."
from dataclasses import dataclass
from typing import ClassVar

from pc_transformer.settling import FreeEnergy, begin_settling, errors_down, no_errors


@dataclass(frozen=True)
class PartStep:
    part: float = 0.25
    energy: FreeEnergy = FreeEnergy()
    reads_feed_forward: ClassVar[bool] = True

    def __call__(self, model, tokens, targets, measure_residual=True):
        up, trace = begin_settling(self.energy, model, tokens, targets, measures=measure_residual)
        start, down = no_errors(up.states), errors_down(up, keep_graph=True)
        trace.measure(start, down)
        errors = trace.batch_energy.step(start, down, self.part)
        trace.step_sizes.append(self.part)
        trace.measure(errors, down)
        return trace.settled(up, errors, trace.residual)
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    "A package that holds the two files and nothing else."
    room = tmp_path / "one_edit_tasks"
    room.mkdir()
    files = {"first": TASK, "widths": STUDY, "cauchy": LIKELIHOOD, "part": SOLVER}
    for name, text in {"__init__": "", **files}.items():
        (room / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield room
    for name in [n for n in sys.modules if n.startswith("one_edit_tasks")]:
        del sys.modules[name]


def config(**changes: Any) -> RunConfig:
    model = ModelConfig(vocab_size=3, block_size=8, n_layer=1, n_head=2, d_model=16)
    plan = TrainConfig(
        iters=60, batch_size=64, learning_rate=1e-2, warmup_iters=5,
        eval_interval=30, checkpoint_interval=20,
    )
    return replace(RunConfig(model=model, train=plan), **changes)


def first(c: RunConfig, **changes: Any) -> Any:
    make = importlib.import_module("one_edit_tasks.first").First
    return make(c.model.block_size, c.train.batch_size, c.train.seed, **changes)


@pytest.mark.parametrize("algorithm", ["backprop", "predictive_coding"])
def test_a_new_task_is_trained_saved_and_resumed(package: Path, algorithm: str) -> None:
    """Both learners learn it, a run is resumed bit for bit, and another task's checkpoint is
    refused."""
    c, cpu = config(**{"learner.algorithm": algorithm}), torch.device("cpu")
    whole = train(Trainer(c, first(c), cpu), Checkpoints(package / "whole"))
    assert whole.record[-1]["valid_loss"] < 0.5 < math.log(2)
    assert whole.record[-1]["accuracy"] > 0.75

    def stop(t: Trainer) -> None:
        if t.step == 33:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match=r"after step 33 of 60: the checkpoint is in .*cut"):
        train(Trainer(c, first(c), cpu), Checkpoints(package / "cut"), stop)
    with pytest.raises(CheckpointError, match="other data"):
        resume(Trainer(c, Damaged(first(c), 1, label_noise=0.1), cpu), package / "cut")
    again = Trainer(c, first(c), cpu)
    resume(again, package / "cut")
    train(again, Checkpoints(package / "cut"))
    assert again.losses == whole.losses and again.record == whole.record


def test_damage_wraps_a_new_task(package: Path) -> None:
    "Labels stay among the task's targets, places without a target stay without one."
    task = first(config())
    noisy = Damaged(task, seed=1, label_noise=0.5)
    pairs = [(task.batch(i), noisy.batch(i)) for i in range(40)]
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1] < 0, b[1] < 0) for a, b in pairs)
    flipped = [(a[1] != b[1])[a[1] >= 0].double().mean().item() for a, b in pairs]
    assert sum(flipped) / 40 == pytest.approx(0.5, abs=0.05)
    assert all(int(b[1].max()) < 2 for _, b in pairs) and noisy.n_target == 2
    assert noisy.baselines() == task.baselines()


def test_a_trainer_refuses_a_task_of_another_vocabulary(package: Path) -> None:
    with pytest.raises(ConfigError, match="vocab_size is 3, but the task's is 5"):
        Trainer(config(), first(config(), vocab_size=5), torch.device("cpu"))


def test_a_new_study_is_run_from_the_command_line(
    package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    "By module and by file; the command line has no word of it, and its file is like all others."
    out = tmp_path / "out"
    assert main(["run", "one_edit_tasks.widths", f"--out={out}", "--only=d_model 4"]) == 0
    printed = capsys.readouterr().out
    assert "| a coin | 0.693 |" in printed and "± " in printed
    found = json.loads((out / "results.json").read_text())
    assert list(found) == ["study", "question", "about", "config", "baselines", "runs"]
    assert [(r["arm"], r["seed"]) for r in found["runs"]] == [("d_model 4", n) for n in (1, 2, 3)]
    assert main(["run", str(package / "widths.py"), f"--out={out}"]) == 0
    made = json.loads((out / "results.json").read_text())["runs"]
    assert made[:3] == found["runs"] and len(made) == 7 and made[-1]["seed"] == 7
    assert main(["studies", "--module=one_edit_tasks.widths"]) == 0
    assert "Does a wider model remember better?" in capsys.readouterr().out
    assert "first" not in COMMANDS and main(["run", "first"]) == 1


def test_a_study_that_is_stopped_loses_one_run(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    "What was made before is in the file, and the study goes on where it was."
    of, advance, count = harness.find("one_edit_tasks.widths"), Trainer.advance, [0]

    def stopping(t: Trainer) -> float:
        count[0] += 1
        if count[0] == 5:      # the first step of the third run
            os.kill(os.getpid(), signal.SIGINT)
        return advance(t)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", stopping)
        with pytest.raises(Interrupted, match="after step 1 of 2, and of d_model 4, seed 2"):
            harness.run(of, tmp_path, device="cpu")
    kept = harness.read(tmp_path / "results.json").runs
    assert len(kept) == 2
    results = harness.run(of, tmp_path, device="cpu")
    assert results.runs[:2] == kept and len(results.runs) == 7


def test_two_processes_add_to_one_file(package: Path, tmp_path: Path) -> None:
    "A run that another process added while this one trained is kept, and not made again."
    of = harness.find("one_edit_tasks.widths")
    measure, once = harness.train_and_measure, []

    def interrupted(job: harness.Job) -> dict[str, Any]:
        if not once:
            once.append(harness.run(of, tmp_path, seeds=(2,), device="cpu"))
        return measure(job)

    mine = harness.Study(**{**vars(of), "run": interrupted})
    results = harness.run(mine, tmp_path, seeds=(1, 2), device="cpu")
    made = [(r["arm"], r["seed"]) for r in results.runs]
    assert len(made) == len(set(made)) == 6


def test_another_studys_file_is_left_alone(package: Path, tmp_path: Path) -> None:
    harness.run(harness.find("one_edit_tasks.widths"), tmp_path, (1,), device="cpu")
    with pytest.raises(CheckpointError, match="holds the results of first"):
        harness.run(harness.find("demo"), tmp_path, device="cpu")


@pytest.fixture
def cauchy(package: Path) -> Any:
    "The file of the new likelihood."
    return importlib.import_module("one_edit_tasks.cauchy")


def test_a_new_likelihood_is_a_density(cauchy: Any) -> None:
    "All that its four functions do not say is inherited: Student's t at nu = 1 is the same."
    ours, theirs, draw = cauchy.Cauchy(), StudentT(1.0), torch.Generator().manual_seed(0)
    x = torch.randn(500, 3, dtype=torch.float64, generator=draw)
    assert torch.allclose(ours.log_prob(x, 2.0), theirs.log_prob(x, 2.0), rtol=1e-12)
    assert torch.allclose(ours.score(x, 2.0), theirs.score(x, 2.0), rtol=1e-12)
    drawn = ours.sample((20_000, 3), 4.0, draw).double()
    assert ours.fit(drawn).item() == pytest.approx(4.0, rel=0.06)


@pytest.mark.parametrize("backend", ["auto", "reference", "chunked"])
def test_a_new_likelihood_is_attended_with(cauchy: Any, backend: Any) -> None:
    """Keys are read by it, with gradients and on every backend that a CPU has for all families.
    `attend` wants one of the package's names, and says so."""
    x = [torch.randn(2, 2, 9, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    keys = Keys(x[1][:, :, None], x[2], torch.full((1, 2, 1, 1, 1), 0.7, dtype=torch.float64))
    found = []
    for likelihood in (cauchy.Cauchy(), StudentT(1.0)):
        out = read(x[0], keys, likelihood, Mask(is_causal=True), backend=backend).out
        found.append([out, *torch.autograd.grad(out.square().sum(), x)])
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(*found, strict=True))
    with pytest.raises(ValueError, match="unknown attention family 'cauchy': choose from"):
        attend(*x, "cauchy", backend=backend)


def test_a_new_likelihood_is_learned_with_and_written_with(cauchy: Any) -> None:
    """In every head and every node of a model: it learns the task, and what is written with a
    cache is what is written without. A configuration names the package's families only."""
    c, energy = config(**{"model.attention": "laplace"}), FreeEnergy(100.0, family=cauchy.Cauchy())
    teacher = PredictiveCoding(ErrorSettling(energy, steps=4))
    t = Trainer(c, first(c), torch.device("cpu"), teacher=teacher)
    tokens, heads = t.batch(0)[0], [m for m in t.model.modules() if isinstance(m, PCAttention)]
    before = t.model(tokens)
    for head in heads:
        head.__class__ = cauchy.CauchyHead
    assert heads and not torch.allclose(t.model(tokens), before)
    train(t)
    assert t.learner is teacher and t.record[-1]["valid_loss"] < 0.5 < math.log(2)
    model, prompt = t.model.eval(), tokens[:4, :3]
    write = lambda cache: generate(model, prompt, 5, seed=3, log_probs=True, cache=cache)
    (text, likely), (again, other) = write(True), write(False)
    assert torch.equal(text, again) and torch.allclose(likely, other, atol=1e-4)
    with pytest.raises(ConfigError, match="cauchy"):
        config(**{"model.attention": "cauchy"})


def test_a_new_solver_is_learned_with_and_looked_at(package: Path) -> None:
    "The hidden layers learn the part of backprop's gradient that the states moved."
    make = importlib.import_module("one_edit_tasks.part").PartStep
    c, monitor = config(), Monitor(interval=30)
    t = Trainer(c, first(c), torch.device("cpu"), teacher=PredictiveCoding(make(part=0.25)))
    batch = t.batch(0)
    ours, theirs = (gradients(x, t.model, *batch) for x in (t.learner, Backprop()))
    for name, g in ours.items():
        if "token" not in name:     # the embedding is the output's too
            share = 1.0 if name.startswith("output") else 0.25
            assert torch.allclose(g, share * theirs[name], rtol=1e-3, atol=1e-6), name
    train(t, monitor)
    assert t.record[-1]["valid_loss"] < 0.5 < math.log(2)
    looks = monitor.history
    assert [look.step for look in looks] == [30, 60]
    assert all("PartStep(part=0.25" in look.learner for look in looks)
    assert all(look.stuck is None and look.broken is None for look in looks)
    assert all(look.residual == pytest.approx(0.75, abs=1e-3) for look in looks)


def test_a_new_solver_says_what_it_cannot(package: Path) -> None:
    "Neither halves of a nudge nor a name in a configuration."
    make = importlib.import_module("one_edit_tasks.part").PartStep
    with pytest.raises(ValueError, match="only ErrorSettling can be nudged both ways, got PartSt"):
        PredictiveCoding(make(), centred=True)
    with pytest.raises(ConfigError, match="solver"):
        config(**{"learner.solver": "part"})
