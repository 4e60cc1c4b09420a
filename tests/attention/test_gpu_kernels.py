"""The GPU backends against the definition in float64.

Without a GPU the kernels run in Triton's interpreter where Triton is installed, and what is plain
PyTorch runs anyway. With one, this one command checks the compiled kernels in bfloat16, float16 and
float32:

    pytest tests/attention/test_gpu_kernels.py
"""

import dataclasses
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from common import answers_alike
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

from pc_transformer.attention.kernels import triton as g
from pc_transformer.energies import (
    Contaminated,
    Elliptical,
    Gaussian,
    GeneralizedGaussian,
    Huber,
    Independent,
    Laplace,
    Logistic,
    StudentT,
)

ROOT = Path(__file__).resolve().parents[2]
LINKS: dict[str, str | Elliptical] = {
    "dot": "dot",
    "gaussian": Gaussian(),
    "student_t": StudentT(3.0),
    "laplace": Laplace(0.3),
    "huber": Huber(1.3),
    "generalized_gaussian": GeneralizedGaussian(1.4),
    "logistic": Logistic(),
    "contaminated": Contaminated(0.1, 0.05),
}
KINDS = ("head", "key", "shared", "diagonal")
MASKS = {
    "everything": {},
    "causal": dict(is_causal=True),
    "causal window": dict(is_causal=True, window=9),
    "window": dict(window=9),
}
SMALL = {kernel: g.Blocks(16, 16) for kernel in g.KERNELS}
TOLERANCE = {torch.float32: 3e-5, torch.float16: 6e-3, torch.bfloat16: 4e-2}
GPU = torch.cuda.is_available()
interpreter = pytest.mark.skipif(
    not (g.available("cpu")[0] and g.interpreted()), reason="Triton's interpreter is not at hand"
)
Results = tuple[Tensor, Tensor]
Backend = Callable[..., tuple[Tensor, Tensor | None]]


def definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    link: str | Elliptical,
    precision: Tensor,
    log_mix: Tensor | None = None,
    mask: Tensor | None = None,
    is_causal: bool = False,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    "Attention as it is defined: every difference of query and key, every score."
    d, Tq, Tk = q.shape[-1], q.shape[-2], k.shape[-2]
    if isinstance(link, str):
        s = (q * precision) @ k.mT
    else:
        wide = precision.expand(*precision.shape[:-1], d)
        u = (wide[:, :, None] * (q[:, :, :, None] - k[:, :, None]).square()).sum(-1)
        s = link.link(u, d) + wide.log().sum(-1)[:, :, None] / 2
    s = s if log_mix is None else s + log_mix[:, :, None]
    i, j = torch.arange(Tq, device=q.device)[:, None], torch.arange(Tk, device=q.device)
    seen = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device)
    if is_causal:
        seen = seen & (j <= i)
    if window is not None:
        seen = seen & (j > i - window) & ((j < i + window) | is_causal)
    s = s.masked_fill(~seen, -math.inf)
    if mask is not None:
        s = s.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else s + mask
    blind = (s == -math.inf).all(-1, keepdim=True)
    s = s.masked_fill(blind, 0.0)
    return s.softmax(-1).masked_fill(blind, 0.0) @ v, s.logsumexp(-1).masked_fill(
        blind[..., 0], -math.inf
    )


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def precision_of(kind: str, B: int, H: int, Tk: int, d: int) -> Tensor:
    shape = {
        "head": (1, H, 1, 1),
        "key": (B, H, Tk, 1),
        "shared": (1, H, 1, d),
        "diagonal": (B, H, Tk, d),
    }[kind]
    return (draw(5, *shape) / 2).exp()


def with_shapes(
    link: str | Elliptical, H: int, to: Callable[[Tensor], Tensor]
) -> tuple[str | Elliptical, list[Tensor]]:
    "The link with its shape parameters as tensors, one per head, that want a gradient."
    name, shape = g.read_link(link)
    if isinstance(link, str) or not shape:
        return link, []
    heads = torch.linspace(0.9, 1.1, H).view(1, H, 1, 1).double()
    tensors = [to(x * heads).detach().requires_grad_() for x in shape]
    return dataclasses.replace(link, **dict(zip(g.SHAPES[name], tensors, strict=True))), tensors


