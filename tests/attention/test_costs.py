"""What attention costs: the formulas of the notebook on operations against counts of what runs."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sympy as sp
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from pc_transformer.attention.kernels import chunked, merge, sdpa
from pc_transformer.energies import Gaussian, Huber, Independent, Laplace, StudentT

CHAPTER = Path(__file__).resolve().parents[2] / "nbs/5_speed/13_operations.ipynb"
SIZES = [(1, 1, 64, 8), (2, 3, 96, 16), (1, 2, 130, 33)]


def read_chapter() -> SimpleNamespace:
    """The formulas and the counters, as the page shows them: its cells that begin with `# cost`."""
    cells = json.loads(CHAPTER.read_text(encoding="utf-8"))["cells"]
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    names: dict[str, Any] = {"sp": sp, "torch": torch}
    for cell in code:
        if cell.startswith("# cost"):
            exec(cell, names)
    return SimpleNamespace(**names)


cost = read_chapter()


def at(formula: sp.Expr, size: tuple[int, ...]) -> int:
    """The formula in numbers; `size` is (B, H, T, d)."""
    return int(formula.subs(dict(zip((cost.B, cost.H, cost.T, cost.d), size, strict=True))))


def inputs(size: tuple[int, ...], grad: bool = True) -> list[Tensor]:
    """Queries, keys and values."""
    torch.manual_seed(0)
    return [torch.randn(size, requires_grad=grad) for _ in range(3)]


def precision(kind: str, size: tuple[int, ...]) -> Tensor:
    """A precision with four axes."""
    B, H, T, d = size
    shape = {"shared": (1, H, 1, 1), "per key": (B, H, T, 1), "diagonal per key": (B, H, T, d)}[
        kind
    ]
    return torch.rand(shape) + 0.5


def unfused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dot-product attention as matrices."""
    return ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1) @ v


def direct(q: Tensor, k: Tensor, v: Tensor, lam: Tensor, log_pi: Tensor) -> Tensor:
    """Gaussian attention by its errors, as the theory begins."""
    u = (q[..., :, None, :] - k[..., None, :, :]).square().sum(-1)
    scores = log_pi[..., None, :] - lam * u / 2 + q.shape[-1] / 2 * torch.log(lam / (2 * math.pi))
    return scores.softmax(-1) @ v


FAMILIES = {
    "dot": (sdpa, "dot", "shared"),
    "gaussian": (chunked, Gaussian(), "shared"),
    "gaussian, per key": (chunked, Gaussian(), "per key"),
    "gaussian, diagonal per key": (chunked, Gaussian(), "diagonal per key"),
    "student_t": (chunked, StudentT(4.0), "per key"),
    "laplace": (chunked, Laplace(), "per key"),
    "huber": (chunked, Huber(), "per key"),
    "student_t, diagonal per key": (chunked, StudentT(4.0), "diagonal per key"),
}


def family_run(name: str, size: tuple[int, ...], **options: Any) -> Callable[[], Tensor]:
    """One call of a family's kernel."""
    kernel, link, kind = FAMILIES[name]
    q, k, v = inputs(size)
    Lam = precision(kind, size)
    return lambda: kernel(q, k, v, link, Lam, need_lse=False, **options)[0]


def widths(name: str) -> tuple[sp.Expr, sp.Expr]:
    """Width of the scores' product and of the read-out's."""
    columns = {
        "student_t": 1,
        "laplace": 1,
        "huber": 1,
        "student_t, diagonal per key": cost.d,
    } | cost.columns_needed
    return cost.d + columns[name], cost.d


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", FAMILIES)
def test_operations_of_each_family(name: str, size: tuple[int, ...]) -> None:
    """Matrix products, forward and with the backward pass, are exactly those of equation (1)."""
    run = family_run(name, size)
    assert cost.operations(run) == at(cost.products(*widths(name)), size)
    assert cost.operations(cost.train(run)) == at(cost.products(*widths(name), backward=True), size)


@pytest.mark.parametrize("size", SIZES)
def test_operations_of_the_plain_forms(size: tuple[int, ...]) -> None:
    """Unfused: no product twice. Direct: only the read-out is a product."""
    q, k, v = inputs(size)
    lam, log_pi = torch.rand(size[1], 1, 1) + 0.5, torch.randn(size[:3])
    for run, w in ((lambda: unfused(q, k, v), cost.d), (lambda: direct(q, k, v, lam, log_pi), 0)):
        assert cost.operations(run) == at(cost.products(w, cost.d), size)
        assert cost.operations(cost.train(run)) == at(
            cost.products(w, cost.d, True, fused=False), size
        )


@pytest.mark.parametrize("size", SIZES)
def test_the_count_of_the_fused_kernel_is_that_of_its_matrices(size: tuple[int, ...]) -> None:
    """PyTorch's other implementation makes the same products in the open, and one less backward."""
    q, k, v = inputs(size)

    def run() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    fused, fused_train = cost.operations(run), cost.operations(cost.train(run))
    with sdpa_kernel(SDPBackend.MATH):
        assert cost.operations(run) == fused
        assert cost.operations(cost.train(run)) == fused_train - at(2 * cost.N * cost.d, size)


