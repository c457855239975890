"""A daemon that cannot start says why in one typed error, and leaves everything as it was."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e_daemon import Daemons, everything, peer_of
from safetensors.numpy import load_file, save_file
from tiny_models import write_directory

from sessiond.errors import (
    DataDirectoryBusy,
    DataDirectoryReadOnly,
    FormatTooNew,
    InvalidConfig,
    ModelCorrupt,
    ModelMissing,
    ModelUnsupported,
    RecordCorrupt,
    SessiondError,
    Status,
)
from sessiond.model import Model

NOBODY = 65534


@contextlib.contextmanager
def as_somebody_without_rights() -> Iterator[None]:
    """Modes do not stop root: become someone whom they do."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
async def before(daemons: Daemons):
    """A data directory with a session in it; what it holds, and a check that it still does."""
    daemon = await daemons.start()
    async with peer_of(daemon.port) as peer:
        session = (await peer.create(system="Be brief.")).session_id
        await peer.turn(session, "Tell me", max_tokens=4)
        held = await everything(peer, session)
    await daemons.stop(daemon)

    async def unchanged() -> None:
        daemon = await daemons.start()
        async with peer_of(daemon.port) as peer:
            assert await everything(peer, session) == held
            assert (await peer.turn(session, "And?", max_tokens=2)).restored.tokens_recomputed == 0
        await daemons.stop(daemon)

    return unchanged


async def refuses_to_start(daemons: Daemons, error: type[SessiondError], **changes) -> SessiondError:
    with pytest.raises(SessiondError) as caught:
        await daemons.start(**changes)
    assert type(caught.value) is error, caught.value
    assert error.status is Status.FAILED_PRECONDITION or error in (InvalidConfig, RecordCorrupt)
    assert caught.value.message
    return caught.value


