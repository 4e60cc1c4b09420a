"""Fused attention against its formula: every link, mask and precision; what masks promise; what
memory promises."""

import ast
import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pc_transformer.attention import kernels
from pc_transformer.attention.kernels import chunked, merge, plain, sdpa
from pc_transformer.energies import FAMILIES, Elliptical, Gaussian, Laplace, StudentT

LINKS = {"dot": "dot", **{name: family() for name, family in FAMILIES.items()}}
BACKENDS = [("dot", sdpa)]
BACKENDS += [(name, f) for f in (plain, chunked) for name in LINKS]
IDS = [f"{name}-{f.__name__}" for name, f in BACKENDS]


def oracle(q, k, v, link, precision, log_mix=None, mask=None, is_causal=False, window=None, **_):
    "Score, softmax and read-out, written independently of the kernels' helpers."
    if link == "dot":
        s = (q * precision) @ k.mT
    else:
        error = q[:, :, :, None] - k[:, :, None]
        u = (precision[..., None, :, :] * error**2).sum(-1)
        logs = precision.log().expand(*precision.shape[:-1], q.shape[-1]).sum(-1) / 2
        s = link.link(u, q.shape[-1]) + logs[..., None, :]
    if log_mix is not None:
        s = s + log_mix[..., None, :]
    i, j = torch.arange(s.shape[-2])[:, None], torch.arange(s.shape[-1])
    hide = torch.zeros(s.shape[-2:], dtype=torch.bool)
    if is_causal:
        hide |= j > i
    if window is not None:
        hide |= (j <= i - window) | (j >= i + window)
    s = s.masked_fill(hide, -math.inf)
    if mask is not None:
        s = s.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else s + mask
    blind = (s == -math.inf).all(-1, keepdim=True)
    s = s.masked_fill(blind, 0.0)
    return s.softmax(-1).masked_fill(blind, 0.0) @ v, s.logsumexp(-1).masked_fill(
        blind[..., 0], -math.inf
    )


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def precision_of(kind, B, H, T, d):
    shape = {
        "shared": (1, H, 1, 1),
        "key": (B, H, T, 1),
        "diagonal": (1, H, 1, d),
        "diagonal key": (B, H, T, d),
    }[kind]
    return draw(*shape, seed=9).abs() / 2 + 0.3


def everything(call, link, leaves, dtype, kw):
    "Output, lse and the gradients of all that has one, computed in `dtype`."
    cast = lambda x: x.detach().to(dtype).requires_grad_() if x.is_floating_point() else x
    own = [cast(x) for x in leaves]
    args = {n: cast(a) if isinstance(a, torch.Tensor) else a for n, a in kw.items()}
    out, lse = call(*own[:3], link, own[3], **args)
    lse = out.new_zeros(()) if lse is None else lse  # PyTorch's kernel has none
    wanted = own + [a for a in args.values() if isinstance(a, torch.Tensor) and a.requires_grad]
    loss = out.sin().sum() + lse.masked_fill(lse == -math.inf, 0.0).cos().sum()
    return [out, lse, *torch.autograd.grad(loss, wanted)]


def compare(f, link, leaves, tol_out=5e-5, tol_grad=2e-5, dtype=torch.float32, **kw):
    "Output, lse and all gradients of `f` in `dtype` against the oracle in float64."
    formula = (lambda *x, **kw: (oracle(*x, **kw)[0], None)) if f is sdpa else oracle
    exact, near = (
        everything(formula, link, leaves, torch.float64, kw),
        everything(f, link, leaves, dtype, kw),
    )
    assert torch.equal(exact[1].isinf(), near[1].isinf())
    assert (exact[0] - near[0]).abs().max() < tol_out
    finite = exact[1].isfinite()
    assert (exact[1] - near[1])[finite].abs().max() < tol_out
    for n, (a, b) in enumerate(zip(exact[2:], near[2:], strict=True)):
        assert b.isfinite().all()
        # a precision's gradient is a sum over all pairs that nearly cancel: ten times the tolerance
        assert (a - b).abs().max() < (10 if n == 3 else 1) * tol_grad * max(
            a.abs().max().item(), 1e-3
        ), n