def results(
    attend: Backend,
    link: str | Elliptical,
    inputs: list[Tensor],
    precision: Tensor,
    log_mix: Tensor,
    narrow: torch.dtype,
    device: str,
    **options: object,
) -> list[Tensor]:
    """Read-out, log-sum-exp, and the gradients of q, k, v, precision, log_mix and shapes through
    both, in float64."""
    wide = torch.float64 if narrow == torch.float64 else torch.float32
    x = [t.to(device, narrow).requires_grad_() for t in inputs]
    y = [t.to(device, wide).requires_grad_() for t in (precision, log_mix)]
    link, shapes = with_shapes(link, inputs[0].shape[1], lambda t: t.to(device, wide))
    if isinstance(options.get("mask"), Tensor):
        options["mask"] = options["mask"].to(device)  # type: ignore[attr-defined]
    out, lse = attend(*x, link, *y, **options)
    assert lse is not None and out.dtype == narrow
    dout, dlse = (draw(seed, *t.shape).to(device, wide) for seed, t in ((7, out), (8, lse)))
    loss = (out.to(wide) * dout).sum() + (lse.to(wide) * dlse)[lse.isfinite()].sum()
    return [
        t.detach().double().cpu() for t in (out, lse, *torch.autograd.grad(loss, [*x, *y, *shapes]))
    ]


def worst(
    attend: Backend,
    link: str | Elliptical,
    kind: str = "key",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    B: int = 1,
    H: int = 2,
    Tq: int = 37,
    Tk: int = 37,
    d: int = 16,
    dv: int = 16,
    **options: object,
) -> float:
    """The largest difference from the definition on the same rounded inputs, in units of the
    largest entry (at least 1)."""
    inputs = [
        t.to(dtype).double()
        for t in (draw(1, B, H, Tq, d), draw(2, B, H, Tk, d), draw(3, B, H, Tk, dv))
    ]
    precision, log_mix = precision_of(kind, B, H, Tk, d), draw(4, B, H, Tk)
    exact = {name: value for name, value in options.items() if name != "blocks"}
    want = results(definition, link, inputs, precision, log_mix, torch.float64, device, **exact)
    got = results(attend, link, inputs, precision, log_mix, dtype, device, **options)
    errors = []
    for a, b in zip(got, want, strict=True):
        assert a.isfinite().equal(b.isfinite())
        errors.append(
            (a - b).nan_to_num().abs().max().item() / max(1.0, b[b.isfinite()].abs().max().item())
        )
    return max(errors)


def kinds(link: str) -> tuple[str, ...]:
    return ("head", "shared") if link == "dot" else KINDS


# ---------------------------------------------------------------- Triton's interpreter


@interpreter
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LINKS)
def test_every_link_and_precision(name: str, kind: str) -> None:
    if kind in kinds(name):
        assert (
            worst(g.triton, LINKS[name], kind, is_causal=True, blocks=SMALL)
            < TOLERANCE[torch.float32]
        )


@interpreter
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", ["dot", "student_t"])
def test_every_mask(name: str, mask: str) -> None:
    kind = "head" if name == "dot" else "diagonal"
    assert (
        worst(g.triton, LINKS[name], kind, **MASKS[mask], blocks=SMALL) < TOLERANCE[torch.float32]
    )


@interpreter
@pytest.mark.parametrize(
    "shape",
    [
        dict(Tq=1, Tk=1),
        dict(Tq=1, Tk=50),
        dict(Tq=50, Tk=19),
        dict(d=1, dv=1),
        dict(d=20, dv=24),
        dict(d=32, dv=32),
        dict(d=64, dv=16),
        dict(Tq=32, Tk=32),
        dict(B=2, H=3, Tq=17, Tk=17),
    ],
    ids=str,
)
def test_every_size(shape: dict[str, int]) -> None:
    for kind in ("key", "diagonal"):
        assert (
            worst(g.triton, LINKS["laplace"], kind, **shape, blocks=SMALL)
            < TOLERANCE[torch.float32]
        )


@interpreter
def test_every_pair_of_block_sizes() -> None:
    "Blocks of queries and keys need not be alike, and the three kernels need not agree."
    blocks = {"forward": g.Blocks(32, 16), "query": g.Blocks(16, 64), "key": g.Blocks(64, 32)}
    for mask in MASKS.values():
        assert (
            worst(g.triton, LINKS["huber"], Tq=75, Tk=75, **mask, blocks=blocks)
            < TOLERANCE[torch.float32]
        )
    assert worst(g.triton, LINKS["huber"]) < TOLERANCE[torch.float32]  # the table's


