"""Imports point down only. The table is the architecture; a new module gets a line.

A module may import modules of its own layer and of lower ones. A third-party library in RESTRICTED may be imported
only by the modules listed with it.
"""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Top first. Names are module paths under `sessiond.`; a pattern stands for several.
LAYERS: list[list[str]] = [
    ["cli"],
    ["cli_app"],
    ["cli_*"],
    ["doctor"],
    ["doctor_*"],
    ["server"],
    ["service", "adminservice", "auth"],
    ["portable"],
    ["importing"],
    ["exporting"],
    ["places"],
    ["manifest"],
    ["wirein", "wireout", "wireadmin", "wireexplain", "metrics"],
    ["conversation", "branching", "keeper", "care"],
    ["sessions"],
    ["retelling"],
    ["transplant"],
    ["newsession"],
    ["views", "paging"],
    ["admission"],
    ["turn"],
    ["explaining"],
    ["turnlog"],
    ["turnplan", "turnstream"],
    ["turnevents"],
    ["audit"],
    ["desk"],
    ["scrub", "turnplaces"],
    ["sharing"],
    ["live"],
    ["lifecycle", "handover"],
    ["readsummary"],
    ["explanations"],
    ["engine"],
    ["scheduler"],
    ["idlework", "line"],
    ["zipping", "turnwork"],
    ["stepevents"],
    ["foreignkv"],
    ["segments"],
    ["history"],
    ["messages"],
    ["template", "sampling", "textstream"],
    ["templateprobe"],
    ["model", "ggufconvert"],
    ["forward"],
    ["fused"],
    ["modelweights", "ggufblocks"],
    ["blockfile"],
    ["attention"],
    ["tiers"],
    ["restoring"],
    ["cachememory"],
    ["cache"],
    ["selection"],
    ["backing"],
    ["reading"],
    ["verify", "pacing"],
    ["collector"],
    ["secondlook", "mending"],
    ["diskuse", "erasure", "reachability", "damage"],
    ["references"],
    ["priors"],
    ["branch", "tree", "foreignsessions"],
    ["storage.*"],
    ["policies.*"],
    ["kernels.*"],
    ["modelstore"],
    ["modelconvert", "modelfetch", "modelcache", "modelidentity", "modelcheck"],
    ["clients.*"],
    ["v1.*"],
    ["config"],
    ["types", "errors"],
]
LEAVES = ["types", "errors", "v1.*"]  # these import nothing of the project

# Beyond the order: what a part may know at all, besides itself and the leaves.
KNOWS: dict[str, list[str]] = {
    "clients.*": ["clients.*", "v1.*"],
    "policies.*": ["policies.*", "kernels.*", "errors", "types"],
    "kernels.*": ["kernels.*", "errors", "types"],
    "storage.*": ["storage.*", "kernels.*", "errors", "types", "config"],
    "config": ["errors", "types"],
    "cli_*": ["cli_*", "doctor", "doctor_*", "server", "config", "modelstore", "clients.*", "v1.*", "errors"],
}

# Who may import which library, wherever in the file.
RESTRICTED: dict[str, list[str]] = {
    "grpc": ["server", "service", "adminservice", "cli_*", "clients.*", "v1.*"],
    "grpc_status": ["server", "clients.*"],
    "transformers": ["model", "attention", "cache", "ggufconvert"],
    "torch": [
        "server", "engine", "scheduler", "sampling", "model", "attention", "cache", "selection", "reading",
        "policies.*", "kernels.*", "modelweights", "ggufconvert", "ggufblocks", "blockfile",
        "forward", "fused",
    ],
    "lmdb": ["storage.*"],
    "sqlalchemy": ["storage.*", "doctor_place"],
    "alembic": ["storage.*"],
    "blosc2": ["storage.*"],
    "pydantic_settings": ["config"],
    "typer": ["cli", "cli_*"],
    "rich": ["cli", "cli_*"],
    "huggingface_hub": ["modelfetch"],
    "triton": ["kernels.triton_*"],
}  # fmt: skip

CLIENT_LIBRARIES = {"grpc", "google", "grpc_status"}