MASKS = {
    "none": {},
    "causal": dict(is_causal=True),
    "window": dict(is_causal=True, window=11),
    "band": dict(window=11),
    "padding": dict(
        is_causal=True, mask=(torch.arange(75) < 60)[None, None, None].expand(2, 1, 1, 75)
    ),
    "left padding": dict(is_causal=True, mask=(torch.arange(75) >= 5)[None, None, None]),
    "arbitrary": dict(mask=draw(2, 3, 75, 75, seed=4) > 0.5),
    "float": dict(mask=draw(1, 3, 75, 75, seed=5)),
    "prior": dict(is_causal=True, log_mix=draw(2, 3, 75, seed=6)),
    "no prior": dict(
        is_causal=True,
        log_mix=draw(2, 3, 75, seed=6).masked_fill(torch.arange(75) % 3 == 0, -math.inf),
    ),
}


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize(("name", "f"), BACKENDS, ids=IDS)
def test_equals_the_formula(name, f, masks):
    kinds = (
        ["shared", "diagonal"] if name == "dot" else ["shared", "key", "diagonal", "diagonal key"]
    )
    kw = MASKS[masks]
    inputs = [draw(2, 3, 75, 8, seed=n) for n in range(2)] + [draw(2, 3, 75, 5, seed=3)]
    kind = kinds[sorted(MASKS).index(masks) % len(kinds)]
    compare(f, LINKS[name], [*inputs, precision_of(kind, 2, 3, 75, 8)], **kw)


@pytest.mark.parametrize("kind", ["shared", "key", "diagonal", "diagonal key"])
@pytest.mark.parametrize("name", ["gaussian", "student_t", "laplace", "huber"])
def test_every_precision_and_cross_attention(name, kind):
    inputs = [
        draw(2, 3, 7, 8),
        draw(2, 3, 140, 8, seed=1),
        draw(2, 3, 140, 8, seed=2),
        precision_of(kind, 2, 3, 140, 8),
    ]
    for f in (plain, chunked):
        compare(f, LINKS[name], inputs)


@pytest.mark.parametrize("f", [plain, chunked])
@pytest.mark.parametrize("family", [n for n, c in FAMILIES.items() if dataclasses.fields(c)])
def test_learned_shapes_have_their_gradient(family, f):
    kind = FAMILIES[family]
    fields = {f.name: f.default for f in dataclasses.fields(kind)}
    B, H, T, d = 2, 2, 70, 4
    x = [draw(B, H, T, d, seed=n) for n in range(3)] + [precision_of("key", B, H, T, d)]
    for shape in ((1, H, 1, 1), (1, 1, 1, 1)):
        found = []
        for call, dtype in ((oracle, torch.float64), (f, torch.float32)):
            own = {
                n: torch.full(shape, max(v, 0.2), dtype=dtype, requires_grad=True)
                for n, v in fields.items()
            }
            out, lse = call(
                *(t.to(dtype) for t in x[:3]), kind(**own), x[3].to(dtype), is_causal=True
            )
            found.append(torch.autograd.grad(out.sin().sum() + lse.sin().sum(), list(own.values())))
        for a, b in zip(*found, strict=True):
            assert a.shape == b.shape and (a - b).abs().max() < 1e-4 * max(1, a.abs().max())


@pytest.mark.parametrize("f", [plain, chunked])
def test_a_learned_shape_may_be_held(f):
    "Gradients of queries alone, where the tail is a tensor that asks for none."
    q, k, v = (draw(1, 2, 9, 4, seed=n).requires_grad_(n == 0) for n in range(3))
    one, nu = torch.ones(2, 1, 2, 1, 1, dtype=torch.float64).mul(3)
    found = [
        torch.autograd.grad(call(q, k, v, StudentT(nu), one)[0].sin().sum(), q)[0]
        for call in (oracle, f)
    ]
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("nu", [0.1, 1.0, 300.0, 1e6])
def test_student_t_at_every_nu(nu):
    inputs = [draw(1, 2, 70, 16, seed=n) for n in range(3)] + [
        torch.full((1, 2, 1, 1), 0.5, dtype=torch.float64)
    ]
    for f in (plain, chunked):
        compare(f, StudentT(nu), inputs, is_causal=True)


