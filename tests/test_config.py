"""Properties of the configuration: any valid one survives YAML, JSON and dotted changes; any
stray key is refused."""

import json
import math
from typing import get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pc_transformer.config import (
    TAILED,
    Attention,
    ConfigError,
    ModelConfig,
    TrainConfig,
    from_dict,
    from_yaml,
    replace,
    to_dict,
    to_yaml,
)
from pc_transformer.learning.config import LearnerConfig
from pc_transformer.training.run import RunConfig

quick = settings(deadline=None, max_examples=40)
sizes = st.integers(1, 10**6)
positive = st.floats(5e-324, 1e300, allow_nan=False)
rate = st.floats(5e-324, 1e30, allow_nan=False)  # what an optimiser multiplies by
fraction = st.floats(0, 1, exclude_max=True)
rates = st.tuples(rate, rate).map(sorted)
counts = st.fixed_dictionaries(
    {k: sizes for k in ("iters", "batch_size", "eval_interval", "checkpoint_interval")}
)


coordinates = st.sampled_from(["together", "independent"])


@st.composite
def models(draw) -> ModelConfig:
    n_head, d_head = draw(st.integers(1, 64)), draw(st.integers(1, 64))
    attention = draw(st.sampled_from(get_args(Attention)))
    own = (
        {}
        if attention == "dot"
        else {
            "precision": draw(st.sampled_from(["head", "key", "diagonal"])),
            "mixing": draw(st.sampled_from(["equal", "norm", "key"])),
            "tail": draw(st.none() | positive) if attention in TAILED else None,
        }
    )
    return ModelConfig(
        draw(sizes),
        draw(sizes),
        draw(sizes),
        n_head,
        n_head * d_head,
        attention,
        draw(st.none() | positive),
        **own,
        n_component=draw(sizes),
        n_kv_head=draw(st.sampled_from([None, 1, n_head])),
        window=draw(st.none() | sizes),
        qk_norm=draw(st.booleans()),
        background=draw(st.booleans()),
        coordinates="together" if attention == "dot" else draw(coordinates),
    )


@st.composite
def trainings(draw) -> TrainConfig:
    low, high = draw(rates)
    return TrainConfig(
        **draw(counts),
        learning_rate=high,
        min_learning_rate=low,
        warmup_iters=draw(st.integers(0, 10**6)),
        weight_decay=draw(rate),
        beta1=draw(fraction),
        beta2=draw(fraction),
        grad_clip=draw(positive),
        precision_lr_scale=draw(rate),
        seed=draw(st.integers(0, 2**63 - 1)),
    )


@st.composite
def learners_(draw) -> LearnerConfig:
    steps = draw(sizes)
    step_size = draw(st.floats(0, 1, exclude_min=True)) if steps > 1 else 1.0
    algorithm = draw(st.sampled_from(["predictive_coding", "backprop"]))
    end = {"steps_end": draw(st.none() | st.integers(2, 9))} if steps > 1 else {}
    own = {
        "tolerance": draw(st.floats(0, 0.9)),
        "centred": draw(st.booleans()),
        "lean": draw(st.booleans()),
    }
    own["relative_precision_end"] = draw(st.none() | positive)
    return LearnerConfig(algorithm, steps, draw(positive), step_size, **own, **end)


learners = learners_()
runs = st.builds(RunConfig, models(), learners, trainings(), st.text(min_size=1).filter(str.strip))


@quick
@given(runs)
def test_yaml_and_json_round_trips(run: RunConfig) -> None:
    assert from_yaml(RunConfig, str(run)) == run
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(run)))) == run
    assert eval(repr(run)) == run
    assert yaml.safe_load(to_yaml(run)) == to_dict(run)  # any other YAML reader sees the same


@quick
@given(runs, st.text())
def test_a_stray_key_is_refused_and_named(run: RunConfig, key: str) -> None:
    part, known = "train", to_dict(run)["train"]
    if key in known:
        return
    with pytest.raises(ConfigError, match="in train: unknown key .* iters, batch_size"):
        from_dict(RunConfig, {part: {key: 1}})


@quick
@given(runs, sizes)
def test_replace_changes_one_value_and_leaves_the_old_object(run: RunConfig, iters: int) -> None:
    before = to_dict(run)
    after = to_dict(replace(run, **{"train.iters": iters}))
    assert to_dict(run) == before
    before["train"]["iters"] = iters
    assert after == before


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
trees = st.recursive(
    scalars, lambda t: st.lists(t, max_size=3) | st.dictionaries(st.text(max_size=5), t, max_size=3)
)


@quick
@given(st.sampled_from(list(to_dict(RunConfig()))) | st.text(max_size=5), trees)
def test_anything_else_is_a_config_error(key: str, tree: object) -> None:
    try:
        run = from_dict(RunConfig, {key: tree})
    except ConfigError as error:
        assert "\n" not in str(error) and len(str(error)) < 300
    else:
        assert from_yaml(RunConfig, str(run)) == run


@given(st.text(alphabet="{}[]:,-&*!|>'\"%@`#\n aiters1e.", max_size=40))
@settings(max_examples=100, deadline=None)
def test_any_text_is_a_configuration_or_a_config_error(text: str) -> None:
    try:
        from_yaml(TrainConfig, text)
    except ConfigError as error:
        assert str(error)


@pytest.mark.parametrize("name", ["n_layer", "d_model", "block_size", "vocab_size", "n_head"])
@pytest.mark.parametrize("value", [0, -1, True, "4", 4.0, None])
def test_sizes_are_positive_integers(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^in model: {name} must be"):
        replace(RunConfig(), **{f"model.{name}": value})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400, "1e-3", True, None])
