"""Nothing global is borrowed (rule 18): threads get what each would get alone, and masks belong
to seed, step and node."""

import ast
import copy
import dataclasses
import itertools
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
import torch
import torch.nn.functional as F
from common import stir
from torch import Tensor, nn

import pc_transformer
from pc_transformer.attention.kernels import Plan
from pc_transformer.config import Attention, ModelConfig, TrainConfig, replace
from pc_transformer.data import Text, evaluate
from pc_transformer.experiments.evidence import EvidenceSettler
from pc_transformer.experiments.families import evaluate_damaged
from pc_transformer.experiments.incremental import IncrementalPC
from pc_transformer.experiments.uncertainty import flat_predictions
from pc_transformer.inference import (
    Recompute,
    StateGaussians,
    Still,
    ensemble_log_probs,
    generate,
    stream,
    token_scores,
)
from pc_transformer.isolation import (
    Draws,
    Dropout,
    ahead,
    drawing,
    evaluating,
    generator,
    leaf,
    private,
    view,
)
from pc_transformer.learning import (
    Backprop,
    Learner,
    PredictiveCoding,
    gradient_cosine,
    gradients,
    try_learner,
)
from pc_transformer.learning.config import LearnerConfig
from pc_transformer.model import FeedForwardLayer, PCTransformer
from pc_transformer.monitoring import take_snapshot
from pc_transformer.settling import (
    ErrorSettling,
    FreeEnergy,
    HighwaySettling,
    StateSettling,
    SweepSettling,
)
from pc_transformer.training import Trainer
from pc_transformer.training.run import RunConfig

CONFIG = ModelConfig(vocab_size=11, block_size=12, n_layer=2, n_head=2, d_model=16, dropout=0.4)
IDS = torch.randint(11, (400,), generator=torch.Generator().manual_seed(0))
X, Y = (IDS[i : i + 48].view(4, 12) for i in (0, 1))
LEARNERS: dict[str, Learner] = {
    "backprop": Backprop(),
    "error": PredictiveCoding(),
    "centred": PredictiveCoding(centred=True),
    "lean": PredictiveCoding(ErrorSettling(FreeEnergy(30.0), steps=2, lean=True)),
    "sweep": PredictiveCoding(SweepSettling()),
    "state": PredictiveCoding(StateSettling(FreeEnergy(30.0), steps=2)),
    "highway": PredictiveCoding(HighwaySettling(steps=2)),
    "incremental": IncrementalPC(StateSettling(FreeEnergy(30.0), steps=2), lambda: None),
}


def trained(**changes: Any) -> PCTransformer:
    "A model in training mode, in which every part matters."
    model = PCTransformer(replace(CONFIG, **changes), seed=1)
    stir(model, 3, 8.0)
    return model.train()


def trainer(learner: LearnerConfig | None = None, **changes: Any) -> Trainer:
    "A run with dropout."
    c = RunConfig(
        model=replace(CONFIG, **changes),
        learner=learner or LearnerConfig(),
        train=TrainConfig(iters=8, batch_size=4, eval_interval=8),
    )
    return Trainer(c, Text.of_ids(IDS[:300], IDS[300:], c), torch.device("cpu"))


def same(a: Any, b: Any) -> bool:
    "Bit for bit."
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a == b


def together(calls: list[Callable[[], Any]], times: int, workers: int = 8) -> list[list[Any]]:
    "What each call gives, again and again, while all the others run."
    with ThreadPoolExecutor(workers) as pool:
        jobs = [[pool.submit(call) for call in calls] for _ in range(times)]
        return [[job.result() for job in row] for row in jobs]