def test_a_family_inside_a_family_keeps_its_shape():
    """A link made of another one (as settling queries use) has its tensors per head too, with
    their gradient."""

    @dataclasses.dataclass(frozen=True)
    class Doubled(Elliptical):
        inner: Elliptical

        def link(self, u, dim):
            return 2 * self.inner.link(u, dim)

        def weight(self, u, dim):
            return 2 * self.inner.weight(u, dim)

        def log_normaliser(self, dim):
            raise NotImplementedError

        def standard(self, like, generator):
            raise NotImplementedError

    x = [draw(2, 3, 70, 4, seed=n) for n in range(3)]
    lam, found = torch.ones(1, 3, 1, 1, dtype=torch.float64), []
    for f in (oracle, plain, chunked):
        nu = torch.tensor([1.0, 3.0, 9.0], dtype=torch.float64).view(1, 3, 1, 1).requires_grad_()
        out = f(*x, Doubled(StudentT(nu)), lam, is_causal=True)[0]
        found.append((out, *torch.autograd.grad(out.sin().sum(), nu)))
    for near in found[1:]:
        torch.testing.assert_close(near, found[0], rtol=1e-9, atol=1e-9)


def test_student_t_becomes_gaussian():
    x = [draw(1, 2, 70, 16, seed=n) for n in range(3)]
    lam = torch.ones(1, 2, 1, 1, dtype=torch.float64)
    torch.testing.assert_close(
        chunked(*x, StudentT(1e9), lam), chunked(*x, Gaussian(), lam), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    "name", ["gaussian", "student_t", "laplace", "huber", "generalized_gaussian"]
)
@pytest.mark.parametrize(
    "case",
    [
        "huge",
        "offset 30",
        "offset 300",
        "equal",
        "same",
        "outlier",
        "first",
        "d=1",
        "T=1",
        "1e-6",
        "1e6",
    ],
)
def test_adversarial_inputs(name, case):
    T, d = (1 if case == "T=1" else 66), (1 if case == "d=1" else 16)
    q, k, v = (draw(1, 2, T, d, seed=n).float() for n in range(3))
    lam = torch.full((1, 2, 1, 1), float(case) if case[:2] == "1e" else d**-0.5)
    if case == "huge":
        q, k = 30 * q, 30 * k
    if case.startswith("offset"):
        q, k = (x + float(case.split()[1]) for x in (q, k))
    if case == "equal":
        k = k[:, :, :1].expand_as(k).contiguous()
    if case == "same":
        q = k.clone()
    if case in ("outlier", "first"):
        at = 0 if case == "first" else 9
        q[:, :, at], k[:, :, at] = 1e4, 1e4
    exact, energy = oracle(
        *(x.double() for x in (q, k, v)), LINKS[name], lam.double(), is_causal=True
    )
    leaves = [x.requires_grad_() for x in (q, k, v, lam)]
    for f in (plain, chunked):
        out, lse = f(*leaves[:3], LINKS[name], leaves[3], is_causal=True)
        scores = (
            1e4 if case in ("huge", "1e6") else 1.0
        )  # float32 keeps seven digits of the largest score
        assert (out - exact).abs().max() < 5e-5 * (1 if scores == 1 else 20)
        # a distance is a difference of squares: float32 keeps seven digits of those
        squares = (
            lam
            * ((q.detach() ** 2).sum(-1) + (k.detach() ** 2).sum(-1).cummax(-1).values)[..., None]
        )
        assert ((lse - energy).abs() < 5e-5 + 5e-5 * energy.abs() + 1e-6 * squares[..., 0]).all()
        grads = torch.autograd.grad(out.sum() + lse.clamp(-10, 10).sum(), leaves, allow_unused=True)
        assert all(g is None or g.isfinite().all() for g in grads)


