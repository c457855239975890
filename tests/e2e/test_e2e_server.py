"""The server around the sessions: what it says of itself, who may connect, and how it goes down."""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from e2e_daemon import PATIENCE, Daemons, Gate, Peer, peer_of, refused
from e2e_model import CONTEXT
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from step_hooks import StepHook

from sessiond.clients.errors import from_rpc_error
from sessiond.errors import InvalidConfig, UnsafeAddress
from sessiond.v1 import admin_pb2

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def health(peer: Peer, service: str = "") -> int:
    stub = health_pb2_grpc.HealthStub(peer.channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status


class TestWhatALaterVersionWillServe:
    @pytest.mark.parametrize(
        ("service", "method", "request_"),
        [
            ("admin", "WatchStats", admin_pb2.WatchStatsRequest()),
            ("admin", "DrainServer", admin_pb2.DrainServerRequest()),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    async def test_says_so(self, peer: Peer, service: str, method: str, request_):
        call = getattr(getattr(peer, service), method)(request_)
        answer = call.read() if isinstance(call, grpc.aio.UnaryStreamCall) else call
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await answer
        error = from_rpc_error(caught.value)
        assert (error.reason, error.code) == ("NOT_IMPLEMENTED_YET", StatusCode.UNIMPLEMENTED)


class TestWhatItSaysOfItself:
    async def test_it_is_healthy(self, peer: Peer):
        for service in ("", "sessiond.v1.Sessions", "sessiond.v1.Admin"):
            assert await health(peer, service) == SERVING

    async def test_reflection_names_the_services(self, peer: Peer):
        stub = reflection_pb2_grpc.ServerReflectionStub(peer.channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        answers = [answer async for answer in stub.ServerReflectionInfo(iter([request]))]
        names = {service.name for service in answers[0].list_services_response.service}
        assert {"sessiond.v1.Sessions", "sessiond.v1.Admin", "grpc.health.v1.Health"} <= names

    async def test_reflection_can_be_turned_off(self, daemons: Daemons):
        daemon = await daemons.start(reflection=False)
        async with peer_of(daemon.port) as peer:
            stub = reflection_pb2_grpc.ServerReflectionStub(peer.channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest()])).read()
            assert caught.value.code() is StatusCode.UNIMPLEMENTED

    async def test_its_info(self, peer: Peer, chat_model: Path, settings):
        info = await peer.call(peer.admin.GetServerInfo, admin_pb2.GetServerInfoRequest())
        assert info.version == importlib.metadata.version("sessiond")
        assert info.model == chat_model.name
        assert info.state == admin_pb2.SERVER_STATE_SERVING
        assert info.cell_tokens == 128
        assert info.max_context_tokens == CONTEXT
        assert info.data_directory == str(settings["data_dir"])
        assert "full" in info.policies
        assert info.identity.identity_id
        assert {"weights", "tokenizer"} <= set(info.identity.fields)
        assert info.numerics_profile.fields["threads"] == "1"
        assert set(info.kernels) == {"layers", "attention"}
        assert info.HasField("start_time")

    async def test_its_identity_is_that_of_the_model_not_of_the_run(self, daemons: Daemons, daemon, settings):
        async with peer_of(daemon.port) as peer:
            first = await peer.call(peer.admin.GetServerInfo, admin_pb2.GetServerInfoRequest())
        other = await daemons.start(data_dir=settings["data_dir"].with_name("other"))
        async with peer_of(other.port) as peer:
            second = await peer.call(peer.admin.GetServerInfo, admin_pb2.GetServerInfoRequest())
        assert first.identity == second.identity

    async def test_its_stats_count_what_was_done(self, peer: Peer, daemon):
        async def stats() -> admin_pb2.GetStatsResponse:
            return await peer.call(peer.admin.GetStats, admin_pb2.GetStatsRequest())

        fresh = await stats()
        assert sum(fresh.sessions_by_tier.values()) == 0
        session = (await peer.create(system="Be brief.")).session_id
        cold = await peer.create(system="Be brief.")
        gone = await peer.create(system="Be brief.")
        await peer.delete(gone.session_id)
        turn = await peer.turn(session, "word " * 60, max_tokens=8)
        settled = await peer.settled(session)
        now = await stats()
        assert dict(now.sessions_by_tier) == {"hot": 1, "cold": 1}
        assert now.sessions_deleted == 1
        assert (now.turns_running, now.turns_queued, now.turns_suspended) == (0, 0, 0)
        assert now.memory_bytes_by_tier["device"] == settled.bytes_hot
        assert now.memory_budget_bytes_by_tier["device"] == daemon.settings.memory_budget_bytes
        assert now.tokens.prefilled == turn.accepted.prompt_tokens_new
        assert now.tokens.reused == turn.accepted.prompt_tokens_reused == 0
        assert now.tokens.decoded == 8
        assert now.tokens.sealed + now.tokens.prefilled >= settled.exact_upto
        assert now.disk.kv_raw_bytes > 0
        assert now.disk.kv_coded_bytes > 0
        assert now.disk.log_file_bytes > 0
        assert now.disk.free_bytes > 0
        assert now.HasField("uptime")
        names = ("engine_step_seconds", "engine_forward_seconds")
        step, forward = (now.gauges[name] - fresh.gauges[name] for name in names)
        assert 0 < forward < step < now.uptime.ToNanoseconds() / 1e9
        await peer.suspend(session)
        await peer.turn(session, "And?", max_tokens=2)
        then = (await stats()).tokens
        assert then.restored == then.reused == settled.token_count - 1
        assert then.recomputed == 0
        assert cold.session_id

    async def test_its_stats_count_what_a_turn_computed_again(self, daemons: Daemons):
        """A short turn's KV is provisional; a long input behind it makes it canonical before anything seals it."""
        daemon = await daemons.start(settle_seconds=600)
        async with peer_of(daemon.port) as peer:
            session = (await peer.create(system="Be brief.")).session_id
            short = await peer.turn(session, "Tell me", max_tokens=8)
            stats = await peer.call(peer.admin.GetStats, admin_pb2.GetStatsRequest())
            assert stats.tokens.recomputed == 0
            long = await peer.turn(session, "word " * 60, max_tokens=2)
            computed = short.finished.committed_tokens - 1  # its last token was sampled, not fed
            stats = await peer.call(peer.admin.GetStats, admin_pb2.GetStatsRequest())
            assert 0 < computed < 128
            assert stats.tokens.recomputed == computed
            assert long.accepted.prompt_tokens_reused == 0

    async def test_a_running_turn_is_not_counted_as_suspended(self, peer: Peer, daemon):
        session = (await peer.create(system="Be brief.")).session_id
        gate = Gate(daemon)
        stream = peer.open(session, "Tell me", max_tokens=2)
        await gate.reached()
        stats = await peer.call(peer.admin.GetStats, admin_pb2.GetStatsRequest())
        assert (stats.turns_running, stats.turns_suspended) == (1, 0)
        gate.open()
        await stream.read()


class TestGoingDown:
    async def test_sigterm_lets_the_running_turn_end(self, spawn):
        process = spawn()
        async with peer_of(process.port) as peer:
            session = (await peer.create(system="Be brief.")).session_id
            other = (await peer.create(system="Be brief.")).session_id
            process.hold(3)
            stream = peer.open(session, "Tell me", max_tokens=10, request_id="turn-1")
            await stream.read_tokens(2)
            process.terminate()
            async with asyncio.timeout(PATIENCE):
                while await health(peer) != NOT_SERVING:  # noqa: ASYNC110 - another process
                    await asyncio.sleep(0.02)
            assert await health(peer, "sessiond.v1.Sessions") == NOT_SERVING
            for attempt in (
                lambda: peer.turn(other, "Tell me", max_tokens=2),
                lambda: peer.create(system="Be brief."),
                lambda: peer.warm(other),
            ):
                with refused("DRAINING", StatusCode.UNAVAILABLE) as error:
                    await attempt()
                assert error.value.retry_after
            info = await peer.call(peer.admin.GetServerInfo, admin_pb2.GetServerInfoRequest())
            assert info.state == admin_pb2.SERVER_STATE_DRAINING
            # Who asks for the running turn still gets it.
            joined = peer.open(session, "Tell me", max_tokens=10, request_id="turn-1")
            await joined.read_tokens(2)
            process.release()
            turn = await stream.read()
            assert turn.error is None
            assert len(turn.ids) == 10
            assert (await joined.read()).ids == turn.ids
        assert await process.exit_code() == 0
        process = spawn()
        async with peer_of(process.port) as peer:
            then = await peer.turn(session, "And?", max_tokens=2)
            assert then.restored.tokens_recomputed == 0
            with pytest.raises(Exception, match="SESSION_NOT_FOUND"):
                await peer.get("0" * 32)

    async def test_a_turn_that_takes_too_long_is_suspended_and_its_client_told_to_come_back(self, daemons: Daemons):
        daemon = await daemons.start(drain_seconds=0.1)
        async with peer_of(daemon.port) as peer:
            whole = await peer.turn((await peer.create(system="Be brief.")).session_id, "Tell me", max_tokens=20)
            session = (await peer.create(system="Be brief.")).session_id
            gate = Gate(daemon)
            gate.let(5)
            stream = peer.open(session, "Tell me", max_tokens=20, request_id="turn-1")
            await stream.read_tokens(4)
            stopping = asyncio.create_task(daemons.stop(daemon))
            await gate.cancelled()
            gate.let(1)
            first = await stream.read()
            gate.open()
            assert first.error is not None
            assert first.error.code is StatusCode.UNAVAILABLE
            await stopping
        daemon = await daemons.start()
        async with peer_of(daemon.port) as peer:
            assert (await peer.get(session)).suspended_request_id == "turn-1"
            rest = await peer.turn(
                session, "Tell me", max_tokens=20, request_id="turn-1", resume_after_tokens=len(first.ids)
            )
            assert first.ids + rest.ids == whole.ids

    async def test_the_command_line_serves_until_sigterm(self, chat_model: Path, tmp_path: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        arguments = ["--model", str(chat_model), "--data-dir", str(tmp_path / "data"), "--listen", f"127.0.0.1:{port}"]
        with (tmp_path / "log").open("wb") as log:
            process = subprocess.Popen(  # noqa: ASYNC220 - starting it takes no time
                [sys.executable, "-c", "from sessiond.cli import main; main()", "serve", *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            async with peer_of(port) as peer:
                async with asyncio.timeout(PATIENCE):
                    while process.poll() is None:
                        try:
                            assert await health(peer) == SERVING
                            break
                        except grpc.aio.AioRpcError:
                            await asyncio.sleep(0.1)
                session = (await peer.create(system="Be brief.")).session_id
                assert len((await peer.turn(session, "Tell me", max_tokens=3)).ids) == 3
            process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(process.wait, PATIENCE) == 0
        finally:
            process.kill()
            process.wait()


class TestFailure:
    async def test_a_failing_step_ends_its_turn_with_failed_and_leaves_the_session(self, peer: Peer, daemon):
        session = await peer.create(system="Be brief.")
        whole = await peer.turn((await peer.create(system="Be brief.")).session_id, "Tell me", max_tokens=6)
        model = daemon.desk.engine.model
        calls = 0

        def failing(feeds):
            nonlocal calls
            calls += 1
            if calls > 3:
                raise RuntimeError("the step failed")

        hook = StepHook(model, failing)
        turn = await peer.open(session.session_id, "Tell me", max_tokens=6, request_id="turn-1").read()
        hook.remove()
        assert turn.kinds[0] == "accepted"
        assert turn.kinds[-1] == "failed"
        assert turn.error is not None
        assert turn.error.code is StatusCode.INTERNAL
        assert turn.events[-1].failed.status.code == StatusCode.INTERNAL.value[0]
        now = await peer.get(session.session_id)
        assert now.head_revision_id == session.head_revision_id
        assert (now.running_request_id, now.suspended_request_id) == ("", "")
        assert (await peer.turn(session.session_id, "Tell me", max_tokens=6, request_id="turn-2")).ids == whole.ids

    async def test_a_failed_turn_replays_its_failure(self, peer: Peer, daemon):
        session = (await peer.create(system="Be brief.")).session_id
        hook = StepHook(daemon.desk.engine.model, lambda feeds: 1 / 0)
        first = await peer.open(session, "Tell me", max_tokens=6, request_id="turn-1").read()
        hook.remove()
        again = await peer.open(session, "Tell me", max_tokens=6, request_id="turn-1").read()
        assert first.error is not None
        assert again.error is not None
        assert (again.error.reason, again.error.code) == (first.error.reason, first.error.code)
        assert "finished" not in again.kinds

    async def test_a_bug_tells_the_caller_nothing_of_the_inside(self, peer: Peer, daemon, monkeypatch):
        def broken(*args, **kwargs):
            raise ZeroDivisionError("a secret of the inside")

        monkeypatch.setattr(daemon.sessions, "get", broken)
        with refused("INTERNAL", StatusCode.INTERNAL) as error:
            await peer.get("0" * 32)
        assert "secret" not in error.value.message


@pytest.fixture
def certificates() -> Path:
    """ca, and with keys: server, alice and stranger (of another CA)."""
    return Path(__file__).with_name("certificates")


def credentials(folder: Path, name: str = "") -> grpc.ChannelCredentials:
    roots = (folder / "ca.crt").read_bytes()
    if not name:
        return grpc.ssl_channel_credentials(roots)
    return grpc.ssl_channel_credentials(
        roots, (folder / f"{name}.key").read_bytes(), (folder / f"{name}.crt").read_bytes()
    )


class TestWhoMayConnect:
    @pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "192.0.2.1:0", "example.invalid:0"])
    async def test_beyond_loopback_without_tls_is_refused(self, daemons: Daemons, settings, address: str):
        with pytest.raises(UnsafeAddress) as caught:
            await daemons.start(listen=address)
        assert caught.value.reason == "UNSAFE_ADDRESS"
        assert not settings["data_dir"].exists(), "refused before anything is made"

    async def test_beyond_loopback_is_possible_for_who_insists(self, daemons: Daemons):
        daemon = await daemons.start(listen="0.0.0.0:0", insecure_allow_remote=True)
        async with peer_of(daemon.port) as peer:
            assert await health(peer) == SERVING
            # Reflection is off by default there.
            stub = reflection_pb2_grpc.ServerReflectionStub(peer.channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest()])).read()
            assert caught.value.code() is StatusCode.UNIMPLEMENTED

    async def test_an_address_in_use_is_refused_by_name(self, daemons: Daemons, settings):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            with pytest.raises(UnsafeAddress) as caught:
                await daemons.start(listen=f"127.0.0.1:{port}")
            assert str(port) in caught.value.message
        # Nothing stayed open.
        await daemons.start()

    async def test_tls(self, daemons: Daemons, certificates: Path):
        daemon = await daemons.start(tls_cert=certificates / "server.crt", tls_key=certificates / "server.key")
        async with peer_of(daemon.port, credentials=credentials(certificates)) as peer:
            assert (await peer.create(system="Be brief.")).tenant == "default"
        async with peer_of(daemon.port) as plain:
            with pytest.raises(Exception, match="UNAVAILABLE"):
                await plain.create(system="Be brief.")

    async def test_with_mutual_tls_the_tenant_is_the_certificates_name(self, daemons: Daemons, certificates: Path):
        daemon = await daemons.start(
            tls_cert=certificates / "server.crt",
            tls_key=certificates / "server.key",
            tls_client_ca=certificates / "ca.crt",
            trust_tenant_metadata=True,
        )
        async with peer_of(daemon.port, credentials=credentials(certificates, "alice"), tenant="bob") as peer:
            assert (await peer.create(system="Be brief.")).tenant == "alice"
        for name in ("", "stranger"):
            async with peer_of(daemon.port, credentials=credentials(certificates, name)) as peer:
                with pytest.raises(Exception, match="UNAVAILABLE"):
                    await peer.create(system="Be brief.")

    async def test_tls_allows_addresses_beyond_loopback(self, daemons: Daemons, certificates: Path):
        daemon = await daemons.start(
            listen="0.0.0.0:0", tls_cert=certificates / "server.crt", tls_key=certificates / "server.key"
        )
        async with peer_of(daemon.port, credentials=credentials(certificates)) as peer:
            assert await health(peer) == SERVING

    @pytest.mark.parametrize("given", [("tls_cert",), ("tls_key",), ("tls_client_ca",), ("tls_cert", "tls_client_ca")])
    async def test_half_of_tls_is_refused(self, daemons: Daemons, certificates: Path, given):
        names = {"tls_cert": "server.crt", "tls_key": "server.key", "tls_client_ca": "ca.crt"}
        with pytest.raises(InvalidConfig):
            await daemons.start(**{name: certificates / names[name] for name in given})

    async def test_certificates_that_are_not_there_or_not_certificates_are_refused(
        self, daemons: Daemons, certificates: Path, tmp_path: Path
    ):
        with pytest.raises(InvalidConfig):
            await daemons.start(tls_cert=tmp_path / "none.crt", tls_key=certificates / "server.key")
        rubbish = tmp_path / "rubbish.crt"
        rubbish.write_text("no certificate")
        with pytest.raises((InvalidConfig, UnsafeAddress)):
            await daemons.start(tls_cert=rubbish, tls_key=certificates / "server.key")
        assert os.listdir(tmp_path)
