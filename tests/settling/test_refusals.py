"""Settings and batches that mean nothing are refused with one sentence."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from pc_transformer import ModelConfig, PCTransformer
from pc_transformer.config import ConfigError
from pc_transformer.learning import PredictiveCoding
from pc_transformer.learning.config import SOLVERS, LearnerConfig
from pc_transformer.settling import (
    ErrorSettling,
    FreeEnergy,
    HighwaySettling,
    Pathway,
    SettlingError,
    StateSettling,
    SweepSettling,
    check_batch,
    check_steady,
    errors_down,
    predict_up,
    relative_precisions,
)

CONFIG = ModelConfig(vocab_size=11, block_size=16, n_layer=2, n_head=2, d_model=16)
tokens, targets = torch.randint(11, (2, 4, 16), generator=torch.Generator().manual_seed(0))


def model() -> PCTransformer:
    return PCTransformer(CONFIG, seed=1).double()


@pytest.mark.parametrize(
    "setting",
    [
        {"per": "x"},
        {"relative_precision": torch.ones(2, 2)},
        {"family": "gaussian"},
        {"nudge": 0.0},
        {"relative_precision": math.inf},
        {"relative_precision": 0.0},
        {"reduce": 3},
    ],
)
def test_free_energy(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        FreeEnergy(**setting)


@pytest.mark.parametrize(
    "setting",
    [
        {"steps": True},
        {"steps": 2.0},
        {"steps": 0},
        {"tolerance": "0.1"},
        {"step_size": math.nan},
        {"energy": 1e4},
        {"pathway": None},
        {"lean": 1},
    ],
)
def test_error_settling(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        ErrorSettling(**setting)


@pytest.mark.parametrize(
    "make",
    [
        lambda: StateSettling(steps=0),
        lambda: StateSettling(step_size=0.0),
        lambda: HighwaySettling(steps=-1),
        lambda: SweepSettling(FreeEnergy(-1.0)),
        lambda: PredictiveCoding(StateSettling(), centred=True),
        lambda: PredictiveCoding(steps_end=0),
        lambda: StateSettling(steps=True),
        lambda: SweepSettling("100"),  # type: ignore[arg-type]
        lambda: HighwaySettling(steps=1.0),  # type: ignore[arg-type]
        lambda: StateSettling(FreeEnergy(reduce=lambda x: x)),
        lambda: Pathway(blocked=(0,)),
        lambda: Pathway(skip=True, blocked=(1,)),
        lambda: errors_down(predict_up(model(), tokens, targets), pathway=Pathway(blocked=(5,))),
    ],
)
def test_solvers_and_pathways(make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError):
        make()


@pytest.mark.parametrize(
    "setting",
    [
        {"steps": 0},
        {"step_size": 1.5},
        {"relative_precision": 0.0},
        {"relative_precision_end": -1.0},
        {"steps_end": 0},
        {"tolerance": 1.0},
        {"steps": 1, "step_size": 0.5},
        {"solver": "sweep", "steps": 3},
        {"solver": "sweep", "per": "token"},
        {"solver": "highway", "centred": True},
        {"solver": "highway", "energy": "huber"},
        {"solver": "state", "tolerance": 0.1},
        {"solver": "state"},
        {"solver": "newton"},
    ],
)
def test_learner_config(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        LearnerConfig(**setting)


@pytest.mark.parametrize("square", [math.nan, math.inf, 0.0, 1e-300, 1e300])
def test_precisions_name_their_node(square: float) -> None:
    squares = [torch.tensor(x, dtype=torch.float64) for x in (1.0, square)]
    with pytest.raises(SettlingError, match="node 1 has no precision"):
        relative_precisions(squares, 1e10 if square < 1 else 1e-10, [1.0, 1.0])


@pytest.mark.parametrize(
    "bad",
    [None, targets.int(), targets[:, :-1], targets + 11, torch.full_like(targets, -100)],
)
def test_batches(bad: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        check_batch(model(), tokens, bad)


@pytest.mark.parametrize("module", [nn.Dropout2d(0.5), nn.BatchNorm1d(4)])
def test_modules_that_answer_differently(module: nn.Module) -> None:
    with pytest.raises(ValueError, match="in every pass"):
        check_steady([module])


@pytest.mark.parametrize("kind", [SweepSettling, HighwaySettling])
def test_errors_that_are_not_finite(kind: Any) -> None:
    with pytest.raises(SettlingError):
        kind(FreeEnergy(1e-320))(model(), tokens, targets)


@pytest.mark.parametrize("kind", SOLVERS.values())
def test_weights_that_are_not_finite(kind: Any) -> None:
    poisoned = model()
    poisoned.predictors[2].down.weight.data[0, 0] = math.nan
    with pytest.raises(SettlingError):
        kind()(poisoned, tokens, targets)


def test_steps_that_are_far_too_long_are_halved() -> None:
    wild = StateSettling(FreeEnergy(100.0), steps=6, step_size=100.0)
    settled = wild(model(), tokens, targets, measure_residual=False)
    assert (settled.energy.diff() <= 1e-9).all() and max(settled.step_sizes) < 100