@interpreter
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["dot", "gaussian", "student_t", "laplace"])
def test_sixteen_bits(name: str, dtype: torch.dtype) -> None:
    for kind in kinds(name):
        tolerance = TOLERANCE[dtype] * (
            1 + (kind == "shared")
        )  # scaling queries and keys rounds them once more
        assert worst(g.triton, LINKS[name], kind, dtype, is_causal=True, blocks=SMALL) < tolerance


@interpreter
def test_squares_in_two_parts_are_the_better_ones() -> None:
    """For queries next to their keys, a distance from squares that were rounded once is mostly
    noise."""
    k = draw(1, 1, 1, 40, 64).bfloat16()
    q = (k.double() + draw(2, 1, 1, 40, 64) / 50).bfloat16()
    v, precision = (
        draw(3, 1, 1, 40, 64).bfloat16(),
        precision_of("diagonal", 1, 1, 40, 64).bfloat16().double(),
    )
    _, want = definition(q.double(), k.double(), v.double(), Laplace(0.0), precision)
    lse = [g.triton(q, k, v, Laplace(0.0), precision, split=split)[1] for split in (True, False)]
    two, one = ((x - want).abs().mean().item() for x in lse if x is not None)
    assert two < 0.005 and 3 * two < one


@interpreter
def test_key_padding_and_rows_that_see_nothing() -> None:
    mask = torch.arange(37) < torch.tensor([30, 0]).view(2, 1, 1, 1)
    for name, kind in (("dot", "head"), ("student_t", "key"), ("laplace", "diagonal")):
        assert (
            worst(g.triton, LINKS[name], kind, B=2, mask=mask, is_causal=True, blocks=SMALL)
            < TOLERANCE[torch.float32]
        )
    floats = draw(9, 1, 1, 1, 37).float()
    assert worst(g.triton, LINKS["gaussian"], mask=floats, blocks=SMALL) < TOLERANCE[torch.float32]


@interpreter
def test_nothing_seen_gives_zeros() -> None:
    q, k, v = (draw(seed, 1, 1, 20, 8).float().requires_grad_() for seed in (1, 2, 3))
    out, lse = g.triton(
        q,
        k,
        v,
        Laplace(0.0),
        torch.ones(1, 1, 1, 1),
        mask=torch.zeros(1, 1, 1, 20, dtype=torch.bool),
    )
    assert lse is not None and out.eq(0).all() and lse.eq(-math.inf).all()
    assert all(x.eq(0).all() for x in torch.autograd.grad(out.sum(), [q, k, v]))


@interpreter
def test_nan_stays_nan() -> None:
    q, k, v = (draw(seed, 1, 1, 20, 8).float() for seed in (1, 2, 3))
    q[0, 0, 7, 3] = math.nan
    k[0, 0, 18, 0] = math.nan
    for link in LINKS.values():
        out, lse = g.triton(q, k, v, link, torch.ones(1, 1, 1, 1), is_causal=True, blocks=SMALL)
        want = [i == 7 or i >= 18 for i in range(20)]
        assert (
            lse is not None
            and lse[0, 0].isnan().tolist() == want
            and out[0, 0].isnan().any(-1).tolist() == want
        )


@interpreter
@pytest.mark.parametrize(
    "link",
    [
        StudentT(0.1),
        StudentT(1e6),
        Laplace(0.0),
        GeneralizedGaussian(0.5),
        GeneralizedGaussian(2.0),
        Contaminated(1e-4, 1e-6),
        Huber(1e-3),
    ],
    ids=str,
)
def test_extreme_shapes(link: Elliptical) -> None:
    assert worst(g.triton, link, "key", is_causal=True, blocks=SMALL) < 3 * TOLERANCE[torch.float32]


