"""Properties of the energies, against PyTorch's distributions and autograd; and a mutant that
each must catch."""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pc_transformer.energies import (
    FAMILIES,
    Categorical,
    Contaminated,
    Elliptical,
    Gaussian,
    GaussianMixture,
    GeneralizedGaussian,
    Huber,
    Independent,
    Laplace,
    Logistic,
    StudentT,
)

close = torch.testing.assert_close
quick = settings(
    deadline=None, max_examples=50
)  # the first call of PyTorch is slow, whatever the example


def tensor(seed: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass(frozen=True)
class NoLogDet(Gaussian):
    """A mutant: the normaliser without the log-determinant, as in codes whose energy is just the
    squared error."""

    def log_prob(self, error: Tensor, precision: float | Tensor) -> Tensor:
        dim = error.shape[-1]
        return self.link(self.quadratic(error, precision), dim) - self.log_normaliser(dim)


@dataclass(frozen=True)
class CountedOnce(Gaussian):
    "A mutant: a precision that serves all D coordinates counts once in the log-determinant."

    def log_prob(self, error: Tensor, precision: float | Tensor) -> Tensor:
        log = torch.as_tensor(precision, dtype=error.dtype).log()
        log = log.sum(-1) if log.dim() else log
        return (
            self.link(self.quadratic(error, precision), 0)
            - self.log_normaliser(error.shape[-1])
            + log / 2
        )


@dataclass(frozen=True)
class HalfScore(Gaussian):
    "A mutant: w = -g' instead of -2 g'."

    def weight(self, u: Tensor, dim: int) -> Tensor:
        return torch.full_like(u, 0.5)


def is_a_density(family: Elliptical, precision: float) -> None:
    "The integral over two coordinates, each in units of its own width, is one."
    axis = torch.linspace(-9, 9, 181, dtype=torch.float64) / precision**0.5
    points = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1)
    total = family.log_prob(points, precision).exp().sum() * (axis[1] - axis[0]) ** 2
    close(total, torch.ones_like(total), rtol=1e-10, atol=0)


def is_normal(
    family: Elliptical, seed: int, shape: tuple[int, ...], own: tuple[int, ...], scale: float
) -> None:
    "log_prob is the sum of PyTorch's normal log densities."
    error, precision = tensor(seed, shape) / scale**0.5, tensor(seed + 1, own).exp() * scale
    want = torch.distributions.Normal(0, precision.rsqrt()).log_prob(error).sum(-1)
    close(family.log_prob(error, precision), want, rtol=1e-10, atol=1e-9)


def score_is_the_gradient(
    family: Elliptical, seed: int, own: tuple[int, ...], scale: float
) -> None:
    "score is autograd's derivative of log_prob."
    error, precision = tensor(seed, (3, 4)).requires_grad_(), tensor(seed + 1, own).exp() * scale
    (want,) = torch.autograd.grad(family.log_prob(error, precision).sum(), error)
    close(family.score(error.detach(), precision), want, rtol=1e-12, atol=0)


def fit_is_the_maximum(family: Elliptical, seed: int, scale: float, diagonal: bool) -> None:
    "Any other precision makes the data less likely."
    errors = tensor(seed, (20, 3)) / scale**0.5
    best = family.fit(errors, diagonal=diagonal)
    top = family.log_prob(errors, best).sum()
    for change in (0.5, 0.99, 1.01, 2.0):
        assert family.log_prob(errors, best * change).sum() < top


seeds = st.integers(0, 2**31)
scales = st.floats(-6, 6).map(lambda x: 10**x)
owns = st.sampled_from([(), (1,), (4,), (3, 1), (3, 4), (1, 4)])


@quick
@given(scales)
def test_gaussian_is_a_density(precision: float) -> None:
    is_a_density(Gaussian(), precision)


@quick
@given(seeds, owns, scales)
def test_gaussian_is_torchs_normal(seed: int, own: tuple[int, ...], scale: float) -> None:
    is_normal(Gaussian(), seed, (3, 4), own, scale)


@quick
@given(seeds, owns, scales)
def test_score_is_the_gradient(seed: int, own: tuple[int, ...], scale: float) -> None:
    score_is_the_gradient(Gaussian(), seed, own, scale)


@quick
@given(seeds, scales, st.booleans())
def test_fit_is_the_maximum(seed: int, scale: float, diagonal: bool) -> None:
    fit_is_the_maximum(Gaussian(), seed, scale, diagonal)


@pytest.mark.parametrize("mutant", [NoLogDet(), CountedOnce()])
def test_mutants_of_the_normaliser_are_caught(mutant: Elliptical) -> None:
    with pytest.raises(AssertionError):
        is_a_density(mutant, 4.0)
    with pytest.raises(AssertionError):
        is_normal(mutant, 0, (3, 4), (1,), 4.0)


def test_without_the_log_determinant_fit_is_no_maximum() -> None:
    with pytest.raises(AssertionError):
        fit_is_the_maximum(NoLogDet(), 0, 4.0, diagonal=False)


def test_the_mutant_score_is_caught() -> None:
    with pytest.raises(AssertionError):
        score_is_the_gradient(HalfScore(), 0, (), 1.0)


