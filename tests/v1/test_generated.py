"""The committed code is what proto/ says, and proto/ says what everything is."""

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from google.protobuf import descriptor_pb2

from sessiond import errors
from sessiond.v1 import errors_pb2

ROOT = Path(__file__).parents[2]
PROTO = ROOT / "proto"
# Numbers of fields in descriptor.proto, as they stand in SourceCodeInfo.Location.path.
MESSAGE, ENUM, SERVICE = 4, 5, 6
NESTED_FIELD, NESTED_MESSAGE, NESTED_ENUM, NESTED_ONEOF = 2, 3, 4, 8
VALUE = METHOD = 2


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    pytest.importorskip("grpc_tools")
    spec = importlib.util.spec_from_file_location("generate", PROTO / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[descriptor_pb2.FileDescriptorProto]:
    """The protos as descriptors, comments included."""
    pytest.importorskip("grpc_tools")
    out = tmp_path_factory.mktemp("descriptors") / "set.bin"
    sources = sorted(str(path.relative_to(PROTO)) for path in (PROTO / "sessiond/v1").glob("*.proto"))
    options = [f"--proto_path={PROTO}", f"--descriptor_set_out={out}"]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", "--include_source_info", *options, *sources], check=True)
    return list(descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file)


def test_committed_code_is_what_the_sources_give(generate: ModuleType) -> None:
    assert generate.differences(ROOT) == []


def test_a_changed_file_is_noticed(generate: ModuleType, tmp_path: Path) -> None:
    generate.replace(tmp_path)
    changed = tmp_path / "sessiond/v1/types_pb2.py"
    changed.write_bytes(changed.read_bytes() + b"\n")
    assert generate.differences(tmp_path) == ["types_pb2.py"]


def test_buf_lint_passes() -> None:
    buf = shutil.which("buf", path=str(Path(sys.executable).parent))
    if buf is None:
        pytest.skip("buf is not installed")
    result = subprocess.run([buf, "lint", str(PROTO)], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout + result.stderr) == (0, "")


def test_everything_in_the_contract_has_a_comment(files: list[descriptor_pb2.FileDescriptorProto]) -> None:
    bare = []
    for file in files:
        commented = {
            tuple(location.path) for location in file.source_code_info.location if location.leading_comments.strip()
        }
        bare += [f"{file.name}: {name}" for path, name in walk(file) if path not in commented]
    assert bare == []


def test_every_rpc_lists_its_statuses(files: list[descriptor_pb2.FileDescriptorProto]) -> None:
    status = re.compile(r"^ ?\* [A-Z_]+(:| /|,)", re.MULTILINE)
    silent = []
    for file in files:
        comments = {tuple(place.path): place.leading_comments for place in file.source_code_info.location}
        for i, service in enumerate(file.service):
            for j, method in enumerate(service.method):
                if not status.search(comments[(SERVICE, i, METHOD, j)]):
                    silent.append(f"{service.name}.{method.name}")
    assert silent == []


def test_the_comments_name_only_reasons_there_are(files: list[descriptor_pb2.FileDescriptorProto]) -> None:
    known = {name.removeprefix("ERROR_REASON_") for name in reason_names()}
    named = {
        reason
        for file in files
        for place in file.source_code_info.location
        for line in re.findall(r"\* [A-Z_]+ / ([^.:]+)", place.leading_comments)
        for reason in re.findall(r"\b[A-Z]+(?:_[A-Z]+)*\b", line)
    }
    assert named
    assert named <= known


def test_every_error_of_the_daemon_is_in_the_contract() -> None:
    reasons = {f"ERROR_REASON_{cls.reason}" for cls in tree(errors.SessiondError)}
    assert reasons == reason_names() - {"ERROR_REASON_UNSPECIFIED"}


def reason_names() -> set[str]:
    return {value.name for value in errors_pb2.ErrorReason.DESCRIPTOR.values}


def tree(cls: type[errors.SessiondError]) -> Iterator[type[errors.SessiondError]]:
    yield cls
    for child in cls.__subclasses__():
        # Tests define errors of their own; they are not the daemon's.
        if child.__module__.startswith("sessiond."):
            yield from tree(child)


def walk(file: descriptor_pb2.FileDescriptorProto) -> Iterator[tuple[tuple[int, ...], str]]:
    """The source path and name of everything that needs a comment."""
    for i, message in enumerate(file.message_type):
        yield from walk_message((MESSAGE, i), message)
    for i, enum in enumerate(file.enum_type):
        yield from walk_enum((ENUM, i), enum)
    for i, service in enumerate(file.service):
        yield (SERVICE, i), service.name
        for j, method in enumerate(service.method):
            yield (SERVICE, i, METHOD, j), f"{service.name}.{method.name}"


def walk_message(
    path: tuple[int, ...], message: descriptor_pb2.DescriptorProto
) -> Iterator[tuple[tuple[int, ...], str]]:
    if message.options.map_entry:
        return
    yield path, message.name
    for i, field in enumerate(message.field):
        yield (*path, NESTED_FIELD, i), f"{message.name}.{field.name}"
    synthetic = {field.oneof_index for field in message.field if field.proto3_optional}
    for i, oneof in enumerate(message.oneof_decl):
        if i not in synthetic:
            yield (*path, NESTED_ONEOF, i), f"{message.name}.{oneof.name}"
    for i, nested in enumerate(message.nested_type):
        yield from walk_message((*path, NESTED_MESSAGE, i), nested)
    for i, enum in enumerate(message.enum_type):
        yield from walk_enum((*path, NESTED_ENUM, i), enum)


def walk_enum(path: tuple[int, ...], enum: descriptor_pb2.EnumDescriptorProto) -> Iterator[tuple[tuple[int, ...], str]]:
    yield path, enum.name
    for i, value in enumerate(enum.value):
        yield (*path, VALUE, i), f"{enum.name}.{value.name}"
