"""Deltas add up to what the template itself renders, over the templates of several model families."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sessiond.errors import BadMessage, EmptyInput
from sessiond.template import CONTENT, ChatTemplate, Message, TokenDelta, ToolCall

# The published templates, shortened to what matters: headers, order checks, trimming, trailers.
CHATML = """{% for message in messages %}{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system
You are helpful.<|im_end|>
' }}{% endif %}{{ '<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""

LLAMA3 = """{{ '<|begin_of_text|>' }}{% for message in messages %}{{ '<|start_header_id|>' + message['role']
 + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

MISTRAL = """{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}
{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}{{- '<s>' }}
{%- for message in loop_messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate user/assistant') }}{%- endif %}
{%- if message['role'] == 'user' %}{%- if loop.last and system is defined %}
{{- '[INST] ' + system + '\n\n' + message['content'] + '[/INST]' }}{%- else %}
{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}
{%- else %}{{- ' ' + message['content'] | trim + '</s>' }}{%- endif %}{%- endfor %}"""

GEMMA = """{{ '<bos>' }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}
{%- endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate') }}{% endif %}
{%- if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
{{- '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

PHI3 = """{% for message in messages %}
{{- '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}"""

ZEPHYR = """{% for message in messages %}
{{- '<<' + message['role'] + '>>\n' + message['content'] + '</s>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<<assistant>>\n' }}{% endif %}"""

# Earlier answers lose their reasoning, the last one keeps it (Qwen3's way).
QWEN3 = """{%- set ns = namespace(last=-1) %}{%- for m in messages %}{%- if m['role'] == 'user' %}
{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}{%- for m in messages %}{%- set content = m['content'] %}
{%- if m['role'] == 'assistant' and loop.index0 < ns.last %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}
{{- '<|im_start|>' + m['role'] + '\n' + content + '<|im_end|>\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""

# Reasoning vanishes from every answer, and the prompt begins one (DeepSeek R1's way).
R1 = """{{ '<s>' }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|user|>' + m['content'] }}
{%- elif m['role'] == 'system' %}{{ m['content'] }}
{%- else %}{{ '<|assistant|>' + m['content'].split('</think>')[-1] + '<|end|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"""

TOOLS = """{% if tools %}{{ '<|system|>' + (tools | tojson) + '<|end|>\n' }}{% endif %}{% for m in messages %}
{%- if m['role'] == 'tool' and not messages[loop.index0 - 1].tool_calls %}{{ raise_exception('no call') }}{% endif %}
{{- '<|' + m['role'] + '|>\n' + m['content'] }}{% for call in m.tool_calls or [] %}
{{- '<call>' + call.function.name + ' ' + (call.function.arguments | tojson) + '</call>' }}{% endfor %}
{{- '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""

SPECIAL = [
    "<s>",
    "</s>",
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<bos>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|tool|>",
    "<|end|>",
    "[INST]",
    "[/INST]",
]

FAMILIES: dict[str, tuple[str, str]] = {
    "chatml": (CHATML, "<|im_end|>\n"),
    "llama3": (LLAMA3, "<|eot_id|>"),
    "mistral": (MISTRAL, "</s>"),
    "gemma": (GEMMA, "<end_of_turn>\n"),
    "phi3": (PHI3, "<|end|>\n"),
    "zephyr": (ZEPHYR, "</s>\n"),
}


def tokenizer_with(template: str | None) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges, one of them over newlines, and the families' special tokens."""
    merges = [("Ċ", "Ċ"), ("h", "e"), ("Ġ", "a"), ("a", "s"), ("u", "s"), ("us", "e")]
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(merge) for merge in merges)]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=template, eos_token="</s>", clean_up_tokenization_spaces=False
    )


@cache
def chat(family: str) -> tuple[ChatTemplate, PreTrainedTokenizerFast]:
    tokenizer = tokenizer_with(FAMILIES[family][0])
    return ChatTemplate(tokenizer), tokenizer


def user(text: str) -> Message:
    return Message("user", text)


def answer(text: str, *calls: ToolCall) -> Message:
    return Message("assistant", text, calls)


def whole(tokenizer: Any, messages: Sequence[Message], generate: bool) -> str:
    dicts = [message.as_dict() for message in messages]
    return str(tokenizer.apply_chat_template(dicts, tokenize=False, add_generation_prompt=generate))


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def closing_ids(template: ChatTemplate, tokenizer: Any, ended: Any, last_id: int | None) -> list[int]:
    """The end-of-turn text still missing behind an answer, as tokens by itself."""
    return list(tokenizer.encode(template.open_tail(ended, last_id), add_special_tokens=False))


def converse(
    template: ChatTemplate, tokenizer: Any, root: list[Message], turns: list[tuple[str, str, str]], as_one: bool
) -> tuple[list[int], list[Message], bool]:
    """Keep a log over turns of (question, answer, how it ended), checking it against the template at each step."""
    traits = template.probe()
    log = list(template.render_root(root).ids)
    history = list(root)
    ended, drifted = "", False
    for question, reply, ended_now in turns:
        tail = ""
        if ended:
            tail = template.open_tail(ended, log[-1])  # type: ignore[arg-type]
            if not as_one:
                log += closing_ids(template, tokenizer, ended, log[-1])
        delta = template.render_turn(history, [user(question)], open_tail=tail if as_one else None)
        assert decode(tokenizer, delta.ids) == delta.text
        drifted |= delta.drift
        log += delta.ids
        history.append(user(question))
        if not delta.drift:
            assert decode(tokenizer, log) == whole(tokenizer, history, True)
        log += tokenizer.encode(traits.answer_lead + reply, add_special_tokens=False)
        if ended_now == "stop_token":
            log.append(traits.end_of_turn_ids[0])
        history.append(answer(reply))
        ended = ended_now
    log += closing_ids(template, tokenizer, ended, log[-1])
    return log, history, drifted


TURNS = [
    ("hello", "Hello! user\nassistant", "stop_token"),
    ("user", "assistant", "open"),
    ("What's 2+2?\n\nTell me.", "4\n\n- four", "open"),
    ("日本語 😀 e\u0301", "はい 👩‍👩‍👧", "stop_token"),
    ("bye\n", "", "stop_token"),
]


@pytest.mark.parametrize("as_one", [True, False])
@pytest.mark.parametrize(
    ("family", "system"),
    # Gemma has no system role; Mistral's system prompt moves (tested below).
    [(family, "") for family in FAMILIES] + [(f, "Be terse.") for f in FAMILIES if f not in {"gemma", "mistral"}],
)
def test_deltas_of_a_dialogue_add_up_to_the_templates_rendering(family: str, system: str, as_one: bool) -> None:
    template, tokenizer = chat(family)
    root = [Message("system", system)] if system else []
    # A trimming template and an answer's own whitespace disagree by design: keep it off the edges there.
    trims = template.probe().trims_content or template.probe().answer_lead
    turns = [(q.strip() if trims else q, a.strip() if trims else a, e) for q, a, e in TURNS]
    log, history, drifted = converse(template, tokenizer, root, turns, as_one)
    assert not drifted
    assert decode(tokenizer, log) == whole(tokenizer, history, False).removesuffix(template.probe().trailer)


@pytest.mark.parametrize("family", FAMILIES)
def test_probe_finds_the_closing_and_the_stop_token(family: str) -> None:
    template, tokenizer = chat(family)
    traits = template.probe()
    closing = FAMILIES[family][1]
    assert traits.problem == ""
    assert traits.end_of_turn == closing
    assert traits.prefix_stable
    end_id = tokenizer.encode(closing, add_special_tokens=False)[0]
    assert template.stop_ids == {end_id, tokenizer.eos_token_id}
    assert ChatTemplate(tokenizer, [7]).stop_ids == template.stop_ids | {7}
    assert traits.default_system == (family == "chatml")
    assert traits.supports_system == (family != "gemma")
    assert traits.trims_content == (family in {"llama3", "gemma"})
    assert traits.trailer == ("<|endoftext|>" if family == "phi3" else "")
    assert traits.answer_lead == (" " if family == "mistral" else "")
    assert traits.drifts == (family == "mistral")


def test_closing_completes_what_generation_left_open() -> None:
    template, tokenizer = chat("chatml")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    newline = tokenizer.encode("\n")
    other_stop = tokenizer.convert_tokens_to_ids("</s>")
    assert closing_ids(template, tokenizer, "stop_token", end) == newline
    assert closing_ids(template, tokenizer, "open", 5) == [end, *newline]
    assert closing_ids(template, tokenizer, "stop_token", other_stop) == [end, *newline]
    # A newline sampled as a stop token of the request is an answer's text, not the closing's newline.
    assert closing_ids(template, tokenizer, "stop_token", newline[0]) == [end, *newline]
    assert template.open_tail("open", None) == "<|im_end|>\n"


def test_default_system_prompt_appears_once_at_the_start() -> None:
    template, tokenizer = chat("chatml")
    assert template.render_root([]) == TokenDelta([], [])
    log, _, _ = converse(template, tokenizer, [], TURNS, True)
    text = decode(tokenizer, log)
    assert text.count("You are helpful.") == 1
    assert text.startswith("<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nhello")
    log, _, _ = converse(template, tokenizer, [Message("system", "")], TURNS, True)
    assert "You are helpful." not in decode(tokenizer, log)
    # A log that began with raw token ids is not at its start.
    assert "You are helpful." not in template.render_turn([], [user("x")], at_start=False).text


def test_a_delta_does_not_grow_with_its_history() -> None:
    _, tokenizer = chat("chatml")
    calls: list[int] = []
    render = tokenizer.apply_chat_template

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def __call__(self, text: str, **kwargs: Any) -> Any:
            return tokenizer(text, **kwargs)

        def apply_chat_template(self, conversation: list[dict[str, Any]], **kwargs: Any) -> Any:
            calls.append(len(conversation))
            return render(conversation, **kwargs)

    counted = ChatTemplate(Counting())  # type: ignore[arg-type]
    history = [Message("system", "s"), *[user("q"), answer("a")] * 300]
    calls.clear()
    delta = counted.render_turn(history, [user("next")])
    assert max(calls) == 3
    assert whole(tokenizer, [*history, user("next")], True).endswith(delta.text)


def test_unusual_orders_are_rendered_behind_the_whole_history() -> None:
    template, tokenizer = chat("chatml")
    history = [user("a"), answer("b"), user("c")]
    new = [Message("system", "from now on in French"), user("d")]
    delta = template.render_turn(history, new)
    assert whole(tokenizer, history, False) + delta.text == whole(tokenizer, [*history, *new], True)
    assert not delta.drift
    appended = template.render_turn(history, new, add_generation_prompt=False)
    later = template.render_turn([Message("system", "s"), Message("system", "t")], [user("d")])
    assert (later.drift, later.text) == (False, template.render_turn(history, [user("d")]).text)
    prompt = tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)
    assert appended.ids + prompt == delta.ids


def test_an_order_the_template_refuses_is_named() -> None:
    template, _ = chat("mistral")
    with pytest.raises(BadMessage, match="alternate"):
        template.render_turn([user("a"), answer("b"), user("c")], [user("d")])
    with pytest.raises(BadMessage, match="System role not supported"):
        chat("gemma")[0].render_root([Message("system", "s")])


def test_a_system_prompt_that_moves_to_the_last_message_drifts_and_is_not_repeated() -> None:
    template, tokenizer = chat("mistral")
    assert template.probe().prefix_stable
    assert not template.probe().prefix_stable_system
    log, _, drifted = converse(template, tokenizer, [Message("system", "Be terse.")], TURNS[:3], True)
    assert drifted
    text = decode(tokenizer, log)
    assert text.startswith("<s>[INST] Be terse.\n\nhello[/INST]")
    assert text.count("Be terse.") == 1


THOUGHT = "<think>\nhm\n</think>\n\nyes"


@pytest.mark.parametrize(("source", "closing"), [(QWEN3, "<|im_end|>\n"), (R1, "<|end|>")])
def test_templates_that_drop_reasoning_are_found_and_said_to_drift(source: str, closing: str) -> None:
    tokenizer = tokenizer_with(source)
    template = ChatTemplate(tokenizer)
    assert template.probe().drops_reasoning
    assert template.probe().drifts
    assert template.probe().end_of_turn == closing
    first = template.render_turn([], [user("q")])
    assert not first.drift
    second = template.render_turn([user("q"), answer(THOUGHT)], [user("r")], open_tail=closing)
    assert second.drift
    expected = whole(tokenizer, [user("q"), answer("yes"), user("r")], True)
    assert expected.endswith(second.text)
    assert second.text.startswith(closing)
    assert second.text.count("r") >= 1
    assert "hm" not in second.text
    assert "q" not in second.text.removeprefix(closing)


def test_answers_without_reasoning_do_not_drift() -> None:
    template = ChatTemplate(tokenizer_with(QWEN3))
    assert not template.render_turn([user("q"), answer("plain")], [user("r")]).drift


def test_tools_and_their_results() -> None:
    tokenizer = tokenizer_with(TOOLS)
    template = ChatTemplate(tokenizer)
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    root = template.render_root([Message("system", "s")], tools)
    assert root.text.startswith('<|system|>[{"type"')
    call = ToolCall("add", '{"a": 1}', "c1")
    history = [Message("system", "s"), user("1+1?"), answer("", call)]
    result = Message("tool", "2", tool_call_id="c1", name="add")
    delta = template.render_turn(history, [result], tools=tools)
    assert delta.text == "<|tool|>\n2<|end|>\n<|assistant|>\n"
    assert not delta.drift
    assert "add" not in template.render_turn([*history, result, answer("2")], [user("thanks")], tools=tools).text
    # With no root messages the first turn brings the tools.
    assert template.render_turn([], [user("x")], tools=tools).text.startswith('<|system|>[{"type"')
    assert ToolCall("f", "{bad").as_dict()["function"]["arguments"] == "{bad"
    assert ToolCall("f", "[1]").as_dict()["function"]["arguments"] == "[1]"
    assert ToolCall("f").as_dict()["function"]["arguments"] == {}


def flagged(tokenizer: Any, delta: TokenDelta, flag: int) -> str:
    return decode(tokenizer, [i for i, f in zip(delta.ids, delta.flags, strict=True) if f == flag])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", ["user", "assistant", "hello <|im_end|> there", "INST", "  padded  ", "😀"])
def test_flags_tell_content_from_template(family: str, text: str) -> None:
    template, tokenizer = chat(family)
    kept = text.strip() if template.probe().trims_content else text
    history = [user("q"), answer("a")]
    messages = [user(text), answer("so"), user(text)]
    for delta in (template.render_turn(history, messages), template.render_turn([], messages)):
        assert len(delta.flags) == len(delta.ids)
        assert flagged(tokenizer, delta, CONTENT).replace(" ", "") == (kept + "so" + kept).replace(" ", "")
    shifted = template.render_turn(history, messages, open_tail=template.open_tail("open", None))
    assert flagged(tokenizer, shifted, CONTENT) == flagged(tokenizer, template.render_turn(history, messages), CONTENT)


@settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=80)
@given(
    st.sampled_from(sorted(FAMILIES)),
    st.lists(
        st.tuples(st.text(min_size=1), st.text(), st.sampled_from(["stop_token", "open"])), max_size=4, min_size=1
    ),
    st.booleans(),
)
def test_any_text_adds_up(family: str, turns: list[tuple[str, str, str]], as_one: bool) -> None:
    template, tokenizer = chat(family)
    turns = [(q.strip() or "q", a.strip(), e) for q, a, e in turns]
    log, history, drifted = converse(template, tokenizer, [], turns, as_one)
    assert not drifted
    assert decode(tokenizer, log) == whole(tokenizer, history, False).removesuffix(template.probe().trailer)


BROKEN = {
    "absent": (None, "chat_template is not set"),
    "syntax": ("{% for %}", "refuses"),
    "refusing": ("{{ raise_exception('never') }}", "never"),
    "blind": ("nothing", "keep earlier messages"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_without_a_working_template_only_messages_are_refused(kind: str) -> None:
    source, reason = BROKEN[kind]
    template = ChatTemplate(tokenizer_with(source), [9])
    assert template.probe().problem
    assert template.stop_ids == {9, tokenizer_with(source).eos_token_id}
    assert template.render_root([]).ids == []
    for call in (
        lambda: template.render_root([user("x")]),
        lambda: template.render_turn([], [user("x")]),
        lambda: template.open_tail("open", None),
    ):
        with pytest.raises(BadMessage, match=reason):
            call()


def test_messages_are_checked() -> None:
    for make in (
        lambda: Message("robot", "x"),
        lambda: Message("User", "x"),
        lambda: Message("user", "\ud800"),
        lambda: Message("assistant", "\udfff x"),
        lambda: Message("tool", "x", name="\ud800"),
        lambda: Message("user", b"x"),  # type: ignore[arg-type]
        lambda: Message("user", "x", tool_calls=(ToolCall("f"),)),
        lambda: Message("user", "x", tool_call_id="1"),
        lambda: Message("assistant", "", (ToolCall("f", "\ud800"),)),
    ):
        with pytest.raises(BadMessage):
            make()
    with pytest.raises(EmptyInput):
        Message("user", "")
    for role in ("system", "assistant", "tool"):
        Message(role, "")
    with pytest.raises(EmptyInput):
        chat("chatml")[0].render_turn([], [])


@pytest.mark.model
@pytest.mark.parametrize("system", ["", "Be terse."])
def test_default_model_dialogue_has_the_ids_of_the_whole_rendering(smollm2_dir: Path, system: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    template = ChatTemplate(tokenizer, [2])
    traits = template.probe()
    assert (traits.default_system, traits.supports_system, traits.drifts) == (True, True, False)
    assert (traits.end_of_turn, traits.end_of_turn_ids) == ("<|im_end|>\n", (2, 198))
    assert template.stop_ids == {2}
    root = [Message("system", system)] if system else []
    log, history, drifted = converse(template, tokenizer, root, TURNS, True)
    assert not drifted
    text = whole(tokenizer, history, False)
    assert decode(tokenizer, log) == text
    # Not promised, but true of this template, whose parts begin and end with special tokens or newlines.
    assert len(log) == pytest.approx(len(tokenizer.encode(text, add_special_tokens=False)), abs=len(TURNS))
