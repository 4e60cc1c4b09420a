#!/usr/bin/env python
"""Numbers that a change of layout may not move, for every family, option and solver.

`golden.py write FILE` before the change, `golden.py check FILE` after it: every tensor must be
equal bit for bit, or within `--tolerance` of the largest value of its tensor.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
from pathlib import Path
from typing import get_args

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pc_transformer import ModelConfig, PCTransformer, generate
from pc_transformer.config import Attention, replace
from pc_transformer.data import Text
from pc_transformer.learning import Backprop, PredictiveCoding, gradients
from pc_transformer.settling import (
    ErrorSettling,
    FreeEnergy,
    HighwaySettling,
    StateSettling,
    SweepSettling,
)
from pc_transformer.training import Trainer, save, save_checkpoint
from pc_transformer.training.run import RunConfig

SMALL = {"vocab_size": 17, "block_size": 12, "n_layer": 2, "n_head": 4, "d_model": 32}
MODELS = {name: {"attention": name} for name in get_args(Attention)} | {
    "by key": {"precision": "key", "mixing": "key", "attention": "student_t"},
    "diagonal": {"precision": "diagonal"},
    "norm": {"mixing": "norm"},
    "mixture by key": {"attention": "mixture", "precision": "key", "mixing": "key"},
    "window, groups": {"window": 5, "n_kv_head": 2},
    "background": {"background": True, "qk_norm": True},
    "gpt2": {"attention": "dot", "bias": True, "gelu": "tanh"},
    "learned scale": {"attention": "dot", "precision_init": 0.5},
    "dropout": {"dropout": 0.1},
}
ERRORS = ErrorSettling(FreeEnergy(100.0), steps=3, step_size=0.5)
SOLVERS = {
    "errors": ERRORS,
    "one step": ErrorSettling(),
    "lean": ErrorSettling(FreeEnergy(100.0), steps=3, step_size=0.5, lean=True),
    "token, student": ErrorSettling(FreeEnergy(100.0, per="token"), steps=3, step_size=0.5),
    "states": StateSettling(FreeEnergy(100.0), steps=4),
    "sweep": SweepSettling(),
    "highway": HighwaySettling(FreeEnergy(1000.0), steps=3),
}
LEARNERS = {
    "backprop": {"learner.algorithm": "backprop"},
    "errors": {"learner.steps": 2, "learner.step_size": 0.5},
    "states": {"learner.solver": "state", "learner.steps": 3},
    "sweep": {"learner.solver": "sweep"},
    "highway": {"learner.solver": "highway", "learner.steps": 2},
    "centred": {"learner.centred": True},
}


def digest(path: Path) -> Tensor:
    """A file's SHA-256."""
    return torch.tensor(list(hashlib.sha256(path.read_bytes()).digest()))


def of_model(name: str) -> dict[str, Tensor]:
    """Logits, energies, gradients, a text and the saved file of one model."""
    model = PCTransformer(ModelConfig(**{**SMALL, **MODELS[name]}), seed=3).train(name == "dropout")
    tokens, targets = torch.randint(17, (2, 3, 12), generator=torch.Generator().manual_seed(1))
    found = {
        "logits": model.eval()(tokens),
        "text": generate(model, tokens[:, :4], max_new_tokens=20, seed=5),
    }
    model.train(name == "dropout")
    for solver, settle in SOLVERS.items():
        torch.manual_seed(9)
        settled = settle(model, tokens, targets)
        found |= {
            f"{solver}/energy": settled.node_energy,
            f"{solver}/top": settled.errors[-1].contiguous(),
        }
        learner = PredictiveCoding(settle, centred=solver == "errors")
        found |= {f"{solver}/{n}": g for n, g in gradients(learner, model, tokens, targets).items()}
    found |= {f"backprop/{n}": g for n, g in gradients(Backprop(), model, tokens, targets).items()}
    with tempfile.TemporaryDirectory() as folder:
        found["file"] = digest(save(model, Path(folder) / "m") / "model.safetensors")
    return {f"{name}/{k}": v.detach().clone() for k, v in found.items()}


def of_training(name: str) -> dict[str, Tensor]:
    """Twenty losses, two evaluations and the checkpoint's tensors of one learner."""
    ids = torch.randint(17, (600,), generator=torch.Generator().manual_seed(2))
    changes = {
        **{f"model.{k}": v for k, v in SMALL.items()},
        "model.dropout": 0.1,
        "train.iters": 20,
        "train.batch_size": 4,
        "learner.relative_precision": 1000.0,
        **LEARNERS[name],
    }
    config = replace(RunConfig(), **changes)
    trainer = Trainer(config, Text.of_ids(ids[:500], ids[500:], config), torch.device("cpu"))
    seen = [
        trainer.measure()["valid_loss"],
        *(trainer.advance() for _ in range(20)),
        trainer.measure()["valid_loss"],
    ]
    with tempfile.TemporaryDirectory() as folder:
        place = save_checkpoint(trainer, Path(folder))
        files = {n: digest(place / f"{n}.safetensors") for n in ("model", "optimizer")}
    return {
        f"training/{name}/{k}": v
        for k, v in {"losses": torch.tensor(seen, dtype=torch.float64), **files}.items()
    }


def main() -> int:
    """Write or check; the exit code says whether all is as it was."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("write", "check"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    now: dict[str, Tensor] = {}
    for part in [*(of_model(n) for n in MODELS), *(of_training(n) for n in LEARNERS)]:
        now |= part
    if args.what == "write":
        save_file(now, args.file)
        print(f"{len(now)} tensors written")
        return 0
    then = load_file(args.file)
    moved = sorted(then.keys() ^ now.keys())
    for key in then.keys() & now.keys():
        a, b = then[key].double(), now[key].double()
        if (
            a.shape != b.shape
            or not ((a == b) | ((a - b).abs() <= args.tolerance * a.abs().max())).all()
        ):
            moved.append(
                f"{key} ({(a - b).abs().max().item():.1e})"
                if a.shape == b.shape
                else f"{key}: shape"
            )
    print(f"{len(then)} tensors, {len(moved)} moved", *moved[:40], sep="\n  ")
    return int(bool(moved))


if __name__ == "__main__":
    sys.exit(main())