@pytest.mark.parametrize(("name", "f"), BACKENDS, ids=IDS)
@pytest.mark.parametrize("kind", ["shared", "key"])
def test_no_token_reaches_into_the_past(name, f, kind):
    if name == "dot" and kind == "key":
        pytest.skip("dot products have one scale")
    q, k, v = (draw(1, 2, 100, 8, seed=n).float() + 2 for n in range(3))
    lam = precision_of(kind, 1, 2, 100, 8).float()
    for t, value, kw in itertools.product(
        (1, 8, 70), (0.0, 3e4), (dict(), dict(window=20), dict(grads=True))
    ):
        grads, kw = kw.get("grads", False), {n: a for n, a in kw.items() if n != "grads"}
        runs = []
        for change in (False, True):
            x = [a.clone() for a in (q, k, v)]
            if change:
                for a in x:
                    a[:, :, t] = value
            x = [a.requires_grad_(grads) for a in x]
            runs.append(f(*x, LINKS[name], lam, is_causal=True, **kw))
        for a, b in zip(*runs, strict=True):  # outputs, and energies too: mixtures merge by them
            if a is None:
                continue
            assert torch.equal(a[:, :, :t], b[:, :, :t]), (t, value, kw)
            assert not torch.equal(a[:, :, t:], b[:, :, t:])


@pytest.mark.parametrize(("name", "f"), BACKENDS, ids=IDS)
def test_blind_rows_are_zero_with_zero_gradients(name, f):
    mask = torch.ones(1, 1, 70, 70, dtype=torch.bool)
    mask[..., 5, :] = False
    x = [draw(1, 2, 70, 4, seed=n).float().requires_grad_() for n in range(3)]
    lam = torch.ones(1, 2, 1, 1, requires_grad=True)
    out, lse = f(*x, LINKS[name], lam, mask=mask)
    assert out[:, :, 5].eq(0).all() and out.isfinite().all()
    assert lse is None or lse[:, :, 5].eq(-math.inf).all()
    weight = torch.zeros_like(out)
    weight[:, :, 5] = 1
    for g in torch.autograd.grad((out * weight).sum(), [*x, lam], allow_unused=True):
        assert g is None or g.eq(0).all()
    nothing = f(*x, LINKS[name], lam, log_mix=torch.full((1, 2, 70), -math.inf))
    assert nothing[0].eq(0).all() and (lse is None or nothing[1].eq(-math.inf).all())


