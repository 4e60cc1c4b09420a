"""Generation: filters, sampling, and the promise that a model is only read (rules 2,
3 and 4)."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pc_transformer.config import ModelConfig, from_yaml
from pc_transformer.data import CharTokenizer
from pc_transformer.inference import (
    Cached,
    KVCache,
    Recompute,
    SamplingConfig,
    Texts,
    Windows,
    distribution,
    generate,
    generate_text,
    min_p_filter,
    opening,
    pack,
    penalise_repetition,
    sample,
    stream,
    temperature_scale,
    top_k_filter,
    top_p_filter,
    typical_filter,
)
from pc_transformer.model import PCTransformer

CONFIG = ModelConfig(vocab_size=11, block_size=8, n_layer=2, n_head=2, d_model=16)
PROMPT = torch.tensor([[1, 2, 3], [4, 5, 6]])

# Few distinct values on purpose: ties are common
tied = st.lists(st.sampled_from([-3.0, -1.0, 0.0, 0.5, 2.0]), min_size=1, max_size=9)
# a grid: differences are either none or far above rounding
free = st.lists(st.integers(-30_000, 30_000).map(lambda n: n / 1000), min_size=1, max_size=9)
logits_1d = st.one_of(tied, free).map(lambda x: torch.tensor(x, dtype=torch.float64))


@pytest.fixture(params=["dot", "gaussian"])
def model(request) -> PCTransformer:
    """A small untrained model of each attention family, with logits far from uniform."""
    config = ModelConfig(
        vocab_size=11, block_size=8, n_layer=2, n_head=2, d_model=16, attention=request.param
    )
    made = PCTransformer(config, seed=1)
    with torch.no_grad():
        for p in made.parameters():
            if p.dim() > 1:
                p.mul_(8)
    return made


def kept(filtered: Tensor) -> list[int]:
    """Which tokens are left."""
    return filtered.isfinite().nonzero().flatten().tolist()


# ---- filters


@given(logits_1d, st.data())
def test_top_k_keeps_exactly_the_k_first(z, data):
    k = data.draw(st.integers(1, len(z)))
    order = sorted(
        range(len(z)), key=lambda i: (-z[i].item(), i)
    )  # largest first, then lowest index
    out = top_k_filter(z, k)
    assert kept(out) == sorted(order[:k])
    assert torch.equal(out[out.isfinite()], z[out.isfinite()])  # what stays is unchanged


@given(logits_1d, st.floats(1e-9, 1, exclude_max=True))
@settings(max_examples=300)
def test_top_p_is_the_smallest_set(z, p):
    q = z.softmax(-1)
    order = sorted(range(len(z)), key=lambda i: (-q[i].item(), -z[i].item(), i))
    n = len(kept(top_p_filter(z, p)))
    assert kept(top_p_filter(z, p)) == sorted(order[:n]) and n >= 1
    assert q[order[:n]].sum() >= p - 1e-12  # enough mass
    assert n == 1 or q[order[: n - 1]].sum() < p + 1e-12  # and one token fewer would not do


@pytest.mark.parametrize("cut", [top_p_filter, typical_filter])
@pytest.mark.parametrize(
    ("masses", "p", "stay"),
    [
        ([1, 1, 1, 1], 0.5, 2),
        ([1, 1, 1, 1], 0.25, 1),
        ([1, 1, 1, 1], 0.75, 3),
        ([1, 1, 1, 1], 0.75 + 1e-12, 4),
        ([1] * 8, 0.5, 4),
        ([1, 1, 0, 0], 0.5, 1),
    ],
)
def test_a_set_whose_mass_is_exactly_p_is_large_enough(cut, masses, p, stay):
    z = torch.tensor(masses, dtype=torch.float64).log()
    assert kept(cut(z, p)) == list(range(stay))


@given(logits_1d)
def test_limits_of_the_filters(z):
    greedy = temperature_scale(z, 0)
    assert kept(greedy) == [int(z.argmax())]
    assert torch.equal(top_k_filter(z, 1), greedy) and torch.equal(top_p_filter(z, 1e-12), greedy)
    assert torch.equal(top_k_filter(z, len(z)), z) and torch.equal(top_p_filter(z, 1.0), z)
    ties = (z == z.max()).double()
    assert torch.allclose(
        temperature_scale(z, 1e-18).softmax(-1), ties / ties.sum()
    )  # ties share the limit


@given(logits_1d, st.floats(0.05, 20))
def test_temperature_is_the_definition(z, tau):
    assert torch.allclose(temperature_scale(z, tau).softmax(-1), (z / tau).softmax(-1), rtol=1e-10)


@given(logits_1d, st.floats(0, 5), st.integers(1, 9), st.floats(0.01, 1))
def test_distribution_is_one(z, tau, k, p):
    q = distribution(z[None], tau, min(k, len(z)), p)
    assert abs(q.sum().item() - 1) < 1e-12 and (q >= 0).all() and 1 <= (q > 0).sum() <= k


def test_filters_work_on_any_leading_shape():
    z = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    for f in (
        lambda x: top_k_filter(x, 2),
        lambda x: top_p_filter(x, 0.6),
        lambda x: temperature_scale(x, 0.5),
    ):
        rows = torch.stack([f(row) for row in z.flatten(0, 1)]).view_as(z)
        assert torch.equal(f(z), rows) and f(z).dtype == z.dtype


def test_masked_logits_stay_masked():
    z = torch.tensor([[1.0, -math.inf, 0.0]])
    assert distribution(z, top_k=3, top_p=0.999)[0, 1] == 0


@pytest.mark.parametrize("options", [{}, {"top_k": 4}, {"top_p": 0.8}, {"temperature": 2.0}])
def test_draws_follow_the_probabilities(options):
    """Pearson's chi-square with a fixed seed; a sampler that ignores the options (the mutant)
    fails it."""
    z = torch.tensor([[0.3, 1.2, -0.5, 0.0, 0.9]], dtype=torch.float64)
    q = distribution(z, **options)[0]
    quantile = {2: 9.21, 3: 11.34, 4: 13.28}  # 99 %

    def chi2(probabilities: Tensor) -> float:
        drawn = sample(probabilities.expand(20_000, -1), torch.Generator().manual_seed(3))
        n = torch.bincount(drawn, minlength=5)
        return float(((n - 20_000 * q) ** 2 / (20_000 * q).clamp_min(1e-9)).sum())

    limit = quantile[int((q > 0).sum()) - 1]
    assert chi2(q) < limit
    if options:
        assert chi2(z.softmax(-1)[0]) > limit


# ---- the loop


def test_shape_and_prompt_are_kept(model):
    out = generate(model, PROMPT, 20, seed=0)
    assert out.shape == (2, 23) and out.dtype == torch.int64 and torch.equal(out[:, :3], PROMPT)
    assert int(out.min()) >= 0 and int(out.max()) < 11
    assert torch.equal(
        generate(model, PROMPT[0], 5, seed=0)[:, :3], PROMPT[:1]
    )  # one row counts as a batch of one
    same = generate(model, PROMPT, 0)
    assert torch.equal(same, PROMPT) and same.data_ptr() != PROMPT.data_ptr()


def test_greedy_is_argmax_past_the_context(model):
    tokens = PROMPT.clone()
    model.eval()
    for _ in range(20):
        tokens = torch.cat([tokens, model(tokens[:, -8:])[:, -1].argmax(-1, keepdim=True)], dim=1)
    for options in ({"temperature": 0}, {"top_k": 1}, {"top_p": 1e-12}, {"temperature": 1e-9}):
        assert torch.equal(generate(model, PROMPT, 20, seed=9, **options), tokens)


def test_long_prompt_reads_its_end(model):
    long = torch.arange(11)[None].repeat(2, 1)
    with pytest.raises(ValueError, match="prompt has 11 tokens but the context holds 8"):
        generate(model, long, 1)
    out = generate(model, long, 6, temperature=0, sliding_window=True)
    assert torch.equal(out[:, :11], long)
    assert torch.equal(out[:, 3:], generate(model, long[:, 3:], 6, temperature=0))
    assert generate(model, long[:, :8], 1).shape == (2, 9)  # exactly full is fine


def test_seeds(model):
    first, second, other = (generate(model, PROMPT, 30, seed=s) for s in (4, 4, 5))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert not torch.equal(
        generate(model, PROMPT, 30), generate(model, PROMPT, 30)
    )  # no seed: a new text


def test_output_can_be_trained_on(model):
    """The tokens are ordinary tensors, not inference tensors."""
    out = generate(model, PROMPT, 4, seed=0)
    model(out).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# ---- rules, each with a mutant that the check catches


def bits(module: nn.Module) -> dict[str, bytes]:
    """Every parameter and buffer as raw bytes."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return {
        name: bytes(t.detach().contiguous().flatten().view(torch.uint8).tolist())
        for name, t in named
    }


