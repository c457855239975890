"""A turn, seen from outside: what it streams, what it commits, and how it ends."""

from __future__ import annotations

import asyncio
import math

import pytest
from e2e_daemon import Peer, Turn, everything, refused
from e2e_model import CONTEXT, DEFAULT_SYSTEM, SPECIAL, STOP
from grpc import StatusCode
from transformers import AutoTokenizer

from sessiond.stepevents import TokenOut
from sessiond.v1 import sessions_pb2, types_pb2


@pytest.fixture(scope="session")
def tokenizer(chat_model):
    return AutoTokenizer.from_pretrained(chat_model)


def say(tokenizer, letter: str) -> dict[int, float]:
    """A bias that makes every token that letter."""
    (token,) = tokenizer.encode(letter, add_special_tokens=False)
    return {token: 100.0}


def log_of(daemon, session) -> list[int]:
    """The token ids in the log, root to head."""
    log = daemon.desk.store.log
    return [
        int(token)
        for revision in log.chain(session.tenant, session.head_revision_id)
        for token in log.tokens(session.tenant, revision.revision_id)[0]
    ]


def assert_well_formed(turn: Turn) -> None:
    """The order of events, one terminal event, and counts that agree with each other."""
    kinds = turn.kinds
    assert kinds[0] == "accepted"
    assert kinds[-1] == "finished"
    middle = kinds[1:-1]
    assert middle[:1] == ["restored"] or "restored" not in middle
    assert set(middle[1:]) <= {"token"}
    assert [event.sequence for event in turn.events] == list(range(len(kinds)))
    index, offset = 0, 0
    for part in turn.tokens:
        assert part.first_token_index == index
        assert part.text_offset == offset
        index += len(part.token_ids)
        offset += len(part.text.encode())
    assert turn.text == turn.answer


class TestAConversation:
    async def test_events_come_in_order_and_text_deltas_are_the_answer(self, peer: Peer):
        session = await peer.create(system="Be brief.")
        for text in ("Hello there", "And again", "A third time"):
            turn = await peer.turn(session.session_id, text, max_tokens=12)
            assert_well_formed(turn)
            assert len(turn.ids) == turn.finished.usage.generated_tokens == 12
            assert turn.finished.finish_reason == types_pb2.FINISH_REASON_LENGTH
            assert turn.answer

    async def test_new_and_reused_tokens_add_up_to_the_prompt(self, peer: Peer):
        session = await peer.create(system="Be brief.")
        first = await peer.turn(session.session_id, "Hello there", max_tokens=8)
        usage = first.finished.usage
        prompt = first.finished.committed_tokens - 8
        assert usage.prompt_tokens_new + usage.prompt_tokens_reused == prompt
        assert usage.prompt_tokens_reused == 0
        await peer.settled(session.session_id)

        second = await peer.turn(session.session_id, "And again", max_tokens=8)
        usage = second.finished.usage
        assert usage.prompt_tokens_new + usage.prompt_tokens_reused == second.finished.committed_tokens - 8
        # All of the first turn but its last token, which was sampled and never computed.
        assert usage.prompt_tokens_reused == first.finished.committed_tokens - 1
        assert second.accepted.prompt_tokens_new == usage.prompt_tokens_new
        assert second.accepted.prompt_tokens_reused == usage.prompt_tokens_reused

    async def test_each_turn_moves_the_head_and_the_count(self, peer: Peer):
        session = await peer.create(system="Be brief.")
        heads = [session.head_revision_id]
        for text in ("one", "two"):
            turn = await peer.turn(session.session_id, text, max_tokens=4)
            now = await peer.get(session.session_id)
            assert turn.accepted.revision_id == heads[-1]
            assert now.head_revision_id == turn.finished.revision_id == turn.accepted.turn_revision_id
            assert now.token_count == turn.finished.committed_tokens
            assert now.etag != session.etag
            heads.append(now.head_revision_id)
        revisions = await peer.revisions(session.session_id)
        assert [r.revision_id for r in revisions] == heads
        assert [r.parent_revision_id for r in revisions] == ["", *heads[:-1]]

    async def test_a_revision_tells_what_was_asked_and_answered(self, peer: Peer):
        session = await peer.create(system="Be brief.")
        turn = await peer.turn(session.session_id, "What is it?", max_tokens=6, request_id="the-turn")
        request = sessions_pb2.GetRevisionRequest(session_id=session.session_id, revision_id=turn.finished.revision_id)
        revision = await peer.call(peer.sessions.GetRevision, request)
        assert [(m.role, m.content[0].text) for m in revision.messages] == [("user", "What is it?")]
        assert revision.answer == turn.finished.answer
        assert revision.kind == types_pb2.REVISION_KIND_TURN
        assert revision.finish_reason == types_pb2.FINISH_REASON_LENGTH
        assert revision.usage == turn.finished.usage
        assert revision.request_id == "the-turn"
        assert not revision.aborted

    async def test_log_ends_are_the_lengths_of_what_was_logged(self, peer: Peer, daemon):
        session = await peer.create(system="Be brief.")
        for text in ("one", "two", "three"):
            await peer.turn(session.session_id, text, max_tokens=5)
        revisions = await peer.revisions(session.session_id)
        ends = 0
        for revision in revisions:
            ids, _ = daemon.desk.store.log.tokens("default", revision.revision_id)
            assert revision.log_start == ends
            ends += len(ids)
            assert revision.log_end == ends