@quick
@given(st.sampled_from([torch.bfloat16, torch.float32, torch.float64]), owns)
def test_dtype_and_shape_are_those_of_the_error(dtype: torch.dtype, own: tuple[int, ...]) -> None:
    error, precision = tensor(0, (3, 4)).to(dtype), tensor(1, own).exp()
    for value in (Gaussian().log_prob(error, precision), Gaussian().quadratic(error, precision)):
        assert (value.dtype, value.shape) == (dtype, (3,))
    assert Gaussian().score(error, precision).shape == error.shape
    assert Gaussian().fit(error).dtype == dtype


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_precision_is_positive_and_finite(value: float) -> None:
    precision = torch.tensor([1.0, value, 1.0])
    for method in (Gaussian().log_prob, Gaussian().energy, Gaussian().score, Gaussian().quadratic):
        with pytest.raises(ValueError, match="precision must be positive and finite"):
            method(torch.zeros(2, 3), precision)
    with pytest.raises(ValueError, match="precision must be positive and finite"):
        Gaussian().sample((2, 3), precision)


@quick
@given(seeds, st.integers(1, 9), st.floats(-3, 3).map(lambda x: 10**x))
def test_categorical_is_torchs(seed: int, V: int, scale: float) -> None:
    logits = (tensor(seed, (2, 3, V)) * scale).requires_grad_()
    targets = torch.randint(V, (2, 3), generator=torch.Generator().manual_seed(seed))
    value = Categorical().log_prob(targets, logits)
    close(value, torch.distributions.Categorical(logits=logits).log_prob(targets))
    (want,) = torch.autograd.grad(value.sum(), logits)
    close(Categorical().score(targets, logits.detach()), want)


@quick
@given(st.integers(), st.integers(1, 9))
def test_a_target_is_in_the_vocabulary(target: int, V: int) -> None:
    assume(-(2**63) <= target < 2**63 and not 0 <= target < V)
    with pytest.raises(ValueError, match=f"target {target} is outside the vocabulary 0 to {V - 1}"):
        Categorical().energy(torch.tensor([target]), torch.zeros(1, V))


@quick
@given(st.lists(st.integers(0, 4), min_size=1), st.floats(0, 3))
def test_fitted_probabilities_sum_to_one(seen: list[int], smoothing: float) -> None:
    fitted = Categorical().fit(torch.tensor(seen), V=5, smoothing=smoothing).exp()
    close(fitted.sum(), torch.ones(()))
    close(
        fitted[seen[0]],
        torch.tensor((seen.count(seen[0]) + smoothing) / (len(seen) + 5 * smoothing)),
    )


def test_a_head_and_a_node_use_the_same_object() -> None:
    q, k = tensor(0, (5, 8)), tensor(1, (7, 8))
    scores = Gaussian().log_prob(q[:, None] - k, 2.0)
    assert scores.shape == (5, 7)
    close(scores.softmax(-1), (2.0 * (q @ k.T - k.square().sum(-1) / 2)).softmax(-1))


# Every family, with shapes from one end of its range to the other. `end` is the largest log
# distance of the integral.

ELLIPTICAL = [
    Gaussian(),
    StudentT(0.1),
    StudentT(1.0),
    StudentT(4.0),
    StudentT(1e6),
    Laplace(),
    Laplace(1e-3),
    Laplace(2.0),
    Laplace(100.0),
    Huber(0.01),
    Huber(),
    Huber(30.0),
    GeneralizedGaussian(0.3),
    GeneralizedGaussian(),
    GeneralizedGaussian(2.0),
    GeneralizedGaussian(6.0),
    Logistic(),
    Contaminated(),
    Contaminated(0.5, 1e-4),
    Contaminated(0.001, 0.9),
]
elliptical = pytest.mark.parametrize("family", ELLIPTICAL, ids=str)
BOUNDED = (StudentT, Laplace, Huber, Logistic)


def radial_mass(family: Elliptical, dim: int) -> float:
    "The integral of the density over all directions and distances, at unit precision."
    t = torch.linspace(
        -40, 400 if isinstance(family, StudentT) else 60, 20_001, dtype=torch.float64
    )
    surface = math.log(2) + dim / 2 * math.log(math.pi) - math.lgamma(dim / 2)
    log_p = surface + dim * t + family.link((2 * t).exp(), dim) - family.log_normaliser(dim)
    return (log_p.exp().sum() * (t[1] - t[0])).item()


@dataclass(frozen=True)
class ForgetsEps(Laplace):
    "A mutant: the normaliser of the sharp tip for the rounded one."

    def log_normaliser(self, dim: int) -> float | Tensor:
        return Laplace().log_normaliser(dim)


@elliptical
@pytest.mark.parametrize("dim", [1, 2, 3, 5, 64])
def test_a_family_is_a_density(family: Elliptical, dim: int) -> None:
    assert radial_mass(family, dim) == pytest.approx(1, rel=1e-8)


@pytest.mark.parametrize("mutant", [ForgetsEps(1.0)])
def test_a_wrong_normaliser_is_caught(mutant: Elliptical) -> None:
    assert radial_mass(mutant, 3) != pytest.approx(1, rel=1e-2)


@elliptical
@settings(quick, max_examples=6)
@given(seeds, owns, scales)
def test_a_familys_score_is_the_gradient(
    family: Elliptical, seed: int, own: tuple[int, ...], scale: float
) -> None:
    error, precision = tensor(seed, (3, 4)).requires_grad_(), tensor(seed + 1, own).exp() * scale
    (want,) = torch.autograd.grad(family.log_prob(error, precision).sum(), error)
    close(family.score(error.detach(), precision), want, rtol=1e-8, atol=0)