class TestTheModel:
    async def test_missing(self, daemons: Daemons, before, tmp_path: Path):
        await refuses_to_start(daemons, ModelMissing, model=str(tmp_path / "nowhere"))
        (tmp_path / "empty").mkdir()
        await refuses_to_start(daemons, ModelMissing, model=str(tmp_path / "empty"))
        await before()

    async def test_without_its_weights(self, daemons: Daemons, before, chat_model: Path, tmp_path: Path):
        broken = shutil.copytree(chat_model, tmp_path / "broken")
        (broken / "model.safetensors").unlink()
        await refuses_to_start(daemons, ModelMissing, model=str(broken))
        await before()

    @pytest.mark.parametrize("keep", [0, 4, 1000, -1])
    async def test_truncated(self, daemons: Daemons, before, chat_model: Path, tmp_path: Path, keep: int):
        broken = shutil.copytree(chat_model, tmp_path / "broken")
        weights = (broken / "model.safetensors").read_bytes()
        (broken / "model.safetensors").write_bytes(weights[:keep])
        await refuses_to_start(daemons, ModelCorrupt, model=str(broken))
        await before()

    async def test_with_a_damaged_configuration(self, daemons: Daemons, before, chat_model: Path, tmp_path: Path):
        broken = shutil.copytree(chat_model, tmp_path / "broken")
        (broken / "config.json").write_text("{")
        await refuses_to_start(daemons, ModelCorrupt, model=str(broken))
        await before()

    async def test_with_a_damaged_tokenizer(self, daemons: Daemons, before, chat_model: Path, tmp_path: Path):
        broken = shutil.copytree(chat_model, tmp_path / "broken")
        (broken / "tokenizer.json").write_text("{")
        await refuses_to_start(daemons, ModelCorrupt, model=str(broken))
        await before()

    async def test_of_an_unsupported_architecture(self, daemons: Daemons, before, tmp_path: Path):
        for model_type in ("bert", "mamba", "no_such_thing"):
            other = write_directory(tmp_path / model_type, model_type)
            error = await refuses_to_start(daemons, ModelUnsupported, model=str(other))
            assert model_type in error.message
        await before()

    async def test_of_another_form_than_its_configuration_says(
        self, daemons: Daemons, before, chat_model: Path, tmp_path: Path
    ):
        broken = shutil.copytree(chat_model, tmp_path / "broken")
        config = json.loads((broken / "config.json").read_text())
        (broken / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
        await refuses_to_start(daemons, ModelCorrupt, model=str(broken))
        await before()

    async def test_that_lacks_a_tensor(self, daemons: Daemons, before, chat_model: Path, tmp_path: Path):
        broken = shutil.copytree(chat_model, tmp_path / "broken")
        tensors = load_file(broken / "model.safetensors")
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
        await refuses_to_start(daemons, ModelCorrupt, model=str(broken))
        await before()

    async def test_a_gguf_file_that_is_none(self, daemons: Daemons, before, tmp_path: Path):
        rubbish = tmp_path / "model.gguf"
        rubbish.write_bytes(b"GGUF" + b"\0" * 100)
        await refuses_to_start(daemons, ModelCorrupt, model=str(rubbish))
        await before()

    async def test_that_cannot_run(self, daemons: Daemons, before, monkeypatch):
        """What fails on the engine's thread ends the start too."""

        def refuse(self: Model, tokens: int) -> None:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")

        with monkeypatch.context() as patch:
            patch.setattr(Model, "warm_up", refuse)
            patch.setattr(threading, "excepthook", lambda args: None)
            with pytest.raises(OSError, match="Cannot allocate memory"):
                await asyncio.wait_for(daemons.start(), 20)
        await before()


class TestTheDataDirectory:
    async def test_in_use_by_another_daemon(self, daemons: Daemons):
        daemon = await daemons.start()
        async with peer_of(daemon.port) as peer:
            session = (await peer.create(system="Be brief.")).session_id
            held = await everything(peer, session)
            await refuses_to_start(daemons, DataDirectoryBusy)
            assert await everything(peer, session) == held
            assert (await peer.turn(session, "Tell me", max_tokens=2)).finished.revision_id

    async def test_in_use_by_another_process(self, daemons: Daemons, spawn):
        process = spawn()
        await refuses_to_start(daemons, DataDirectoryBusy)
        process.kill()
        # The lock dies with its process.
        await daemons.start()

    async def test_read_only(self, daemons: Daemons, before, settings):
        # Outside pytest's folders, which another user cannot enter.
        with tempfile.TemporaryDirectory() as folder:
            os.chmod(folder, 0o755)
            data = shutil.copytree(settings["data_dir"], Path(folder) / "data")
            paths = [data, *data.rglob("*")]
            for path in paths:
                path.chmod(0o555 if path.is_dir() else 0o444)
            with as_somebody_without_rights():
                await refuses_to_start(daemons, DataDirectoryReadOnly, data_dir=data)
                await refuses_to_start(daemons, DataDirectoryReadOnly, data_dir=data / "new")
            for path in paths:
                path.chmod(0o755 if path.is_dir() else 0o644)
            contents = {path.relative_to(data) for path in paths}
            assert contents == {path.relative_to(data) for path in data.rglob("*")} | {Path()}
        await before()

    async def test_that_is_a_file(self, daemons: Daemons, tmp_path: Path):
        file = tmp_path / "file"
        file.write_text("mine")
        await refuses_to_start(daemons, DataDirectoryReadOnly, data_dir=file)
        await refuses_to_start(daemons, DataDirectoryReadOnly, data_dir=file / "below")
        assert file.read_text() == "mine"

    async def test_of_a_newer_version(self, daemons: Daemons, before, settings):
        path = settings["data_dir"] / "FORMAT"
        written = path.read_bytes()
        newer = json.loads(written) | {"format": 999, "created_by": "sessiond 99", "something": "new"}
        path.write_text(json.dumps(newer))
        error = await refuses_to_start(daemons, FormatTooNew)
        assert "999" in error.message
        assert json.loads(path.read_text()) == newer
        path.write_bytes(written)
        await before()

    async def test_with_a_damaged_format(self, daemons: Daemons, before, settings):
        path = settings["data_dir"] / "FORMAT"
        written = path.read_bytes()
        path.write_text("{")
        with pytest.raises(RecordCorrupt):
            await daemons.start()
        path.write_bytes(written)
        await before()

    async def test_keeps_its_cell_size(self, daemons: Daemons, before, settings):
        daemon = await daemons.start(cell_tokens=256)
        assert daemon.desk.store.cell_tokens == 128
        await daemons.stop(daemon)
        await before()


async def test_a_token_file_that_is_none_is_refused(daemons: Daemons, tmp_path: Path, settings):
    for text in (None, "{", "[]", '{"a": 1}', '{"a": ""}', '{"": "a"}'):
        path = tmp_path / "tokens.json"
        if text is not None:
            path.write_text(text)
        await refuses_to_start(daemons, InvalidConfig, auth_tokens=path)
    assert not settings["data_dir"].exists()