def readers(model: PCTransformer, t: Trainer) -> dict[str, Callable[[], Any]]:
    "Everything that reads a model, by name."
    known = StateGaussians.fit(copy.deepcopy(model).eval(), X)
    text = dict(seed=3, top_k=5)
    read = {
        "generate": lambda: generate(model, X[:, :3], 6, **text),
        "without a cache": lambda: generate(model, X[:, :3], 6, cache=False, **text),
        "evidence": lambda: generate(model, X[:1, :3], 3, settle=EvidenceSettler(), **text),
        "evaluate": lambda: evaluate(model, IDS, 12),
        "damaged": lambda: evaluate_damaged(model, IDS, 12, 11, 0.2),
        "cosine": lambda: gradient_cosine(PredictiveCoding(), model, X, Y),
        "snapshot": lambda: take_snapshot(model, PredictiveCoding(), X, Y, products=1).scale,
        "measure": lambda: {k: v for k, v in t.measure().items() if k != "step"},
        "construct": lambda: PCTransformer(CONFIG, seed=5).state_dict(),
        "ensemble": lambda: ensemble_log_probs([model], X),
        "scores": lambda: token_scores(model, X, known),
        "predictions": lambda: flat_predictions(model, X)[0],
    }
    for name, learner in LEARNERS.items():
        read[f"gradients, {name}"] = lambda learner=learner: seeded(learner, model)
    return read


def seeded(learner: Learner, model: PCTransformer) -> dict[str, Tensor]:
    "Gradients with dropout, from a seed."
    with drawing(Draws(4)):
        return gradients(learner, model, X, Y)


def test_threads_get_what_each_gets_alone() -> None:
    """Writing, measuring, looking, and making models at once, on one model: each number is that
    of a quiet machine."""
    model, t = trained(), trainer()
    t.model.load_state_dict(model.state_dict())
    t.model = model
    for p in model.parameters():
        p.grad = torch.full_like(p, 2.0)
    calls = readers(model, t)
    model.predictors[2].eval()  # a mixed mode
    modes, bits = [m.training for m in model.modules()], copy.deepcopy(model.state_dict())
    alone, state = {name: call() for name, call in calls.items()}, torch.get_rng_state()
    for row in together(list(calls.values()), times=6):
        for name, found in zip(calls, row, strict=True):
            assert same(found, alone[name]), name
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes and same(
        dict(model.state_dict()), dict(bits)
    )
    assert all(p.grad is not None and p.grad.eq(2).all() for p in model.parameters())


def test_a_run_trains_on_while_others_read() -> None:
    """Steps of training with dropout are the same bit for bit while another thread reads the
    weights they move."""
    for learner in (
        LearnerConfig(algorithm="backprop"),
        LearnerConfig(),
        LearnerConfig(centred=True),
    ):
        quiet, watched = trainer(learner), trainer(learner)
        expected = [quiet.advance() for _ in range(6)]
        with ThreadPoolExecutor(4) as pool:
            run = pool.submit(lambda t=watched: [t.advance() for _ in range(6)])
            looks = []
            while not run.done():
                looks = [
                    pool.submit(evaluate, watched.model, IDS[:60], 12),
                    pool.submit(generate, watched.model, X[:, :3], 4, seed=0, cache=False),
                    pool.submit(PCTransformer, CONFIG, 5),
                ]
                for look in looks:
                    look.result()
        assert run.result() == expected
        assert same(dict(watched.model.state_dict()), dict(quiet.model.state_dict()))


def test_twelve_threads_make_one_model() -> None:
    """The seed decides, however many are made at once, in every family; as the usual way does
    for one alone."""
    for family in get_args(Attention):
        config = replace(CONFIG, attention=family, bias=True)
        expected = PCTransformer(config, seed=5).state_dict()
        rows = together(
            [lambda config=config: PCTransformer(config, seed=5).state_dict()], 12, workers=12
        )
        assert all(same(dict(row[0]), dict(expected)) for row in rows)


GLOBAL = [
    (torch, "manual_seed"),
    (torch, "set_rng_state"),
    (torch, "seed"),
    (torch.random, "fork_rng"),
    (torch.random, "set_rng_state"),
    (torch.random, "manual_seed"),
    (nn.Module, "train"),
    (nn.Module, "eval"),
]


