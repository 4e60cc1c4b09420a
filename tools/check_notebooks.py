#!/usr/bin/env python
"""Test notebooks, two at a time: each in a process of its own, with a time limit of its own.

nbdev runs the cells. Every process is forked from this one, which has imported what all of them
import. One line a
notebook, as it ends: ok or FAIL and its seconds, and what a failing one said. All are run; exit
1 if any failed.
"""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
os.environ.update(
    OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", TQDM_DISABLE="1", MPLBACKEND="agg"
)
os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}".rstrip(
    os.pathsep
)

import argparse  # noqa: E402
import contextlib  # noqa: E402
import faulthandler  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
import traceback  # noqa: E402
from dataclasses import dataclass, field  # noqa: E402
from typing import IO  # noqa: E402

sys.path.insert(0, str(ROOT))
import matplotlib.pyplot  # noqa: E402, F401
import torch  # noqa: E402, F401
from nbdev.config import get_config  # noqa: E402
from nbdev.doclinks import nbglob  # noqa: E402
from nbdev.test import test_nb  # noqa: E402

import pc_transformer  # noqa: E402, F401


@dataclass
class Running:
    """A notebook that is being tested."""

    path: Path
    log: IO[bytes]
    limit: float
    pid: int = 0
    start: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """How long it has been running."""
        return time.perf_counter() - self.start

    @property
    def name(self) -> str:
        """Its path from the root, as `make run NB=` wants it."""
        return (
            self.path.relative_to(ROOT).as_posix()
            if self.path.is_relative_to(ROOT)
            else self.path.name
        )

    def begin(self) -> Running:
        """Fork the process that runs the cells; it ends itself, with its stacks, when its time
        is over."""
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid:
            return self
        passed = False
        try:
            os.setsid()
            os.dup2(self.log.fileno(), 1)
            os.dup2(self.log.fileno(), 2)
            faulthandler.dump_traceback_later(self.limit, exit=True, file=2)
            passed, _ = test_nb(
                self.path, skip_flags=get_config().tst_flags.split(), basepath=str(ROOT)
            )
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(0 if passed else 1)

    def ended(self) -> str | None:
        """None while it runs, then what was wrong, or an empty text."""
        late = self.seconds > self.limit
        if self.seconds > self.limit + 10:
            self.kill()
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if not pid:
            return None
        self.kill()  # what it has started and left behind
        if not status:
            return ""
        code = os.waitstatus_to_exitcode(status)
        return (
            f"took more than {self.limit:.0f} s"
            if late
            else f"killed by signal {-code}"
            if code < 0
            else "failed"
        )

    def kill(self) -> None:
        """End its whole group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def said(self) -> str:
        """What it has printed."""
        self.log.seek(0)
        return self.log.read().decode("utf-8", "replace").strip()


def test_all(paths: list[Path], limit: float, workers: int) -> list[str]:
    """Run notebooks and report each as it ends; what failed, and how."""
    waiting, running, failed = list(paths), list[Running](), list[str]()
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                running.append(Running(waiting.pop(0), tempfile.TemporaryFile(), limit).begin())
            for each in list(running):
                if (problem := each.ended()) is None:
                    continue
                running.remove(each)
                line = (
                    f"{'FAIL' if problem else 'ok':4}  {each.seconds:6.1f} s  {each.name} "
                    f" {problem}".rstrip()
                )
                print(f"{line}\n{each.said()}\n" if problem else line, flush=True)
                failed += [f"{each.name} {problem}"] if problem else []
                each.log.close()
            time.sleep(0.05)
    finally:
        for each in running:
            each.kill()
    return failed


def main() -> int:
    """Test the notebooks that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="*", type=Path, help="notebooks (default: all in nbs/)")
    parser.add_argument(
        "--timeout",
        type=float,
        default=1200,
        help="seconds that one notebook may take (default: 1200)",
    )
    parser.add_argument(
        "--workers", type=int, default=2, help="how many run at a time (default: 2)"
    )
    parser.add_argument("--failed", type=Path, help="a file that gets the failures, one a line")
    args = parser.parse_args()
    paths = [p.absolute() for p in args.paths]
    os.chdir(ROOT)
    paths = paths or sorted(Path(p).absolute() for p in nbglob(as_path=True))
    if missing := [p for p in paths if not p.is_file()]:
        parser.error(f"{missing[0]} is not a file")
    failed = test_all(paths, args.timeout, args.workers)
    if args.failed:
        args.failed.write_text("".join(f"{line}\n" for line in failed), encoding="utf-8")
    print(
        f"{len(paths) - len(failed)} of {len(paths)} notebooks passed"
        + "".join(f"\n  {line}" for line in failed)
    )
    return 1 if failed or not paths else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