@elliptical
@settings(quick, max_examples=8)
@given(st.floats(-20, 20).map(lambda x: 10**x), st.integers(1, 64))
def test_weight_is_minus_twice_the_slope_of_the_link(
    family: Elliptical, u: float, dim: int
) -> None:
    at = torch.tensor([u], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(family.link(at, dim).sum(), at)
    close(family.weight(at, dim).detach(), -2 * slope, rtol=1e-8, atol=1e-300)


@elliptical
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_zero_error_has_zero_slope_in_every_dtype(family: Elliptical, dtype: torch.dtype) -> None:
    error = torch.zeros(2, 3, dtype=dtype, requires_grad=True)
    value = family.log_prob(error, 2.0)
    (slope,) = torch.autograd.grad(value.sum(), error)
    assert value.dtype == family.weight(torch.zeros(2, dtype=dtype), 3).dtype == dtype
    assert (slope == 0).all() and (family.score(error.detach(), 2.0) == 0).all()
    assert family.weight(torch.zeros(2, dtype=dtype), 3).isfinite().all()


@elliptical
def test_float32_agrees_with_float64_far_from_one(family: Elliptical) -> None:
    u = torch.logspace(-30, 12, 43)
    want, have = family.link(u.double(), 8), family.link(u, 8)
    inside = want.abs() < 1e30
    close(have[inside].double(), want[inside], rtol=1e-5, atol=1e-6)
    close(family.weight(u, 8).double(), family.weight(u.double(), 8), rtol=1e-3, atol=1e-30)


@elliptical
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_huge_and_missing_errors_stay_what_they_are(family: Elliptical, dtype: torch.dtype) -> None:
    huge = torch.full(
        (1, 2), 1e15 if isinstance(family, BOUNDED) else 1e3, dtype=dtype, requires_grad=True
    )
    (slope,) = torch.autograd.grad(family.log_prob(huge, 1.0).sum(), huge)
    assert slope.isfinite().all() or isinstance(family, GeneralizedGaussian)
    missing = torch.tensor([[math.nan, 0.0]], dtype=dtype)
    assert family.log_prob(missing, 1.0).isnan().all() and family.score(missing, 1.0).isnan().any()


@elliptical
@pytest.mark.parametrize("dim", [1, 8])
def test_draws_follow_the_density(family: Elliptical, dim: int) -> None:
    n, generator = 4000, torch.Generator().manual_seed(dim)
    drawn = family.sample((n, dim), torch.full((dim,), 4.0, dtype=torch.float64), generator)
    t = torch.linspace(
        -40, 400 if isinstance(family, StudentT) else 60, 20_001, dtype=torch.float64
    )
    p = (dim * t + family.link((2 * t).exp(), dim)).exp()
    p = p.cumsum(0) - p / 2
    have = (
        torch.searchsorted(family.quadratic(drawn, 4.0).sort().values, (2 * t).exp(), right=True)
        / n
    )
    assert (
        have - p / p[-1]
    ).abs().max() * n**0.5 < 1.95  # Kolmogorov and Smirnov, one in a thousand
    assert (drawn > 0).double().mean(0).sub(0.5).abs().max() < 4 * 0.5 / n**0.5


@elliptical
def test_draws_are_repeatable_and_keep_dtype_and_shape(family: Elliptical) -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        one, two = (
            family.sample(
                (2, 5, 3), torch.tensor(1.0, dtype=dtype), torch.Generator().manual_seed(1)
            )
            for _ in "ab"
        )
        assert torch.equal(one, two) and one.dtype == dtype and one.shape == (2, 5, 3)


@elliptical
@pytest.mark.parametrize("diagonal", [False, True])
def test_a_familys_fit_is_the_maximum(family: Elliptical, diagonal: bool) -> None:
    scale = (
        torch.tensor([1.0, 1e4, 1e-3], dtype=torch.float64)
        if diagonal
        else torch.tensor(1e3, dtype=torch.float64)
    )
    errors = family.sample((300, 3), scale, torch.Generator().manual_seed(0))
    log = family.fit(errors, diagonal, max_iters=20_000).log().requires_grad_()
    total = family.log_prob(errors, log.exp()).mean()
    (slope,) = torch.autograd.grad(total, log)
    close(slope, torch.zeros_like(slope), rtol=0, atol=1e-7)
    for change in (0.5, 0.9, 1.1, 2.0):
        assert family.log_prob(errors, log.detach().exp() * change).mean() < total


SHAPED = {
    StudentT: [(0.3,), (5.0,)], Laplace: [(0.5,)], Huber: [(0.8,)],
    GeneralizedGaussian: [(0.5,), (3.0,)], Contaminated: [(0.1, 0.01)],
}


@pytest.mark.parametrize(
    ("make", "shape"), [(make, shape) for make, shapes in SHAPED.items() for shape in shapes]
)
@pytest.mark.parametrize("diagonal", [False, True])
def test_fit_shape_beats_the_truth_and_every_neighbour(
    make: type, shape: tuple, diagonal: bool
) -> None:
    truth, scale = make(*shape), torch.tensor([1.0, 9.0], dtype=torch.float64)
    errors = truth.sample(
        (300, 2), scale if diagonal else scale[0], torch.Generator().manual_seed(3)
    )
    best, precision = make().fit_shape(errors, diagonal)
    top = best.log_prob(errors, precision).sum()
    rise = top - truth.log_prob(errors, truth.fit(errors, diagonal)).sum()
    assert -1e-6 < rise < 7  # twice the rise follows chi squared: 14 is beyond one in a thousand
    for name in best.__dataclass_fields__:
        for change in (0.95, 1.05):
            other = replace(
                best,
                **{name: min(getattr(best, name) * change, 1.0 if name == "ratio" else math.inf)},
            )
            if other != best:
                assert other.log_prob(errors, other.fit(errors, diagonal)).sum() <= top + 1e-6


@pytest.mark.parametrize("make", SHAPED)
@settings(quick, max_examples=2)
@given(seed=seeds, diagonal=st.booleans())
def test_fit_shape_never_lowers_the_likelihood(make: type, seed: int, diagonal: bool) -> None:
    errors, start = (
        tensor(seed, (40, 3)),
        make(),
    )  # Gaussian errors: the shape goes to the end of its range
    best, precision = start.fit_shape(errors, diagonal)
    assert (
        best.log_prob(errors, precision).sum()
        >= start.log_prob(errors, start.fit(errors, diagonal)).sum() - 1e-7
    )


def test_families_without_a_shape_fit_the_precision() -> None:
    for family in (Gaussian(), Logistic()):
        best, precision = family.fit_shape(errors := tensor(0, (50, 2)))
        assert best is family
        close(precision, family.fit(errors))


def test_the_weight_of_a_student_is_one_on_average_at_its_fit() -> None:
    errors = StudentT(0.5).sample(
        (300, 4), torch.ones((), dtype=torch.float64), torch.Generator().manual_seed(0)
    )
    for diagonal in (False, True):
        w = StudentT(0.5).weight(
            StudentT(0.5).quadratic(errors, StudentT(0.5).fit(errors, diagonal)), 4
        )
        close(w.mean(), torch.ones_like(w.mean()))


PARAMETERS = [
    (StudentT, (0.7,)),
    (StudentT, (50.0,)),
    (Laplace, (0.4,)),
    (Huber, (1.2,)),
    (GeneralizedGaussian, (1.3,)),
    (Contaminated, (0.2, 0.1)),
]


@pytest.mark.parametrize(("make", "values"), PARAMETERS)
def test_shapes_learn_by_gradient(make: type, values: tuple) -> None:
    error = tensor(0, (4, 3)) * 2
    raw = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in values]
    assert torch.autograd.gradcheck(lambda *x: make(*x).log_prob(error, 2.0), raw)
    assert torch.autograd.gradcheck(lambda *x: make(*x).score(error, 2.0), raw)


