#!/usr/bin/env python
"""Run notebooks in place and save their outputs, so that a second run leaves no diff.

Cells with `#| eval: false`, `#| slow` or `#| cuda` are not run and keep their saved outputs
(`--slow` and `--cuda` run them too). Cell ids stay; execution counts, timings and widget state go,
and pictures are stored with a palette where nobody sees the difference: a third of the bytes.
A notebook is only replaced when all of its cells passed.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from execnb.nbio import nb2str
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbdev.clean import clean_nb
from nbformat import NotebookNode
from PIL import Image, ImageChops, ImageStat
from PIL.Image import open as read_image

ROOT = Path(__file__).resolve().parents[1]
ENV = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "PYTHONHASHSEED": "0",
    "TQDM_DISABLE": "1",
    "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}".rstrip(os.pathsep),
}
KERNEL = {"display_name": "python3", "language": "python", "name": "python3"}
ANSI = re.compile(r"\x1b\[[0-9;]*m")
# its model id is random, and only a live kernel can show it
SEEN = 2.5  # of 255: the root mean square of a difference that shows
WIDGET = "application/vnd.jupyter.widget-view+json"
IPYKERNEL = re.compile(
    r"\S*/ipykernel_\d+/\d+\.py:\d+"
)  # the file name that a kernel gives to a cell


class Runner(NotebookClient):
    """An nbclient that leaves some cells alone."""

    skip: re.Pattern[str]

    async def async_execute_cell(
        self, cell: NotebookNode, cell_index: int, *args, **kwargs
    ) -> NotebookNode:
        """Run one cell unless a directive says not to."""
        self.current = cell
        if cell.cell_type == "code" and self.skip.search(cell.source):
            return cell
        return await super().async_execute_cell(cell, cell_index, *args, **kwargs)


def lighter(text: str) -> str:
    """A picture, base64 of PNG, with a palette of 256 colours unless one would be seen to lack."""
    image = read_image(io.BytesIO(base64.b64decode(text)))
    plain = image.convert("RGB")
    opaque = image.convert("RGBA").getchannel("A").getextrema() == (255, 255)
    if image.mode == "P" or not opaque:
        return text
    few = plain.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    gone = ImageChops.difference(plain, few.convert("RGB"))
    if max(ImageStat.Stat(gone).rms) > SEEN:
        return text
    data = io.BytesIO()
    few.save(data, "PNG", optimize=True)
    return base64.b64encode(data.getvalue()).decode() + "\n" * text.endswith("\n")


def tidy(nb: NotebookNode) -> str:
    """The notebook as `nbdev_clean` leaves it, without anything that changes from run to run."""
    nb.metadata = NotebookNode(kernelspec=KERNEL)
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if WIDGET not in o.get("data", {})]
            for out in cell.outputs:
                if "image/png" in (data := out.get("data", {})):
                    data["image/png"] = lighter(data["image/png"])
                if out.output_type == "stream":
                    out.text = IPYKERNEL.sub("<cell>", out.text).replace(f"{ROOT}/", "")
    clean = json.loads(nbformat.writes(nb))
    clean_nb(clean, allowed_cell_metadata_keys=["tags"])
    return nb2str(clean)


def run(path: Path, skip: re.Pattern[str], timeout: int) -> float:
    """Run one notebook in place and return the seconds it took."""
    start = time.perf_counter()
    nb = nbformat.read(path, as_version=4)
    client = Runner(
        nb,
        timeout=timeout,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.skip = skip
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as e:
        source = (
            "" if isinstance(e, CellExecutionError) else f"{client.current.source}\n\n"
        )  # the former names it
        print(f"\n{path}: this cell failed\n\n{source}{ANSI.sub('', str(e))}", file=sys.stderr)
        raise SystemExit(1) from None
    part = path.with_name(f".{path.name}.part")
    part.write_text(tidy(nb), encoding="utf-8")
    part.replace(path)
    return time.perf_counter() - start


def main() -> None:
    """Run the notebooks that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="+", type=Path, help="notebooks")
    parser.add_argument(
        "--timeout", type=int, default=300, help="seconds that one cell may take (default: 300)"
    )
    parser.add_argument("--slow", action="store_true", help="also run the cells marked #| slow")
    parser.add_argument("--cuda", action="store_true", help="also run the cells marked #| cuda")
    args = parser.parse_args()
    flags = [f for f, on in (("slow", args.slow), ("cuda", args.cuda)) if not on]
    skip = re.compile(rf"^#\|\s*(eval:\s*false|{'|'.join(flags) or 'eval: false'})\s*$", re.M)
    os.environ.pop("MPLBACKEND", None)  # with a backend set, no figure would be saved
    os.environ.update(ENV)
    for path in args.paths:
        if not path.is_file():
            parser.error(f"{path} is not a file")
    for path in args.paths:
        print(f"{path}: {run(path, skip, args.timeout):.1f} s", flush=True)


if __name__ == "__main__":
    main()
