"""Layers in processes of their own, and processes that share a batch: what goes wrong, and
nobody left behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from pc_transformer.config import ModelConfig
from pc_transformer.experiments.layer_processes import LayerProcesses
from pc_transformer.learning import PredictiveCoding
from pc_transformer.model import Chain, PCTransformer
from pc_transformer.settling import ErrorSettling, FreeEnergy, SettlingError
from pc_transformer.training import DataParallel, ProcessError

pytestmark = pytest.mark.skipif(os.name != "posix", reason="pipes are inherited by number")
CONFIG = ModelConfig(vocab_size=9, block_size=8, n_layer=1, n_head=2, d_model=8)
RULE = partial(torch.optim.SGD, lr=0.1)
SOURCE = str(Path(__file__).resolve().parents[2])


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, targets = torch.randint(9, (2, 3, 8), generator=torch.Generator().manual_seed(seed))
    targets[0, :3] = -100
    return tokens, targets


@pytest.fixture
def processes() -> Iterator[LayerProcesses]:
    with LayerProcesses(PCTransformer(CONFIG, seed=1), RULE, timeout=60.0) as made:
        yield made
    assert all(p.poll() is not None for p in made.processes), "left behind"


def gone(pid: int) -> bool:
    "Whether a process has ended (a zombie that init has not collected counts as ended)."
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_deeper_rings_learn_what_one_process_learns() -> None:
    "Two layers, five processes, float64 too: the same weights, bit for bit or nearly."
    config = ModelConfig(vocab_size=9, block_size=8, n_layer=2, n_head=2, d_model=8)
    start, one = (PCTransformer(config, seed=1).double() for _ in range(2))
    solver, optimizer = ErrorSettling(FreeEnergy(1.0), steps=3), RULE(list(one.parameters()))
    with LayerProcesses(start, RULE, solver) as ring:
        for seed in range(3):
            there = ring.step(*batch(seed))
            optimizer.zero_grad()
            here = PredictiveCoding(solver).backward(one, *batch(seed))
            optimizer.step()
            assert there.step_sizes == here.step_sizes
            assert here.energy is not None and there.energy == pytest.approx(here.energy, rel=1e-12)
        learned = ring.weights()
    for name, p in one.named_parameters():
        torch.testing.assert_close(learned[name], p.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_padding_and_half_precision_in_processes(dtype: torch.dtype) -> None:
    """Every process knows which positions count, and keeps precisions and errors in float32 at
    least."""
    start, one, short = (PCTransformer(CONFIG, seed=1).to(dtype) for _ in range(3))
    solver = ErrorSettling(FreeEnergy(1.0 if dtype == torch.float64 else 1e4), steps=2)
    optimizers = [RULE(list(model.parameters())) for model in (one, short)]
    with LayerProcesses(start, RULE, solver) as ring:
        for seed in range(2):
            tokens, targets = batch(seed)
            targets[:, 5:] = -100
            there, here = (
                ring.step(tokens, targets),
                PredictiveCoding(solver).backward(one, tokens, targets),
            )
            PredictiveCoding(solver).backward(short, tokens[:, :5], targets[:, :5])
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            assert here.energy is not None and there.energy == pytest.approx(here.energy, rel=1e-12)
            whole = ring.step(*batch(seed))  # and a whole batch after a padded one
            PredictiveCoding(solver).backward(one, *batch(seed))
            PredictiveCoding(solver).backward(short, *batch(seed))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            assert whole.step_sizes == there.step_sizes == [1.0, 1.0]
        learned = ring.weights()
    limits = (
        {"rtol": 1e-12, "atol": 1e-14} if dtype == torch.float64 else {"rtol": 1e-2, "atol": 1e-4}
    )
    for (name, p), q in zip(one.named_parameters(), short.parameters(), strict=True):
        torch.testing.assert_close(learned[name], p.detach(), **limits)
        torch.testing.assert_close(learned[name], q.detach(), **limits)
    assert any((learned[n] != p).any() for n, p in start.named_parameters())


def test_a_process_that_cannot_go_on_says_why_and_all_end(processes: LayerProcesses) -> None:
    "Tokens that the parent did not check: node 0 fails, and its own sentence arrives."
    tokens, targets = batch()
    # not a PCTransformer: its tokens are not checked
    processes.model = Chain([], torch.nn.Identity())  # pyright: ignore
    with pytest.raises(
        ProcessError, match="the process of node 0 stopped: IndexError: index out of range"
    ):
        processes.step(tokens + 9, targets)
    assert all(p.poll() is not None for p in processes.processes)


def test_the_start_has_a_time_of_its_own() -> None:
    "Importing PyTorch takes longer than this time-out, everywhere."
    with LayerProcesses(PCTransformer(CONFIG, seed=1), RULE, timeout=0.01) as made:
        made.ring.timeout = 60.0
        assert made.step(*batch()).loss > 0
    with pytest.raises(ProcessError, match="no answer from nodes 0, 1, 2 within 0.01 s"):
        LayerProcesses(PCTransformer(CONFIG, seed=1), RULE, start_timeout=0.01)


def test_a_failing_start_is_one_error_and_no_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    "Every process refuses its optimiser; one is quoted, and none prints."
    with pytest.raises(
        ProcessError,
        match=r"the process of node \d stopped: ValueError: Invalid learning rate: -1.0",
    ):
        LayerProcesses(PCTransformer(CONFIG, seed=1), partial(torch.optim.SGD, lr=-1.0))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_process_that_is_ended_is_named_and_nothing_is_printed(
    number: signal.Signals, processes: LayerProcesses, capfd: pytest.CaptureFixture[str]
) -> None:
    os.kill(processes.processes[1].pid, number)
    with pytest.raises(
        ProcessError, match=rf"the process of node 1 ended \(killed by {number.name}\)"
    ):
        processes.step(*batch())
    assert all(p.poll() is not None for p in processes.processes) and capfd.readouterr() == ("", "")


def test_wrong_types_are_said_before_anything_starts() -> None:
    model = PCTransformer(CONFIG, seed=1)
    for wrong, sentence in (
        ({"timeout": "long"}, "timeout must be a positive number of seconds, got 'long'"),
        ({"start_timeout": 0}, "start_timeout must be a positive number of seconds, got 0"),
        ({"solver": "error"}, "layers in processes follow an ErrorSettling, not a str"),
        ({"optimizer": lambda p: None}, "layers and optimiser must be importable"),
    ):
        with pytest.raises((TypeError, ValueError), match=sentence):
            LayerProcesses(**{"model": model, "optimizer": RULE, **wrong})
    with pytest.raises(TypeError, match="needs a model with predictors and output, not a Linear"):
        LayerProcesses(torch.nn.Linear(2, 2), RULE)  # pyright: ignore[reportArgumentType]
    for rank, size in ((0.0, 2), ("0", 1), (True, 2), (0, 0)):
        with pytest.raises(ValueError, match="rank must be a whole number"):
            DataParallel(rank, size)  # pyright: ignore[reportArgumentType]


def test_a_stopped_process_is_late_and_is_ended(processes: LayerProcesses) -> None:
    processes.timeout = 2.0
    os.kill(processes.processes[1].pid, signal.SIGSTOP)
    begun = time.monotonic()
    with pytest.raises(ProcessError, match="no answer from node"):
        processes.step(*batch())
    assert time.monotonic() - begun < 300 and all(p.poll() is not None for p in processes.processes)


def test_a_settling_error_ends_all(processes: LayerProcesses) -> None:
    processes.solver = ErrorSettling(FreeEnergy(1e-9), steps=2, max_halvings=0)
    with pytest.raises(SettlingError, match="lowered the energy|overflowed"):
        processes.step(*batch())
    assert all(p.poll() is not None for p in processes.processes)
    with pytest.raises(ProcessError, match="have ended: start new ones"):
        processes.step(*batch())


def test_a_bad_batch_is_refused_before_anything_is_sent(processes: LayerProcesses) -> None:
    tokens, targets = batch()
    with pytest.raises(ValueError, match="every target is -100"):
        processes.step(tokens, torch.full_like(targets, -100))
    assert processes.step(tokens, targets).loss > 0, "and the processes are still there"


PARENT = """
import sys, torch
from functools import partial
from pc_transformer.config import ModelConfig
from pc_transformer.model import PCTransformer
from pc_transformer.experiments.layer_processes import LayerProcesses
config = ModelConfig(vocab_size=9, block_size=8, n_layer=1, n_head=2, d_model=8)
ring = LayerProcesses(PCTransformer(config), partial(torch.optim.SGD, lr=0.1))
print(*[p.pid for p in ring.processes], flush=True)
sys.stdin.read()
"""


def test_when_the_parent_is_killed_its_children_end() -> None:
    env = os.environ | {"PYTHONPATH": SOURCE}
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=-1, stdout=-1, env=env, text=True
    )
    assert parent.stdout is not None
    children = [int(x) for x in parent.stdout.readline().split()]
    assert len(children) == 3 and not any(map(gone, children))
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 30
    while not all(map(gone, children)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert all(map(gone, children))


LONELY = """
from pc_transformer.training import join
with join(timeout=2.0) as team: pass
"""


def test_a_rank_whose_partner_never_comes_gives_up() -> None:
    env = os.environ | {
        "PYTHONPATH": SOURCE,
        "RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "9",
    }
    found = subprocess.run(
        [sys.executable, "-c", LONELY], env=env, capture_output=True, text=True, timeout=120
    )
    assert (
        found.returncode == 1 and found.stderr.count("Traceback") == 1
    )  # the script's own: it caught nothing
    assert (
        "ProcessError: torch.distributed could not bring the processes together (" in found.stderr
    )


HALF = """
import os, sys, torch
from pc_transformer.training import all_sum, join
with join(timeout=5.0) as team:
    all_sum(torch.ones(2))
    if team.rank: os._exit(0)
    all_sum(torch.ones(2))
