"""What several tests build."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from pc_transformer.attention import LEARNED, attend
from pc_transformer.energies import FAMILIES

SIZES: dict[str, Any] = {
    "vocab_size": 13,
    "block_size": 10,
    "n_layer": 2,
    "n_head": 2,
    "d_model": 16,
}
TOKENS = torch.randint(13, (6, 10), generator=torch.Generator().manual_seed(0))
ATTENTIONS = ("dot", *FAMILIES, "mixture")


def stir(model: nn.Module, seed: int, scale: float) -> None:
    """Random gains and precisions, and matrices `scale` times as large: a model in which every
    part matters."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(LEARNED) or p.dim() < 2:
                p.add_(torch.randn(p.shape, generator=noise) / 4)
            else:
                p.mul_(scale)


# What is no number, and who may see it: every backend has to answer alike.

FAULTS: dict[str, tuple[str, float]] = {  # what is written into one coordinate of one token
    f"{what} {value:g}": (what, value)
    for what in "qkv"
    for value in (math.nan, math.inf, -math.inf)
} | {f"{what} 1e30": (what, 1e30) for what in "qk"}
SEEN: dict[str, dict[str, Any]] = {
    "all": {},
    "causal": {"is_causal": True},
    "window": {"is_causal": True, "window": 3},
    "band": {"window": 3},
    "padding": {"attn_mask": torch.arange(9) < 4, "is_causal": True},
    "left padding": {"attn_mask": torch.arange(9) > 5, "is_causal": True},
    "added": {"attn_mask": torch.zeros(9).masked_fill(torch.arange(9) == 4, -math.inf)},
    "prior": {
        "is_causal": True,
        "log_mix": torch.zeros(9).masked_fill(torch.arange(9) == 4, -math.inf),
    },
    "no prior": {"log_mix": torch.full((9,), -math.inf)},
    "rows": {
        "attn_mask": (
            torch.ones(9, 9, dtype=torch.bool).tril().index_fill(0, torch.tensor([2, 6]), False)
        )
    },
}


def may_see(options: dict[str, Any], T: int = 9) -> Tensor:
    "Which key a query may see, straight from the words."
    i, j = torch.arange(T)[:, None], torch.arange(T)
    may = (j <= i) if options.get("is_causal") else torch.ones(T, T, dtype=torch.bool)
    if (window := options.get("window")) is not None:
        may = may & (j > i - window) & (j < i + window)
    for added in (options.get("attn_mask"), options.get("log_mix")):
        if added is not None:
            may = may & (added if added.dtype == torch.bool else added > -math.inf)
    return may


def answers_alike(
    family: str,
    fault: str,
    seen: str,
    backend: str,
    dtype: torch.dtype = torch.float32,
    **more: Any,
) -> None:
    """A row is NaN if it may see what is no number, zero if it may see nothing, and else as if
    the number were not there."""
    (what, value), options, at = FAULTS[fault], SEEN[seen], 4
    x = {
        n: torch.randn(2, 2, 9, 8, generator=torch.Generator().manual_seed(i)).to(dtype)
        for i, n in enumerate("qkv")
    }
    bad = {n: t.clone() for n, t in x.items()}
    bad[what][1, 1, at, 3] = value
    may = may_see(options)
    lost = torch.zeros(2, 2, 9, dtype=torch.bool)
    lost[1, 1] = may[:, at] if what != "q" else (torch.arange(9) == at) & may.any(-1)
    blind = ~may.any(-1)
    if family == "mixture":
        for y in (x, bad):
            y["k"] = torch.stack([y["k"], y["k"] + 1], 2)
    shape = (
        {"log_mix": options["log_mix"][None]}
        if family == "mixture" and "log_mix" in options
        else {}
    )
    call = options | shape | more
    want, want_lse = attend(**x, family=family, backend="reference", return_lse=True, **call)
    leaves = {n: t.requires_grad_() for n, t in bad.items()}
    other = "reference" if backend == "sdpa" else backend  # PyTorch's kernel has no log-sum-exp
    out, lse = attend(**leaves, family=family, backend=other, return_lse=True, **call)
    if backend == "sdpa":
        out = attend(**leaves, family=family, backend=backend, **call)
    assert torch.equal(out.isnan(), lost[..., None].expand_as(out)) and torch.equal(
        lse.isnan(), lost
    ), (out.isnan(), lse)
    assert out[:, :, blind].eq(0).all() and lse[:, :, blind].eq(-math.inf).all()
    eps = 1e-4 if dtype in (torch.float32, torch.float64) else 0.05
    torch.testing.assert_close(out[~lost], want[~lost], rtol=eps, atol=eps)
    torch.testing.assert_close(lse[~lost], want_lse[~lost], rtol=eps, atol=eps)
    kept = out[~lost].float().sum()
    for n, g in zip(leaves, torch.autograd.grad(kept, list(leaves.values())), strict=True):
        assert n != "q" or g[:, :, blind].eq(0).all()