def test_nothing_global_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's ways of changing seed and mode taken away, all that reads, looks or trains
    still works."""
    model, t = trained(), trainer()
    calls = readers(model, t) | {"advance": t.advance}
    del calls["scores"]  # makes a model of another family, and sets that one's mode

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a global state was changed")

    state = torch.get_rng_state()
    for holder, name in GLOBAL:
        monkeypatch.setattr(holder, name, refuse)
    for call in calls.values():
        call()
    monkeypatch.undo()
    assert torch.equal(torch.get_rng_state(), state)


def sources() -> list[Path]:
    "Every module of the package."
    return sorted(Path(pc_transformer.__file__).parent.rglob("*.py"))


BORROWED = {
    "fork_rng",
    "set_rng_state",
    "default_generator",
    "manual_seed_all",
    "scratch_gradients",
    "set_default_dtype",
}


@pytest.mark.parametrize("path", sources(), ids=lambda p: p.stem)
def test_no_module_borrows(path: Path) -> None:
    """No global seed in the source; and a reader uses the view that `evaluating` gives, not the
    model it was given."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            assert node.attr not in BORROWED, f"{path.name}:{node.lineno}"
            whole = ast.unparse(node)
            assert whole not in ("torch.manual_seed", "np.random.seed", "random.seed"), (
                f"{path.name}:{node.lineno}"
            )
        for item in node.items if isinstance(node, ast.With) else ():
            if ast.unparse(item.context_expr).startswith("evaluating("):
                assert item.optional_vars is not None, (
                    f"{path.name}:{node.lineno}: evaluating(...) needs `as`"
                )


def test_evaluation_drops_nothing() -> None:
    """A model in training mode, whole or in part, is read without dropout: the numbers are those
    of its copy in eval."""
    model = trained()
    still = copy.deepcopy(model).eval()
    known = StateGaussians.fit(still, X)
    looks: dict[str, Callable[[PCTransformer], Any]] = {
        "evaluate": lambda m: evaluate(m, IDS, 12),
        "damaged": lambda m: evaluate_damaged(m, IDS, 12, 11, 0.2),
        "generate": lambda m: generate(m, X[:, :4], 6, seed=0, cache=False),
        "recompute": lambda m: generate(m, X[:, :4], 6, seed=0, settle=Recompute()),
        "evidence": lambda m: generate(m, X[:1, :4], 4, seed=0, settle=EvidenceSettler()),
        "cosine": lambda m: gradient_cosine(
            PredictiveCoding(ErrorSettling(FreeEnergy(30.0), steps=2)), m, X, Y
        ),
        "snapshot": lambda m: take_snapshot(m, PredictiveCoding(), X, Y, products=2).curvature,
        "ensemble": lambda m: ensemble_log_probs([m], X),
        "known": lambda m: StateGaussians.fit(m, X).mean[1],
        "scores": lambda m: token_scores(m, X, known),
        "predictions": lambda m: flat_predictions(m, X)[0],
    }
    for part in (None, 0, 1, 2):  # all of it, or one layer alone in training
        if part is not None:
            model.eval()
            model.predictors[part].train()
        for name, look in looks.items():
            assert same(look(model), look(still)), (name, part)
    logits = torch.cat([still(x[None, :-1]) for x in IDS[:397].unfold(0, 13, 12)])
    by_hand = F.cross_entropy(logits.flatten(0, 1), IDS[1:397]).item()
    assert evaluate(model.train(), IDS[:397], 12) == pytest.approx(by_hand, abs=1e-5)