@pytest.mark.parametrize(("make", "values"), PARAMETERS)
def test_one_shape_per_head_equals_one_object_per_head(make: type, values: tuple) -> None:
    error, factors = (
        tensor(1, (2, 3, 5, 6, 4)),
        torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64).view(1, 3, 1, 1),
    )
    together = make(*(v * factors for v in values))
    for h in range(3):
        own = make(*(v * factors[0, h, 0, 0].item() for v in values))
        close(together.log_prob(error, 2.0)[:, h], own.log_prob(error[:, h], 2.0))
        close(together.score(error, 2.0)[:, h], own.score(error[:, h], 2.0))
    assert (
        together.log_prob(error.float(), 2.0).dtype == torch.float32
    )  # the dtype of the error, whatever the shape's
    assert together.sample((2, 3, 5, 6, 4), 2.0).shape == error.shape


def test_limits() -> None:
    error, precision = tensor(2, (9, 5)), tensor(3, (5,)).exp()
    want = Gaussian().log_prob(error, precision)
    for family, rtol in [
        (StudentT(1e9), 1e-6),
        (Huber(1e3), 1e-12),
        (GeneralizedGaussian(2.0), 1e-12),
        (Contaminated(1e-13, 0.1), 1e-9),
        (Contaminated(0.4, 1.0), 1e-12),
    ]:
        close(family.log_prob(error, precision), want, rtol=rtol, atol=0)
    wide = Laplace(1e4)  # a wide tip is a Gaussian with variance eps
    close(
        wide.log_prob(error * 100, precision),
        Gaussian().log_prob(error, precision) - 5 * math.log(100),
        rtol=1e-2,
        atol=0,
    )
    close(
        Laplace(1e-7).log_prob(error, precision),
        Laplace().log_prob(error, precision),
        rtol=1e-6,
        atol=0,
    )
    close(
        Huber(1e-4).log_prob(error * 1e4, precision / 1e0),
        Laplace().log_prob(error, precision) - 5 * math.log(1e4),
        rtol=1e-3,
        atol=0,
    )


