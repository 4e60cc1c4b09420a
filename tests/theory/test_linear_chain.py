"""Linear chains: what they refuse, and that learned precisions are as right as the data allow."""

import math
from typing import Any

import pytest
import torch

from pc_transformer.energies import Gaussian
from pc_transformer.theory.linear_chain import (
    LinearChain,
    coordinate_precisions,
    design,
    fit_predicted_precision,
    learn_precisions,
    learning_parts,
    log_evidence,
    second_moment,
    settle,
    simulate,
    standard_errors,
)


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def residual_chain(seed: int, widths: list[int], readouts: list[int]) -> LinearChain:
    """Each weight the identity plus noise, cut to its shape."""
    g, shapes = draw(seed), zip(widths, [widths[0], *widths], strict=False)
    weights = [torch.eye(a, b) + 0.3 * torch.randn(a, b, generator=g) / b**0.5 for a, b in shapes]
    return LinearChain([W.double() for W in weights], readouts)


def moment(chain: LinearChain, truth: list[Any], n: int, seed: int) -> torch.Tensor:
    g = draw(seed)
    x = torch.randn(n, chain.weights[0].shape[1], generator=g, dtype=torch.float64)
    return second_moment(chain, x, simulate(chain, truth, x, g)[1])


CHAIN = residual_chain(0, [3, 4, 2], [0, 1, 2, 1])
FEATURES, ERRORS = torch.randn(50, 2, generator=draw(1)), torch.randn(50, 4, generator=draw(2))


@pytest.mark.parametrize(
    ("call", "kind", "says"),
    [
        (lambda: LinearChain([torch.ones(3, 3), torch.ones(2, 4)], [0]), ValueError, "W_1 reads 4"),
        (lambda: LinearChain(CHAIN.weights, [3]), ValueError, "at least one of the nodes"),
        (lambda: LinearChain(CHAIN.weights, []), ValueError, "at least one of the nodes"),
        (lambda: coordinate_precisions(CHAIN, [1.0]), ValueError, "7 parts, got 1"),
        (lambda: coordinate_precisions(CHAIN, [1.0, 1.0, -1.0, *[1.0] * 4]), ValueError, "part 2"),
        (lambda: second_moment(CHAIN, torch.ones(5, 3), []), ValueError, "shapes [(5, 3), (5, 4)"),
        (lambda: learning_parts(CHAIN, [True]), ValueError, "each of 7 parts"),
        (lambda: learning_parts(LinearChain(CHAIN.weights, [1]), None), ValueError, "node 2"),
        (lambda: fit_predicted_precision(FEATURES[:, [0, 0]], ERRORS), ValueError, "independent"),
        (lambda: fit_predicted_precision(FEATURES, ERRORS, 1), RuntimeError, "still moves"),
    ],
)
def test_what_is_refused(call: Any, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind) as error:
        call()
    assert says in str(error.value)


def test_the_evidence_is_the_laplace_formula_at_the_settled_states() -> None:
    precision = [2.0, torch.tensor([1.0, 2.0, 3.0, 4.0]), 5.0, 9.0, 9.0, 9.0, 3.0]
    x = torch.randn(5, 3, generator=draw(1), dtype=torch.float64)
    reads = simulate(CHAIN, precision, x, draw(2))[1]
    errors, A = settle(CHAIN, precision, x, reads), design(CHAIN)
    F = sum(Gaussian().energy(e, q).mean() for e, q in zip(errors, precision, strict=True))
    curvature = torch.logdet(A.T @ (coordinate_precisions(CHAIN, precision)[:, None] * A))
    found = log_evidence(CHAIN, precision, second_moment(CHAIN, x, reads))
    want = -F - (curvature - A.shape[1] * math.log(2 * math.pi)) / 2
    assert math.isclose(found, float(want), rel_tol=1e-10)


@pytest.mark.parametrize("off", [1e-2, 1e4])
@pytest.mark.parametrize(("D", "N", "every"), [(1, 3, 1), (3, 9, 1), (4, 5, 2)])
@pytest.mark.parametrize("diagonal", [False, True])
def test_precisions_are_found_from_far_starts(
    D: int, N: int, every: int, diagonal: bool, off: float
) -> None:
    chain = residual_chain(N, [D] * N, list(range(0, N, every)))
    g = draw(D)
    nodes: list[Any] = [10 ** torch.rand((D,) if diagonal else (), generator=g) for _ in range(N)]
    truth = [*nodes, *[8.0] * len(chain.readouts)]
    S = moment(chain, truth, 50_000, 20)
    start = [*(off * q for q in nodes), *truth[N:]]
    run = learn_precisions(chain, S, start, steps=3000)
    assert run.gap < 1e-3
    assert all(b >= a - 1e-10 for a, b in zip(run.evidence, run.evidence[1:], strict=False))
    errors = standard_errors(chain, truth, 50_000)[:N]
    for q, true, error in zip(run.precision, nodes, errors, strict=False):
        assert ((q / true).log().abs() < 5 * error).all()


def test_standard_errors_are_the_spread_of_many_experiments() -> None:
    chain = LinearChain([torch.tensor([[w]]).double() for w in (1.0, 0.8, 1.2)], [0, 1, 2])
    truth = [4.0, 1.0, 10.0, 5.0, 5.0, 5.0]
    found = [
        learn_precisions(chain, moment(chain, truth, 2000, 100 + i), truth, steps=60).precision[:3]
        for i in range(80)
    ]
    expected = torch.stack(standard_errors(chain, truth, 2000)[:3])
    torch.testing.assert_close(
        torch.tensor(found).double().log().std(0), expected, rtol=0.25, atol=0
    )
