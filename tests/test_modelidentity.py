"""The identity names what changes a number or a token id, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_models import write_directory, write_safetensors

from sessiond.errors import ModelCorrupt, ModelMissing
from sessiond.modelcheck import BLOCKS
from sessiond.modelidentity import canonical_json, differing_fields, identity_fields, identity_id

FIELDS = ["architecture", "kv_dtype", "rope", "shape", "tokenizer", "weights"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_directory(tmp_path / "model", rope_theta=10000.0, transformers_version="5.0")


def changed(model: Path, before: dict[str, str]) -> list[str]:
    after = identity_fields(model)
    return [name for name in FIELDS if after[name] != before[name]]


def test_fields_and_id_have_their_form(model: Path) -> None:
    fields = identity_fields(model)
    assert sorted(fields) == FIELDS
    assert len(identity_id(fields)) == 32
    assert identity_id(fields) == identity_id(dict(reversed(fields.items())))
    assert identity_id(fields | {"kv_dtype": "float32"}) != identity_id(fields)


def test_sharding_and_metadata_do_not_change_it(model: Path, tmp_path: Path) -> None:
    before = identity_fields(model)
    sharded = write_directory(tmp_path / "sharded", shards=2, rope_theta=10000.0, transformers_version="6.1")
    assert identity_fields(sharded) == before
    tensors = {"a.weight": np.arange(8, dtype=np.float32), "b.weight": np.arange(6, dtype=np.float32)}
    write_safetensors(model / "model.safetensors", tensors, format="pt", note="other")
    assert identity_fields(model) == before


def test_each_part_changes_its_own_field(model: Path) -> None:
    before = identity_fields(model)
    config = json.loads((model / "config.json").read_text())
    for key, value, field in [
        ("rope_theta", 500000.0, "rope"),
        ("rms_norm_eps", 1e-6, "shape"),
        ("model_type", "qwen2", "architecture"),
    ]:
        (model / "config.json").write_text(json.dumps(config | {key: value}))
        assert changed(model, before) == [field]
    (model / "config.json").write_text(json.dumps(config))
    (model / "chat_template.jinja").write_text("{{ messages }}")
    assert changed(model, before) == ["tokenizer"]
    (model / "chat_template.jinja").unlink()
    (model / "tokenizer_config.json").write_text(json.dumps({"local_files_only": True}))
    at_rest = identity_fields(model)
    (model / "tokenizer_config.json").write_text(json.dumps({"local_files_only": False}))
    assert identity_fields(model) == at_rest
    (model / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    assert changed(model, at_rest) == ["tokenizer"]


def test_one_changed_weight_changes_it(model: Path) -> None:
    before = identity_fields(model)
    data = bytearray((model / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (model / "model.safetensors").write_bytes(data)
    assert changed(model, before) == ["weights"]


def test_remembered_digest_follows_the_file(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "digests"
    before = identity_fields(model, cache=cache)
    (slot,) = cache.iterdir()
    slot.write_text("1" * 64)
    assert identity_fields(model, cache=cache)["weights"] == "1" * 64  # it is read
    slot.write_text("garbage")
    assert identity_fields(model, cache=cache) == before
    write_safetensors(model / "model.safetensors", {"a.weight": np.zeros(3, dtype=np.float32)})
    after = identity_fields(model, cache=cache)["weights"]
    assert after == identity_fields(model)["weights"] != before["weights"]


def test_quantized_weights_are_another_identity_and_bf16_has_the_one_it_always_had(model: Path, tmp_path: Path) -> None:
    plain = identity_fields(model)
    assert sorted(plain) == FIELDS
    assert identity_fields(model, weights="bf16") == plain
    kinds = {kind: identity_fields(model, weights=kind) for kind in ("int8", "int4")}
    for fields in kinds.values():
        assert differing_fields(plain, fields) == ["quantization"]
    assert differing_fields(kinds["int8"], kinds["int4"]) == ["quantization"]


def test_kept_codes_change_the_identity_of_quantized_weights_alone(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "digests"
    plain, rounded = identity_fields(model, cache=cache), identity_fields(model, weights="int4", cache=cache)
    write_safetensors(model / BLOCKS, {"a.weight.codes": np.arange(32, dtype=np.uint8)})
    kept = identity_fields(model, weights="int4", cache=cache)
    assert identity_fields(model, cache=cache) == plain
    assert differing_fields(kept, rounded) == ["quantization"]
    write_safetensors(model / BLOCKS, {"a.weight.codes": np.arange(1, 33, dtype=np.uint8)})
    assert differing_fields(kept, identity_fields(model, weights="int4", cache=cache)) == ["quantization"]


def test_a_cache_that_cannot_be_written_costs_only_time(model: Path, tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    assert identity_fields(model, cache=in_the_way / "digests") == identity_fields(model)


def test_nested_text_configuration_is_read(model: Path, tmp_path: Path) -> None:
    text = {"hidden_size": 8, "rope_theta": 10000.0}
    nested = write_directory(tmp_path / "nested", "gemma3", text_config=text)
    assert identity_fields(nested)["rope"] == identity_fields(model)["rope"]


def test_missing_or_damaged_files_are_typed(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelMissing):
        identity_fields(tmp_path / "nothing")
    (model / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ModelCorrupt):
        identity_fields(model)
    shutil.rmtree(model)


def test_canonical_json_is_canonical() -> None:
    assert canonical_json({"b": 1, "a": "ü"}) == '{"a":"\\u00fc","b":1}'