@interpreter
@pytest.mark.parametrize("lam", [1e-6, 1e6])
@pytest.mark.parametrize("name", ["gaussian", "student_t", "laplace", "huber"])
@pytest.mark.parametrize("kind", ["key", "diagonal"])
def test_extreme_precisions(name: str, lam: float, kind: str) -> None:
    """Distances in units of the precision are what they were: the same results from inputs
    scaled by its root."""
    q, k, v = (draw(seed, 1, 1, 20, 8) for seed in (1, 2, 3))
    precision = precision_of(kind, 1, 1, 20, 8)
    out, lse = definition(q, k, v, LINKS[name], precision)
    got = g.triton(
        *((x / lam**0.5).float() for x in (q, k)), v.float(), LINKS[name], (precision * lam).float()
    )
    torch.testing.assert_close(got[0].double(), out, rtol=1e-4, atol=1e-5)
    assert got[1] is not None
    torch.testing.assert_close(got[1].double() - 4 * math.log(lam), lse, rtol=1e-4, atol=1e-4)


@interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_adversarial_inputs(dtype: torch.dtype) -> None:
    "Equal keys share their weight, an outlier touches its own row only, huge norms stay finite."
    one = torch.ones(1, 1, 1, 1)
    q, k, v = (draw(seed, 1, 1, 40, 16).to(dtype) for seed in (1, 2, 3))
    for link in LINKS.values():
        same = k[:, :, :1].expand_as(k)
        out, _ = g.triton(q, same, v, link, one)
        torch.testing.assert_close(
            out.float(), v.float().mean(2, keepdim=True).expand_as(out), rtol=0, atol=5e-3
        )
        far = q.clone()
        far[:, :, 5] = 1e4
        inputs = [x.clone().requires_grad_() for x in (far, k, v)]
        out, lse = g.triton(*inputs, link, one / 4)
        others = [i for i in range(40) if i != 5]
        clean, _ = g.triton(q, k, v, link, one / 4)
        assert lse is not None and out.isfinite().all() and lse.isfinite().all()
        assert (
            out[:, :, others].equal(clean[:, :, others]) and out.abs().max() <= v.abs().max() * 1.01
        )
        assert all(
            x.isfinite().all()
            for x in torch.autograd.grad(out[:, :, others].sum() + lse[:, :, others].sum(), inputs)
        )
        big, _ = g.triton(1e3 * q, 1e3 * k, v, link, one)
        assert big.isfinite().all()


@interpreter
def test_a_query_on_its_key() -> None:
    """Distance zero: the infinite slope of Laplace and of p < 2 meets a zero difference, and the
    gradient stays bounded."""
    k = draw(1, 1, 1, 20, 8)
    for dtype in (torch.float32, torch.bfloat16):
        for link in (Laplace(0.0), GeneralizedGaussian(1.0), Logistic(), Huber(1.3)):
            x = [t.to(dtype).requires_grad_() for t in (k, k, draw(3, 1, 1, 20, 8))]
            out, lse = g.triton(*x, link, torch.ones(1, 1, 1, 1))
            assert lse is not None
            grads = torch.autograd.grad(out.float().sum() + lse.sum(), x)
            assert all(t.isfinite().all() and t.abs().max() < 30 for t in grads)


@interpreter
def test_any_strides_and_only_the_gradients_asked_for() -> None:
    packed = draw(
        1, 2, 20, 3, 4, 16
    ).float()  # batch, time, q k v, heads, width: as one linear map makes them
    q, k, v = (x.transpose(1, 2) for x in packed.unbind(2))
    lam = torch.ones(1, 4, 1, 1)
    got, _ = g.triton(q, k, v, StudentT(3.0), lam, is_causal=True, blocks=SMALL)
    want, _ = definition(
        q.double(), k.double(), v.double(), StudentT(3.0), lam.double(), is_causal=True
    )
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    for own in range(3):
        x = [t.detach().clone().requires_grad_(n == own) for n, t in enumerate((q, k, v))]
        g.triton(*x, StudentT(3.0), lam, is_causal=True, blocks=SMALL)[0].sum().backward()
        assert [t.grad is not None for t in x] == [n == own for n in range(3)]


@interpreter
def test_two_runs_agree_bit_for_bit() -> None:
    def run() -> list[Tensor]:
        inputs = [draw(seed, 1, 2, 40, 16) for seed in (1, 2, 3)]
        return results(
            g.triton,
            LINKS["student_t"],
            inputs,
            precision_of("key", 1, 2, 40, 16),
            draw(4, 1, 2, 40),
            torch.float32,
            "cpu",
            is_causal=True,
            blocks=SMALL,
        )

    assert all(a.equal(b) for a, b in zip(run(), run(), strict=True))