def modules() -> dict[str, Path]:
    """Every hand-written module of the package: `storage.codec` -> its file. Packages are `storage.__init__`."""
    mapping = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    found = {}
    for package, folder in mapping.items():
        prefix = package.removeprefix("sessiond").lstrip(".")
        for path in (ROOT / folder).glob("*.py"):
            found[f"{prefix}.{path.stem}".lstrip(".")] = path
    found.pop("__init__")
    return found


MODULES = modules()
SOURCES = {name: path.read_text("utf-8") for name, path in MODULES.items()}


def imports(source: str) -> Iterator[str]:
    """Dotted names that a source imports, anywhere in it."""
    for node in _walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """Every node that runs: what stands under `if TYPE_CHECKING:` only names types."""
    yield node
    skipped = node.body if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING") else []
    for child in ast.iter_child_nodes(node):
        if child not in skipped:
            yield from _walk(child)


def own_imports(source: str) -> set[str]:
    """Modules of the project that a source imports, named as in MODULES."""
    found = set()
    for name in imports(source):
        if name != "sessiond" and not name.startswith("sessiond."):
            continue
        parts = name.split(".")[1:]
        # `from sessiond.storage.keys import x` names a thing in a module; take the longest prefix that is a module.
        for length in range(len(parts), 0, -1):
            candidate = ".".join(parts[:length])
            known = candidate in MODULES or candidate.startswith("v1.")
            if known or f"{candidate}.__init__" in MODULES:
                found.add(candidate if known else f"{candidate}.__init__")
                break
        else:
            found.add(".".join(parts))
    return found


def layer(name: str) -> int:
    # An exact name goes before a pattern: cli_app is not just any cli_*.
    for exact in (True, False):
        for number, patterns in enumerate(LAYERS):
            if any(name == pattern if exact else fnmatch(name, pattern) for pattern in patterns):
                return number
    pytest.fail(f"sessiond.{name} has no line in LAYERS: say where it stands")


def matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_module_imports_only_downward(name: str) -> None:
    upward = [other for other in own_imports(SOURCES[name]) if layer(other) < layer(name)]
    assert upward == [], f"sessiond.{name} imports upward"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_module_imports_only_libraries_it_may(name: str) -> None:
    libraries = {imported.partition(".")[0] for imported in imports(SOURCES[name])}
    forbidden = [
        library for library, allowed in RESTRICTED.items() if library in libraries and not matches(name, allowed)
    ]
    assert forbidden == [], f"sessiond.{name} may not import these"


@pytest.mark.parametrize("part", sorted(KNOWS))
def test_part_knows_only_what_it_may(part: str) -> None:
    for name in filter(lambda name: fnmatch(name, part), MODULES):
        strangers = [other for other in own_imports(SOURCES[name]) if not matches(other, KNOWS[part])]
        assert strangers == [], f"sessiond.{name} may not know these"


@pytest.mark.parametrize("name", sorted(name for name in MODULES if matches(name, ["types", "errors"])))
def test_leaves_import_nothing_of_the_project(name: str) -> None:
    assert own_imports(SOURCES[name]) == set()


def test_clients_import_only_grpc_and_protobuf() -> None:
    import sys

    for name in filter(lambda name: name.startswith("clients."), MODULES):
        libraries = {imported.partition(".")[0] for imported in imports(SOURCES[name])} - {"sessiond"}
        assert libraries - CLIENT_LIBRARIES <= sys.stdlib_module_names, name


def test_package_imports_nothing() -> None:
    source = (ROOT / "sessiond" / "__init__.py").read_text()
    assert list(imports(source)) == []


def test_the_checks_see_what_they_forbid() -> None:
    source = "def f():\n    from sessiond.storage.keys import x\n    import sessiond.turn, torch.nn\n"
    source += "if TYPE_CHECKING:\n    import grpc\n"
    assert {name.partition(".")[0] for name in imports(source)} == {"sessiond", "torch"}
    assert "turn" in own_imports(source)
    assert layer("turn") < layer("storage.keys")
    assert layer("cli") < layer("cli_app") < layer("cli_chat")