@pytest.mark.parametrize(
    ("make", "bad"),
    [
        (StudentT, 0.0),
        (StudentT, -1.0),
        (StudentT, math.nan),
        (StudentT, math.inf),
        (Laplace, -1e-9),
        (Laplace, math.nan),
        (Huber, 0.0),
        (Huber, math.nan),
        (GeneralizedGaussian, 0.0),
        (GeneralizedGaussian, -2),
        (GeneralizedGaussian, math.nan),
        (Contaminated, 0.0),
        (Contaminated, 1.0),
        (Contaminated, 1.5),
        (Contaminated, math.nan),
    ],
)
def test_a_shape_without_a_density_is_refused(make: type, bad: float) -> None:
    for value in (bad, torch.tensor([0.5, bad])):
        with pytest.raises(ValueError, match=r"must lie in [\[(]0, (inf|1)\), got"):
            make(value)
    for value in ("4", None, True, torch.tensor(1)):
        with pytest.raises(TypeError, match="must be a number or a tensor of a floating dtype"):
            make(value)


def test_the_ratio_of_outliers() -> None:
    for ratio in (0.0, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"ratio must lie in \(0, 1\]"):
            Contaminated(0.1, ratio)


def test_the_names() -> None:
    assert (
        list(FAMILIES)
        == "gaussian student_t laplace huber generalized_gaussian logistic contaminated".split()
    )
    assert all(issubclass(make, Elliptical) and make() == make() for make in FAMILIES.values())


@quick
@given(seeds, owns, scales)
def test_independent_laplace_is_torchs(seed: int, own: tuple[int, ...], scale: float) -> None:
    error, precision = (
        (tensor(seed, (3, 4)) / scale**0.5).requires_grad_(),
        tensor(seed + 1, own).exp() * scale,
    )
    value = Independent(Laplace()).log_prob(error, precision)
    close(value, torch.distributions.Laplace(0, precision.rsqrt()).log_prob(error).sum(-1))
    close(Independent(Laplace()).energy(error, precision), -value)
    (want,) = torch.autograd.grad(value.sum(), error)
    score, w = (
        f(error.detach(), precision)
        for f in (Independent(Laplace()).score, Independent(Laplace()).weight)
    )
    close(score, want)
    close(-w * precision * error.detach(), want)


@pytest.mark.parametrize("family", FAMILIES)
def test_independent_coordinates_are_a_sum(family: str) -> None:
    "Density and slope are those of the coordinates, one by one; a Gaussian is nothing new."
    one, error = FAMILIES[family](), tensor(0, (3, 4))
    precision, both = tensor(1, (3, 4)).exp(), Independent(FAMILIES[family]())
    parts = [(error[..., c, None], precision[..., c, None]) for c in range(4)]
    close(both.log_prob(error, precision), sum(one.log_prob(*part) for part in parts))
    close(both.score(error, precision), torch.cat([one.score(*part) for part in parts], -1))
    close(-both.weight(error, precision) * precision * error, both.score(error, precision))
    zero = torch.zeros(4, dtype=error.dtype)
    close(both.log_prob(zero, 1.0), one.link(zero[0], 1) * 4 - both.log_normaliser(4))
    same = torch.allclose(both.log_prob(error, precision), one.log_prob(error, precision))
    assert same == (family == "gaussian")


@pytest.mark.parametrize("diagonal", [False, True])
def test_independent_laplace_fits_its_own_draws(diagonal: bool) -> None:
    lone, scale = Independent(Laplace()), torch.tensor([0.01, 900.0], dtype=torch.float64)
    errors = lone.sample(
        (4000, 2), scale if diagonal else scale[1], torch.Generator().manual_seed(0)
    )
    best = lone.fit(errors, diagonal)
    assert ((best / (scale if diagonal else scale[1]) - 1).abs() < 4 * 2 / 4000**0.5).all()
    for change in (0.9, 1.1):
        assert lone.log_prob(errors, best * change).sum() < lone.log_prob(errors, best).sum()
    assert lone.score(torch.tensor([math.nan, 0.0]), 1.0)[0].isnan()


def mixture(seed: int, M: int, D: int, diagonal: bool) -> GaussianMixture:
    return GaussianMixture(
        tensor(seed, (M,)),
        2 * tensor(seed + 1, (M, D)),
        tensor(seed + 2, (M, D) if diagonal else (M,)).exp(),
    )


@quick
@given(seeds, st.integers(1, 4), st.integers(1, 5), st.booleans())
def test_mixture_is_torchs(seed: int, M: int, D: int, diagonal: bool) -> None:
    pair, error, precision = (
        mixture(seed, M, D, diagonal),
        tensor(seed + 3, (7, D)).requires_grad_(),
        tensor(seed, (D,)).exp(),
    )
    parts = torch.distributions.Normal(
        pair.means, pair.precisions.reshape(M, -1).rsqrt().expand(M, D)
    )
    torchs = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=pair.log_mix),
        torch.distributions.Independent(parts, 1),
    )
    value = pair.log_prob(error, precision)
    close(value, torchs.log_prob(error * precision.sqrt()) + precision.log().sum() / 2)
    (want,) = torch.autograd.grad(value.sum(), error)
    close(pair.score(error.detach(), precision), want)
    close(
        pair.responsibilities(error.detach(), precision).sum(-1), torch.ones(7, dtype=torch.float64)
    )


def test_mixture_learns_by_gradient() -> None:
    error = tensor(0, (6, 2))
    raw = [x.requires_grad_() for x in (tensor(1, (3,)), tensor(2, (3, 2)), tensor(3, (3, 2)))]
    assert torch.autograd.gradcheck(
        lambda a, m, s: GaussianMixture(a, m, s.exp()).log_prob(error, 2.0), raw
    )