"""


def test_when_one_of_a_team_dies_the_other_fails_and_does_not_hang() -> None:
    "torchrun starts them as a user would."
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--no-python",
    ]
    env = os.environ | {"PYTHONPATH": SOURCE, "CUDA_VISIBLE_DEVICES": ""}
    found = subprocess.run(
        [*command, sys.executable, "-c", HALF], env=env, capture_output=True, text=True, timeout=180
    )
    assert found.returncode != 0 and "ChildFailedError" in found.stderr


DYING = """
import os, signal, sys
from pc_transformer import training
from pc_transformer.cli import main
backward = training.Trainer.backward
def fragile(self):
    if self.team.rank == 1 and self.step == 3: os.kill(os.getpid(), signal.SIGKILL)
    return backward(self)
training.Trainer.backward = fragile
sys.exit(main())
"""


def small_run(folder: Path, *more: str) -> list[str]:
    "Options of a tiny model on a text in this folder."
    text = folder / "text.txt"
    text.write_text("to be or not to be, that is the question: " * 60)
    size = {"n_layer": 1, "n_head": 2, "d_model": 16, "block_size": 8}
    model = [f"--model.{name}={n}" for name, n in size.items()]
    return [*model, "--train.batch_size=4", f"--data={text}", "--progress=false", *more]


def test_the_survivor_of_a_team_says_one_sentence_and_ends_with_one(tmp_path: Path) -> None:
    "Two processes as torchrun starts them, one of which is killed in the middle of a step."
    small = small_run(tmp_path, "--train.iters=50")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        meet = {
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(s.getsockname()[1]),
        }
    env = os.environ | meet | {"PYTHONPATH": SOURCE, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", DYING, "train", str(tmp_path / "run"), *small]
    team = [
        subprocess.Popen(
            command, env=env | {"RANK": r, "LOCAL_RANK": r}, stderr=subprocess.PIPE, text=True
        )
        for r in "01"
    ]
    said = [p.communicate(timeout=240)[1] for p in team]
    assert [p.returncode for p in team] == [1, -signal.SIGKILL] and said[1] == ""
    (line,) = [x for x in said[0].splitlines() if not x.startswith("threads: ")]
    assert line.startswith("pct: torch.distributed could not add up over the processes (")
    assert line.endswith("one of them has ended or is late, look for its own message")


def test_pct_train_shares_batches_under_torchrun(tmp_path: Path) -> None:
    "Two processes of torchrun and one alone: the same losses, one run folder each."
    small = small_run(tmp_path, "--train.iters=6", "--train.eval_interval=6")
    env = os.environ | {"PYTHONPATH": SOURCE, "CUDA_VISIBLE_DEVICES": ""}
    start = [
        sys.executable,
        "-c",
        "import sys; from pc_transformer.cli import main; sys.exit(main())",
        "train",
    ]
    team = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--no-python",
        *start,
    ]
    losses = {}
    for name, command in (("one", start), ("two", team)):
        found = subprocess.run(
            [*command, str(tmp_path / name), *small],
            env=env,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert found.returncode == 0, found.stderr
        losses[name] = json.loads(next((tmp_path / name).glob("step-*/training.json")).read_text())[
            "losses"
        ]
    assert found.stderr.count("validation loss") == 1
    assert len(losses["one"]) == 6 and losses["two"] == pytest.approx(losses["one"], abs=1e-6)