class TestTheTemplate:
    async def test_the_log_is_the_conversation_as_the_template_renders_it(self, peer: Peer, daemon, tokenizer):
        session = await peer.create(messages=[{"role": "system", "content": "Be brief."}])
        said = []
        for text in ("Hello", "Again"):
            turn = await peer.turn(session.session_id, text, max_tokens=5)
            said += [{"role": "user", "content": text}, {"role": "assistant", "content": turn.answer}]
        whole = tokenizer.apply_chat_template([{"role": "system", "content": "Be brief."}, *said], tokenize=False)
        log = tokenizer.decode(log_of(daemon, await peer.get(session.session_id)))
        # The last answer is closed when the next turn comes.
        assert log == whole.removesuffix(SPECIAL[STOP] + "\n")

    async def test_the_default_system_prompt_comes_once(self, peer: Peer, daemon, tokenizer):
        session = await peer.create(messages=[{"role": "user", "content": "Hello"}])
        await peer.turn(session.session_id, "First", max_tokens=3)
        await peer.turn(session.session_id, "Second", max_tokens=3)
        log = tokenizer.decode(log_of(daemon, await peer.get(session.session_id)))
        assert log.count(DEFAULT_SYSTEM) == 1

    async def test_a_session_made_of_nothing_begins_with_its_first_turn(self, peer: Peer, daemon, tokenizer):
        session = await peer.create()
        assert session.token_count == 0
        turn = await peer.turn(session.session_id, "Hello", max_tokens=3)
        whole = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": turn.answer}], tokenize=False
        )
        log = tokenizer.decode(log_of(daemon, await peer.get(session.session_id)))
        assert log == whole.removesuffix(SPECIAL[STOP] + "\n")

    async def test_a_given_system_prompt_replaces_the_default_one(self, peer: Peer, daemon, tokenizer):
        session = await peer.create(system="Be brief.")
        await peer.turn(session.session_id, "First", max_tokens=3)
        log = tokenizer.decode(log_of(daemon, await peer.get(session.session_id)))
        assert DEFAULT_SYSTEM not in log
        assert log.count("Be brief.") == 1

    async def test_counting_foretells_what_a_turn_logs(self, peer: Peer):
        session = await peer.create(system="Be brief.")
        counted = await peer.count(session.session_id, "How many?", add_generation_prompt=True)
        turn = await peer.turn(session.session_id, "How many?", max_tokens=3)
        assert counted.session_tokens == session.token_count
        assert counted.max_context_tokens == CONTEXT
        assert counted.session_tokens + counted.tokens + 3 == turn.finished.committed_tokens