@pytest.mark.parametrize(("name", "f"), BACKENDS, ids=IDS)
def test_not_a_number_stays_one(name, f):
    lam = torch.ones(1, 1, 1, 1)
    for which in range(2):
        x = [draw(1, 1, 70, 4, seed=n).float() for n in range(3)]
        x[which][0, 0, 66, 1] = math.nan
        out, lse = f(*x, LINKS[name], lam, is_causal=True)
        assert (
            out[0, 0, 66].isnan().all()
            and (lse is None or lse[0, 0, 66].isnan())
            and out[0, 0, :66].isfinite().all()
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_dtypes_lose_no_more_than_dot_products(dtype):
    q, k, v = (draw(1, 2, 300, 64, seed=n) for n in range(3))
    lam = torch.full((1, 2, 1, 1), 0.125, dtype=torch.float64)

    def loss(f, link, precision):
        exact = oracle(q, k, v, link, precision, is_causal=True)[0]
        out, lse = f(*(x.to(dtype) for x in (q, k, v)), link, precision.to(dtype), is_causal=True)
        assert out.dtype == dtype and (lse is None or lse.dtype == torch.float32)
        return (out.double() - exact).square().mean().sqrt().item()

    yard = loss(sdpa, "dot", lam)
    for precision in (lam, lam.expand(1, 2, 300, 1), lam.expand(1, 2, 300, 64)):
        assert loss(chunked, Gaussian(), precision) < 1.5 * yard
    assert loss(chunked, StudentT(), lam * 4 / 68) < 1.5 * yard


def test_short_dtypes_have_gradients():
    x = [draw(1, 2, 40, 16, seed=n) for n in range(3)]
    for kind in ("shared", "key"):
        lam, grads = precision_of(kind, 1, 2, 40, 16).bfloat16().double(), []
        for f, dtype in ((oracle, torch.float64), (chunked, torch.bfloat16)):
            leaves = [t.bfloat16().to(dtype).requires_grad_() for t in (*x, lam)]
            out, lse = f(*leaves[:3], Gaussian(), leaves[3], is_causal=True)
            grads.append(
                torch.autograd.grad((out.double() ** 2).sum() + lse.double().sum(), leaves)
            )
        for a, b in zip(*grads, strict=True):
            assert (a - b.double()).norm() < 0.05 * a.norm()


def test_dropout_is_drawn_again_by_the_backward_pass():
    torch.manual_seed(3)
    leaves = [draw(1, 2, 70, 4, seed=n).requires_grad_() for n in range(3)]
    lam = torch.ones(1, 2, 1, 1, dtype=torch.float64, requires_grad=True)

    def run(*x):
        torch.manual_seed(5)
        return chunked(*x[:3], StudentT(), x[3], is_causal=True, dropout_p=0.4)

    assert torch.autograd.gradcheck(run, (*leaves, lam), fast_mode=True)
    kept = (
        chunked(*leaves, StudentT(), lam, dropout_p=0.4)[0],
        chunked(*leaves, StudentT(), lam, dropout_p=0.4)[0],
    )
    assert not torch.equal(*kept)
    torch.manual_seed(7)
    ones = torch.ones(1, 1, 400, 1)
    flat = torch.zeros(1, 1, 400, 2)
    mass = chunked(flat, flat, ones, Gaussian(), ones[..., :1, :], dropout_p=0.25)[0]
    assert abs(mass.mean() - 1) < 0.01 and mass.std() > 0.005


@settings(max_examples=25)
@given(
    st.integers(1, 140),
    st.integers(1, 5),
    st.integers(1, 6),
    st.integers(1, 200),
    st.booleans(),
    st.integers(0, 99),
)
def test_any_shape(T, d, dv, window, causal, seed):
    x = [draw(1, 2, T, n, seed=seed + m) for m, n in enumerate((d, d, dv))]
    lam = precision_of("key", 1, 2, T, d)
    for link in (Gaussian(), Laplace()):
        found = chunked(*x, link, lam, is_causal=causal, window=window)
        torch.testing.assert_close(
            found, oracle(*x, link, lam, is_causal=causal, window=window), rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize("M", [1, 3])
def test_merge_is_attention_over_the_union(M):
    q, v, *keys = (draw(2, 2, 66, 6, seed=n).requires_grad_() for n in range(2 + M))
    lam = torch.ones(1, 2, 1, 1, dtype=torch.float64)
    future = torch.ones(66, 66, dtype=torch.bool).tril().repeat(1, M)[None, None]
    whole = oracle(q, torch.cat(keys, -2), torch.cat([v] * M, -2), Gaussian(), lam, mask=future)
    parts = merge(
        *zip(*(plain(q, k, v, Gaussian(), lam, is_causal=True) for k in keys), strict=True)
    )
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-9)
    grads = [
        torch.autograd.grad(o.sin().sum() + e.cos().sum(), (q, v, *keys)) for o, e in (parts, whole)
    ]
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-9)


def test_norm_tied_prior_is_dot_product_attention():
    q, k, v = (draw(1, 2, 80, 8, seed=n).float() for n in range(3))
    lam = torch.full((1, 2, 1, 1), 0.4)
    dot = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.4)
    for f in (plain, chunked):
        out = f(q, k, v, Gaussian(), lam, log_mix=0.2 * (k**2).sum(-1), is_causal=True)[0]
        torch.testing.assert_close(out, dot, rtol=1e-5, atol=1e-5)


def test_sdpa_refuses_what_it_cannot_do():
    "No other backend is run in its name, and `auto` takes another."
    q, k, v = (draw(1, 2, 20, 8, seed=n) for n in range(3))
    long = torch.zeros(1, 1, 2048, 2)
    lam = torch.ones(1, 2, 1, 1, dtype=torch.float64)
    assert kernels.choose(long, long, long, "dot", lam[:, :1])[0] == "sdpa"
    assert kernels.choose(long, long, long, "dot", lam[:, :1], need_lse=True)[0] == "chunked"
    padding = torch.ones(1, 1, 1, 2048).bool()
    assert kernels.choose(long, long, long, "dot", lam[:, :1], mask=padding)[0] == "chunked"
    for link, kw, words in (
        (StudentT(), {}, "not StudentT"),
        ("dot", dict(need_lse=True), "log-sum"),
    ):
        with pytest.raises(ValueError, match=words):
            sdpa(q, k, v, link, lam, **kw)


