#!/usr/bin/env python
"""Bring results files of earlier commands into the schema that all studies share.

`convert_results.py` rewrites what lies under `results/`; a file that has the schema already is
left alone. No number changes: they only get their places. To be used once, then deleted.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

from pc_transformer.config import to_dict
from pc_transformer.experiments import families, settling, stress, tinyshakespeare
from pc_transformer.experiments.harness import Study, arm_name
from pc_transformer.training.run import RunConfig

RESULTS = Path(__file__).resolve().parents[1] / "results"
Json = dict[str, Any]


def file_of(study: Study, old: Json, runs: list[Json], command: str) -> Json:
    """The shared schema."""
    about = {k: old[k] for k in ("date", "device", "versions")} | {"command": command}
    baselines = {
        name: {"loss": b["nats_per_char"], "bits_per_byte": b["bits_per_byte"]}
        for name, b in old.get("baselines", {}).items()
    }
    # the settings of then, where a command changed none: what later became a setting is as usual
    config = to_dict(RunConfig())
    return {
        "study": study.name,
        "question": study.question,
        "about": about,
        "config": config,
        "baselines": baselines,
        "runs": runs,
    }


def moved(run: Json, *gone: str) -> Json:
    """The numbers of a run, with its loss by its new name."""
    kept = {k: v for k, v in run.items() if k not in ("valid_loss", "changes", "seed", *gone)}
    return {"loss": run["valid_loss"], **kept}


def of_settling(old: Json) -> list[Json]:
    """Runs of `pct settle`: changes with the seed among them."""
    found = []
    for run in old["runs"].values():
        changes = {k: v for k, v in run["changes"].items() if k != "train.seed"}
        seed = run["changes"]["train.seed"]
        found.append({"arm": arm_name(changes), "seed": seed, "changes": changes, **moved(run)})
    return found


def of_families(old: Json) -> list[Json]:
    """Runs of `pct study`: family and start beside the changes."""
    found = []
    for r in old["runs"].values():
        more = {k: v for k, v in r["changes"].items()}
        arm = families.arm(r["family"], r["sharpness"], more)
        changes = {**families.STUDY.base, **arm.changes}
        about = {"arm": arm.name, "seed": r["seed"], "changes": changes}
        found.append({**about, **moved(r, "family", "sharpness")})
    return found


def of_comparison(old: Json, name: str) -> list[Json]:
    """Runs of `pct compare`: variants; texts and traces of the first seed go to its runs."""
    found = []
    for r in old["runs"]:
        changes = dict(tinyshakespeare.variants(RunConfig())[r["variant"]])
        if (start := r["config"]["model"]["precision_init"]) is not None:
            assert math.isclose(start, changes["model.precision_init"])
            changes["model.precision_init"] = start
        if (every := r["config"]["train"]["eval_interval"]) != 250:
            changes["train.eval_interval"] = every
        run = {"arm": r["variant"], "seed": r["seed"], "changes": changes}
        run |= moved(r, "variant", "config")
        if name != "tinyshakespeare":
            run["from"] = f"results/{name}, {old['date']}"
        if r["seed"] == old["seeds"][0]:
            run |= {"sample": old["samples"][r["variant"]]}
            if "predictive" in r["variant"] and "settling" in old:
                run |= {"settling": old["settling"]}
        found.append(run)
    return found


def of_stress(old: Json) -> list[Json]:
    """The one run of `pct stress`."""
    numbers = {k: v for k, v in old.items() if k not in ("date", "device", "versions")}
    changes = {**stress.STUDY.base, **stress.STUDY.arms(RunConfig())[0].changes}
    assert changes["n"] == old["n"] and old["first_seed"] == 0
    return [{"arm": "random settings", "seed": 0, "changes": changes, **numbers}]


def converted(folder: str) -> Json | None:
    """An old file as it is; `None` where there is none, or where it has the schema already."""
    place = RESULTS / folder / "results.json"
    old = json.loads(place.read_text(encoding="utf-8")) if place.exists() else None
    return None if old is None or "study" in old else old


def write(found: Json) -> None:
    """The new file."""
    place = RESULTS / found["study"] / "results.json"
    place.parent.mkdir(exist_ok=True)
    place.write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(f"{found['study']}: {len(found['runs'])} runs")


def main() -> int:
    """Convert all that is there."""
    for study in (settling.MAP, settling.WRONG_TARGETS, settling.EQUILIBRIUM):
        if old := converted(study.name):
            write(file_of(study, old, of_settling(old), f"pct run {study.name}"))
    if old := converted("study"):
        write(file_of(families.STUDY, old, of_families(old), "pct run families"))
        shutil.rmtree(RESULTS / "study")
    if old := converted("tinyshakespeare"):
        others = ("attribution", "more_seeds", "more_backprop")
        runs = of_comparison(old, "tinyshakespeare")
        for name in others:
            runs += of_comparison(converted(name) or {"runs": []}, name)
        write(file_of(tinyshakespeare.STUDY, old, runs, "pct run tinyshakespeare"))
        for name in others:
            shutil.rmtree(RESULTS / name, ignore_errors=True)
    if old := converted("stress"):
        write(file_of(stress.STUDY, old, of_stress(old), "pct run stress"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