@pytest.mark.parametrize("diagonal", [False, True])
def test_mixture_finds_its_components(diagonal: bool) -> None:
    truth = GaussianMixture(torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log(),
                            torch.tensor([[-4.0, 0], [0, 4], [5, 0]], dtype=torch.float64),
                            torch.tensor([1.0, 4.0, 0.5], dtype=torch.float64))
    errors = truth.sample((3000, 2), generator=torch.Generator().manual_seed(0))
    best = GaussianMixture.fit(errors, 3, diagonal, torch.Generator().manual_seed(1), restarts=3)
    assert best.log_prob(errors).sum() >= truth.log_prob(errors).sum()
    order = torch.cdist(truth.means, best.means).argmin(1)
    assert order.sort().values.tolist() == [0, 1, 2]
    close(best.means[order], truth.means, rtol=0, atol=0.3)
    close(best.log_mix.exp()[order], truth.log_mix.exp(), rtol=0, atol=0.05)
    assert best.precisions.shape == ((3, 2) if diagonal else (3,))


@settings(quick, max_examples=20)
@given(seeds, st.integers(1, 5), st.booleans())
def test_em_never_lowers_the_likelihood(seed: int, M: int, diagonal: bool) -> None:
    errors = tensor(seed, (60, 2)) * tensor(seed + 1, (60, 1)).exp()
    r, last = (
        torch.rand(
            60, M, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        ).softmax(-1),
        -math.inf,
    )
    for _ in range(30):
        best = GaussianMixture._maximise(errors, r, diagonal, 1e-3)
        r, now = best.responsibilities(errors), best.log_prob(errors).mean().item()
        assert now >= last - 1e-10 * max(1, abs(now))
        last = now


def test_a_component_on_one_error_stops_at_the_floor() -> None:
    errors = torch.cat([tensor(0, (50, 1)), torch.full((1, 1), 1e3, dtype=torch.float64)])
    best = GaussianMixture.fit(errors, 2, generator=torch.Generator().manual_seed(0), floor=1e-4)
    smallest = 1e-4 * errors.var(correction=0)
    close(best.precisions.max(), 1 / smallest)
    assert best.log_prob(errors).isfinite().all()