class Masks:
    """Records which numbers each dropout of a model drops, in the order of the calls;
    attention's by its seed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.step, self.seen = 0, {}
        own, keep = Dropout.forward, Plan.kept

        def forward(layer: Dropout, x: Tensor) -> Tensor:
            out = own(layer, torch.ones_like(x)) if layer.training else x
            if layer.training:
                self.note("states", (x.shape, tuple((out == 0).flatten().tolist())))
            return x * out if layer.training else x

        def kept(plan: Any, p: Tensor, draw: torch.Generator) -> Tensor:
            out = keep(plan, p, draw)
            self.note("attention", (out.shape, tuple((out == 0).flatten().tolist())))
            return out

        monkeypatch.setattr(Dropout, "forward", forward)
        monkeypatch.setattr(Plan, "kept", kept)

    def note(self, kind: str, mask: Any) -> None:
        self.seen.setdefault((kind, self.step), []).append(mask)


WAYS = {
    "backprop": LearnerConfig(algorithm="backprop"),
    "one step": LearnerConfig(),
    "centred": LearnerConfig(centred=True),
    "soft": LearnerConfig(steps=3, relative_precision=10.0),
    "lean": LearnerConfig(lean=True),
    "state": LearnerConfig(solver="state", steps=2, relative_precision=10.0),
    "sweep": LearnerConfig(solver="sweep"),
    "highway": LearnerConfig(solver="highway", steps=2),
}


@pytest.mark.parametrize("way", WAYS)
def test_masks_belong_to_seed_step_and_layer(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer has a mask of its own in every step, the same at every look within a step, and
    again when run again."""
    masks = Masks(monkeypatch)
    runs = []
    for seed in (0, 0, 1):
        masks.seen = {}
        t = trainer(WAYS[way])
        t.config = replace(t.config, **{"train.seed": seed})
        for masks.step in range(3):
            t.advance()
        runs.append(masks.seen)
    assert runs[0] == runs[1]
    seen = runs[0]
    for kind, layers in (("states", 5), ("attention", 2)):
        each = [set(seen[kind, step]) for step in range(3)]
        assert all(len(found) == layers for found in each), [len(found) for found in each]
        once = way in ("backprop", "sweep", "highway") or kind == "attention"
        assert once or len(seen[kind, 0]) > layers  # looked at more than once
        for a, b in itertools.combinations(each, 2):
            assert not a & b, f"{kind}: a mask came back in another step"
        assert not set().union(*each) & set().union(
            *(set(runs[2][kind, step]) for step in range(3))
        )


def test_ranks_and_parts_draw_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that share a batch, and parts of one that is accumulated, do not drop the same."""
    masks = Masks(monkeypatch)
    t = trainer(LearnerConfig(algorithm="backprop"))
    for masks.step, rank in enumerate((0, 1)):
        t.team = dataclasses.replace(t.team, rank=rank, size=2)
        with t.precision_context():
            t.learner.backward(t.model, *t.batch(0))
    for kind in ("states", "attention"):
        assert not set(masks.seen[kind, 0]) & set(masks.seen[kind, 1])
    masks.step = 2
    t = trainer(LearnerConfig(algorithm="backprop"))
    t.config = replace(t.config, **{"train.accumulate": 2})
    with t.precision_context():
        t.backward()
    assert len(set(masks.seen["states", 2])) == 10 and len(set(masks.seen["attention", 2])) == 4


def test_dropout_is_torchs_own_from_the_same_seed() -> None:
    """Private masks are those that torch draws from a global seed, in every dtype, and gradients
    pass through them."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = torch.randn(3, 4, 5, dtype=torch.float64).to(dtype).requires_grad_()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(6)
            expected = F.dropout(x, 0.3)
        with drawing(Draws(6)):
            found = Dropout(0.3)(x)
        assert torch.equal(found, expected)
        grads = [torch.autograd.grad(y.sum(), x)[0] for y in (found, expected)]
        assert torch.equal(*grads)


def test_blocks_nest_and_end() -> None:
    """An error leaves the block; another thread never sees it; a look ahead takes nothing."""
    with pytest.raises(RuntimeError, match="inside"), drawing(Draws(1)):
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(generator).result() is None
        with drawing(ahead()):
            first = torch.rand(3, generator=generator())
        assert torch.equal(first, torch.rand(3, generator=generator()))
        raise RuntimeError("inside")
    assert generator() is None


