"""`attention="dot"` with backprop is nanoGPT: logits, parameters, initial weights, optimiser,
schedule.

The model and the loop below are written from nanoGPT's description (bias=False), not from this
library."""

import inspect
import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from pc_transformer import ModelConfig, PCTransformer
from pc_transformer.attention import LEARNED
from pc_transformer.config import Attention, TrainConfig
from pc_transformer.data import Text
from pc_transformer.learning.config import LearnerConfig
from pc_transformer.training import Trainer, learning_rate, make_optimizer
from pc_transformer.training.run import RunConfig

few = settings(deadline=None, derandomize=True, database=None, max_examples=10)


class LayerNorm(nn.Module):
    def __init__(self, ndim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ndim))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, None, 1e-5)


class CausalSelfAttention(nn.Module):
    def __init__(self, n_embd: int, n_head: int, block_size: int):
        super().__init__()
        self.c_attn = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.c_proj = nn.Linear(n_embd, n_embd, bias=False)
        self.n_head, self.n_embd = n_head, n_embd
        self.register_buffer("mask", torch.tril(torch.ones(block_size, block_size))[None, None])

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.mask[:, :, :T, :T] == 0, float("-inf"))
        y = F.softmax(att, dim=-1) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


class Block(nn.Module):
    def __init__(self, n_embd: int, n_head: int, block_size: int):
        super().__init__()
        self.ln_1, self.ln_2 = LayerNorm(n_embd), LayerNorm(n_embd)
        self.attn = CausalSelfAttention(n_embd, n_head, block_size)
        self.c_fc = nn.Linear(n_embd, 4 * n_embd, bias=False)
        self.c_proj = nn.Linear(4 * n_embd, n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        h = self.c_fc(self.ln_2(x))
        return x + self.c_proj(0.5 * h * (1.0 + torch.erf(h / math.sqrt(2.0))))


class GPT(nn.Module):
    "nanoGPT's model.py without dropout and biases."

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.wte, self.wpe = (
            nn.Embedding(c.vocab_size, c.d_model),
            nn.Embedding(c.block_size, c.d_model),
        )
        self.h = nn.ModuleList(Block(c.d_model, c.n_head, c.block_size) for _ in range(c.n_layer))
        self.ln_f = LayerNorm(c.d_model)
        self.lm_head = nn.Linear(c.d_model, c.vocab_size, bias=False)
        self.wte.weight = self.lm_head.weight
        for name, p in self.named_parameters():
            if p.dim() >= 2:
                std = 0.02 / math.sqrt(2 * c.n_layer) if name.endswith("c_proj.weight") else 0.02
                nn.init.normal_(p, mean=0.0, std=std)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.wte(idx) + self.wpe(torch.arange(idx.size(1)))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


def pairs(ours: PCTransformer, theirs: GPT) -> list[tuple[nn.Parameter, nn.Parameter]]:
    "Every parameter of ours with its counterpart, once."
    f = list(ours.predictors)
    named = [(f[0].token.weight, theirs.wte.weight), (f[0].position.weight, theirs.wpe.weight)]
    for block, attend, feed in zip(theirs.h, f[1::2], f[2::2], strict=True):
        named += [
            (attend.norm.weight, block.ln_1.weight),
            (attend.attention.qkv.weight, block.attn.c_attn.weight),
        ]
        named += [
            (attend.attention.out.weight, block.attn.c_proj.weight),
            (feed.norm.weight, block.ln_2.weight),
        ]
        named += [(feed.up.weight, block.c_fc.weight), (feed.down.weight, block.c_proj.weight)]
    named.append((ours.output.norm.weight, theirs.ln_f.weight))
    assert {id(p) for p, _ in named} == {id(p) for p in ours.parameters()}, (
        "not every parameter has a counterpart"
    )
    assert len(list(theirs.parameters())) == len(named)
    return named


def twins(config: ModelConfig, seed: int = 0, scale: float = 1.0) -> tuple[PCTransformer, GPT]:
    "Both models with the same weights."
    ours, theirs = PCTransformer(config, seed), GPT(config)
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p, q in pairs(ours, theirs):
            if scale != 1.0:
                p.add_(torch.randn(p.shape, generator=noise) / 4) if p.dim() < 2 else p.mul_(scale)
            q.copy_(p)
    return ours, theirs


def draw(config: ModelConfig, rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    x = torch.randint(
        config.vocab_size,
        (rows, config.block_size + 1),
        generator=torch.Generator().manual_seed(seed),
    )
    return x[:, :-1], x[:, 1:]


configs = st.builds(
    lambda V, T, L, H, d: ModelConfig(V, T, L, H, H * d, "dot"),
    st.integers(2, 40),
    st.integers(1, 20),
    st.integers(1, 3),
    st.integers(1, 4),
    st.sampled_from([2, 4, 7]),
)


@few
@given(configs, st.integers(0, 2**31), st.sampled_from([1.0, 5.0]))
def test_logits(config: ModelConfig, seed: int, scale: float) -> None:
    "To 1e-5 in float32, of the largest logit where that is above one."
    ours, theirs = twins(config, seed, scale)
    tokens, _ = draw(config, 3, seed)
    with torch.no_grad():
        want = theirs(tokens)
        apart = (ours(tokens) - want).abs().max().item()
    assert apart <= 1e-5 * max(1.0, want.abs().max().item()), f"logits are off by {apart:.3g}"


def test_default_configuration() -> None:
    "nanoGPT's CPU run: 804,096 parameters, the same logits, loss and gradients."
    config = ModelConfig(attention="dot")
    ours, theirs = twins(config)
    assert ours.n_parameters == 804_096 == sum(p.numel() for p in theirs.parameters())
    assert PCTransformer(ModelConfig()).n_parameters == 804_096 + 4 * 4  # and one precision a head
    tokens, targets = draw(config, 2)
    losses = [F.cross_entropy(m(tokens).flatten(0, 1), targets.flatten()) for m in (ours, theirs)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    for loss in losses:
        loss.backward()
    for p, q in pairs(ours, theirs):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5 * q.grad.abs().max().item())


@pytest.mark.parametrize("mutant", ["tanh gelu", "no scale", "post-norm", "untied"])
def test_other_architectures_are_noticed(mutant: str) -> None:
    "Mutants: small departures from GPT-2 that a comparison of losses would not show."
    config = ModelConfig(11, 8, 2, 2, 8, "dot")
    ours, theirs = twins(config, 1, 20.0)
    if mutant == "tanh gelu":
        for f in ours.predictors[2::2]:
            f.forward = lambda s, f=f: s + f.down(F.gelu(f.up(f.norm(s)), approximate="tanh"))
    if mutant == "no scale":
        for f in ours.predictors[1::2]:
            f.attention.qkv.weight.data[:8] *= 8**0.5
    if mutant == "post-norm":
        for f in ours.predictors[2::2]:
            f.forward = lambda s, f=f: f.norm(s + f.down(F.gelu(f.up(s))))
    if mutant == "untied":
        ours.output.weight = nn.Parameter(ours.output.weight.detach() * 1.01)
    tokens, _ = draw(config, 3)
    assert (ours(tokens) - theirs(tokens)).abs().max() > 1e-4


@pytest.mark.parametrize("family", ["dot", "gaussian", "student_t", "mixture"])
def test_initial_weights(family: str) -> None:
    """Normal with nanoGPT's standard deviations; gains are one; the seed decides and the global
    state is left alone."""
    config = ModelConfig(attention=family)
    state = torch.get_rng_state()
    model, again, other = (
        PCTransformer(config, 1),
        PCTransformer(config, 1),
        PCTransformer(config, 2),
    )
    assert torch.equal(state, torch.get_rng_state()), (
        "construction drew from the global random state"
    )
    for (name, p), q, r in zip(
        model.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(p, q), f"{name} differs for the same seed"
        if name.endswith(LEARNED):
            assert torch.equal(p, r), f"{name} depends on the seed"
            continue
        if p.dim() < 2:
            assert torch.equal(p, torch.ones_like(p)), f"{name} should start at one"
            continue
        assert not torch.equal(p, r), f"{name} is the same for another seed"
        std = (
            0.02 / math.sqrt(2 * config.n_layer)
            if name.endswith(("out.weight", "down.weight"))
            else 0.02
        )
        z = (p.detach().double().flatten() / std).sort().values
        expected = 0.5 * (1 + torch.erf(z / math.sqrt(2)))
        apart = (expected - torch.linspace(0, 1, len(z), dtype=torch.float64)).abs().max() * len(
            z
        ) ** 0.5
        assert apart < 2.2, (
            f"{name} is not normal with standard deviation {std:.4g}: Kolmogorov distance"
            f" {apart:.2f}"
        )


@pytest.mark.parametrize("family", get_args(Attention)[1:])
@pytest.mark.parametrize("options", [{}, {"precision": "key", "mixing": "key", "background": True}])
def test_all_families_start_from_the_same_weights(family: str, options: dict) -> None:
    "So that a comparison of families is one of families."
    dot = dict(PCTransformer(ModelConfig(attention="dot"), 3).named_parameters())
    other = dict(PCTransformer(ModelConfig(attention=family, **options), 3).named_parameters())
    assert all(torch.equal(p, other[n]) for n, p in dot.items())
    assert all(n.endswith(LEARNED) for n in other.keys() - dot.keys())


def nanogpt_lr(it: int, c: TrainConfig) -> float:
    "get_lr of nanoGPT's train.py, with lr_decay_iters = max_iters."
    if it < c.warmup_iters:
        return c.learning_rate * (it + 1) / (c.warmup_iters + 1)
    if it > c.iters:
        return c.min_learning_rate
    decay_ratio = (it - c.warmup_iters) / (c.iters - c.warmup_iters)
    coeff = 0.5 * (1.0 + math.cos(math.pi * decay_ratio))
    return c.min_learning_rate + coeff * (c.learning_rate - c.min_learning_rate)


@few
@given(st.integers(1, 500), st.integers(0, 400), st.floats(1e-6, 1.0), st.floats(0.0, 1.0))
def test_schedule(iters: int, warmup: int, high: float, part: float) -> None:
    c = TrainConfig(
        iters=iters, warmup_iters=warmup, learning_rate=high, min_learning_rate=part * high
    )
    steps = {0, 1, warmup - 1, warmup, warmup + 1, (warmup + iters) // 2, iters - 1}
    if (
        warmup < iters
    ):  # steps after the last one have a rate too; nanoGPT divides by zero where the two are equal
        steps |= {iters, iters + 1, 2 * iters}
    for it in steps:
        if 0 <= it < (iters if warmup >= iters else math.inf):
            assert learning_rate(it, c) == pytest.approx(nanogpt_lr(it, c), rel=1e-12), (
                f"step {it} of {c}"
            )


def test_schedule_of_the_cpu_run() -> None:
    "Its corners: first step, end of the warm-up, middle of the cosine, last step."
    c = TrainConfig()
    got = [learning_rate(it, c) for it in (0, 100, 1050, 2000)]
    assert got == pytest.approx([1e-3 / 101, 1e-3, 5.5e-4, 1e-4], rel=1e-12)


@pytest.mark.parametrize("family", ["dot", "gaussian", "student_t", "mixture"])
def test_optimizer_groups(family: str) -> None:
    """Matrices and embeddings decay, gains do not; precisions have their own rate; each
    parameter is in one group."""
    model = PCTransformer(ModelConfig(attention=family))
    c = TrainConfig(weight_decay=0.3, precision_lr_scale=0.25, beta1=0.8, beta2=0.95)
    optimizer = make_optimizer(model, c)
    groups = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    assert (
        sum(len(g["params"]) for g in optimizer.param_groups)
        == len(groups)
        == len(list(model.parameters()))
    )
    for name, p in model.named_parameters():
        g, precision = groups[id(p)], name.endswith(LEARNED)
        decay = 0.3 if p.dim() >= 2 and not precision else 0.0
        assert (g["weight_decay"], g["scale"]) == (decay, 0.25 if precision else 1.0), name
    for g in optimizer.param_groups:
        assert g["betas"] == (0.8, 0.95) and g["eps"] == 1e-8 and not g["amsgrad"]


def nanogpt_run(model: GPT, trainer: Trainer, c: TrainConfig, steps: int) -> list[float]:
    "nanoGPT's training loop over the same batches, by its own groups, rates and clipping."
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": decay, "weight_decay": c.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=c.learning_rate, betas=(c.beta1, c.beta2))
    losses = []
    for it in range(steps):
        for g in optimizer.param_groups:
            g["lr"] = nanogpt_lr(it, c)
        x, y = trainer.batch(it)
        loss = F.cross_entropy(model(x).view(-1, model.lm_head.out_features), y.reshape(-1))
        loss.backward()
        if c.grad_clip != 0.0:
            nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("grad_clip", [1.0, 0.05, 0.0])
def test_training_run(grad_clip: float) -> None:
    """Thirty steps of nanoGPT's loop and of ours give the same losses; grad_clip = 0 means no
    clipping in both."""
    ids = torch.randint(11, (50,), generator=torch.Generator().manual_seed(0)).repeat(20)
    train = TrainConfig(
        iters=30,
        batch_size=4,
        learning_rate=1e-2,
        min_learning_rate=1e-3,
        warmup_iters=5,
        grad_clip=grad_clip,
    )
    config = RunConfig(ModelConfig(11, 16, 2, 2, 16, "dot"), LearnerConfig("backprop"), train)
    trainer = Trainer(config, Text.of_ids(ids, ids, config), torch.device("cpu"))
    theirs = GPT(config.model)
    with torch.no_grad():
        for p, q in pairs(trainer.model, theirs):
            q.copy_(p)
    want = nanogpt_run(theirs, trainer, train, 30)
    got = [trainer.advance() for _ in range(30)]
    assert want[-1] < want[0] - 0.1, "the reference run does not learn"
    assert got == pytest.approx(want, abs=1e-3), (
        f"the first step that differs: {first_difference(got, want)}"
    )


def first_difference(got: list[float], want: list[float]) -> str:
    apart = [i for i, (a, b) in enumerate(zip(got, want, strict=True)) if abs(a - b) > 1e-3]
    return f"{apart[0]}: {got[apart[0]]:.6f}, nanoGPT {want[apart[0]]:.6f}" if apart else "none"


def test_the_transcription_uses_nothing_of_ours() -> None:
    "Else parity would prove nothing."
    assert "pc_transformer" not in "".join(
        map(inspect.getsource, (LayerNorm, CausalSelfAttention, Block, GPT, nanogpt_lr))
    )