@pytest.mark.parametrize("M", [1, 2, 3])
def test_a_mixture_costs_its_components(M: int) -> None:
    """M components per key: M times the products of one."""
    size = (2, 2, 96, 16)
    q, _, v = inputs(size)
    keys = [inputs(size)[1] for _ in range(M)]
    Lam = precision("shared", size)

    def run() -> Tensor:
        parts = [chunked(q, k, v, Gaussian(), Lam) for k in keys]
        return merge([out for out, _ in parts], [lse for _, lse in parts if lse is not None])[0]

    one = cost.d + cost.columns_needed["gaussian"]
    assert cost.operations(run) == M * at(cost.products(one, one), size)
    assert cost.operations(cost.train(run)) == M * at(cost.products(one, one, True), size)


def test_row_chunks_skip_the_future() -> None:
    """Causal: T (T + c) / 2 pairs of T^2 for chunks of c queries; c is found here."""
    size = (1, 2, 512, 16)
    causal, whole = (
        cost.operations(cost.train(family_run("student_t", size, is_causal=c)))
        for c in (True, False)
    )
    T = size[2]
    rows = 2 * T * causal / whole - T
    assert rows.is_integer() and T % rows == 0
    assert 1 <= rows <= T / 4


@pytest.mark.parametrize("size", SIZES)
def test_numbers_moved_and_kept(size: tuple[int, ...]) -> None:
    """Exact but for terms without a factor T d or T^2."""
    q, k, v = inputs(size)
    lam, log_pi = (torch.rand(shape, requires_grad=True) for shape in ((size[1], 1, 1), size[:3]))
    small = 10 * size[0] * size[1] * size[2]
    for name, run in {
        "unfused": lambda: unfused(q, k, v),
        "direct": lambda: direct(q, k, v, lam, log_pi),
    }.items():
        assert abs(cost.traffic(run) - at(cost.moved[name], size)) <= small
        assert abs(cost.storage_kept(run) - at(cost.kept[name], size)) <= small
    need = at(cost.needed(cost.d, cost.d), size)
    assert cost.traffic(lambda: F.scaled_dot_product_attention(q, k, v)) == need
    assert cost.storage_kept(lambda: F.scaled_dot_product_attention(q, k, v)) == need


@pytest.mark.parametrize("name", FAMILIES)
def test_kernels_keep_no_scores(name: str) -> None:
    """What a kernel keeps for the backward pass grows with T and is a few times what it reads
    and writes."""
    short, long = (1, 2, 512, 16), (1, 2, 1024, 16)
    kept, kept_long = (cost.storage_kept(family_run(name, size)) for size in (short, long))
    assert kept_long < 2.01 * kept
    need = at(cost.needed(*widths(name)), long)
    assert need / 2 < kept_long < 3 * need
    assert kept_long < at(cost.kept["unfused"], long) / 2


class Elements(TorchDispatchMode):
    """Counts the numbers that come out of the named operations."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names, self.count = names, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation; count it if it is one of the named, in place or not."""
        out = func(*args, **(kwargs or {}))
        if func._schema.name.removeprefix("aten::").rstrip("_") in self.names:
            self.count += out.numel()
        return out


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("student_t", ("log", "log1p")),
        ("laplace", ("sqrt",)),
        ("gaussian", ("log", "log1p", "sqrt")),
    ],
)
def test_what_a_link_adds_per_pair(name: str, extra: tuple[str, ...]) -> None:
    """One logarithm (Student's t) or one square root (Laplace) per pair forward, none for the
    Gaussian."""
    size = (1, 2, 128, 16)
    run = family_run(name, size)
    with Elements(*extra) as counter:
        run()
    pairs, per_key = at(cost.N, size), 4 * size[0] * size[1] * size[2]
    assert 0 <= counter.count - (0 if name == "gaussian" else pairs) <= per_key


def test_independent_coordinates_are_all_elementwise() -> None:
    """A root per pair and coordinate, and not one product."""
    size = (1, 2, 64, 16)
    q, k, _ = inputs(size, grad=False)

    def run() -> Tensor:
        return Independent(Laplace()).log_prob(q[:, :, :, None] - k[:, :, None], torch.tensor(0.5))

    with Elements("sqrt") as counter:
        run()
    assert counter.count == at(cost.N * cost.d, size)
    assert cost.operations(run) == 0


def test_the_counters_see_a_difference() -> None:
    """A wider product, a matrix that is kept, a copy: each changes its count."""
    size = (1, 1, 64, 8)
    q, k, v = inputs(size)
    wide_q, wide_k = F.pad(q, (0, 1)), F.pad(k, (0, 1))
    assert cost.operations(lambda: unfused(wide_q, wide_k, v)) > cost.operations(
        lambda: unfused(q, k, v)
    )
    assert cost.storage_kept(lambda: unfused(q, k, v).exp()) > cost.storage_kept(
        lambda: unfused(q, k, v)
    )
    plain = cost.traffic(lambda: unfused(q, k, v))
    assert cost.traffic(lambda: unfused(q.clone(), k, v)) == plain + 2 * q.numel()
    assert cost.traffic(lambda: unfused(q.mT.mT, k, v)) == plain  # a view moves nothing