def test_choices_are_said_and_run():
    q, k, v = (draw(1, 2, 20, 8, seed=n).float() for n in range(3))
    head, keyed = torch.ones(1, 2, 1, 1), torch.ones(1, 2, 20, 8)
    for link in LINKS.values():
        for lam, kw in itertools.product(
            (head, keyed), (dict(), dict(window=4), dict(dropout_p=0.1), dict(is_causal=True))
        ):
            if link == "dot" and lam is keyed:
                continue
            name, why = kernels.choose(q, k, v, link, lam, need_lse=False, **kw)
            assert name in ("plain", "sdpa", "chunked") and len(why.split()) > 5
            out = getattr(kernels, name)(q, k, v, link, lam, **kw)[0]
            if "dropout_p" not in kw:
                torch.testing.assert_close(
                    out, chunked(q, k, v, link, lam, **kw)[0], rtol=1e-5, atol=1e-5
                )
    for T, link, name in (
        (16, "dot", "plain"),
        (64, Gaussian(), "plain"),
        (4096, "dot", "sdpa"),
        (4096, Gaussian(), "chunked"),
        (4096, Laplace(), "chunked"),
    ):
        x = torch.zeros(1, 1, T, 2)
        assert kernels.choose(x, x, x, link, head[:, :1], need_lse=False)[0] == name