@pytest.mark.parametrize(("log_mix", "means", "precisions", "says"), [
    (torch.zeros(2), torch.zeros(2), torch.ones(2), "means must have the shape"),
    (torch.zeros(3), torch.zeros(2, 1), torch.ones(2), "log_mix must have the shape"),
    (torch.zeros(2), torch.zeros(2, 3), torch.ones(2, 2), "precisions must have the shape"),
    (torch.full((2,), math.nan), torch.zeros(2, 3), torch.ones(2), "log_mix gives no weights"),
    (torch.zeros(2), torch.full((2, 3), math.nan), torch.ones(2), "means must be finite"),
    (torch.zeros(2), torch.zeros(2, 3), torch.zeros(2), "precision must be positive and finite"),
])
def test_a_mixture_that_is_none_is_refused(
    log_mix: Tensor, means: Tensor, precisions: Tensor, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        GaussianMixture(log_mix, means, precisions)


def test_a_mixture_needs_its_own_number_of_coordinates_and_enough_errors() -> None:
    with pytest.raises(ValueError, match="the error has 3 coordinates, the components have 2"):
        mixture(0, 2, 2, False).log_prob(torch.zeros(5, 3))
    with pytest.raises(
        ValueError, match="cannot fit 3 components to fewer than 3 different errors"
    ):
        GaussianMixture.fit(torch.tensor([[0.0], [1.0], [1.0]]), 3)
    with pytest.raises(ValueError, match="M must be at least 1, got 0"):
        GaussianMixture.fit(torch.randn(5, 2), 0)
    with pytest.raises(ValueError, match="restarts must be at least 1, got 0"):
        GaussianMixture.fit(torch.randn(5, 2), 1, restarts=0)
    with pytest.raises(TypeError, match="M must be a whole number, got '2'"):
        GaussianMixture.fit(torch.randn(5, 2), "2")
    with pytest.raises(ValueError, match="errors that are all the same"):
        GaussianMixture.fit(torch.ones(5, 2), 1)
    with pytest.raises(ValueError, match="errors that are missing or not finite"):
        GaussianMixture.fit(torch.full((5, 2), math.nan), 1)


def test_a_component_can_be_switched_off() -> None:
    pair = GaussianMixture(torch.tensor([0.0, -math.inf]), torch.zeros(2, 2), torch.ones(2))
    error = torch.randn(4, 2, requires_grad=True)
    close(pair.log_prob(error), Gaussian().log_prob(error, 1.0))
    (slope,) = torch.autograd.grad(pair.log_prob(error).sum(), error)
    close(slope, -error.detach())


# Short dtypes and extreme errors: against the same formulas in many digits.


def truth(family: Any, error: float, dim: int, precision: float) -> tuple[Any, Any]:
    "Log density and slope of `dim` equal errors, in 60 digits."
    if isinstance(family, Independent):
        value, slope = truth(family.family, error, 1, precision)
        return dim * value, slope
    e, Pi = mpmath.mpf(error), mpmath.mpf(precision)
    u = dim * Pi * e**2
    shape = {f.name: mpmath.mpf(getattr(family, f.name)) for f in fields(family)}
    a = next(iter(shape.values()), None)
    if isinstance(family, Gaussian):
        g, w = -u / 2, mpmath.mpf(1)
    elif isinstance(family, StudentT):
        g, w = -(a + dim) / 2 * mpmath.log1p(u / a), (a + dim) / (a + u)
    elif isinstance(family, Laplace):
        g, w = -mpmath.sqrt(u + a**2), 1 / mpmath.sqrt(u + a**2)
    elif isinstance(family, Huber):
        r = mpmath.sqrt(u)
        g, w = (-u / 2, mpmath.mpf(1)) if r <= a else (a * (a / 2 - r), a / r)
    elif isinstance(family, GeneralizedGaussian):
        g, w = -(u ** (a / 2)) / 2, a / 2 * u ** (a / 2 - 1)
    elif isinstance(family, Logistic):
        r = mpmath.sqrt(u)
        g, w = 2 * mpmath.log(2) - r - 2 * mpmath.log1p(mpmath.exp(-r)), mpmath.tanh(r / 2) / r
    else:
        share, ratio = shape["share"], shape["ratio"]
        near = (1 - share) * mpmath.exp(-u / 2)
        far = share * ratio ** (mpmath.mpf(dim) / 2) * mpmath.exp(-ratio * u / 2)
        g, w = mpmath.log(near + far), (near + ratio * far) / (near + far)
    return dim * mpmath.log(Pi) / 2 + g - mpmath.mpf(family.log_normaliser(dim)), -w * Pi * e


SHORT = [torch.float16, torch.bfloat16, torch.float32]
EVERY = [
    *ELLIPTICAL,
    Contaminated(0.1, 1e-8),
    Independent(Laplace()),
    Independent(StudentT(2.0)),
]


@pytest.mark.parametrize("dtype", SHORT, ids=str)
@pytest.mark.parametrize("family", EVERY, ids=str)
@settings(quick, max_examples=15)
@given(
    st.floats(-30, 30).map(lambda x: 10**x),
    st.sampled_from([1, 64]),
    st.sampled_from([1.0, 1e-3, 1e6]),
)
@example(40.0, 64, 1.0)
@example(1e4, 64, 1.0)
@example(1e30, 1, 1.0)
@example(1e-30, 64, 1.0)
@example(1e-22, 1, 1e6)
def test_extreme_errors_in_short_dtypes(
    family: Any, dtype: torch.dtype, size: float, dim: int, precision: float
) -> None:
    """Density and slope are those of the formula, wherever the result itself fits: what is
    rounded is the result alone."""
    info = torch.finfo(dtype)
    error = torch.full((2, dim), size).to(dtype)
    error[1] = 1.0  # a row of its own: not touched by the other
    assume(0 < error[0, 0] < math.inf)
    with mpmath.workdps(60):
        log_p, slope = truth(family, error[0, 0].item(), dim, precision)
        found = family.log_prob(error, precision), family.score(error, precision)
        assert found[0].dtype == found[1].dtype == dtype
        tolerance = 4 * info.eps + 1e-5
        for have, want, scale in ((found[0][0], log_p, max(1, dim)), (found[1][0, 0], slope, 0)):
            room = tolerance * abs(want) + scale * 2e-6 + info.smallest_normal * info.eps
            overflows = abs(want) + room >= info.max and have.item() in (-math.inf, -info.max)
            assert overflows or abs(have.item() - want) <= room, want
    for have, want in zip(
        found,
        (family.log_prob(error[1:], precision), family.score(error[1:], precision)),
        strict=True,
    ):
        assert torch.equal(have[1:], want)
    assert torch.equal(family.energy(error, precision), -found[0])


@pytest.mark.parametrize("dtype", SHORT, ids=str)
def test_a_mixture_in_short_dtypes(dtype: torch.dtype) -> None:
    "Widened before the square: far errors keep a density and a slope, huge ones a slope."
    pair = GaussianMixture(
        *(x.to(dtype) for x in (tensor(0, (2,)), tensor(1, (2, 64)), tensor(2, (2,)).exp()))
    )
    wide = GaussianMixture(*(x.double() for x in (pair.log_mix, pair.means, pair.precisions)))
    for size in (1e-30, 1e-3, 1.0, 20.0, 40.0, 1e4, 1e30):
        error = torch.full((3, 64), size).to(dtype)
        if error.isinf().any():
            continue
        for name in ("log_prob", "score", "responsibilities"):
            have, want = getattr(pair, name)(error, 1.0), getattr(wide, name)(error.double(), 1.0)
            fits = want.abs() < torch.finfo(dtype).max
            assert have.dtype == dtype and have[fits].isfinite().all() and have[~fits].isinf().all()
            close(
                have[fits].double(), want[fits], rtol=2 * torch.finfo(dtype).eps + 1e-5, atol=1e-4
            )


def test_a_precision_is_positive_and_finite_for_short_errors() -> None:
    "A precision of a million serves errors of 16 bits; one that is none is refused."
    small = torch.full((3, 4), 1e-3, dtype=torch.float16)
    want = Gaussian().log_prob(small.float(), 1e6)
    close(Gaussian().log_prob(small, 1e6).float(), want, rtol=1e-3, atol=1e-3)
    for family in (*ELLIPTICAL[:5], Independent(Laplace()), mixture(0, 2, 4, False)):
        for bad in (math.inf, torch.tensor(math.nan), 0.0, -1e-300):
            for method in (family.log_prob, family.energy, family.score):
                with pytest.raises(ValueError, match="precision must be positive and finite"):
                    method(small, bad)


@pytest.mark.parametrize("family", [*ELLIPTICAL, Independent(Laplace())], ids=str)
def test_a_fit_of_short_errors(family: Any) -> None:
    "Fitted in float64; a precision that the dtype cannot hold is refused, not infinite."
    errors = (300 * tensor(0, (200, 3))).half()
    more = {"max_iters": 20_000} if isinstance(family, Elliptical) else {}
    close(
        family.fit(errors, **more).double(),
        family.fit(errors.double(), **more),
        rtol=1e-3,
        atol=6e-8,
    )
    with pytest.raises(
        ValueError, match="precision must be positive and finite in torch.float16, got inf"
    ):
        family.fit(torch.full((9, 3), 1e-6, dtype=torch.float16), **more)


@elliptical
def test_nobody_looks_inside_vmap(family: Elliptical) -> None:
    """Densities work in vmap, also with a precision per sample; there what is no precision gives
    NaN."""
    error, precision = tensor(0, (3, 2, 4)).float(), torch.tensor([1.0, 2.0, -1.0])
    for method in (family.log_prob, family.score):
        found = torch.vmap(method)(error, precision)
        close(
            found[:2],
            torch.stack([method(error[i], precision[i]) for i in range(2)]),
            rtol=1e-5,
            atol=1e-5,
        )
        assert found[2].isnan().all()


def test_slopes_of_extreme_errors() -> None:
    """Autograd goes the way of the values: the slope of the energy is the score, and NaN reaches
    nobody else."""
    for family in ELLIPTICAL:
        error = torch.tensor([[1e-30], [3.0], [1e25]], requires_grad=True)
        (slope,) = torch.autograd.grad(family.log_prob(error, 1.0).sum(), error)
        want = family.score(error.detach(), 1.0)
        fits = want.isfinite()
        close(slope[fits], want[fits], rtol=1e-4, atol=1e-30)
        assert fits[1] and fits[0]


@pytest.mark.parametrize(
    ("call", "kind", "says"),
    [
        (lambda: Gaussian().log_prob(None, 1.0), TypeError, "an error must be a tensor, got None"),
        (lambda: Gaussian().log_prob([1.0], 1.0), TypeError, "an error must be a tensor"),
        (
            lambda: Gaussian().log_prob(torch.zeros(2, dtype=torch.int64), 1.0),
            TypeError,
            "floating dtype, got torch.int64",
        ),
        (
            lambda: Gaussian().score(torch.zeros(2), "1"),
            TypeError,
            "a precision must be a number or a tensor of numbers, got '1'",
        ),
        (lambda: Laplace().energy(torch.zeros(2), None), TypeError, "a precision must be a number"),
        (lambda: Laplace().energy(torch.zeros(2), True), TypeError, "a precision must be a number"),
        (
            lambda: Independent(Laplace()).weight(torch.zeros(2), torch.tensor(True)),
            TypeError,
            "a precision must be a number",
        ),
        (lambda: Gaussian().sample((2, 3), "1"), TypeError, "a precision must be a number"),
        (lambda: Gaussian().fit(None), TypeError, "errors must be a tensor"),
        (lambda: Gaussian().fit(torch.tensor(1.0)), ValueError, "errors need a last axis"),
        (lambda: StudentT().fit_shape([1.0]), TypeError, "errors must be a tensor"),
        (lambda: StudentT("1"), TypeError, "nu must be a number"),
        (
            lambda: GaussianMixture([0.0], torch.zeros(1, 1), torch.ones(1)),
            TypeError,
            "log_mix must be a tensor",
        ),
        (
            lambda: GaussianMixture.fit(torch.randn(5, 2), 1.5),
            TypeError,
            "M must be a whole number, got 1.5",
        ),
        (
            lambda: GaussianMixture.fit(torch.randn(5, 2), True),
            TypeError,
            "M must be a whole number, got True",
        ),
        (
            lambda: GaussianMixture.fit(torch.randn(5, 2), 1, restarts=0),
            ValueError,
            "restarts must be at least 1, got 0",
        ),
        (
            lambda: Categorical().energy(None, torch.zeros(1, 3)),
            TypeError,
            "targets must be an int64 tensor, got None",
        ),
        (
            lambda: Categorical().energy(torch.zeros(1).long(), None),
            TypeError,
            "logits must be a tensor",
        ),
        (
            lambda: Categorical().fit(torch.zeros(3).long(), 2.0),
            TypeError,
            "V must be a whole number",
        ),
        (
            lambda: Categorical().fit(torch.zeros(3).long(), 2, "1"),
            TypeError,
            "smoothing must be a number",
        ),
        (
            lambda: Categorical().fit(torch.zeros(3).long(), 2, math.nan),
            ValueError,
            "smoothing must be finite",
        ),
    ],
)
def test_types_are_looked_at_first(call: Any, kind: type, says: str) -> None:
    with pytest.raises(kind, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_numbers_of_numpy_are_numbers() -> None:
    error = torch.ones(2, 3)
    close(
        StudentT(np.float64(4.0)).log_prob(error, np.float32(2.0)),
        StudentT(4.0).log_prob(error, 2.0),
    )
