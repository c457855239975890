"""Sessions that meet another model: refused by the field that differs, or told again where the caller asks for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import structlog.testing
from e2e_archive import export, import_
from e2e_daemon import Daemons, Peer, peer_of, recorded, refused
from e2e_model import write_chat_model
from grpc import StatusCode
from test_e2e_branches import fork

from sessiond.server import Daemon
from sessiond.v1 import sessions_pb2 as pb

LONG = 40
TEXT = "word " * 60
OTHER_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="session")
def other_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("model") / "other-weights", seed=1)


@pytest.fixture(scope="session")
def other_template(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights with another chat template: to the identity another tokenizer."""
    path = tmp_path_factory.mktemp("model") / "other-template"
    shutil.copytree(chat_model, path)
    (path / "chat_template.jinja").write_text(OTHER_TEMPLATE)
    config = json.loads((path / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture
async def weights(daemons: Daemons, tmp_path: Path, other_weights: Path) -> AsyncIterator[Peer]:
    daemon = await daemons.start(data_dir=tmp_path / "weights", model=str(other_weights))
    async with peer_of(daemon.port) as peer:
        peer.daemon = daemon  # type: ignore[attr-defined]
        yield peer


@pytest.fixture
async def template(daemons: Daemons, tmp_path: Path, other_template: Path) -> AsyncIterator[Peer]:
    daemon = await daemons.start(data_dir=tmp_path / "template", model=str(other_template))
    async with peer_of(daemon.port) as peer:
        peer.daemon = daemon  # type: ignore[attr-defined]
        yield peer


async def talked(peer: Peer, *texts: str, **options: Any) -> str:
    session = (await peer.create(system="Be brief.")).session_id
    for text in texts:
        await peer.turn(session, text, max_tokens=20, **options)
    await peer.settled(session)
    return session


def text_of(daemon: Daemon, session_id: str) -> str:
    """All tokens of a session, as the tokenizer writes them."""
    log = daemon.desk.store.log
    record = log.session("default", session_id)
    ids = [i for r in log.chain("default", record.head_revision) for i in log.tokens("default", r.revision_id)[0]]
    return daemon.desk.tokenizer.decode(ids)


def tokens_of(daemon: Daemon, session_id: str) -> list[int]:
    log = daemon.desk.store.log
    record = log.session("default", session_id)
    chain = log.chain("default", record.head_revision)
    return [int(i) for r in chain for i in log.tokens("default", r.revision_id)[0]]


def made(peer: Any) -> int:
    return len(peer.daemon.desk.store.log.sessions()) + peer.daemon.desk.store.blocks.stat().entries


class TestOtherWeights:
    async def test_are_refused_by_name(self, peer: Peer, weights: Peer):
        archive, _ = await export(peer, await talked(peer, TEXT))
        with refused("IDENTITY_MISMATCH", StatusCode.FAILED_PRECONDITION) as caught:
            await import_(weights, archive)
        assert caught.value.metadata["field"] == "weights"
        assert made(weights) == 0

    async def test_are_told_by_a_dry_run(self, peer: Peer, weights: Peer):
        archive, header = await export(peer, await talked(peer, TEXT))
        said = await import_(weights, archive, dry_run=True)
        assert (said.verdict, list(said.differing_fields)) == (pb.IMPORT_VERDICT_RECOMPUTE, ["weights"])
        assert (said.tokens, said.tokens_with_kv) == (header.n_tokens, 0)
        assert not said.HasField("session")
        assert made(weights) == 0

    async def test_take_the_tokens_as_they_are_and_compute_them(self, peer: Peer, daemon: Daemon, weights: Peer):
        session = await talked(peer, TEXT, "And?")
        archive, header = await export(peer, session)
        done = await import_(weights, archive, allow_recompute=True)
        assert (done.verdict, done.tokens_with_kv) == (pb.IMPORT_VERDICT_RECOMPUTE, 0)
        moved = done.session.session_id
        assert tokens_of(weights.daemon, moved) == tokens_of(daemon, session)
        turn = await weights.turn(moved, "Go on", max_tokens=LONG)
        assert [(r.reason, r.tokens) for r in turn.restored.reasons] == [(pb.RECOMPUTE_CAUSE_IDENTITY, header.n_tokens)]
        await weights.settled(moved)
        await weights.suspend(moved)
        assert (await weights.turn(moved, "Then?", max_tokens=4)).restored.tokens_recomputed == 0


class TestAnotherTokenizer:
    async def test_is_given_the_messages_in_its_own_template(self, peer: Peer, template: Peer):
        session = await talked(peer, "Hello", "And?")
        answers = [revision.answer.content[0].text for revision in (await peer.revisions(session))[1:]]
        archive, _ = await export(peer, session)
        done = await import_(template, archive, allow_recompute=True)
        assert (done.verdict, list(done.differing_fields)) == (pb.IMPORT_VERDICT_RECOMPUTE, ["tokenizer"])
        moved = done.session.session_id
        await template.turn(moved, "Go on", max_tokens=4)
        assert text_of(template.daemon, moved).startswith(
            f"[system]Be brief.<|im_end|>[user]Hello<|im_end|>[assistant]{answers[0]}<|im_end|>"
            f"[user]And?<|im_end|>[assistant]{answers[1]}<|im_end|>[user]Go on<|im_end|>[assistant]"
        )

    async def test_goes_on_as_if_the_conversation_had_been_its_own(self, peer: Peer, template: Peer):
        """Token for token what the model would have logged, had it given the same answers."""
        session = await talked(peer, "Hello")
        answer = (await peer.revisions(session))[1].answer.content[0].text
        moved = (await import_(template, (await export(peer, session))[0], allow_recompute=True)).session.session_id
        there = await template.turn(moved, "Go on", max_tokens=LONG)
        own = await template.create(
            messages=[
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": answer},
            ]
        )
        assert (await template.turn(own.session_id, "Go on", max_tokens=LONG)).ids == there.ids

    async def test_keeps_revisions_messages_and_usage(self, peer: Peer, template: Peer):
        session = await talked(peer, "Hello", "And?")
        moved = (await import_(template, (await export(peer, session))[0], allow_recompute=True)).session.session_id
        ours, theirs = await peer.revisions(session), await template.revisions(moved)
        for before, after in zip(ours, theirs, strict=True):
            assert (after.kind, list(after.messages), after.answer) == (
                before.kind,
                list(before.messages),
                before.answer,
            )
            assert after.finish_reason == before.finish_reason
        assert [r.log_start for r in theirs[1:]] == [r.log_end for r in theirs[:-1]]

    async def test_closes_an_answer_that_was_cut_off_and_goes_on_with_one_that_continued(self, peer, template):
        session = (await peer.create(system="Be brief.")).session_id
        first = await peer.turn(session, "Hello", max_tokens=5)
        second = await peer.turn(session, mode="continue", max_tokens=5)
        moved = (await import_(template, (await export(peer, session))[0], allow_recompute=True)).session.session_id
        await template.turn(moved, "Go on", max_tokens=2)
        assert f"[assistant]{first.answer}{second.answer}<|im_end|>[user]Go on" in text_of(template.daemon, moved)

    async def test_cannot_take_raw_tokens(self, peer: Peer, template: Peer):
        session = (await peer.create(token_ids=[40, 41, 42])).session_id
        await peer.turn(session, "Hello", max_tokens=4)
        archive, _ = await export(peer, session)
        said = await import_(template, archive, dry_run=True)
        assert (said.verdict, list(said.differing_fields)) == (pb.IMPORT_VERDICT_REFUSED, ["tokenizer"])
        for allow in (False, True):
            with refused("IDENTITY_MISMATCH", StatusCode.FAILED_PRECONDITION) as caught:
                await import_(template, archive, allow_recompute=allow)
            assert caught.value.metadata["field"] == "tokenizer"
        assert made(template) == 0

    async def test_brings_the_history_home_again(self, peer: Peer, daemon: Daemon, template: Peer):
        session = await talked(peer, "Hello", "And?")
        away = (await import_(template, (await export(peer, session))[0], allow_recompute=True)).session.session_id
        back = await import_(peer, (await export(template, away))[0], allow_recompute=True)
        assert back.verdict == pb.IMPORT_VERDICT_RECOMPUTE
        # What was generated may be encoded otherwise than it was sampled: the text is what has to be the same.
        assert text_of(daemon, back.session.session_id) == text_of(daemon, session)


async def test_a_history_that_is_too_long_for_the_model_is_refused(peer: Peer, daemons: Daemons, tmp_path: Path):
    small = write_chat_model(tmp_path / "small", context=256)
    session = await talked(peer, TEXT)
    archive, header = await export(peer, session)
    daemon = await daemons.start(data_dir=tmp_path / "away", model=str(small))
    async with peer_of(daemon.port) as other:
        for options in ({"dry_run": True}, {"allow_recompute": True}):
            with refused("CONTEXT_TOO_LONG", StatusCode.INVALID_ARGUMENT) as caught:
                await import_(other, archive, **options)
        assert caught.value.metadata["history_tokens"] == str(header.n_tokens)
    assert daemon.desk.store.log.sessions() == []


class TestADataDirectoryThatMeetsAnotherModel:
    async def test_says_at_start_how_many_sessions_are_strangers(self, daemons: Daemons, daemon, peer, other_weights):
        for _ in range(2):
            await talked(peer, "Hi")
        with structlog.testing.capture_logs() as logs:
            await daemons.restart(daemon, model=str(other_weights))
        said = [entry for entry in logs if entry["event"] == "sessions of another model"]
        assert [(entry["sessions"], entry["differing"]) for entry in said] == [(2, ["weights"])]

    async def test_says_nothing_when_all_are_its_own(self, daemons: Daemons, daemon: Daemon, peer: Peer):
        await talked(peer, "Hi")
        with structlog.testing.capture_logs() as logs:
            await daemons.restart(daemon)
        assert not [entry for entry in logs if entry["event"] == "sessions of another model"]

    async def test_refuses_turns_forks_them_and_finds_them_exact_later(
        self, daemons: Daemons, daemon: Daemon, peer: Peer, other_weights: Path, tmp_path: Path
    ):
        session, twin = await talked(peer, TEXT), await talked(peer, TEXT)
        before = await peer.get(session)
        daemon = await daemons.restart(daemon, model=str(other_weights))
        async with peer_of(daemon.port) as now:
            with refused("IDENTITY_MISMATCH", StatusCode.FAILED_PRECONDITION) as caught:
                await now.turn(session, "Go on", max_tokens=4)
            assert caught.value.metadata["field"] == "weights"
            with refused("IDENTITY_MISMATCH", StatusCode.FAILED_PRECONDITION):
                await fork(now, session)
            assert {s.session_id for s in (await now.list()).sessions} == {session, twin}
            moved = await fork(now, session, recompute=True, labels={"was": "ours"}, request_id="move-1")
            assert recorded(await fork(now, session, recompute=True, labels={"was": "ours"}, request_id="move-1")) == (
                recorded(moved)
            )
            with refused("REQUEST_ID_REUSED", StatusCode.INVALID_ARGUMENT):
                await fork(now, twin, recompute=True, request_id="move-1")
            shared = {r.revision_id for r in await now.revisions(session)} & {
                r.revision_id for r in await now.revisions(moved.session_id)
            }
            assert not shared
            assert tokens_of(daemon, moved.session_id) == tokens_of(daemon, session)
            turn = await now.turn(moved.session_id, "Go on", max_tokens=LONG)
            assert {reason.reason for reason in turn.restored.reasons} == {pb.RECOMPUTE_CAUSE_IDENTITY}
            await now.settled(moved.session_id)
            archive, header = await export(now, session)
            assert header.tokens_with_kv == before.token_count - 1, "a stranger's KV can still be taken along"
            await now.delete(moved.session_id, purge_now=True)
        daemon = await daemons.restart(daemon)
        async with peer_of(daemon.port) as again:
            assert recorded(await again.get(session)) == recorded(before)
            here = await again.turn(session, "Go on", max_tokens=LONG)
            assert here.restored.tokens_recomputed == 0
        away = await daemons.start(data_dir=tmp_path / "away")
        async with peer_of(away.port) as other:
            there = await other.turn((await import_(other, archive)).session.session_id, "Go on", max_tokens=LONG)
        assert (there.ids, there.restored.tokens_recomputed) == (here.ids, 0)

    async def test_forks_into_another_template(
        self, daemons: Daemons, daemon: Daemon, peer: Peer, other_template: Path
    ):
        session = await talked(peer, "Hello")
        daemon = await daemons.restart(daemon, model=str(other_template))
        async with peer_of(daemon.port) as now:
            moved = (await fork(now, session, recompute=True)).session_id
            assert text_of(daemon, moved).startswith("[system]Be brief.<|im_end|>[user]Hello<|im_end|>[assistant]")
            raw = await now.create(token_ids=[40, 41])
        daemon = await daemons.restart(daemon)
        async with peer_of(daemon.port) as again:
            with refused("IDENTITY_MISMATCH", StatusCode.FAILED_PRECONDITION) as caught:
                await fork(again, raw.session_id, recompute=True)
            assert caught.value.metadata["field"] == "tokenizer"


class TestAForkWithRecompute:
    async def test_of_the_same_model_shares_neither_revisions_nor_needs_them(self, peer: Peer, daemon: Daemon):
        session = await talked(peer, TEXT)
        copy = (await fork(peer, session, recompute=True)).session_id
        here = await peer.turn(session, "Go on", max_tokens=LONG)
        await peer.delete(session, purge_now=True)
        there = await peer.turn(copy, "Go on", max_tokens=LONG)
        assert there.ids == here.ids

    async def test_takes_any_revision(self, peer: Peer):
        session = await talked(peer, "Hello", "And?")
        middle = (await peer.revisions(session))[1]
        copy = await fork(peer, session, middle.revision_id, recompute=True)
        assert copy.token_count == middle.log_end

    async def test_into_a_model_that_is_not_served_is_refused(self, peer: Peer):
        session = await talked(peer, "Hello")
        for options in ({"model": "gpt-9"}, {"adapter": "lora"}):
            with refused("MODEL_MISSING", StatusCode.FAILED_PRECONDITION):
                await fork(peer, session, recompute=True, **options)
            with refused("BAD_REQUEST", StatusCode.INVALID_ARGUMENT):
                await fork(peer, session, **options)


async def test_an_import_that_comes_again_under_another_model_gets_the_session_it_made(
    peer: Peer, daemons: Daemons, tmp_path: Path, other_weights: Path
):
    archive, _ = await export(peer, await talked(peer, "Hello"))
    daemon = await daemons.start(data_dir=tmp_path / "away")
    async with peer_of(daemon.port) as other:
        made = await import_(other, archive, request_id="import-1")
    daemon = await daemons.restart(daemon, data_dir=tmp_path / "away", model=str(other_weights))
    async with peer_of(daemon.port) as other:
        again = await import_(other, archive, request_id="import-1")
        assert (again.session.session_id, again.verdict) == (made.session.session_id, made.verdict)
        with refused("REQUEST_ID_REUSED", StatusCode.INVALID_ARGUMENT):
            await import_(other, archive, request_id="import-1", labels={"a": "b"})
        with refused("IDENTITY_MISMATCH", StatusCode.FAILED_PRECONDITION):
            await import_(other, archive, request_id="import-2")