def test_plain_is_chosen_by_the_bytes_it_keeps():
    "A bent link keeps the distances beside the scores, and ends at half as many pairs."
    pairs = kernels.CACHE // 4
    for link, most in (("dot", pairs), (Gaussian(), pairs), (StudentT(), pairs // 2)):
        for Tk, name in ((most, "plain"), (most + 1, "chunked")):
            q, k = torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1).expand(1, 1, Tk, 1)
            found = kernels.choose(q, k, k, link, torch.ones(1, 1, 1, 1), need_lse=False)[0]
            assert (found == "plain") == (name == "plain"), (link, Tk)


@pytest.mark.parametrize(
    ("bad", "kind", "words"),
    [
        (dict(link="cosine"), TypeError, "elliptical family"),
        (dict(precision=1.0), TypeError, "must be a tensor"),
        (dict(k=torch.zeros(1, 2, 9, 4)), ValueError, "is_causal needs"),
        (dict(q=torch.zeros(2, 9, 4)), ValueError, "needs q"),
        (dict(link="dot", precision=torch.ones(1, 1, 8, 1)), ValueError, "one scale"),
        (dict(window=0), ValueError, "window"),
    ],
)
def test_bad_arguments_get_a_sentence(bad, kind, words):
    args = dict(
        q=torch.zeros(1, 2, 8, 4),
        k=torch.zeros(1, 2, 8, 4),
        v=torch.zeros(1, 2, 8, 4),
        link=Gaussian(),
        precision=torch.ones(1, 1, 1, 1),
        is_causal=True,
    )
    args |= bad
    if args["k"].shape[-2] == 9:
        args["v"] = args["k"]
    for f in (plain, sdpa, chunked):
        with pytest.raises(kind, match=words):
            f(**args)


def test_training_memory_is_linear():
    "Forward and backward at 2,048 tokens stay far below one tensor of Tq x Tk scores per head."
    from pc_transformer.experiments.meters import peak_bytes

    x = [torch.randn(1, 6, 2048, 32, requires_grad=True) for _ in range(3)]
    lam = torch.ones(1, 6, 1, 1, requires_grad=True)
    for link in (StudentT(), Laplace()):
        peak = peak_bytes(
            lambda link=link: chunked(*x, link, lam, is_causal=True)[0].sum().backward(),
            torch.device("cpu"),
        )
        assert 0 < peak < 0.5 * 6 * 2048**2 * 4


def union(q, k, v, link, precision, log_mix=None, mask=None, is_causal=False, window=None):
    """The oracle of a mixture: one long list of keys, the components one after the other, and
    the masks repeated."""
    B, H, M, T, _ = k.shape
    hide = torch.ones(q.shape[-2], T, dtype=torch.bool)
    i, j = torch.arange(q.shape[-2])[:, None], torch.arange(T)
    hide &= (j <= i) if is_causal else True
    if window is not None:
        hide &= (j > i - window) & (j < i + window)
    hide = hide[None, None]
    if mask is not None:
        hide = mask & hide if mask.dtype == torch.bool else mask.masked_fill(~hide, -math.inf)
    long = lambda x, *last: x.expand(*x.shape[:2], M, T, *last).flatten(2, 3)
    prior = None if log_mix is None else long(log_mix)
    return oracle(
        q,
        k.flatten(2, 3),
        torch.cat([v] * M, -2),
        link,
        long(precision, precision.shape[-1]),
        prior,
        hide.expand(*hide.shape[:2], *hide.shape[-2:]).repeat(1, 1, 1, M),
    )


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("name", ["gaussian", "student_t", "laplace", "huber"])
def test_a_mixture_in_one_pass_is_attention_over_the_union(name, masks):
    kw, M = dict(MASKS[masks]), 3
    if "log_mix" in kw:
        more = draw(2, 3, M, 75, seed=11)
        never = (torch.arange(75) + torch.arange(M)[:, None]) % 3 == 0
        kw["log_mix"] = more.masked_fill(never, -math.inf) if masks == "no prior" else more
    if kw.get("mask") is not None and kw["mask"].shape[-2] == 1:
        kw["mask"] = kw["mask"].expand(-1, -1, 75, -1)
    inputs = [draw(2, 3, 75, 8), draw(2, 3, M, 75, 8, seed=1), draw(2, 3, 75, 5, seed=3)]
    shapes = {
        "head": (1, 3, 1, 1, 1),
        "component": (1, 3, M, 1, 1),
        "key": (2, 3, M, 75, 1),
        "coordinate": (1, 3, M, 1, 8),
        "diagonal": (2, 3, M, 75, 8),
    }
    for kind in [sorted(shapes)[(sorted(MASKS).index(masks) + n) % len(shapes)] for n in range(2)]:
        shape = shapes[kind]
        compare_mixture(LINKS[name], [*inputs, draw(*shape, seed=9).abs() / 2 + 0.3], **kw)


def compare_mixture(link, leaves, **kw):
    "`compare`, with `union` for an oracle."
    runs = ((union, torch.float64), (chunked, torch.float64), (chunked, torch.float32))
    found = [everything(call, link, leaves, dtype, kw) for call, dtype in runs]
    for near, tol in ((found[1], 1e-9), (found[2], 1e-4)):
        assert torch.equal(found[0][1].isinf(), near[1].isinf())
        for n, (a, b) in enumerate(zip(found[0], near, strict=True)):
            a, b = (x.masked_fill(x == -math.inf, 0.0) for x in (a, b))
            assert b.isfinite().all() and (a - b).abs().max() < (10 if n == 5 else 1) * tol * max(
                a.abs().max().item(), 1
            ), n


def test_a_mixture_learns_its_shape_and_one_component_is_none():
    q, k, v = draw(2, 3, 70, 4), draw(2, 3, 2, 70, 4, seed=1), draw(2, 3, 70, 4, seed=2)
    found = []
    for f in (union, chunked):
        nu, lam = (
            torch.tensor([1.0, 3.0, 9.0], dtype=torch.float64).requires_grad_() for _ in range(2)
        )
        out, lse = f(
            q, k, v, StudentT(nu.view(1, 3, 1, 1)), lam.view(1, 3, 1, 1, 1), is_causal=True
        )
        found.append((out, lse, *torch.autograd.grad(out.sin().sum() + lse.sin().sum(), (nu, lam))))
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-9)
    lam = torch.ones(1, 3, 1, 1, dtype=torch.float64)
    torch.testing.assert_close(
        chunked(q, k[:, :, :1], v, Laplace(), lam[:, :, None]),
        chunked(q, k[:, :, 0], v, Laplace(), lam),
    )