def only_reads(model: nn.Module, run=generate) -> bool:
    """Rule 4, and more: state, modes, gradients, prompt and the global random state are as
    before."""
    model.train()
    list(model.modules())[-1].eval()  # a mixed state
    prompt, modes, state = PROMPT.clone(), [m.training for m in model.modules()], bits(model)
    rng = torch.get_rng_state()
    run(model, prompt, 12, seed=0)
    return (
        bits(model) == state
        and [m.training for m in model.modules()] == modes
        and all(p.grad is None for p in model.parameters())
        and torch.equal(prompt, PROMPT)
        and torch.equal(torch.get_rng_state(), rng)
        and torch.is_grad_enabled()
    )


class CountsCalls(PCTransformer):
    """A mutant: a buffer moves with every forward pass."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, tokens):
        self.calls += 1
        return super().forward(tokens)


class LearnsWhileReading(PCTransformer):
    """A mutant: weights are updated in eval."""

    def forward(self, tokens):
        with torch.no_grad():
            next(self.parameters()).mul_(1.0001)
        return super().forward(tokens)


class NoisyInEval(PCTransformer):
    """A mutant: dropout that ignores eval mode; its logits depend on the global random state."""

    def forward(self, tokens):
        return nn.functional.dropout(super().forward(tokens), 0.5, training=True)


def leaves_eval(model, prompt, n, seed):
    """A mutant of generate: the mode is not restored."""
    out = generate(model, prompt, n, seed=seed)
    model.eval()
    return out


def seeds_globally(model, prompt, n, seed):
    """A mutant of generate: draws from the global random state."""
    torch.manual_seed(seed)
    return generate(model, prompt, n, seed=seed)


def writes_into_the_prompt(model, prompt, n, seed):
    """A mutant of generate: works in the caller's tensor."""
    prompt[:, 0] = 0
    return generate(model, prompt, n, seed=seed)