@pytest.mark.parametrize("seed", [2**70, -(2**64), 1.5, "1", None, True, [1]])
def test_seeds_that_are_none(seed: Any) -> None:
    """One sentence before anything is drawn."""
    for call in (lambda: PCTransformer(CONFIG, seed=seed), lambda: Draws(seed)):
        with pytest.raises((TypeError, ValueError), match="a seed must"):
            call()
    if seed is not None:
        with pytest.raises((TypeError, ValueError), match="seed must"):
            generate(trained(), X[:, :3], 2, seed=seed)


class Tied(nn.Module):
    "Shared layers, a tied weight, neighbours that are not registered, and a circle."

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(4)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.again = nn.ModuleDict({"drop": self.drop})
        self.hidden, self.pair, self.named = [self.drop], (self.a, self.drop), {"x": self.drop}
        self.norm.owner = [self]  # a circle
        self.run = self.body

    def body(self, x: Tensor) -> Tensor:
        x = self.named["x"](self.pair[1](self.hidden[0](self.again["drop"](self.a(x)))))
        return self.b(self.norm.owner[0].norm(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


def test_a_view_is_the_model_in_another_mode() -> None:
    """Ties, circles, hooks and hidden neighbours hold in a view; what it does and learns stays
    with it."""
    model, x = Tied(), torch.randn(6, 4)
    calls: list[nn.Module] = []
    model.a.register_forward_hook(lambda m, *_: calls.append(m))
    expected = copy.deepcopy(model).eval()(x)
    still = view(model, training=False)
    assert (
        torch.equal(still(x), expected)
        and calls == [calls[0], still.a]
        and model.training
        and model.norm.training
    )
    assert (
        type(still) is Tied
        and still.norm.owner[0] is still
        and still.a.weight is still.b.weight is model.a.weight
    )
    assert [n for n, _ in still.named_modules()] == [n for n, _ in model.named_modules()]
    apart = view(model, tensor=leaf)
    assert apart.training and apart.a.weight is apart.b.weight is not model.a.weight
    apart(x).sum().backward()
    assert model.a.weight.grad is None and apart.a.weight.grad is not None
    copied = view(model, training=False, tensor=private)
    copied.load_state_dict({k: torch.zeros_like(v) for k, v in copied.state_dict().items()})
    assert (
        torch.equal(view(model, training=False)(x), copy.deepcopy(model).eval()(x))
        and model.a.weight.abs().sum() > 0
    )
    with torch.no_grad():
        model.a.bias += 1
    assert torch.equal(still.a.bias, model.a.bias)
    model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()}, assign=True)
    assert torch.equal(still.a.bias, model.a.bias)  # parameters that are replaced are seen, too


class Ordered(OrderedDict[str, Any]):
    "A dict of a kind of its own."


class Pair(NamedTuple):
    first: Any
    second: Any


class Keeps(nn.Module):
    """What drops out stands in containers that are no plain ones, none of them registered; one
    hook is a method."""

    def __init__(self) -> None:
        super().__init__()
        drop = nn.Dropout(0.5)
        self.ordered, self.pair = Ordered(drop=drop, other=1), Pair(drop, 2)
        self.default = defaultdict(list, drop=[drop])
        self.drop, self.notes = drop, []
        drop.register_forward_hook(self.note)

    def note(self, *_: Any) -> None:
        self.notes.append(self.training)

    def forward(self, x: Tensor) -> Tensor:
        return self.default["drop"][0](self.pair.first(self.ordered["drop"](x)))


def test_views_follow_every_kind_of_container() -> None:
    model, x = Keeps(), torch.ones(50)
    still = view(model, training=False)
    assert torch.equal(still(x), x) and model.notes == [True] * 3, "hooks are the model's own"
    assert (
        type(still.ordered) is Ordered
        and type(still.pair) is Pair
        and type(still.default) is defaultdict
    )
    assert (
        still.ordered["drop"]
        is still.pair.first
        is still.default["drop"][0]
        is still.drop
        is not model.drop
    )
    assert model.ordered["drop"] is model.drop and still.ordered["other"] == 1