def test_numbers_are_finite(value: object) -> None:
    with pytest.raises(ConfigError, match="^learning_rate must be a finite number"):
        replace(TrainConfig(), learning_rate=value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model: {n_layer: 2}\nmodel: {n_layer: 3}", "line 2: .* the key 'model' appears twice"),
        ("model: {d_model: 130}", "in model: d_model = 130 .* 128 or 132 would do"),
        (
            "modell: {}",
            "unknown key 'modell'; the keys of RunConfig are model, learner, train, data",
        ),
        ("- a", "expected a mapping"),
        ("", "is empty"),
        ("? [a]\n: 1", "not valid YAML"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
        ("!!python/object/apply:os.getcwd []", "not valid YAML"),
        ("model: !!int four", "not valid YAML"),
        ("model: !!bool four", "not valid YAML"),
        ("train: {iters: " + "9" * 5000 + "}", "not valid YAML"),
        ("&a {model: *a}", "in model: unknown key 'model'"),
        ("{<<: {data: x}}", "unknown key '<<'"),
        ("data: 3", "data must be a text, got 3"),
        ("model:", "in model: expected a mapping"),
    ],
)
def test_sentences(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        from_yaml(RunConfig, text)


EDGES = [  # the last value that is right, the first that is wrong, and what is said of it
    ("model: {n_head: 4, d_model: 12}", "model: {n_head: 4, d_model: 14}", "12 or 16 would do"),
    (
        "model: {n_head: 4, n_kv_head: 2}",
        "model: {n_head: 4, n_kv_head: 3}",
        "not divisible by n_kv_head = 3",
    ),
    ("model: {dropout: 0.999}", "model: {dropout: 1.0}", "dropout must lie in"),
    ("model: {dropout: 0.0}", "model: {dropout: -0.001}", "dropout must lie in"),
    (
        "model: {attention: student_t, tail: 3.0}",
        "model: {attention: laplace, tail: 3.0}",
        "laplace attention has no tail",
    ),
    (
        "model: {attention: dot, mixing: key}",
        "model: {attention: dot, mixing: norm}",
        "mixing not 'norm'",
    ),
    (
        "model: {attention: gaussian, precision: key}",
        "model: {attention: dot, precision: key}",
        "precision must be 'head'",
    ),
    ("model: {window: 1}", "model: {window: 0}", "window must be positive"),
    ("train: {beta1: 0.0}", "train: {beta1: 1.0}", "beta1 must lie in"),
    ("train: {beta2: 0.999}", "train: {beta2: 1.0}", "beta2 must lie in"),
    (
        "train: {min_learning_rate: 1e-3}",
        "train: {min_learning_rate: 1.1e-3}",
        "the rate must not rise",
    ),
    (
        "train: {batch_size: 12, accumulate: 4}",
        "train: {batch_size: 12, accumulate: 5}",
        "5 equal parts",
    ),
    ("train: {warmup_iters: 0}", "train: {warmup_iters: -1}", "must not be negative"),
    (
        "learner: {steps: 2, step_size: 0.5}",
        "learner: {steps: 1, step_size: 0.5}",
        "needs steps > 1",
    ),
    (
        "learner: {steps: 3, steps_end: 2, step_size: 0.5}",
        "learner: {steps: 3, steps_end: 1, step_size: 0.5}",
        "needs steps > 1",
    ),
    (
        "learner: {steps: 2, step_size: 1.0}",
        "learner: {steps: 2, step_size: 1.01}",
        "step_size must lie in",
    ),
    ("learner: {tolerance: 0.99}", "learner: {tolerance: 1.0}", "tolerance must lie in"),
    (
        "learner: {solver: state, steps: 2}",
        "learner: {solver: state, steps: 2, steps_end: 1}",
        "needs more than 1 step",
    ),
    (
        "learner: {solver: error, tolerance: 0.1}",
        "learner: {solver: sweep, tolerance: 0.1}",
        "the solver 'sweep' has no tolerance",
    ),
    (
        "learner: {solver: sweep, lean: true}",
        "learner: {solver: highway, centred: true}",
        "only ErrorSettling can be nudged both ways",
    ),
]


@pytest.mark.parametrize(("right", "wrong", "says"), EDGES)
def test_edges(right: str, wrong: str, says: str) -> None:
    from_yaml(RunConfig, right)
    with pytest.raises(ConfigError, match=says) as error:
        from_yaml(RunConfig, wrong)
    assert "\n" not in str(error.value)


def test_an_unquoted_exponent_is_a_number() -> None:
    assert from_yaml(TrainConfig, "{learning_rate: 1e-2, seed: 7}") == TrainConfig(
        learning_rate=0.01, seed=7
    )


def test_the_defaults_are_nanogpts_cpu_run() -> None:
    run = RunConfig()
    assert (run.model.n_layer, run.model.n_head, run.model.d_model, run.model.block_size) == (
        4,
        4,
        128,
        64,
    )
    assert (run.train.iters, run.train.batch_size, run.train.warmup_iters) == (2000, 12, 100)
    assert (run.train.learning_rate, run.train.min_learning_rate) == (1e-3, 1e-4)
    assert (run.train.beta1, run.train.beta2, run.train.weight_decay, run.train.grad_clip) == (
        0.9,
        0.99,
        0.1,
        1.0,
    )
    assert (run.model.d_head, run.model.n_node) == (32, 9)