def test_rule_4_generation_only_reads(model):
    assert only_reads(model)


@pytest.mark.parametrize("mutant", [CountsCalls, LearnsWhileReading, NoisyInEval])
def test_rule_4_catches_models(mutant):
    assert not only_reads(mutant(CONFIG))


@pytest.mark.parametrize("mutant", [leaves_eval, seeds_globally, writes_into_the_prompt])
def test_rule_4_catches_loops(mutant):
    assert not only_reads(PCTransformer(CONFIG), mutant)


def ignores_the_global_seed(model: nn.Module) -> bool:
    """Rule 2: greedy text does not depend on the global random state, nor on the call's own
    seed."""
    texts = []
    for seed in range(3):
        torch.manual_seed(seed)
        texts.append(generate(model, PROMPT, 12, temperature=0, seed=seed))
    return all(torch.equal(text, texts[0]) for text in texts)


def test_rule_2(model):
    assert ignores_the_global_seed(model)
    assert not ignores_the_global_seed(NoisyInEval(CONFIG))


def test_rule_3_rows_do_not_mix(model):
    """A row's greedy text does not depend on the other rows of the batch."""
    both = generate(model, PROMPT, 12, temperature=0)
    assert torch.equal(both, torch.cat([generate(model, row, 12, temperature=0) for row in PROMPT]))


