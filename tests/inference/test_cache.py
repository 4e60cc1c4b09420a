"""The KV cache: cached logits equal full recomputation for every family and option (rules 2
to 5)."""

import math

import pytest
import torch
from common import ATTENTIONS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils import prune

from pc_transformer.attention import PCAttention, attend
from pc_transformer.attention.sharpness import TAILS
from pc_transformer.config import ConfigError, ModelConfig, replace
from pc_transformer.inference import (
    DTYPES,
    Frozen,
    KVCache,
    Packed,
    cache_bytes,
    cacheable,
    cached_scores,
    columns,
    extend,
    fast_product,
    has_blocks,
    pack,
    quantise,
    read_out,
    square,
)
from pc_transformer.model import PCTransformer

OPTIONS = {
    "plain": {},
    "prior by token": {"mixing": "key"},
    "grouped": {"n_kv_head": 2},
    "window": {"window": 5},
    "qk_norm": {"qk_norm": True},
    "background": {"background": True},
    "scale": {"precision_init": 0.3},
    "norm": {"mixing": "norm"},
    "per key": {"precision": "key"},
    "diagonal": {"precision": "diagonal"},
    "per key, tied": {"precision": "key", "mixing": "norm", "n_kv_head": 2, "window": 4},
    "diagonal, tied": {
        "precision": "diagonal",
        "mixing": "norm",
        "background": True,
        "n_kv_head": 1,
    },
    "GPT-2": {"bias": True, "gelu": "tanh"},
    "everything": {"precision": "key", "mixing": "key", "background": True, "qk_norm": True},
}
SMALL = ModelConfig(
    vocab_size=11, block_size=32, n_layer=2, n_head=4, d_model=32, attention="gaussian"
)


def make(
    config: ModelConfig, dtype: torch.dtype = torch.float32, sharper: float = 4.0
) -> PCTransformer:
    """A model whose logits are far from uniform and whose maps from tokens are not zero."""
    model, draw = PCTransformer(config, seed=1).to(dtype).eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("map"):
                p.normal_(0, 0.3, generator=draw)
            elif name.endswith("bias"):
                p.normal_(0, 0.3, generator=draw)
            elif name.endswith(("log_tail", "log_mix", "log_precision")):
                p.add_(0.3 * torch.randn(p.shape, generator=draw, dtype=p.dtype))
            elif p.dim() > 1 and not name.endswith(("shift", "background")):
                p.mul_(sharper)
    return model


def random_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(11, shape, generator=torch.Generator().manual_seed(seed))


def feed(
    model: PCTransformer, tokens: torch.Tensor, parts: tuple[int, ...], **options
) -> torch.Tensor:
    """Logits of all tokens, read in parts through one cache."""
    cache = KVCache.allocate(model, len(tokens))
    out = torch.cat([extend(model, part, cache, **options) for part in tokens.split(parts, 1)], 1)
    assert cache.length == tokens.shape[1] and cache.lengths == [tokens.shape[1]] * len(tokens)
    return out


def close(a: torch.Tensor, b: torch.Tensor, scale: float = 1.0) -> None:
    """Rule 5: 1e-5 in float32, 1e-10 in float64, of the largest logit."""
    limit = (1e-5 if a.dtype == torch.float32 else 1e-10) * scale
    assert (a - b).abs().max() <= limit * b.abs().max().clamp_min(1), (a - b).abs().max()


