"""Is this a model we can serve? Reads configurations and file headers only, and needs no transformers."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from sessiond.errors import DependencyMissing, ModelCorrupt, ModelMissing, ModelUnsupported

#: `model_type` of a transformers configuration whose attention and cache this version owns.
SUPPORTED_MODEL_TYPES = ("gemma3", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3")
#: `general.architecture` of a GGUF file (Mistral models call themselves llama there).
SUPPORTED_GGUF_ARCHITECTURES = ("gemma3", "llama", "mistral", "phi3", "qwen2", "qwen3")

#: Of a converted directory: the GGUF file's own codes, if any are kept. No weights that transformers would read.
BLOCKS = "blocks.safetensors"

_MAX_HEADER_BYTES = 100_000_000  # the safetensors library refuses longer headers too
_ITEM_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16,
    "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64, "F4": 4,
}  # fmt: skip


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises ModelMissing or ModelCorrupt."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ModelMissing(f"{path} does not exist", path=path) from error
    except OSError as error:
        raise ModelMissing(f"{path} cannot be read: {error.strerror}", path=path) from error
    except (ValueError, RecursionError) as error:
        raise ModelCorrupt(f"{path} is not JSON: {error}", path=path) from error
    if not isinstance(value, dict):
        raise ModelCorrupt(f"{path} does not hold a JSON object", path=path)
    return value


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of a configuration (Gemma-3 nests it)."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def check_directory(path: Path) -> dict[str, Any]:
    """Check a transformers directory and return its configuration.

    Raises ModelMissing (no configuration or weights), ModelCorrupt (a file's header contradicts its size),
    ModelUnsupported (architecture, quantization or weight format).
    """
    if not (path / "config.json").is_file():
        hint = "; pass the .gguf file itself" if any(path.glob("*.gguf")) else ""
        raise ModelMissing(f"{path} holds no config.json, so it is not a transformers model{hint}", path=path)
    config = read_json(path / "config.json")
    model_type = config.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise _unsupported(f"{path} is of type {model_type!r}", SUPPORTED_MODEL_TYPES, path)
    if config.get("quantization_config"):
        raise ModelUnsupported(
            f"{path} holds weights quantized for another library; use the bf16 weights or a GGUF file",
            path=path,
        )
    for file in weight_files(path):
        read_safetensors_header(file)
    return config


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a transformers directory, sorted.

    Raises ModelMissing, ModelCorrupt, ModelUnsupported (pickled weights).
    """
    index = path / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelCorrupt(f"{index} has no weight_map", path=index)
        names = sorted({str(name) for name in weight_map.values()})
        # A name is data from a download: it must not lead out of the directory.
        if any(Path(name).name != name or not name.endswith(".safetensors") for name in names):
            raise ModelCorrupt(f"{index} names files outside its directory", path=index)
        files = [path / name for name in names]
    else:
        files = [path / "model.safetensors"]
    missing = [file.name for file in files if not file.is_file()]
    if not missing:
        return files
    if not index.is_file() and any(path.glob("*.bin")):
        raise ModelUnsupported(f"{path} has pickled weights only; convert them to safetensors", path=path)
    raise ModelMissing(f"{path} lacks {', '.join(missing)}", path=path)


def read_safetensors_header(path: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """Byte offset of the data, and name -> {dtype, shape, data_offsets}; every extent lies inside the file.

    The data must be covered exactly and without overlap. Raises ModelCorrupt.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise ModelCorrupt(f"{path} is truncated: {size} bytes", path=path)
        (length,) = struct.unpack("<Q", prefix)
        if length > min(size - 8, _MAX_HEADER_BYTES):
            raise ModelCorrupt(
                f"{path} is truncated or no safetensors file: header of {length} bytes, file of {size}",
                path=path,
            )
        raw = file.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        end = _check_extents(header)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelCorrupt(f"{path} has a damaged safetensors header: {error!r}", path=path) from error
    if 8 + length + end != size:
        raise ModelCorrupt(
            f"{path} is truncated or damaged: its header describes {8 + length + end} bytes, it has {size}",
            path=path,
        )
    return 8 + length, header


def _check_extents(header: dict[str, dict[str, Any]]) -> int:
    """End of the last tensor; ValueError unless tensors adjoin and match their shapes."""
    position = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = entry["data_offsets"]
        n_bits = _ITEM_BITS[entry["dtype"]]
        for n in entry["shape"]:
            if not isinstance(n, int) or n < 0:
                raise ValueError(f"shape of {name}")
            n_bits *= n
        if start != position or (end - start) * 8 != n_bits:
            raise ValueError(f"extent of {name}")
        position = end
    return position


def check_gguf(path: Path) -> str:
    """Check magic, metadata and tensor extents of a GGUF file; return its architecture.

    Raises ModelCorrupt or ModelUnsupported. Takes a second or two: done once, before conversion.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelCorrupt(f"{path} is no GGUF file: its first bytes are not GGUF", path=path)
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise DependencyMissing("reading GGUF files needs gguf: pip install 'sessiond[server]'") from error
    size = path.stat().st_size
    try:
        reader = GGUFReader(str(path))
        field = reader.fields.get("general.architecture")
        architecture = field.contents() if field is not None else None
        end = max((int(tensor.data_offset) + int(tensor.n_bytes) for tensor in reader.tensors), default=0)
    # What the reader raises on bytes that are not what they claim; it has no error class of its own.
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError, AttributeError) as error:
        raise ModelCorrupt(f"{path} is truncated or damaged: {error}", path=path) from error
    if end == 0 or end > size:
        raise ModelCorrupt(f"{path} is truncated: its tensors need {end} bytes, it has {size}", path=path)
    if architecture not in SUPPORTED_GGUF_ARCHITECTURES:
        raise _unsupported(f"{path} is of architecture {architecture!r}", SUPPORTED_GGUF_ARCHITECTURES, path)
    return str(architecture)


def _unsupported(what: str, supported: tuple[str, ...], path: Path) -> ModelUnsupported:
    return ModelUnsupported(f"{what}; supported are {', '.join(supported)}", path=path, supported=", ".join(supported))
