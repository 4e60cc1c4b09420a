"""Processes that share every batch hold equal weights to the last bit, and make the updates of one
process up to rounding."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pc_transformer.config import ModelConfig, TrainConfig, replace
from pc_transformer.data import Text
from pc_transformer.learning import Backprop, PredictiveCoding
from pc_transformer.learning.config import LearnerConfig
from pc_transformer.model import PCTransformer
from pc_transformer.monitoring import Monitor
from pc_transformer.settling import ErrorSettling, FreeEnergy, SweepSettling
from pc_transformer.training import (
    Checkpoints,
    DataParallel,
    Trainer,
    checkpoints,
    join,
    sync_gradients,
    tensors_of,
    train,
)
from pc_transformer.training.run import RunConfig

MODEL = ModelConfig(vocab_size=11, block_size=16, n_layer=2, n_head=2, d_model=16)
SHORT = TrainConfig(iters=6, batch_size=6, warmup_iters=2, eval_interval=3, checkpoint_interval=20)
CHANGES: dict[str, dict[str, Any]] = {
    "error": {},
    "soft": {"learner.steps": 4, "learner.relative_precision": 0.3, "train.accumulate": 2},
    "backprop": {"learner.algorithm": "backprop"},
}
Reduce = Callable[[Tensor], Tensor] | None


def batch(step: int, gaps: bool) -> tuple[Tensor, Tensor]:
    "Seven rows, with gaps; every third batch leaves one process nothing to predict."
    x = torch.randint(11, (7, 4), generator=torch.Generator().manual_seed(step)).repeat(1, 5)
    y = x[:, 1:17].clone()
    y[0, :3] = -100
    if gaps and step % 3 == 2:
        y[4:] = -100
    return x[:, :16], y


def descend(learner: Any, team: DataParallel, reduce: Reduce, gaps: bool) -> dict[str, Tensor]:
    model = PCTransformer(MODEL, seed=3)
    optimizer, sizes = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), [1.0]
    for step in range(8):
        x, y = (team.share(t) for t in batch(step, gaps))
        optimizer.zero_grad()
        sizes += learner.backward(model, x, y).step_sizes or []
        if reduce is not None:
            sync_gradients(model, int((y != -100).sum()), reduce)
        optimizer.step()
    return tensors_of(model) | {"sizes": torch.tensor(sizes)}


def by_learner(team: DataParallel, reduce: Reduce) -> dict[str, Tensor]:
    def settling(beta: float, steps: int) -> PredictiveCoding:
        return PredictiveCoding(ErrorSettling(FreeEnergy(beta, reduce=reduce), steps=steps))

    found = {
        "error": descend(settling(1e4, 1), team, reduce, True),
        "soft": descend(settling(0.3, 4), team, reduce, True),
        "sweep": descend(PredictiveCoding(SweepSettling()), team, reduce, False),
        "backprop": descend(Backprop(), team, reduce, False),
    }
    return {f"{kind}:{n}": t for kind, tensors in found.items() for n, t in tensors.items()}


def by_trainer(name: str, team: DataParallel, place: Path | None) -> dict[str, Tensor]:
    "A whole run; one process looks on alone and the others do not wait for it."
    config = replace(RunConfig(MODEL, LearnerConfig(), SHORT), **CHANGES[name])
    ids = torch.randint(11, (600,), generator=torch.Generator().manual_seed(0))
    watch = [Monitor(interval=2, products=0)] if team.rank == 0 else []
    watch += [Checkpoints(place)] if place else []
    task = Text.of_ids(ids[:500], ids[500:], config)
    done = train(Trainer(config, task, torch.device("cpu"), team=team), *watch)
    if place:
        (place.parent / f"{name}-{team.rank}.json").write_text(json.dumps(done.record))
    losses = torch.tensor(done.losses, dtype=torch.float64)
    return {f"{name}:{n}": t for n, t in {**tensors_of(done.model), "losses": losses}.items()}


def everything(folder: Path) -> None:
    "What each of the two processes does."
    with join() as team:
        found = {"plain": by_learner(team, team.reduce)}
        found["trainer"] = {
            k: t for name in CHANGES for k, t in by_trainer(name, team, folder / name).items()
        }
        accelerate = pytest.importorskip("accelerate")
        one = accelerate.Accelerator(cpu=True)
        assert (one.process_index, one.num_processes) == (team.rank, 2)
        found["accelerate"] = by_learner(team, lambda t: one.reduce(t, reduction="sum"))
        for way, tensors in found.items():
            save_file(tensors, folder / f"{way}-{team.rank}.safetensors")


@contextmanager
def launched(folder: Path, size: int = 2) -> Iterator[None]:
    "What torchrun does: processes with their numbers, and where to meet; all must end well."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | {"WORLD_SIZE": f"{size}", "MASTER_ADDR": "127.0.0.1"}
    env |= {"MASTER_PORT": f"{port}", "CUDA_VISIBLE_DEVICES": ""}
    env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    numbers = [{"RANK": f"{r}", "LOCAL_RANK": f"{r}"} for r in range(size)]
    command = [sys.executable, __file__, str(folder)]
    running = [subprocess.Popen(command, env=env | number) for number in numbers]
    yield
    assert [p.wait(300) for p in running] == [0] * size


def test_two_processes_are_as_good_as_one(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    with launched(tmp_path):
        alone = by_learner(DataParallel(), None)
        runs = {k: t for name in CHANGES for k, t in by_trainer(name, DataParallel(), None).items()}
    fresh = tensors_of(PCTransformer(MODEL, seed=3))
    for way, mine in (("plain", alone), ("accelerate", alone), ("trainer", runs)):
        first, second = (load_file(tmp_path / f"{way}-{r}.safetensors") for r in (0, 1))
        for name, t in mine.items():
            assert torch.equal(first[name], second[name]), (way, name)
            assert (t - first[name]).abs().max() <= (0 if "sizes" in name else 1e-6), (way, name)
    for kind in ("error", "soft", "sweep", "backprop"):
        moved = max((alone[f"{kind}:{n}"] - t).abs().max().item() for n, t in fresh.items())
        assert moved > 1e-2, "the test proves nothing: the weights have hardly moved"
    assert (alone["soft:sizes"] < 1).any(), "the test proves nothing: no step was halved"
    for name in CHANGES:
        assert [p.name for p in checkpoints(tmp_path / name)] == ["step-000006"]
        texts = [(tmp_path / f"{name}-{r}.json").read_text() for r in (0, 1)]
        assert texts[0] == texts[1]


def test_what_cannot_be_shared_is_refused() -> None:
    few = {"train.batch_size": 2, "train.accumulate": 2}
    own = {"learner.solver": "state", "learner.steps": 4}
    for bad, says in ((few, "each needs one"), (own, "StateSettling|share")):
        config = replace(RunConfig(MODEL, LearnerConfig(), SHORT), **bad)
        ids, cpu = torch.arange(100) % 11, torch.device("cpu")
        with pytest.raises(ValueError, match=says):
            Trainer(config, Text.of_ids(ids, ids, config), cpu, team=DataParallel(0, 2))


if __name__ == "__main__":
    torch.set_num_threads(1)
    everything(Path(sys.argv[1]))
    # the process group is dissolved; gloo's threads may still run, and nothing is left to tear down
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