# ---- bad input


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ("abc", TypeError, "int64 tensor of tokens, but got str"),
        ([1, 2], TypeError, "but got list"),
        (torch.tensor([1.0]), TypeError, "but got torch.float32"),
        (torch.tensor([1], dtype=torch.int32), TypeError, "but got torch.int32"),
        (torch.tensor(1), ValueError, r"has \(\)"),
        (
            torch.zeros(1, 1, 1, dtype=torch.int64),
            ValueError,
            r"shape \(time,\) or \(batch, time\)",
        ),
        (torch.zeros(0, dtype=torch.int64), ValueError, "prompt is empty"),
        (torch.zeros(2, 0, dtype=torch.int64), ValueError, "prompt is empty"),
        (torch.zeros(0, 2, dtype=torch.int64), ValueError, "prompt is empty"),
        (torch.zeros(9, dtype=torch.int64), ValueError, "9 tokens but the context holds 8"),
        (
            torch.tensor([[1, 2], [3, 11]]),
            ValueError,
            r"token 11 at position 1, outside the vocabulary \[0, 11\)",
        ),
        (torch.tensor([-1]), ValueError, "token -1 at position 0"),
    ],
)
def test_bad_prompt(prompt, error, message):
    with pytest.raises(error, match=message) as caught:
        generate(PCTransformer(CONFIG), prompt, 1)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_new_tokens", [-1, 1.5, True, "3", None]),
        ("temperature", [-0.1, math.nan, math.inf, "1", None]),
        ("top_k", [0, -1, 12, 2.0, True, "5"]),
        ("top_p", [0, 0.0, -0.1, 1.01, math.nan, "0.5", True]),
    ],
)
def test_bad_options(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"^{name} must .*got [^\n]*$"):
            generate(PCTransformer(CONFIG), PROMPT, **({"max_new_tokens": 1} | {name: value}))