def configs(family: str, option: str) -> ModelConfig:
    try:
        return replace(SMALL, attention=family, **OPTIONS[option])
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("family", ATTENTIONS)
def test_rule_5_cached_logits_equal_full_recomputation(family, option):
    config = configs(family, option)
    for dtype in (torch.float32, torch.float64):
        model, tokens = make(config, dtype), random_tokens(2, 14)
        with torch.no_grad():
            full = model(tokens)
        for parts in ((1,) * 14, (5, 1, 1, 4, 3)):
            close(feed(model, tokens, parts), full)
        assert torch.equal(
            feed(model, tokens, (14,)), full
        )  # one prefill is the model's own pass, bit for bit
        ragged = KVCache.allocate(model, 2)
        first = extend(model, tokens[:, :7], ragged, counts=[3, 7], last=True)
        later = [
            extend(model, torch.stack([tokens[0, 3 + i : 4 + i], tokens[1, 7 + i : 8 + i]]), ragged)
            for i in range(5)
        ]
        close(torch.cat([first, *later], 1), torch.stack([full[0, 2:8], full[1, 6:12]]))
        assert ragged.lengths == [8, 12] and ragged.length == 12


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_parts_and_any_lengths(data):
    config = replace(
        SMALL,
        attention=data.draw(st.sampled_from(ATTENTIONS)),
        window=data.draw(st.sampled_from([None, 1, 3, 9])),
        n_kv_head=data.draw(st.sampled_from([None, 1, 2])),
        qk_norm=data.draw(st.booleans()),
    )
    model, tokens = (
        make(config, torch.float64),
        random_tokens(3, 24, seed=data.draw(st.integers(0, 99))),
    )
    counts = data.draw(st.lists(st.integers(1, 8), min_size=3, max_size=3))
    with torch.no_grad():
        full = model(tokens)
    cache = KVCache.allocate(model, 3)
    found = extend(model, tokens[:, :8], cache, counts=counts, last=True)[:, 0]
    close(found, torch.stack([full[r, n - 1] for r, n in enumerate(counts)]))
    for T in data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)):
        new = torch.stack([tokens[r, n : n + T] for r, n in enumerate(cache.lengths)])
        before = list(cache.lengths)
        close(
            extend(model, new, cache),
            torch.stack([full[r, n : n + T] for r, n in enumerate(before)]),
        )


@pytest.mark.parametrize("family", ATTENTIONS)
def test_settling_queries_over_a_cache(family, monkeypatch):
    """Equals a forward pass in which every layer's queries settle."""
    config = replace(SMALL, attention=family, n_kv_head=2)
    apart = {"coordinates": "independent"}
    for changes in (
        {},
        apart,
        {"precision": "key"},
        {"precision": "key", **apart},
        {"mixing": "key", "window": 6},
        {"mixing": "norm", "window": 6, "precision": "diagonal", **apart},
    ):
        try:
            model = make(replace(config, **changes), torch.float64, sharper=1.5)
        except ConfigError:
            continue
        tokens = random_tokens(2, 10)

        def settling(self, x):
            q, keys = self.project(x)
            tail = {} if self.log_tail is None else {TAILS[self.family][0]: self.log_tail.exp()}
            with_M = lambda y: y if y is None or self.family == "mixture" else y.squeeze(2)
            out = attend(
                q,
                with_M(keys.k),
                keys.v,
                self.family,
                with_M(keys.precision),
                with_M(keys.log_mix),
                is_causal=True,
                window=self.window,
                settle_steps=2,
                coordinates=self.coordinates,
                **tail,
            )
            return self.out(out.transpose(1, 2).flatten(2))

        found = feed(model, tokens, (3, *(1,) * 7), settle_steps=2)
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(PCAttention, "forward", settling)
            full = model(tokens)
        close(
            found, full, scale=1e4 if family in ("laplace", "generalized_gaussian") else 10
        )  # weights are infinite at a key
        with torch.no_grad():
            assert (model(tokens) - full).abs().max() > 1e-6  # and settling does something


@pytest.mark.parametrize("family", ATTENTIONS)
def test_rule_3_causality_is_bit_equal(family):
    model, tokens = make(replace(SMALL, attention=family)), random_tokens(1, 12)
    other = tokens.clone()
    other[0, 8] = (other[0, 8] + 1) % 11
    for parts in ((1,) * 12, (6, 1, 1, 1, 1, 1, 1)):
        a, b = feed(model, tokens, parts), feed(model, other, parts)
        assert torch.equal(a[:, :8], b[:, :8]) and not torch.equal(a[:, 8:], b[:, 8:])


def test_rule_4_a_cache_only_reads_and_mode_and_seed_do_not_matter():
    model, tokens = make(replace(SMALL, attention="student_t", dropout=0.5)), random_tokens(2, 9)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    rng = torch.get_rng_state()
    quiet = feed(model, tokens, (4, 1, 1, 3))
    assert torch.equal(feed(model.train(), tokens, (4, 1, 1, 3)), quiet) and model.training
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items()) and torch.equal(
        torch.get_rng_state(), rng
    )
    assert all(p.grad is None for p in model.parameters())


# ---- memory