class TestSampling:
    async def test_greedy_answers_repeat(self, peer: Peer):
        turns = []
        for _ in range(2):
            session = await peer.create(system="Be brief.")
            turns.append(await peer.turn(session.session_id, "Tell me", max_tokens=20))
        assert turns[0].ids == turns[1].ids
        assert len(set(turns[0].ids)) > 3, "the model should say more than one letter"

    async def test_a_seed_decides_the_answer(self, peer: Peer):
        answers = []
        for seed in (1, 1, 2):
            session = await peer.create(system="Be brief.")
            turn = await peer.turn(session.session_id, "Tell me", max_tokens=20, temperature=3.0, seed=seed)
            answers.append(turn.ids)
        assert answers[0] == answers[1]
        assert answers[0] != answers[2]

    async def test_without_a_seed_answers_differ(self, peer: Peer):
        answers = []
        for _ in range(2):
            session = await peer.create(system="Be brief.")
            answers.append((await peer.turn(session.session_id, "Tell me", max_tokens=24, temperature=5.0)).ids)
        assert answers[0] != answers[1]

    async def test_logit_bias_decides_the_answer(self, peer: Peer, tokenizer):
        session = await peer.create(system="Be brief.")
        turn = await peer.turn(session.session_id, "Tell me", max_tokens=5, logit_bias=say(tokenizer, "q"))
        assert turn.answer == "qqqqq"

    async def test_logprobs_come_only_when_asked_for(self, peer: Peer):
        session = await peer.create(system="Be brief.")
        plain = await peer.turn(session.session_id, "Tell me", max_tokens=4)
        assert not any(part.logprobs for part in plain.tokens)
        asked = await peer.turn(session.session_id, "Tell me", max_tokens=4, logprobs=3)
        for part in asked.tokens:
            assert [entry.token_id for entry in part.logprobs] == list(part.token_ids)
            for entry in part.logprobs:
                assert len(entry.top) == 3
                # Greedy takes the likeliest.
                assert entry.top[0].token_id == entry.token_id
                assert entry.logprob == entry.top[0].logprob <= 0
                assert sum(math.exp(top.logprob) for top in entry.top) <= 1.0001

    async def test_text_is_never_cut_inside_a_character(self, peer: Peer):
        session = await peer.create(system="Be brief.")
        # Hot enough that all bytes come, and so does malformed UTF-8.
        turn = await peer.turn(session.session_id, "Tell me", max_tokens=60, temperature=100.0, seed=5)
        assert_well_formed(turn)
        assert "\ufffd" in turn.text or any(ord(char) > 127 for char in turn.text)