def test_types_come_first(model):
    "Each argument of another kind is one sentence about it, before anything is read or allocated."
    for error, words, bad in (
        (TypeError, "sampling must be a SamplingConfig, but is a dict", {"sampling": {}}),
        (TypeError, "stop_tokens must be a list of tokens, but got 3", {"stop_tokens": 3}),
        (TypeError, "stop_tokens must be", {"stop_tokens": "abc"}),
        (TypeError, "cache must be True or False, but got 'no'", {"cache": "no"}),
        (TypeError, "sliding_window must be True or False", {"sliding_window": 1}),
        (TypeError, "settle must have a method logits", {"settle": "evidence"}),
        (TypeError, "log_probs must be True or False", {"log_probs": 1}),
        (TypeError, "cache_dtype must be a name or None, but is a list", {"cache_dtype": [8]}),
        (ValueError, "seed must lie between", {"seed": 2**70}),
        (ValueError, "seed must lie between", {"seed": [0, 2**70]}),
        (ValueError, "seed must be an integer, or 2", {"seed": b"ab"}),
        (ValueError, "max_new_tokens must be 0 or", {"max_new_tokens": 2**40}),
    ):
        with pytest.raises(error, match=words) as caught:
            generate(model, PROMPT, **({"max_new_tokens": 1} | bad))
        assert "\n" not in str(caught.value)
    with pytest.raises(
        TypeError,
        match="model must have a config with block_size and vocab_size, but a Linear has none",
    ):
        generate(nn.Linear(2, 2), PROMPT, 1)
    tokenizer = CharTokenizer("abcdefghijk")
    for words, bad in (
        ("prompt must be a text", {"prompt": PROMPT}),
        ("tokenizer must have", {"tokenizer": {}}),
        ("stop must be", {"stop": 1}),
        ("stop must be", {"stop": {"a": 1}}),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            generate_text(
                model, **({"tokenizer": tokenizer, "prompt": "ab", "max_new_tokens": 1} | bad)
            )
    for call, words in (
        (lambda: PCTransformer({}), "made from a ModelConfig, but got a dict"),
        (lambda: model([[1]]), "tokens must be an int64 tensor, but are a list"),
        (lambda: model(PROMPT.float()), "tokens must be int64, but are float32"),
    ):
        with pytest.raises(TypeError, match=words):
            call()


def test_bad_logits(model):
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    model.train()
    with pytest.raises(ValueError, match="row 0 contain NaN"):
        generate(model, PROMPT, 1)
    assert model.training  # restored although it failed
    for bad, message in ((math.inf, r"\+inf"), (-math.inf, "all -inf")):
        with pytest.raises(ValueError, match=message):
            distribution(torch.full((1, 3), bad))


def test_text(model):
    tokenizer = CharTokenizer("abcdefghijk")
    out = generate_text(model, tokenizer, "abc", 10, seed=1, top_k=5, top_p=0.9, temperature=0.7)
    assert out[:3] == "abc" and len(out) == 13
    assert out == generate_text(
        model, tokenizer, "abc", 10, seed=1, top_k=5, top_p=0.9, temperature=0.7
    )
    with pytest.raises(ValueError, match="character 'z' at position 1"):
        generate_text(model, tokenizer, "az", 1)
    with pytest.raises(ValueError, match="prompt is empty"):
        generate_text(model, tokenizer, "", 1)
    with pytest.raises(ValueError, match="the tokenizer knows 12 tokens, the model 11"):
        generate_text(model, CharTokenizer("abcdefghijkl"), "a", 1)


CHOICES = (
    {},
    {"temperature": 0},
    {"top_k": 9},
    {"top_p": 0.5},
    {"typical_p": 0.3},
    {"min_p": 0.01},
    {"repetition_penalty": 1.3, "presence_penalty": 0.1},
    {"cache": False},
    {"settle_steps": 1},
)


@pytest.mark.parametrize("options", CHOICES, ids=str)
def test_a_padded_vocabulary_is_sampled_without_its_padding(model, options):
    """Surplus tokens, however likely, are never drawn; the others are drawn as if there were no
    surplus."""
    with torch.no_grad():
        model.predictors[0].token.weight[3:] *= 30  # of all logits these are now the largest
    tokens = generate(
        model, PROMPT[0, :1].clamp(max=2), 40, seed=1, **({"sliding_window": True} | options)
    )
    assert (tokens >= 3).any(), "the test draws no surplus token"
    text = generate_text(
        model, CharTokenizer("abc"), "a", 40, seed=1, **({"sliding_window": True} | options)
    )
    assert len(text) == 41 and set(text) <= set("abc")


@pytest.mark.parametrize("options", CHOICES, ids=str)
def test_the_unknown_symbol_is_read_and_never_drawn(model, options):
    """However likely; a prompt may hold it, and is shown with the replacement character."""
    with torch.no_grad():
        model.predictors[0].token.weight[3:] *= 30
    tokenizer, how = CharTokenizer("abc", unknown=True), {"sliding_window": True} | options
    text = generate_text(model, tokenizer, "a?", 40, seed=1, **how)
    assert text[:2] == "a\ufffd" and set(text[2:]) <= set("abc") and len(text) == 42
    exact = CharTokenizer("abcdefghij", unknown=True)  # as many tokens as the model has
    likely = int(generate(model, exact.encode("a"), 1, temperature=0)[0, -1])
    with torch.no_grad():
        model.predictors[0].token.weight[10] = 3 * model.predictors[0].token.weight[likely]
    assert int(generate(model, exact.encode("a"), 1, temperature=0)[0, -1]) == exact.symbols
    assert set(generate_text(model, exact, "a", 40, seed=1, **how)) <= set(exact.vocabulary)


def test_a_text_opens_with_a_known_character():
    assert opening(CharTokenizer("\nab", unknown=True)) == "\n"
    assert opening(CharTokenizer("ab", unknown=True)) == opening(CharTokenizer("ab")) == "a"


def test_symbols_are_checked_and_share_the_whole_probability(model):
    for bad in (0, 12, 1.5, True, "3"):
        with pytest.raises(ValueError, match="symbols must be an integer from 1 to 11"):
            generate(model, PROMPT, 1, symbols=bad)
    for few in (1, 3):
        q = model(PROMPT)[:, -1, :few].double().softmax(-1)
        drawn = [
            int(t)
            for s in range(400)
            for t in generate(model, PROMPT[:1], 1, seed=s, symbols=few)[:, -1]
        ]
        assert torch.allclose(
            torch.bincount(torch.tensor(drawn), minlength=few).double() / 400, q[0], atol=0.08
        )


@pytest.mark.cuda
def test_same_text_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    model = PCTransformer(CONFIG).double()
    here = generate(model, PROMPT, 40, seed=7, top_p=0.9)
    there = generate(model.cuda(), PROMPT, 40, seed=7, top_p=0.9)
    assert there.is_cuda and torch.equal(here, there.cpu())


# ---- more strategies


@given(logits_1d, st.floats(0, 1))
def test_min_p_is_the_definition_and_keeps_the_mode(z, p):
    q, out = z.softmax(-1), min_p_filter(z, p)
    edge = p * q.max()
    assert out[z.argmax()] == z.max()
    for i in range(len(z)):  # clear cases only: rounding decides at the edge
        if q[i] > edge * (1 + 1e-9):
            assert out[i] == z[i]
        if q[i] < edge * (1 - 1e-9):
            assert out[i] == -math.inf


@given(logits_1d, st.floats(1e-6, 1))
def test_typical_is_the_smallest_set_nearest_to_the_entropy(z, p):
    q = z.softmax(-1)
    far = (-q.log() - torch.special.entr(q).sum()).abs()
    left = typical_filter(z, p).isfinite()
    assert left.any() and (p == 1 or q[left].sum() >= p - 1e-12)
    assert left.all() or far[left].max() <= far[~left].min() + 1e-9
    assert left.sum() == 1 or q[left].sum() - q[left][far[left].argmax()] < p + 1e-9
    assert torch.equal(typical_filter(z, 1), z)


@given(logits_1d, st.floats(0.1, 3), st.floats(-1, 1), st.floats(-1, 1))
def test_penalties_are_the_formula(z, theta, frequency, presence):
    n = torch.arange(len(z), dtype=torch.float64) % 3
    out = penalise_repetition(z, n, theta, frequency, presence)
    for i in range(len(z)):
        x = z[i].item()
        if n[i] > 0:
            x = (x / theta if x > 0 else x * theta) - frequency * n[i].item() - presence
        assert abs(out[i].item() - x) < 1e-9
    assert torch.equal(penalise_repetition(z, n), z)


class Fixed(nn.Module):
    """Logits that fall from token to token, whatever was read."""

    def __init__(self):
        super().__init__()
        self.config, self.z = CONFIG, nn.Parameter(-torch.arange(11.0))

    def forward(self, tokens):
        return self.z.expand(*tokens.shape, 11)


@pytest.mark.parametrize("penalty", ["frequency_penalty", "presence_penalty"])
def test_penalties_count_prompt_and_continuation(penalty):
    prompts = [torch.tensor([0, 1, 1]), torch.tensor([3, 0])]
    rows = generate(Fixed(), prompts, 9, temperature=0, **{penalty: 100.0})
    fresh = [
        [2, 3, 4, 5, 6, 7, 8, 9, 10],
        [1, 2, 4, 5, 6, 7, 8, 9, 10],
    ]  # nobody is used twice while others are left
    assert [row[len(p) :].tolist() for row, p in zip(rows, prompts, strict=True)] == fresh
    again = generate(Fixed(), prompts[0], 12, temperature=0, **{penalty: 100.0})[0][12:].tolist()
    assert again == (
        [0, 2, 3] if penalty == "frequency_penalty" else [0, 0, 0]
    )  # the second 1 counts, or does not


def test_sampling_config_prints_and_reads_back():
    how = SamplingConfig(top_k=3, typical_p=0.5, min_p=0.1)
    assert from_yaml(SamplingConfig, str(how)) == how


# ---- cache, batches, streams


STRATEGIES = [
    {},
    {"temperature": 0},
    {"top_k": 4, "slide": 3},
    {"min_p": 0.1, "slide": 8},
    {"typical_p": 0.7},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.1},
    {"stop_tokens": [3, 7]},
    {"settle_steps": 1, "slide": 4},
]
RAGGED = [torch.tensor([1, 2, 3]), torch.tensor([4]), torch.arange(8)]


