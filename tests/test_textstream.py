"""Streamed text is exactly the decoded text, cut nowhere inside a character and before any stop string."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sessiond.textstream import Detokenizer, StopHit, TextStream

SAMPLES = [
    "Hello, world! It's 3 o'clock.  Two  spaces\n\n\tand a tab.",
    "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, 👍🏽 thumb, 🇨🇭",
    "国破山河在,城春草木深。한국어 조선말 日本語",
    "e\u0301 a\u0308\u0323 \u200bzero\u200dwidth नमस्ते ภาษาไทย \u202eright to left",
    "\ufffd literal replacement \ufffd\ufffd characters \ufffd",
    "def f(x):\n    return {x: 'y'}\n\n\n",
    " leading and trailing ",
]


class Case:
    """A tokenizer with its detokenizer; `ids` are all ids a model may sample."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.detokenizer = Detokenizer(tokenizer)
        self.ids = sorted(tokenizer.get_vocab().values())

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))


def sentencepiece(style: str) -> PreTrainedTokenizerFast:
    """Small tokenizers in the styles of Llama 2 (legacy), of Metaspace, and without a leading space (Gemma)."""
    words = ["▁", "▁Hello", "▁world", "▁a", "ing", "st", "op", "▁stop", "\ufffd", "▁▁▁", ",", "!", *"Helowrdainstp"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocab = [(piece, 0.0 if i < 3 else -1.0 - len(pieces) / (len(piece) + 1)) for i, piece in enumerate(pieces)]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    if style == "llama":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(steps)
    elif style == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(piece, special=True) for piece in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges but for one: every character of two bytes or more spans tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate([*alphabet, "st", "<|end|>"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("s", "t")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


BUILT = ["bytes", "llama", "metaspace", "gemma"]


@cache
def built(name: str) -> Case:
    return Case(byte_level() if name == "bytes" else sentencepiece(name))


@pytest.fixture(scope="module")
def smol(smollm2_dir: Path) -> Case:
    return Case(AutoTokenizer.from_pretrained(smollm2_dir))


def expected_hit(text: str, stops: Sequence[str]) -> tuple[str, str] | None:
    """The definition: the stop string completed first, the longest if several; (text before it, stop)."""
    for end in range(len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            stop = max(hits, key=len)
            return text[: end - len(stop)], stop
    return None


def run(case: Case, ids: Sequence[int], stops: Sequence[str] = ()) -> tuple[str, StopHit | None]:
    """Stream ids, checking on the way what holds at every step."""
    stream = TextStream(case.detokenizer, stops)
    shown = ""
    full = case.decode(ids)
    for n, token_id in enumerate(ids, 1):
        delta = stream.push(token_id)
        assert delta.byte_offset == len(shown.encode())
        shown += delta.text
        assert full.startswith(shown)
        assert len(stream._window) <= 80 or stream._in_bytes
        if stream.stopped:
            break
        text = case.decode(ids[:n]).removesuffix("\ufffd")
        open_stops = [k for stop in stops for k in range(1, len(stop)) if text.endswith(stop[:k])]
        assert len(shown) <= len(text) - max(open_stops, default=0)
    delta = stream.flush()
    assert delta.byte_offset == len(shown.encode())
    shown += delta.text
    assert stream.flush().text == ""
    return shown, stream.stopped


def check(case: Case, ids: Sequence[int], stops: Sequence[str] = ()) -> None:
    shown, hit = run(case, ids, stops)
    text = case.decode(ids)
    expected = expected_hit(text, stops)
    if expected is None:
        assert hit is None
        assert shown == text
        return
    assert hit is not None
    assert (shown, hit.stop) == expected
    assert case.decode(ids[: hit.n_whole_tokens]) + hit.visible_rest == shown
    if not case.detokenizer.bytes and "\ufffd" not in text:
        # No longer run of tokens lies wholly before the stop string (special tokens before it belong to the run).
        longer = [case.decode(ids[:n]) for n in range(hit.n_whole_tokens + 1, len(ids) + 1)]
        assert not any(shown.startswith(run) for run in longer)


def token_ids(case: Case) -> st.SearchStrategy[list[int]]:
    """Arbitrary ids, real encodings of text, and encodings cut and glued inside characters."""
    text = st.one_of(
        st.sampled_from(SAMPLES), st.text(max_size=12), st.text("stop Hello,\n\u00e9\u20ac😀", max_size=20)
    )
    piece = st.one_of(
        st.lists(st.sampled_from(case.ids), max_size=12),
        text.map(case.encode),
        st.tuples(text.map(case.encode), st.integers(0, 6), st.integers(0, 6)).map(
            lambda part: part[0][part[1] : max(len(part[0]) - part[2], 0)]
        ),
    )
    return st.lists(piece, max_size=5).map(lambda parts: [token_id for part in parts for token_id in part])


def stop_strings(text: str) -> st.SearchStrategy[list[str]]:
    """Pieces of the text itself (with overlaps), and strings that are not in it."""
    places = st.tuples(st.integers(0, max(len(text) - 1, 0)), st.integers(1, 9))
    inside = places.map(lambda place: text[place[0] : place[0] + place[1]] or "\n")
    return st.lists(st.one_of(inside, st.sampled_from(["stop", "st", "top", "\n\n", "\ufffd", "aab"])), max_size=4)


RELAXED = settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=150)


@pytest.mark.parametrize("name", BUILT)
@RELAXED
@given(data=st.data())
def test_stream_equals_decoding_and_stops_by_definition(name: str, data: st.DataObject) -> None:
    case = built(name)
    ids = data.draw(token_ids(case))
    check(case, ids)
    check(case, ids, data.draw(stop_strings(case.decode(ids))))


@pytest.mark.model
@RELAXED
@given(data=st.data())
def test_default_model_stream_equals_decoding_and_stops_by_definition(smol: Case, data: st.DataObject) -> None:
    ids = data.draw(token_ids(smol))
    check(smol, ids)
    check(smol, ids, data.draw(stop_strings(smol.decode(ids))))


@pytest.mark.model
@pytest.mark.parametrize("text", SAMPLES)
def test_default_model_streams_samples_whole(smol: Case, text: str) -> None:
    shown, hit = run(smol, smol.encode(text))
    assert (shown, hit) == (text, None)


@pytest.mark.model
def test_a_token_is_shown_at_once_when_nothing_is_open(smol: Case) -> None:
    stream = TextStream(smol.detokenizer, ["\n\n", "User:"])
    ids = smol.encode("The quick brown fox")
    assert [stream.push(token_id).text for token_id in ids] == [smol.decode([token_id]) for token_id in ids]


@pytest.mark.model
def test_stop_inside_a_token_keeps_its_visible_part(smol: Case) -> None:
    ids = smol.encode("I like strawberries")
    shown, hit = run(smol, ids, ["berr"])
    assert shown == "I like straw"
    assert hit is not None
    assert hit.stop == "berr"
    assert smol.decode(ids[: hit.n_whole_tokens + 1]) > shown
    assert smol.decode(ids[: hit.n_whole_tokens]) + hit.visible_rest == shown


def test_stop_spanning_tokens_is_held_back_and_released_if_it_does_not_come() -> None:
    case = built("bytes")
    stream = TextStream(case.detokenizer, ["abcabd"])
    texts = [stream.push(token_id).text for token_id in case.encode("abcabcabx")]
    assert texts == ["", "", "", "", "", "abc", "", "", "abcabx"]
    stream = TextStream(case.detokenizer, ["abcabd"])
    texts = [stream.push(token_id).text for token_id in case.encode("abcabcabd")]
    assert texts == ["", "", "", "", "", "abc", "", "", ""]
    assert stream.stopped == StopHit("abcabd", 3, "")


def test_stop_beginning_inside_a_split_character_counts_its_first_token_out() -> None:
    case = built("bytes")
    assert run(case, case.encode("x😀y"), ["😀"]) == ("x", StopHit("😀", 1, ""))
    # é is C3 A9; the last whole token before the cut is x, although C3 came earlier.
    assert run(case, case.encode("xé!"), ["!"]) == ("xé", StopHit("!", 3, ""))


def test_special_tokens_are_counted_and_not_shown() -> None:
    case = built("bytes")
    end = case.tokenizer.convert_tokens_to_ids("<|end|>")
    a, b, stop = case.encode("ab.")
    assert run(case, [end, a, end, b, end, stop], ["."]) == ("ab", StopHit(".", 5, ""))


def test_unfinished_character_is_held_and_flushed_as_replacement() -> None:
    case = built("bytes")
    first, second = case.encode("é")
    stream = TextStream(case.detokenizer)
    assert stream.push(first).text == ""
    assert stream.flush().text == "\ufffd"
    stream = TextStream(case.detokenizer)
    assert stream.push(first).text == ""
    assert stream.push(second).text == "é"


def test_long_runs_of_malformed_bytes_cost_a_bounded_window() -> None:
    case = built("bytes")
    lead, tail = case.encode("é")
    for ids in ([lead] * 400, [tail] * 400, [lead, lead, tail, tail] * 100):
        assert run(case, ids) == (case.decode(ids), None)


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.parametrize("text", ["Hello world, stop!", "a 😀 stop", "é\n\nHello", "   a"])
def test_continuing_with_context_adds_what_a_whole_stream_would(name: str, text: str) -> None:
    case = built(name)
    ids = case.encode(text)
    for cut in range(1, len(ids)):
        before = case.decode(ids[:cut])
        if "\ufffd" in before or not before or ids[cut - 1] in case.detokenizer.bytes:
            continue
        stream = TextStream(case.detokenizer, (), ids[:cut])
        parts = [stream.push(token_id).text for token_id in ids[cut:]]
        assert before + "".join(parts) + stream.flush().text == case.decode(ids)
