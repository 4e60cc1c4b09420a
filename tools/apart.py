"""Jobs, two at a time: each in a process of its own, with a time limit of its own.

Every process is forked from this one, which has imported what all of them import. One line a job,
as it ends: ok or FAIL, its seconds, and what a failing one said. All are run, whatever becomes of
the others. Import this before torch: it says how many threads torch has.
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
from collections.abc import Callable  # noqa: E402
from dataclasses import dataclass, field  # noqa: E402
from functools import partial  # noqa: E402
from typing import IO  # noqa: E402

sys.path.insert(0, str(ROOT))
Job = Callable[[], bool]  # does some work, and says whether it went well


@dataclass
class Running:
    """A job that is being done."""

    name: str
    job: Job
    limit: float
    log: IO[bytes] = field(default_factory=tempfile.TemporaryFile)
    pid: int = 0
    start: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """How long it has been running."""
        return time.perf_counter() - self.start

    def begin(self) -> Running:
        """Fork the process; it ends itself, with its stacks, when its time is over."""
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
            sys.stdout = sys.stderr = open(1, "w", encoding="utf-8", closefd=False)
            faulthandler.dump_traceback_later(self.limit, exit=True, file=2)
            passed = self.job()
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
        if late:
            return f"took more than {self.limit:.0f} s"
        code = os.waitstatus_to_exitcode(status)
        return f"killed by signal {-code}" if code < 0 else "failed"

    def kill(self) -> None:
        """End its whole group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def said(self) -> str:
        """What it has printed."""
        self.log.seek(0)
        return self.log.read().decode("utf-8", "replace").strip()

    def report(self, problem: str) -> str:
        """One line; below it all that a failing one said, in it the last line of another."""
        word, said = ("FAIL", f"{problem}\n{self.said()}\n") if problem else ("ok", self.last())
        return f"{word:4}  {self.seconds:6.1f} s  {self.name}  {said}".rstrip(" ")

    def last(self) -> str:
        """The last line that it has printed."""
        return self.said().rpartition("\n")[2]


def do_all(jobs: dict[str, Job], limit: float, workers: int = 2) -> dict[str, str]:
    """Do jobs and report each as it ends; which failed, and how."""
    waiting, running, failed = list(jobs.items()), list[Running](), dict[str, str]()
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                running.append(Running(*waiting.pop(0), limit).begin())
            for each in list(running):
                if (problem := each.ended()) is None:
                    continue
                running.remove(each)
                print(each.report(problem), flush=True)
                failed |= {each.name: problem} if problem else {}
                each.log.close()
            time.sleep(0.05)
    finally:
        for each in running:
            each.kill()
    return failed


def short(path: Path) -> str:
    """The path from the root."""
    inside = path.is_relative_to(ROOT)
    return path.relative_to(ROOT).as_posix() if inside else path.name


def main(
    about: str, what: str, find: Callable[[], list[Path]], do: Callable[[Path], bool], limit: float
) -> int:
    """Do something for the paths that the command line names, or for all; 1 if any failed."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="*", type=Path, help=f"{what} (default: all)")
    parser.add_argument("--timeout", type=float, default=limit, help="seconds that one may take")
    parser.add_argument("--workers", type=int, default=2, help="how many at a time (default: 2)")
    parser.add_argument("--failed", type=Path, help="a file that gets the failures, one a line")
    args = parser.parse_args()
    paths = [p.absolute() for p in args.paths]
    os.chdir(ROOT)
    paths = paths or find()
    if missing := [p for p in paths if not p.is_file()]:
        parser.error(f"{missing[0]} is not a file")
    jobs = {short(p): partial(do, p) for p in paths}
    lines = [f"{name} {how}" for name, how in do_all(jobs, args.timeout, args.workers).items()]
    if args.failed:
        args.failed.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"{len(paths) - len(lines)} of {len(paths)} {what} passed", *lines, sep="\n  ")
    return 1 if lines or not paths else 0