@pytest.mark.parametrize("family", ["dot", "gaussian", "student_t", "laplace", "mixture"])
@pytest.mark.parametrize("options", STRATEGIES)
def test_text_with_and_without_a_cache_is_the_same(family, options):
    model = PCTransformer(
        ModelConfig(vocab_size=11, block_size=8, n_layer=2, n_head=2, d_model=16, attention=family),
        seed=1,
    )
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(6)
    for prompt in (PROMPT, RAGGED):
        for seed in (5, list(range(len(prompt)))):
            (a, x), (b, y) = (
                generate(model, prompt, 16, seed=seed, cache=c, log_probs=True, **options)
                for c in (True, False)
            )
            assert type(a) is type(b) and all(torch.equal(s, t) for s, t in zip(a, b, strict=True))
            assert all(torch.allclose(s, t, atol=1e-3) for s, t in zip(x, y, strict=True))


def test_a_row_does_not_depend_on_the_others(model):
    together = generate(model, RAGGED, 20, seed=[7, 8, 9])
    for prompt, seed, text in zip(RAGGED, (7, 8, 9), together, strict=True):
        assert torch.equal(generate(model, [prompt], 20, seed=[seed])[0], text)
        assert torch.equal(generate(model, prompt, 20, seed=seed)[0], text)