@interpreter
def test_the_comparison_notices(monkeypatch: pytest.MonkeyPatch) -> None:
    "Mutants of the host code: each is caught by the same comparison, by a wide margin."
    assert worst(g.triton, StudentT(3.0), is_causal=True, blocks=SMALL) < 1e-5

    def other_nu(*args: object, **options: object) -> tuple[Tensor, Tensor | None]:
        q, k, v, link, *rest = args
        return g.triton(q, k, v, dataclasses.replace(link, nu=link.nu * 1.01), *rest, **options)  # type: ignore

    assert worst(other_nu, StudentT(3.0), is_causal=True, blocks=SMALL) > 1e-4
    prepare = g.prepare
    monkeypatch.setattr(
        g,
        "prepare",
        lambda q, k, link, precision, log_mix, mask: prepare(q, k, link, precision, None, mask),
    )
    with pytest.raises(RuntimeError, match="not have been used"):
        worst(g.triton, StudentT(3.0), is_causal=True, blocks=SMALL)
    monkeypatch.undo()
    monkeypatch.setattr(g.Fused, "backward", staticmethod(without_lse(g.Fused.backward)))
    assert worst(g.triton, StudentT(3.0), is_causal=True, blocks=SMALL) > 1e-2


def without_lse(
    backward: Callable[..., tuple[Tensor | None, ...]],
) -> Callable[..., tuple[Tensor | None, ...]]:
    "A mutant: the gradient through the log-sum-exp is forgotten."
    return lambda ctx, dout, dlse: backward(ctx, dout, torch.zeros_like(dlse))


@interpreter
def test_bad_arguments_say_what_is_wrong() -> None:
    q, one = torch.zeros(1, 1, 5, 8), torch.ones(1, 1, 1, 1)

    def wrong(match: str, error: type[Exception] = ValueError, **changes: object) -> None:
        arguments = dict(q=q, k=q, v=q, link=Gaussian(), precision=one) | changes
        with pytest.raises(error, match=match):
            g.triton(**arguments)  # type: ignore[arg-type]

    wrong("link must be", TypeError, link=Independent(Laplace()))
    wrong("link must be", TypeError, link="gaussian")
    wrong("needs q \\(B, H, Tq, d\\)", q=q[0])
    wrong("bfloat16 or float16", TypeError, q=q.double())
    wrong("128 wide", q=torch.zeros(1, 1, 5, 130), k=torch.zeros(1, 1, 5, 130))
    wrong("as many queries as keys", q=q[:, :, :3], is_causal=True)
    wrong("window must be at least 1", window=0)
    wrong("no dropout", dropout_p=0.1)
    wrong("4 axes", precision=one[0])
    wrong("one scale", link="dot", precision=torch.ones(1, 1, 5, 1))
    wrong("4 axes", mask=torch.ones(5, 5, dtype=torch.bool))
    wrong("masks over keys", mask=torch.ones(1, 1, 5, 5, dtype=torch.bool))


# ---------------------------------------------------------------- without Triton, without a GPU