class TestHowATurnEnds:
    async def test_the_models_end_token_stops_it_and_is_not_shown(self, peer: Peer):
        session = await peer.create(system="Be brief.")
        turn = await peer.turn(session.session_id, "Tell me", max_tokens=9, logit_bias={STOP: 100.0})
        assert turn.finished.finish_reason == types_pb2.FINISH_REASON_STOP
        assert turn.ids == [STOP]
        assert turn.text == turn.answer == ""
        assert_well_formed(turn)

    async def test_a_stop_token_id_ends_it(self, peer: Peer, tokenizer):
        (token,) = tokenizer.encode("q", add_special_tokens=False)
        session = await peer.create(system="Be brief.")
        turn = await peer.turn(
            session.session_id, "Tell me", max_tokens=9, logit_bias={token: 100.0}, stop_token_ids=[token]
        )
        assert turn.finished.finish_reason == types_pb2.FINISH_REASON_STOP
        assert turn.ids == [token]

    async def test_a_stop_string_is_neither_streamed_nor_remembered(self, peer: Peer, daemon, tokenizer):
        free = await peer.create(system="Be brief.")
        said = (await peer.turn(free.session_id, "Tell me", max_tokens=24)).answer
        stop = said[9:12]
        visible = said[: said.index(stop)]

        session = await peer.create(system="Be brief.")
        turn = await peer.turn(session.session_id, "Tell me", max_tokens=24, stop=[stop])
        assert turn.finished.finish_reason == types_pb2.FINISH_REASON_STOP
        assert turn.finished.stop == stop
        assert turn.text == turn.answer == visible
        now = await peer.get(session.session_id)
        log = tokenizer.decode(log_of(daemon, now))
        assert log.endswith(f"assistant\n{visible}")
        assert now.token_count == turn.finished.committed_tokens == len(log_of(daemon, now))

        # The next turn builds on exactly that.
        await peer.turn(session.session_id, "Go on", max_tokens=2)
        log = tokenizer.decode(log_of(daemon, await peer.get(session.session_id)))
        assert f"assistant\n{visible}{SPECIAL[STOP]}\n" in log

    async def test_a_token_split_by_a_stop_string_keeps_its_visible_part(self, peer: Peer, daemon, tokenizer):
        (he,) = tokenizer.encode("he", add_special_tokens=False)
        session = await peer.create(system="Be brief.")
        turn = await peer.turn(session.session_id, "Tell me", max_tokens=9, logit_bias={he: 100.0}, stop=["eh"])
        assert turn.answer == turn.text == "h"
        assert tokenizer.decode(log_of(daemon, await peer.get(session.session_id))).endswith("assistant\nh")

    async def test_a_stop_string_that_never_completes_is_shown_at_the_end(self, peer: Peer, tokenizer):
        session = await peer.create(system="Be brief.")
        turn = await peer.turn(
            session.session_id, "Tell me", max_tokens=5, logit_bias=say(tokenizer, "q"), stop=["qqqqqqqqz"]
        )
        assert turn.text == turn.answer == "qqqqq"
        assert turn.finished.finish_reason == types_pb2.FINISH_REASON_LENGTH
        assert_well_formed(turn)

    async def test_a_full_context_ends_it_and_refuses_the_next_one_with_the_numbers(self, peer: Peer, tokenizer):
        session = await peer.create(token_ids=[10] * (CONTEXT - 12))
        turn = await peer.turn(session.session_id, token_ids=[11, 12], max_tokens=500)
        assert turn.finished.finish_reason == types_pb2.FINISH_REASON_CONTEXT_FULL
        assert 0 < turn.finished.usage.generated_tokens <= 10
        assert turn.finished.committed_tokens <= CONTEXT
        before = await everything(peer, session.session_id)
        with refused("CONTEXT_TOO_LONG", StatusCode.INVALID_ARGUMENT) as error:
            await peer.turn(session.session_id, "more")
        assert error.value.metadata["history_tokens"] == str(turn.finished.committed_tokens)
        assert error.value.metadata["max_context_tokens"] == str(CONTEXT)
        assert await everything(peer, session.session_id) == before

    async def test_the_last_position_of_the_context_is_used(self, peer: Peer):
        session = await peer.create(token_ids=[10] * (CONTEXT - 5))
        turn = await peer.turn(session.session_id, token_ids=[11], max_tokens=500)
        assert turn.finished.committed_tokens == CONTEXT