def test_stop_tokens_end_a_row_and_nobody_else(model):
    free, stopped = (
        generate(model, RAGGED, 30, seed=4),
        generate(model, RAGGED, 30, seed=4, stop_tokens=[2]),
    )
    for prompt, whole, text in zip(RAGGED, free, stopped, strict=True):
        new = whole[len(prompt) :].tolist()
        assert text[len(prompt) :].tolist() == (new[: new.index(2) + 1] if 2 in new else new)


def test_log_probabilities_are_the_models_own(model):
    text, logs = generate(model, PROMPT, 5, seed=1, temperature=0.5, top_k=3, log_probs=True)
    model.eval()
    with torch.no_grad():
        full = model(text[:, :-1]).double().log_softmax(-1)
    torch.testing.assert_close(
        logs, full[:, 2:].gather(-1, text[:, 3:, None])[..., 0], atol=1e-4, rtol=1e-4
    )


def test_rule_4_a_stream_that_is_left_half_way(model):
    model.train()
    state, rng = bits(model), torch.get_rng_state()
    steps = stream(model, PROMPT, 20, seed=0)
    seen = [next(steps).tokens for _ in range(3)]
    assert (
        model.training and torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    )  # between two steps, too
    model(PROMPT).sum().backward()  # and the model is usable
    steps.close()
    model.zero_grad(set_to_none=True)
    assert bits(model) == state and torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(torch.stack(seen, 1), generate(model, PROMPT, 3, seed=0)[:, 3:])


@pytest.mark.parametrize("options", STRATEGIES)
def test_text_with_and_without_packed_weights_is_the_same(model, options, monkeypatch):
    monkeypatch.setattr("pc_transformer.inference.packed.LEAST", 0)
    for prompt in (PROMPT, RAGGED, PROMPT[:1, :1]):
        a, b = (
            generate(m, prompt, 16, seed=5, **options) for m in (model, pack(model, len(prompt)))
        )
        assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