def tensors(cache: KVCache) -> list[torch.Tensor]:
    """All that is allocated."""
    stores = [s for x in cache.layers for s in (x.k, x.v)]
    own = [y for s in stores for y in (s.numbers, s.scales) if y is not None]
    return own + [c for x in cache.layers for c in x.column.values()]


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "int8", "float64"])
@pytest.mark.parametrize("family", ATTENTIONS)
def test_bytes(family, dtype):
    for changes in (
        {},
        {"precision": "key"},
        {"mixing": "norm", "n_kv_head": 2},
        {"mixing": "key", "n_component": 3},
    ):
        try:
            config = replace(SMALL, attention=family, **changes)
        except ConfigError:
            continue
        for own in (torch.float32, torch.float64):
            name = str(own).removeprefix("torch.")
            cache = KVCache.allocate(PCTransformer(config).to(own), 3, 17, dtype)
            found = sum(x.nbytes for x in tensors(cache))
            assert found == cache_bytes(config, 3, 17, dtype or name, name)
            assert tuple(cache.layers[0].column) == columns(
                family, config.precision, config.mixing, config.coordinates
            )


@given(st.integers(0, 10_000), st.sampled_from([1e-6, 1.0, 1e6]))
@settings(deadline=None)
def test_eight_bits(seed, size):
    x = size * torch.randn(
        5, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    code, scale = quantise(x)
    assert code.dtype == torch.int8 and ((code * scale - x).abs() <= scale / 2 * (1 + 1e-9)).all()
    assert (code.abs().amax(-1) == 127).all() and (
        (code * scale - x).abs() <= x.abs().amax(-1, True) / 254 * (1 + 1e-9)
    ).all()
    assert torch.equal(quantise(-x)[0], -code)
    torch.testing.assert_close(
        scale, x.abs().amax(-1, keepdim=True) / 127, rtol=1e-12, atol=0
    )  # all of the eight bits
    assert torch.equal(code.abs().amax(-1), torch.full((5,), 127, dtype=torch.int8))


@pytest.mark.parametrize("family", ATTENTIONS)
def test_short_storage_is_near(family):
    model, tokens = make(replace(SMALL, attention=family), sharper=2.0), random_tokens(2, 20)
    with torch.no_grad():
        full = model(tokens).log_softmax(-1)
    error = {}
    for dtype in ("float32", "bfloat16", "int8"):
        cache = KVCache.allocate(model, 2, dtype=dtype)
        found = torch.cat([extend(model, t, cache) for t in tokens.split(1, 1)], 1).log_softmax(-1)
        error[dtype] = (found - full).abs().max().item()
        assert cache.layers[0].k.numbers.dtype == DTYPES[dtype]
    assert error["float32"] < 1e-4 and error["bfloat16"] < 0.2 and error["int8"] < 0.4
    assert error["float32"] < error["bfloat16"] and error["float32"] < error["int8"]


# ---- handling


@pytest.mark.parametrize("dtype", [None, "int8"])
def test_select(dtype):
    model, tokens = make(replace(SMALL, attention="mixture", precision="key")), random_tokens(3, 12)
    cache = KVCache.allocate(model, 3, dtype=dtype)
    extend(model, tokens[:, :8], cache)
    picked, twin = cache.select([2, 0]), cache.select([0, 1, 2])
    expected = extend(model, tokens[:, 8:9], cache)
    assert picked.batch == 2
    close(extend(model, tokens[[2, 0], 8:9], picked), expected[[2, 0]])
    close(extend(model, tokens[:, 8:9], twin), expected)  # copies share nothing with the original


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
@pytest.mark.parametrize("option", ["plain", "per key", "diagonal"])
def test_columns_are_of_the_keys_as_they_are_stored(option, dtype, ragged):
    "Otherwise a distance is the difference of two keys that are not the same, and may be negative."
    model, tokens = make(configs("student_t", option)), random_tokens(2, 9)
    cache = KVCache.allocate(model, 2, dtype=dtype)
    extend(model, tokens[:, :4], cache, counts=[4, 2] if ragged else None)
    extend(model, tokens[:, 4:], cache)
    for past in cache.layers:
        stored, _, column = past.read(0, n := min(cache.lengths))
        kappa = square(past.reader, stored, column.get("lam"))
        torch.testing.assert_close(column["kappa"], kappa, rtol=1e-5, atol=0)


def test_read_keys_equal_attend():
    """Keys of any kind in a cache, read as `attend` reads them."""
    model, tokens = make(replace(SMALL, attention="student_t"), torch.float64), random_tokens(1, 6)
    cache, a = KVCache.allocate(model), model.predictors[1].attention
    extend(model, tokens, cache)
    q = torch.randn(1, 4, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (k, v, column), reader = cache.layers[0].read(0, 6), cache.layers[0].reader
    s = cached_scores(reader, q, k, column)
    expected = attend(q, k, v, "student_t", a.log_precision.exp(), nu=a.log_tail.exp())
    torch.testing.assert_close(read_out(reader, s, v)[0], expected)


# ---- bad input, one sentence each


def says(call, *args, **kwargs) -> str:
    with pytest.raises((ValueError, TypeError, MemoryError)) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_errors():
    model, tokens = make(SMALL), random_tokens(2, 4)
    cache = KVCache.allocate(model, 2, 6)
    other = make(replace(SMALL, attention="dot"))
    assert "another model: it holds gaussian keys of 2 layers" in says(extend, other, tokens, cache)
    assert "another model with the same configuration" in says(extend, make(SMALL), tokens, cache)
    assert "the cache has 2 rows, but tokens have 1" in says(extend, model, tokens[:1], cache)
    extend(model, tokens, cache)
    assert "the cache is full: it holds 4 of 6 tokens, and 4 more do not fit" in says(
        extend, model, tokens, cache
    )
    assert "none of them zero" in says(extend, model, tokens[:, :0], cache)
    assert "range over 11..11" in says(extend, model, torch.full((2, 1), 11), cache)
    assert "counts must be 2 numbers from 1 to 1, got [1, 2]" in says(
        extend, model, tokens[:, :1], cache, counts=[1, 2]
    )
    assert "settle_steps" in says(extend, model, tokens[:, :1], cache, settle_steps=-1)
    assert cache.lengths == [4, 4]
    assert "batch must be at least 1, got 0" in says(KVCache.allocate, model, 0, 6)
    assert "length must be at least 1, got 0" in says(KVCache.allocate, model, 1, 0)
    assert "longer than the context of 32" in says(KVCache.allocate, model, 1, 33)
    assert "cannot store 'int3'" in says(KVCache.allocate, model, 1, 8, "int3")
    assert "plain PCTransformer" in says(KVCache.allocate, torch.nn.Linear(2, 2))
    batch = 10**12
    wanted = cache_bytes(SMALL, batch, 32)
    assert f"no memory for a cache of {wanted:,} bytes" in says(KVCache.allocate, model, batch)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    assert "weights have changed" in says(extend, model, tokens[:, :1], cache)


def test_models_that_are_more_than_their_chain_are_not_cached():
    class Doubled(PCTransformer):
        def forward(self, tokens):
            return 2 * super().forward(tokens)

    hooked = make(SMALL)
    hooked.predictors[2].register_forward_hook(lambda *_: None)
    assert cacheable(make(SMALL)) and not cacheable(Doubled(SMALL)) and not cacheable(hooked)


def test_a_token_costs_the_same_work_at_every_position():
    """Counted, not timed: the number of operations of a step does not depend on the position."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.n += 1
            return func(*args, **(kwargs or {}))

    for family in ATTENTIONS:
        model, counts = make(replace(SMALL, attention=family)), []
        cache = KVCache.allocate(model)
        for token in random_tokens(1, 30).split(1, 1):
            with Count() as count:
                extend(model, token, cache)
            counts.append(count.n)
        assert len(set(counts[2:])) <= 2 and max(counts[2:]) < 1.2 * min(counts[2:]), (
            family,
            counts,
        )
        assert math.isfinite(counts[0])


def test_a_training_step_makes_a_cache_stale() -> None:
    "The trainer's fused optimiser does not count versions by itself."
    from pc_transformer.data import Text
    from pc_transformer.training import Trainer
    from pc_transformer.training.run import RunConfig

    ids = random_tokens(400)
    changes = {
        "model.vocab_size": 11,
        "model.block_size": 16,
        "model.n_layer": 1,
        "model.n_head": 2,
        "model.d_model": 16,
    }
    config = replace(RunConfig(), **changes)
    trainer = Trainer(config, Text.of_ids(ids[:300], ids[300:], config), torch.device("cpu"))
    cache = KVCache.allocate(trainer.model, 1)
    extend(trainer.model, random_tokens(1, 4), cache)
    trainer.advance()
    with pytest.raises(ValueError, match="weights have changed"):
        extend(trainer.model, random_tokens(1, 1), cache)


# ---- weights in another order


def wide(**changes) -> PCTransformer:
    """A model some of whose weights are copied."""
    return PCTransformer(
        replace(SMALL, n_layer=1, n_head=6, d_model=384, attention="dot", **changes), seed=1
    ).eval()


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("option", ["plain", "GPT-2", "grouped", "everything"])
@pytest.mark.parametrize("family", ["dot", "gaussian", "student_t", "laplace", "mixture"])
def test_rule_5_with_packed_weights(family, option, rows, monkeypatch):
    monkeypatch.setattr("pc_transformer.inference.packed.LEAST", 0)
    model, tokens = make(configs(family, option)), random_tokens(rows, 14)
    quick = pack(model, rows)
    assert any(isinstance(m, Packed) for m in quick.modules())
    assert not any(isinstance(m, Packed) for m in model.modules())
    cache = KVCache.allocate(quick, rows)
    with torch.no_grad():
        full, prompt = model(tokens), model(tokens[:, :6])
    # a prompt is the model's own pass
    assert torch.equal(extend(quick, tokens[:, :6], cache), prompt)
    close(torch.cat([extend(quick, t, cache) for t in tokens[:, 6:].split(1, 1)], 1), full[:, 6:])


def in_place(model: PCTransformer) -> None:
    with torch.no_grad():
        model.predictors[2].up.weight.mul_(-3)


def loaded(model: PCTransformer) -> None:
    state = {name: -x for name, x in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def replaced(model: PCTransformer) -> None:
    up = model.predictors[2].up
    up.weight = torch.nn.Parameter(2 * up.weight.detach())


def optimised(model: PCTransformer) -> None:
    model(random_tokens(1, 5)).square().sum().backward()
    torch.optim.AdamW(model.parameters(), lr=0.05).step()
    model.zero_grad(set_to_none=True)


CHANGES = {f.__name__: f for f in (in_place, loaded, replaced, optimised)}


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("change", CHANGES)
def test_weights_are_frozen(change, rows):
    """What PyTorch counts as a change is refused by a cache and by packed weights; made anew, they
    read the present weights."""
    model, tokens = wide(), random_tokens(rows, 6)
    quick = pack(model, rows)
    caches = {m: KVCache.allocate(m, rows) for m in (model, quick)}
    for m, cache in caches.items():
        extend(m, tokens[:, :4], cache)
    CHANGES[change](model)
    for m, cache in caches.items():
        with pytest.raises(ValueError, match="weights have changed"):
            extend(m, tokens[:, :1], cache)
    with pytest.raises(ValueError, match="packed weights are frozen"):
        quick(tokens[:, :1])
    fresh = pack(model, rows)
    for m in (model, fresh):
        cache = KVCache.allocate(m, rows)
        found = torch.cat([extend(m, t, cache) for t in tokens.split(1, 1)], 1)
        with torch.no_grad():
            close(found, model(tokens))


def test_what_is_not_counted_is_the_callers_promise():
    """The edge of the rule, as it is written: `.data` goes past PyTorch's counter."""
    model, tokens = wide(), random_tokens(1, 4)
    quick = pack(model)
    frozen, cache = Frozen(model), KVCache.allocate(quick)
    extend(quick, tokens, cache)
    model.predictors[2].up.weight.data.mul_(-3)
    assert frozen.holds()
    extend(quick, tokens[:, :1], cache)


def test_a_model_made_in_inference_mode_is_read():
    with torch.inference_mode():
        model = wide()
    tokens, cache = random_tokens(1, 4), KVCache.allocate(pack(model))
    found = torch.cat([extend(cache.model, t, cache) for t in tokens.split(1, 1)], 1)
    with torch.no_grad():
        close(found, model(tokens))


def test_what_is_not_packed():
    double, odd = torch.nn.Linear(512, 512).double(), torch.nn.Linear(600, 400)
    few = torch.nn.Linear(8, 64)
    assert all(fast_product(*x) is None for x in ((double, 1), (double, 8), (odd, 1), (few, 1)))
    assert fast_product(torch.nn.Linear(400, 600), 1) is not None


@pytest.mark.parametrize("rows", [1, 4])
def test_copies_are_not_read_under_autocast_nor_in_another_type(rows):
    model, tokens = wide(), random_tokens(rows, 8)
    quick = pack(model, rows)
    for inside in (False, True, False):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=inside):
            a, b = (m(tokens[:, :1]) for m in (model, quick))
        assert torch.equal(a, b) if inside else torch.allclose(a, b, atol=1e-4)
    model.double()
    with torch.no_grad():
        assert torch.equal(model(tokens[:, :1]), quick(tokens[:, :1]))


def test_maps_that_are_more_than_their_weight_are_left_alone():
    for change in (
        lambda m: m.register_forward_hook(lambda _, x, y: 2 * y),
        lambda m: m.register_forward_pre_hook(lambda _, given: (given[0] + 1,)),
        lambda m: prune.l1_unstructured(m, "weight", 0.5),
        torch.nn.utils.parametrizations.weight_norm,
    ):
        for rows in (1, 4):
            model, x = torch.nn.Sequential(torch.nn.Linear(384, 512)), torch.randn(rows, 1, 384)
            assert isinstance(pack(model, rows)[0], Packed)
            change(model[0])
            with torch.no_grad():
                assert torch.equal(pack(model, rows)(x), model(x))


def test_blocks_need_both_operations(monkeypatch):
    class Half:
        _linear_pointwise = None

    monkeypatch.setattr(torch.ops, "mkldnn", Half())
    assert not has_blocks() and fast_product(torch.nn.Linear(384, 1536), 4) is not None


# ---- numbers that are none, types, and what a stored key is


@pytest.mark.parametrize("dtype", ["int8", "bfloat16", "float32"])
@pytest.mark.parametrize("option", ["plain", "norm", "per key", "diagonal", "everything"])
@pytest.mark.parametrize("family", ["gaussian", "student_t", "mixture"])
def test_columns_describe_the_stored_keys(family, option, dtype):
    """kappa and the bias belong to the keys as they are stored, rounding included."""
    config = configs(family, option)
    model, tokens = make(config, torch.float64), random_tokens(2, 9)
    cache = KVCache.allocate(model, 2, dtype=dtype)
    extend(model, tokens[:, :6], cache)
    for t in tokens[:, 6:].split(1, 1):
        extend(model, t, cache)
    (k, _, column), reader = cache.layers[0].read(0, 9), cache.layers[0].reader
    shift = 0 if reader.shift is None else reader.shift[:, :, :, 0]
    lam = column["lam"][:, :, :, 0, 0] if reader.own else reader.Lam[:, :, 0]
    squares = (k[:, :, None] + shift).square()
    kappa = lam * squares.sum(-1) if reader.own else (lam * squares).sum(-1)
    near = {"rtol": 1e-9, "atol": 1e-9}
    if "kappa" in column:
        torch.testing.assert_close(column["kappa"][:, :, :, 0, 0], kappa, **near)
    elif "bias" in column and config.mixing == "equal":
        prior = lam.log() * (reader.d / 2) if reader.own else 0
        torch.testing.assert_close(column["bias"][:, :, :, 0, 0], prior - kappa / 2, **near)


def test_a_cache_holds_as_many_tokens_as_it_says():
    model, tokens = make(SMALL), random_tokens(2, 8)
    for parts in ((8,), (1,) * 8, (7, 1)):
        cache = KVCache.allocate(model, 2, 8)
        for part in tokens.split(parts, 1):
            extend(model, part, cache)
        assert cache.length == cache.capacity == 8
        assert "the cache is full: it holds 8 of 8 tokens, and 1 more do not fit" in says(
            extend, model, tokens[:, :1], cache
        )


@pytest.mark.parametrize("name", ["log_precision", "log_tail", "log_mix", "background"])
def test_a_reader_refuses_numbers_that_are_none(name):
    """As `attend` does, with the same words, before a token is read."""
    family = {"log_tail": "huber", "log_mix": "mixture"}.get(name, "student_t")
    for value in (math.nan, 1e4):
        model = make(replace(SMALL, attention=family, background=True))
        with torch.no_grad():
            odd = math.inf if name == "background" and value == 1e4 else value
            getattr(model.predictors[1].attention, name).flatten()[0] = odd
        if name == "log_mix" and value == 1e4:
            continue  # a log weight may be large
        for call in (
            lambda model=model: KVCache.allocate(model),
            lambda model=model: model(random_tokens(1, 4)),
        ):
            with pytest.raises(
                ValueError, match="positive and finite|must lie in|minus infinity or lie within"
            ):
                call()


def test_a_token_whose_precision_is_none_is_refused_by_every_way_to_read_it():
    """Full pass, prompt, next token and ragged rows alike, and the cache stays as long as it
    was."""
    model, tokens = make(replace(SMALL, attention="gaussian", precision="key")), random_tokens(2, 8)
    tokens[tokens == 7] = 3
    odd = torch.full((2, 1), 7)
    with torch.no_grad():
        a, e = model.predictors[1].attention, model.predictors[0]
        e.token.weight[7] = 0
        e.token.weight[7, 0], a.precision_map[:, 0] = 50, 200.0  # overflows for this token alone
        e.token.weight[:7, 0] = e.token.weight[8:, 0] = e.position.weight[:, 0] = 0
        a.precision_map[:, 1:] = 0
    words = "precision of gaussian attention must be positive and finite in float32, but holds inf"
    with torch.no_grad(), pytest.raises(ValueError, match=words):
        model(torch.cat([tokens[:, :4], odd], 1))
    for prompt, counts in ((4, None), (1, None), (4, [2, 4])):
        cache = KVCache.allocate(model, 2)
        extend(model, tokens[:, :prompt], cache, counts=counts)
        before = list(cache.lengths)
        for new in (odd, torch.cat([odd, tokens[:, :1]], 1)):
            assert words in says(extend, model, new, cache)
            assert cache.lengths == before
        extend(model, tokens[:, 4:6], cache)  # and goes on
        assert cache.lengths == [n + 2 for n in before]
    cache = KVCache.allocate(model, 2)
    assert words in says(extend, model, odd.expand(2, 3), cache) and cache.lengths == [0, 0]


def test_types_are_looked_at_first():
    model, tokens = make(SMALL), random_tokens(2, 4)
    cache = KVCache.allocate(model, 2, 8)
    extend(model, tokens, cache)
    for value in (1.5, True, "2", None):
        for call in (
            lambda x: KVCache.allocate(model, x),
            lambda x: extend(model, tokens, cache, counts=[x, 1]),
            lambda x: extend(model, tokens, cache, settle_steps=x),
        ):
            assert f"must be a whole number, got {value!r}" in says(call, value)
        if value is not None:
            assert "length must be a whole number" in says(KVCache.allocate, model, 1, value)
    for value in (torch.float16, 3, ["int8"]):
        assert "a cache cannot store" in says(KVCache.allocate, model, 1, 8, value)
    for value in (None, [[1, 2], [3, 4]], "ab"):
        assert "tokens must be a tensor of shape (batch, time)" in says(extend, model, value, cache)
    twin = cache.select(torch.tensor([1, 0]))
    assert twin.lengths == [4, 4] and cache.lengths == [4, 4]
    extend(model, tokens, cache, counts=torch.tensor([2, 4]))
    assert cache.lengths == [6, 8] and all(type(n) is int for n in cache.lengths)


def test_what_is_no_number_stays_none_in_eight_bits():
    for value in (math.nan, math.inf):
        x = torch.ones(2, 4)
        x[0, 1] = value
        code, scale = quantise(x)
        assert (code * scale)[0].isnan().all() and (code * scale)[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["dot", "gaussian", "mixture", "student_t"])
def test_a_background_in_half_precision(family: str, dtype: torch.dtype) -> None:
    """The score of nothing is float32, what is read stays in the model's own precision; cached
    and not."""
    model, x = (
        make(replace(SMALL, attention=family, background=True), dtype, 1.0),
        random_tokens(2, 8),
    )
    with torch.no_grad():
        logits, cache = model(x), KVCache.allocate(model, 2, 8)
        at_once = extend(model, x, KVCache.allocate(model, 2, 8))
        by_one = torch.cat([extend(model, x[:, t : t + 1], cache) for t in range(8)], 1)
    assert logits.dtype == dtype and torch.equal(at_once, logits)
    spread = logits.float().std()
    assert (by_one.float() - logits.float()).abs().max() < 16 * torch.finfo(dtype).eps * spread