@pytest.mark.parametrize("name", ["gaussian", "laplace"])
def test_a_mixture_keeps_what_masks_promise(name):
    "No token reaches into the past; blind rows are zero; dropout is drawn again."
    q, k, v = (
        draw(1, 2, 100, 8).float() + 2,
        draw(1, 2, 2, 100, 8, seed=1).float() + 2,
        draw(1, 2, 100, 8, seed=2).float(),
    )
    lam = draw(1, 2, 2, 1, 1, seed=3).abs().float() + 0.3
    for t, value in itertools.product((1, 8, 70), (0.0, 3e4)):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[..., t, :] = value
        before, after = (
            chunked(*x, LINKS[name], lam, is_causal=True) for x in ((q, k, v), changed)
        )
        for a, b in zip(before, after, strict=True):
            assert torch.equal(a[:, :, :t], b[:, :, :t]) and not torch.equal(a, b)
    mask = torch.ones(1, 1, 100, 100, dtype=torch.bool)
    mask[..., 5, :] = False
    leaves = [x.requires_grad_() for x in (q, k, v, lam)]
    out, lse = chunked(*leaves[:3], LINKS[name], lam, mask=mask)
    assert out[:, :, 5].eq(0).all() and lse[:, :, 5].eq(-math.inf).all()
    assert all(g.eq(0).all() for g in torch.autograd.grad(out[:, :, 5].sum(), leaves))
    small = [x.detach().double()[..., :9, :].requires_grad_() for x in leaves[:3]]

    def run(*x):
        torch.manual_seed(5)
        return chunked(*x, LINKS[name], lam.detach().double(), is_causal=True, dropout_p=0.4)

    assert torch.autograd.gradcheck(run, small, fast_mode=True)


@pytest.mark.parametrize("name", ["gaussian", "student_t"])
def test_strided_inputs_and_their_gradients(name):
    """Heads as a layer makes them, `(B, T, H, d)` transposed; groups of some heads, of one batch
    and of several."""
    for B, H, T in ((3, 5, 70), (2, 3, 300), (40, 3, 20)):
        x = [draw(B, T, H, 4, seed=n).transpose(1, 2) for n in range(3)]
        for lam in (precision_of("shared", B, H, T, 4), precision_of("diagonal key", B, H, T, 4)):
            compare(chunked, LINKS[name], [*x, lam], is_causal=True)


def test_memory_of_every_family_is_a_few_inputs():
    "A training step allocates at most twice what PyTorch's kernel does."
    from pc_transformer.experiments.attention_speed import mixture
    from pc_transformer.experiments.meters import peak_bytes

    q, k, v = (torch.randn(4, 6, 512, 64, requires_grad=True) for _ in range(3))
    head, key = (
        torch.full((1, 6, 1, 1), 0.1, requires_grad=True),
        torch.full((4, 6, 512, 64), 0.1, requires_grad=True),
    )
    dout = torch.randn_like(v)
    step = lambda out, *leaves: torch.autograd.grad(out, leaves, dout)
    cpu = torch.device("cpu")
    base = peak_bytes(
        lambda: step(F.scaled_dot_product_attention(q, k, v, is_causal=True), q, k, v), cpu
    )
    runs = [
        (chunked, link, lam)
        for link in LINKS.values()
        for lam in (head, key)
        if not (link == "dot" and lam is key)
    ]
    for f, link, lam in [*runs, (mixture, Gaussian(), head), (mixture, StudentT(), head)]:
        run = lambda f=f, g=link, p=lam: step(
            f(q, k, v, g, p, is_causal=True, need_lse=False)[0], q, k, v, p
        )
        peak = peak_bytes(run, cpu)
        assert peak < 2 * base, (f.__name__, link, lam.shape, peak / base)


def test_kernels_import_neither_attention_nor_triton():
    """`attend` stands on the kernels, not the other way round; and a GPU's kernels are loaded
    when a GPU asks for them."""
    for path in Path(kernels.__file__).parent.glob("*.py"):
        if "triton" in path.name:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        top = {alias.name for x in tree.body if isinstance(x, ast.Import) for alias in x.names}
        top |= {x.module or "" for x in tree.body if isinstance(x, ast.ImportFrom)}
        assert top and not any(
            "attend" in name or "attention.head" in name or "triton" in name for name in top
        ), path.name