def test_settling_objects(model):
    class Own:
        def logits(self, model, tokens):
            return model(tokens)[:, -1]

    assert all(
        torch.equal(a, b)
        for a, b in zip(
            generate(model, RAGGED, 12, seed=1, settle=Own()),
            generate(model, RAGGED, 12, seed=1),
            strict=True,
        )
    )
    model = PCTransformer(
        model.config, seed=1
    )  # precision 1: at 25 the nearest key takes all, settled or not
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(0 if name.endswith("log_precision") else 8 if p.dim() > 1 else 1)
    settled, plain = (
        generate(model, PROMPT, 1, seed=1, settle_steps=n, log_probs=True)[1] for n in (3, 0)
    )
    assert (settled - plain).abs().max() > 1e-6


@pytest.mark.parametrize(
    "options",
    [
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"typical_p": 0.0},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": -1.0},
        {"slide": 0},
        {"slide": 9},
        {"stop_tokens": [11]},
        {"settle": Recompute(), "settle_steps": 1},
        {"settle_steps": -1},
        {"seed": [1]},
        {"seed": "x"},
        {"sampling": SamplingConfig(), "temperature": 0.5},
        {"sampling": SamplingConfig(top_k=12)},
    ],
)
def test_bad_options_of_the_loop(options):
    with pytest.raises(ValueError) as caught:
        stream(PCTransformer(CONFIG), PROMPT, 1, **options)
    assert "\n" not in str(caught.value) and any(
        name in str(caught.value) for name in [*options, "top_k"]
    )


def test_stop_strings(model):
    tokenizer = CharTokenizer("abcdefghijk")
    whole = generate_text(model, tokenizer, "abc", 20, seed=1)
    word = whole[8:10]
    cut = whole[:3] + whole[3:][: whole[3:].index(word)]
    assert generate_text(model, tokenizer, "abc", 20, seed=1, stop=["zz", word]) == cut
    with pytest.raises(ValueError, match="stop must be a list"):
        generate_text(model, tokenizer, "abc", 1, stop="a")


@pytest.mark.parametrize("quick", [False, True])
def test_a_stream_is_of_frozen_weights(model, quick, monkeypatch):
    """With a cache a change under way is refused at the next token; without one, the next token is
    of the weights as they are."""
    monkeypatch.setattr("pc_transformer.inference.packed.LEAST", 0)
    read = pack(model, 2) if quick else model
    steps, free = (stream(read, PROMPT, 6, seed=0, cache=c) for c in (True, False))
    for s in (steps, free):
        next(s)
    with torch.no_grad():
        model.predictors[1].attention.qkv.weight.mul_(0.9)
    with pytest.raises(ValueError, match="weights have changed since the cache was made"):
        next(steps)
    next(free)
    text = generate(pack(model, 2) if quick else model, PROMPT, 6, temperature=0)
    assert torch.equal(text, generate(model, PROMPT, 6, temperature=0, cache=False))


def test_a_window_that_slides_makes_no_new_cache(monkeypatch):
    model = PCTransformer(CONFIG)
    source, whole = Cached(KVCache.allocate(model, 1, 8)), Windows(model, Recompute())
    cache, texts = source.cache, Texts(torch.ones(1, 30, dtype=torch.int64), [2], 8, 1, [0])
    for _ in range(20):
        torch.testing.assert_close(source(texts), whole(texts))
        texts.lengths = [n + 1 for n in texts.lengths]
    assert source.cache is cache


@pytest.mark.parametrize("rows", [1, 3])
def test_copies_under_autocast(rows):
    model = PCTransformer(
        ModelConfig(vocab_size=65, block_size=64, n_layer=1, n_head=6, d_model=384)
    ).eval()
    prompt = torch.ones(rows, 4, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16):
        a, b = (generate(m, prompt, 40, temperature=0) for m in (model, pack(model, rows)))
    assert torch.equal(a, b)