class TestModes:
    async def test_continue_goes_on_as_if_never_stopped(self, peer: Peer):
        whole = await peer.create(system="Be brief.")
        at_once = await peer.turn(whole.session_id, "Tell me", max_tokens=20)
        session = await peer.create(system="Be brief.")
        first = await peer.turn(session.session_id, "Tell me", max_tokens=8)
        then = await peer.turn(session.session_id, mode="continue", max_tokens=12)
        assert first.ids + then.ids == at_once.ids
        assert first.text + then.text == at_once.text
        assert then.finished.committed_tokens == at_once.finished.committed_tokens
        assert_well_formed(then)

    async def test_appended_input_is_answered_by_the_next_turn(self, peer: Peer, daemon, tokenizer):
        session = await peer.create(system="Be brief.")
        appended = await peer.turn(session.session_id, "A fact", mode="append_only")
        assert appended.kinds == ["accepted", "finished"]
        assert appended.finished.usage.generated_tokens == 0
        revision = (await peer.revisions(session.session_id))[-1]
        assert revision.kind == types_pb2.REVISION_KIND_APPEND
        assert revision.finish_reason == types_pb2.FINISH_REASON_UNSPECIFIED
        assert not revision.HasField("answer")
        turn = await peer.turn(session.session_id, "A question", max_tokens=4)
        log = tokenizer.decode(log_of(daemon, await peer.get(session.session_id)))
        assert log.endswith(
            f"<|im_start|>user\nA fact<|im_end|>\n<|im_start|>user\nA question<|im_end|>\n"
            f"<|im_start|>assistant\n{turn.answer}"
        )

    async def test_append_only_says_nothing_of_an_answer(self, peer: Peer):
        session = await peer.create(system="Be brief.")
        turn = await peer.turn(session.session_id, "A fact", mode="append_only")
        assert not turn.finished.HasField("answer")
        assert turn.finished.finish_reason == types_pb2.FINISH_REASON_UNSPECIFIED

    async def test_appending_first_changes_nothing_of_the_answer(self, peer: Peer):
        one = await peer.create(system="Be brief.")
        both = [{"role": "user", "content": "A fact"}, {"role": "user", "content": "A question"}]
        at_once = await peer.turn(one.session_id, both, max_tokens=12)
        two = await peer.create(system="Be brief.")
        await peer.turn(two.session_id, "A fact", mode="append_only")
        split = await peer.turn(two.session_id, "A question", max_tokens=12)
        assert split.ids == at_once.ids
        assert split.finished.committed_tokens == at_once.finished.committed_tokens

    async def test_token_ids_are_taken_as_they_are(self, peer: Peer, daemon):
        session = await peer.create(token_ids=[5, 6, 7])
        turn = await peer.turn(session.session_id, token_ids=[8, 9], max_tokens=3)
        assert log_of(daemon, await peer.get(session.session_id)) == [5, 6, 7, 8, 9, *turn.ids]
        assert turn.finished.committed_tokens == 8

    async def test_a_base_revision_that_is_not_the_head_is_refused(self, peer: Peer):
        session = await peer.create(system="Be brief.")
        await peer.turn(session.session_id, "One", max_tokens=2, base_revision=session.head_revision_id)
        with refused("REVISION_MISMATCH", StatusCode.ABORTED):
            await peer.turn(session.session_id, "Two", max_tokens=2, base_revision=session.head_revision_id)

    async def test_long_input_is_reused_whole_in_the_next_turn(self, peer: Peer):
        session = await peer.create(system="Be brief.")
        first = await peer.turn(session.session_id, "word " * 60, max_tokens=8)
        await peer.settled(session.session_id)
        second = await peer.turn(session.session_id, "And?", max_tokens=8)
        assert second.accepted.prompt_tokens_reused == first.finished.committed_tokens - 1

    async def test_turns_of_many_sessions_at_once_answer_as_they_would_alone(self, peer: Peer):
        texts = [f"Question {i} " * (i + 1) for i in range(5)]
        alone = []
        for text in texts:
            session = await peer.create(system="Be brief.")
            alone.append((await peer.turn(session.session_id, text, max_tokens=16)).ids)
        sessions = [await peer.create(system="Be brief.") for _ in texts]
        together = await asyncio.gather(
            *(peer.turn(s.session_id, text, max_tokens=16) for s, text in zip(sessions, texts, strict=True))
        )
        assert [turn.ids for turn in together] == alone


class TestTheLog:
    async def test_takes_the_tokens_of_a_step_in_one_go(self, peer: Peer, daemon, monkeypatch):
        """Each queued write wakes the writer, which takes a core from the next step."""
        queued: list[int] = []  # batches in each; other threads write too
        environment, post = daemon.desk.store.log.environment, daemon.desk.post
        queue_up = environment._queue_up
        monkeypatch.setattr(environment, "_queue_up", lambda batches: (queued.append(len(batches)), queue_up(batches)))
        steps: list[tuple[int, list[int]]] = []

        def count(events):
            before = len(queued)
            post(events)
            tokens = sum(isinstance(event, TokenOut) for event in events)
            steps.append((tokens, queued[before:]))

        monkeypatch.setattr(daemon.desk.engine, "_deliver", count)
        sessions = [(await peer.create(system="Be brief.")).session_id for _ in range(3)]
        await asyncio.gather(*(peer.turn(session, "Tell me", max_tokens=40) for session in sessions))
        together = [(tokens, batches) for tokens, batches in steps if tokens > 1]
        assert together
        assert all(tokens in batches for tokens, batches in together)