def test_nobody_else_turns_the_mode_of_a_reader() -> None:
    """A model that is in eval mode already: its `train()`, called while it is read, is not
    heard."""
    model = trained().eval()
    with evaluating(model) as still:
        a = still(X)
        model.train()
        assert torch.equal(still(X), a) and not torch.equal(model(X), a)
    model.eval()
    reads = Still(model)
    seen = reads()
    model.train()
    with torch.no_grad():
        assert reads() is seen is not model and torch.equal(seen(X), a), "one view for all tokens"


def test_a_layer_without_dropout_compiles_as_one_graph() -> None:
    """Who drops nothing asks for no randomness."""
    layer, x = FeedForwardLayer(16), torch.randn(2, 5, 16)
    assert layer.training and torch.equal(
        torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x)
    )


def test_a_failure_inside_changes_nothing() -> None:
    model = trained()
    with pytest.raises(RuntimeError, match="inside"), evaluating(model) as still:
        assert not still.training and not torch.is_grad_enabled()
        raise RuntimeError("inside")
    assert all(m.training for m in model.modules()) and torch.is_grad_enabled()


def test_compiled_models_are_read_without_dropout() -> None:
    """A view of a compiled model, of one with a compiled layer, and of one that was compiled in
    place."""
    model = trained()
    expected = evaluate(copy.deepcopy(model).eval(), IDS, 12)
    whole = torch.compile(model, backend="eager")
    assert evaluate(whole, IDS, 12) == expected and model.training and whole.training
    model.predictors[1] = torch.compile(model.predictors[1], backend="eager")  # type: ignore[assignment]
    assert evaluate(model, IDS, 12) == expected and model.training
    model = trained()
    model.compile(backend="eager")
    assert evaluate(model, IDS, 12) == expected and model.training
    scripted = torch.jit.script(nn.Sequential(nn.Dropout(0.5)))
    with pytest.raises(TypeError, match="TorchScript"), evaluating(scripted):
        pass


def test_a_stream_sees_what_its_caller_does() -> None:
    """Between two tokens of one text, layers may be replaced and modes switched."""
    model = trained()
    steps = stream(model, X[:1, :4], 4, temperature=0, cache=False)
    first = next(steps).tokens
    assert torch.equal(first, generate(model, X[:1, :4], 1, temperature=0)[0, -1:])
    with torch.no_grad():
        other = PCTransformer(CONFIG, seed=9)
        stir(other, 5, 8.0)
    model.predictors[3] = other.predictors[3]
    model.eval()
    text = torch.cat([X[:1, :4], first[None]], 1)
    model.train()
    assert torch.equal(next(steps).tokens, generate(model, text, 1, temperature=0)[0, -1:])


def test_a_rehearsal_moves_no_weights() -> None:
    """A learner that steps while it settles (incremental) only clears the gradients of the view."""
    model = trained()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

    def apply() -> None:
        optimizer.step()
        optimizer.zero_grad()

    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = copy.deepcopy(model.state_dict())
    report, found = try_learner(
        IncrementalPC(StateSettling(FreeEnergy(30.0), steps=3), apply), model, X, Y, measure=True
    )
    assert same(dict(model.state_dict()), dict(before)) and all(
        p.grad.eq(1).all() for p in model.parameters()
    )  # type: ignore[union-attr]
    assert report.residual is not None and any(g.abs().sum() > 0 for g in found.values())


def test_settling_refuses_dropout_that_it_cannot_repeat() -> None:
    model = trained()
    model.predictors[2].dropout = nn.Dropout(0.4)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"isolation\.Dropout"):
        PredictiveCoding().backward(model, X, Y)
    model.eval()
    PredictiveCoding().backward(model, X, Y)
