#!/usr/bin/env python
"""Compile the Triton kernels ahead of time for A100 (sm_80) and H100/H200 (sm_90), without a GPU.

Every kernel of `pc_transformer.attention.kernels.triton` is compiled for every link, in bfloat16,
float16 and float32, with the block sizes that it would be launched with, and its registers, spilled
bytes and shared memory are printed. The exit status is 1 if one does not compile or needs more
shared memory than the GPU has.

    python tools/compile_triton.py                       # all links and dtypes
    python tools/compile_triton.py --links student_t --dtypes bf16 --widths 64 128
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pc_transformer.attention.kernels import triton as g

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes that one program may use
SIZES = {"H", "Tq", "Tk", "T", "back", "ahead"}
HALF = {
    "Q",
    "K",
    "M",
    "V",
    "Out",
    "dOut",
    "dQ",
    "dK",
    "dV",
}  # in the inputs' dtype; everything else is float32
STRIDE = re.compile(r"[qkvlba]s[bht]")


@dataclass(frozen=True)
class Job:
    """One kernel to compile."""

    kernel: str
    link: str
    dtype: str
    width: int
    diagonal: bool = False
    back: int | None = None
    ahead: int | None = 0

    def __str__(self) -> str:
        mask = (
            f"{'window ' if self.back is not None else ''}{'causal' if self.ahead == 0 else ''}"
            .strip()
            or "no mask"
        )
        return (
            f"{self.kernel:8} {self.link:20} {self.dtype} d={self.width:<4}"
            f" {'diagonal, ' if self.diagonal else ''}{mask}"
        )


def jobs(links: list[str], dtypes: list[str], widths: list[int]) -> Iterator[Job]:
    """All links and dtypes at the first width, causal; for one of them the other widths, masks
    and a diagonal precision."""
    some = "student_t" if "student_t" in links else links[-1]
    for kernel in g.KERNELS:
        for dtype in dtypes:
            for link in links:
                yield Job(kernel, link, dtype, widths[0])
            for width in widths[1:]:
                yield Job(kernel, some, dtype, width)
            if dtype == dtypes[0]:
                for back, ahead in ((None, None), (255, 0), (255, 255)):
                    yield Job(kernel, some, dtype, widths[0], back=back, ahead=ahead)
            if (
                dtype != "fp16" and some != "dot"
            ):  # a diagonal precision in float16 is computed in float32
                for width in widths[:2]:
                    yield Job(kernel, some, dtype, width, diagonal=True)
    yield Job("row_dots", "", dtypes[0], widths[0])


def source(job: Job) -> tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]:
    """The Triton function, its signature, its constants and its launch options."""
    dtype = DTYPES[job.dtype]
    if job.kernel == "row_dots":
        kernel, half, options = g.row_dots, {"A", "B"}, {}
        constants: dict[str, Any] = dict(D=job.width, BLOCK_D=g.power_of_two(job.width), BLOCK=64)
    else:
        kernel = getattr(g, f"{job.kernel}_kernel")
        plan = g.Plan(job.link, job.back, job.ahead)
        _, constants = g.settings(
            plan, job.kernel, job.width, job.width, dtype, job.diagonal, "cuda"
        )
        options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
        half = HALF | ({"Lam"} if job.diagonal else set())
        if job.kernel == "query":
            constants["SHAPE"] = bool(g.SHAPES[job.link])
    signature = {}
    for name in kernel.arg_names:
        number = name in SIZES or STRIDE.fullmatch(name)
        pointer = "*" + (job.dtype if name in half else "fp32")
        signature[name] = "constexpr" if name in constants else "i32" if number else pointer
    return kernel, signature, constants, options


def compile_one(job: Job, capability: int) -> tuple[int, int, int]:
    """Registers per thread, bytes spilled per thread, and bytes of shared memory per program."""
    import triton  # pyright: ignore[reportMissingImports]
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
    from triton.compiler import ASTSource  # pyright: ignore[reportMissingImports]

    kernel, signature, constants, options = source(job)
    aligned = [
        i
        for i, name in enumerate(kernel.arg_names)
        if signature[name][0] == "*" or re.fullmatch("[qkv]s[bht]", name)
    ]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    made = triton.compile(
        ASTSource(kernel, signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", capability, 32),
        options=options,
    )
    if f".target sm_{capability}" not in made.asm["ptx"]:
        raise RuntimeError(f"asked for sm_{capability}, but the PTX is for something else")
    registers, spilled = usage(
        made.asm["cubin"], Path(str(triton.__file__)).parent / "backends/nvidia/bin/cuobjdump"
    )
    return registers, spilled, made.metadata.shared


def usage(cubin: bytes, cuobjdump: Path) -> tuple[int, int]:
    """Registers and spilled bytes per thread as NVIDIA's tool reads them from the binary; -1
    without the tool."""
    if not cuobjdump.exists():
        return -1, -1
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [cuobjdump, "-res-usage", file.name], capture_output=True, encoding="utf-8", check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (-1, -1)


def main() -> int:
    """Compile and print; 1 if something failed."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--links", nargs="+", default=list(g.SHAPES), choices=list(g.SHAPES))
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--widths", nargs="+", type=int, default=[64, 128, 32, 16])
    parser.add_argument("--targets", nargs="+", type=int, default=[80, 90], choices=[80, 90])
    asked = parser.parse_args()
    if not g.available("cpu")[0] and "not installed" in g.available("cpu")[1]:
        print(g.available("cpu")[1])
        return 1
    if g.interpreted():
        print("TRITON_INTERPRET is set, and an interpreted kernel cannot be compiled: unset it")
        return 1
    failed, start, count = 0, time.time(), 0
    for capability in asked.targets:
        for job in jobs(asked.links, asked.dtypes, asked.widths):
            count += 1
            try:
                registers, spilled, shared = compile_one(job, capability)
            except Exception as error:  # whatever the compiler raises is the finding
                failed += 1
                print(
                    f"sm_{capability} {job}  FAILED: {type(error).__name__}: {str(error)[:500]}",
                    flush=True,
                )
                continue
            too_much = shared > SHARED[capability]
            failed += too_much
            print(
                f"sm_{capability} {job}  {registers:4} registers {spilled:5} B spilled {shared:7} B"
                f" shared{'  TOO MUCH SHARED MEMORY' if too_much else ''}",
                flush=True,
            )
    print(
        f"{count} kernels, {failed} failed, {time.time() - start:.0f} s, Triton {g._tr.__version__}"
    )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
