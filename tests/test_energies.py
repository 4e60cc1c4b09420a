"""Properties of the energies, against PyTorch's distributions and autograd; and a mutant that each must catch."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pc_transformer.energies import Categorical, Elliptical, Gaussian

close = torch.testing.assert_close
quick = settings(deadline=None, max_examples=50)  # the first call of PyTorch is slow, whatever the example


def tensor(seed: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass(frozen=True)
class NoLogDet(Gaussian):
    "A mutant: the normaliser without the log-determinant, as in codes whose energy is just the squared error."

    def log_prob(self, error: Tensor, precision: float | Tensor) -> Tensor:
        dim = error.shape[-1]
        return self.link(self.quadratic(error, precision), dim) - self.log_normaliser(dim)


@dataclass(frozen=True)
class CountedOnce(Gaussian):
    "A mutant: a precision that serves all D coordinates counts once in the log-determinant."

    def log_prob(self, error: Tensor, precision: float | Tensor) -> Tensor:
        log = torch.as_tensor(precision, dtype=error.dtype).log()
        log = log.sum(-1) if log.dim() else log
        return self.link(self.quadratic(error, precision), 0) - self.log_normaliser(error.shape[-1]) + log / 2


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


def is_normal(family: Elliptical, seed: int, shape: tuple[int, ...], own: tuple[int, ...], scale: float) -> None:
    "log_prob is the sum of PyTorch's normal log densities."
    error, precision = tensor(seed, shape) / scale**0.5, tensor(seed + 1, own).exp() * scale
    want = torch.distributions.Normal(0, precision.rsqrt()).log_prob(error).sum(-1)
    close(family.log_prob(error, precision), want, rtol=1e-10, atol=1e-9)


def score_is_the_gradient(family: Elliptical, seed: int, own: tuple[int, ...], scale: float) -> None:
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
    close(fitted[seen[0]], torch.tensor((seen.count(seen[0]) + smoothing) / (len(seen) + 5 * smoothing)))


def test_a_head_and_a_node_use_the_same_object() -> None:
    q, k = tensor(0, (5, 8)), tensor(1, (7, 8))
    scores = Gaussian().log_prob(q[:, None] - k, 2.0)
    assert scores.shape == (5, 7)
    close(scores.softmax(-1), (2.0 * (q @ k.T - k.square().sum(-1) / 2)).softmax(-1))