def test_import_without_triton_costs_nothing_and_says_what_is_missing() -> None:
    code = (
        "import importlib.util, sys\nfind = importlib.util.find_spec\nimportlib.util.find_spec ="
        " lambda name, *a: None if name.split('.')[0] == 'triton' else find(name, *a)\nimport"
        " torch\nbefore = set(sys.modules)\nfrom pc_transformer.attention.kernels import triton as"
        " g\nassert not any(m.split('.')[0] == 'triton' for m in set(sys.modules) - before),"
        " 'Triton was imported'\nprint(g.available('cpu')[0], g.available('cpu')[1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "False Triton is not installed: pip install 'pc_transformer[triton]'\n"


# ---------------------------------------------------------------- with a GPU


def gpu_tolerance(dtype: torch.dtype, kind: str) -> float:
    "A diagonal precision's squares are rounded once; three tf32 products are not quite float32."
    return TOLERANCE[dtype] * (1 + (kind == "shared")) * (3 if dtype == torch.float32 else 1)


@pytest.mark.cuda
@pytest.mark.skipif(not GPU, reason="needs a GPU")
class TestOnTheGpu:
    @pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("name", LINKS)
    def test_links(self, name: str, kind: str, dtype: torch.dtype) -> None:
        if kind in kinds(name):
            error = worst(
                g.triton, LINKS[name], kind, dtype, "cuda", 2, 3, 200, 200, 64, 64, is_causal=True
            )
            assert error < gpu_tolerance(dtype, kind)

    @pytest.mark.parametrize("mask", MASKS)
    @pytest.mark.parametrize("name", ["dot", "student_t"])
    def test_masks(self, name: str, mask: str) -> None:
        error = worst(
            g.triton,
            LINKS[name],
            "head",
            torch.bfloat16,
            "cuda",
            1,
            2,
            300,
            300,
            32,
            32,
            **MASKS[mask],
        )
        assert error < gpu_tolerance(torch.bfloat16, "head")

    @pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
    @pytest.mark.parametrize("d", [16, 48, 64, 96, 128])
    def test_widths(self, d: int, dtype: torch.dtype) -> None:
        for kind in ("key", "diagonal"):
            error = worst(g.triton, LINKS["laplace"], kind, dtype, "cuda", 1, 2, 150, 150, d, d)
            assert error < gpu_tolerance(dtype, kind)

    def test_padding(self) -> None:
        mask = torch.arange(200) < torch.tensor([150, 0]).view(2, 1, 1, 1)
        bf16 = torch.bfloat16
        error = worst(
            g.triton,
            LINKS["student_t"],
            "key",
            bf16,
            "cuda",
            2,
            2,
            200,
            200,
            64,
            64,
            mask=mask,
            is_causal=True,
        )
        assert error < gpu_tolerance(bf16, "key")


@interpreter
@pytest.mark.parametrize(
    "fault", ["q nan", "k nan", "k inf", "v nan", "v -inf", "q 1e30", "k 1e30"]
)
@pytest.mark.parametrize("family", ["dot", "gaussian", "student_t", "mixture"])
def test_what_is_no_number_has_one_outcome(family: str, fault: str) -> None:
    "As in every other backend, and rows that see nothing are zero."
    for seen in ("causal", "window", "left padding", "prior", "no prior"):
        answers_alike(family, fault, seen, "triton")


@interpreter
@pytest.mark.parametrize("name", [name for name in LINKS if name != "dot"])
def test_squares_that_overflow_are_no_mask(name: str) -> None:
    """Also for who calls the kernel itself: keys that are all too far give NaN, not the zeros of
    a row that sees nothing."""
    q, k, v = (draw(seed, 1, 1, 20, 8).float() for seed in (1, 2, 3))
    for options in ({}, {"mask": torch.ones(1, 1, 1, 20, dtype=torch.bool)}):
        out, lse = g.triton(q, 1e25 * k, v, LINKS[name], torch.ones(1, 1, 1, 1), **options)
        assert lse is not None and out.isnan().all() and lse.isnan().all()


@interpreter
def test_outliers_keep_their_small_weight() -> None:
    """A ratio far below the rounding of one is not subtracted from it: the slope is ratio / 2,
    not zero."""
    q, k, v = (
        torch.zeros(1, 1, 1, 4),
        1e3 * draw(1, 1, 1, 20, 4).float(),
        draw(2, 1, 1, 20, 4).float(),
    )
    link, found = Contaminated(0.1, 1e-9), []
    for f, dtype in ((definition, torch.float64), (g.triton, torch.float32)):
        leaf = q.to(dtype).requires_grad_()
        out, _ = f(leaf, k.to(dtype), v.to(dtype), link, torch.ones(1, 1, 1, 1, dtype=dtype))
        found.append(torch.autograd.grad(out.sum(), leaf)[0])
    torch.testing.assert_close(found[1].double(), found[0], rtol=1e-2, atol=1e-9)


def test_types_are_looked_at_first() -> None:
    q = torch.zeros(1, 1, 4, 8)
    if g.available("cpu")[0]:
        for bad, words in (
            ({"q": None}, "q must be a tensor"),
            ({"precision": 1.0}, "precision must be a tensor"),
            ({"window": 1.5}, "window must be a whole number"),
        ):
            with pytest.raises(TypeError, match=words):
                g.triton(
                    **{"q": q, "k": q, "v": q, "link": "dot", "precision": torch.ones(1, 1, 1, 1)}
                    | bad
                )
