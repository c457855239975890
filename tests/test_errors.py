"""The error tree: every class says its status and reason; every one that can be raised has a test that raises it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import grpc
import pytest

from sessiond import errors
from sessiond.errors import SessiondError, Status
from sessiond.v1 import errors_pb2

ROOT = Path(__file__).parents[1]
DAEMON = ("sessiond", "storage", "policies", "kernels")

# Named by the contract, raised by no version so far.
NOT_RAISED_YET = {
    "Quota": "quotas are stored, and enforced by a later version",
    "Starting": "the port opens when the daemon serves; a version that opens it earlier will say so",
}


def walk(kind: type[SessiondError]) -> list[type[SessiondError]]:
    return [kind, *(below for child in kind.__subclasses__() for below in walk(child))]


TREE = walk(SessiondError)
LEAVES = [kind for kind in TREE if not kind.__subclasses__()]


def used_names(source: str) -> set[str]:
    """Names and attributes in a piece of Python, without those that it only imports."""
    tree = ast.parse(source)
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return names | {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def strings(source: str) -> set[str]:
    return {
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


@pytest.fixture(scope="module")
def raised() -> set[str]:
    """Classes that the daemon's code uses outside an `except`."""
    found: set[str] = set()
    for folder in DAEMON:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.name == "errors.py" or "v1" in path.parts:
                continue
            tree = ast.parse(path.read_text("utf-8"))
            caught = {
                id(node)
                for h in ast.walk(tree)
                if isinstance(h, ast.ExceptHandler) and h.type
                for node in ast.walk(h.type)
            }
            for node in ast.walk(tree):
                if id(node) not in caught and isinstance(node, ast.Name | ast.Attribute):
                    found.add(node.id if isinstance(node, ast.Name) else node.attr)
    return found


@pytest.fixture(scope="module")
def tested() -> set[str]:
    """Class names and reasons that some test of the daemon uses."""
    found: set[str] = set()
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        # The client's and the command line's tests make errors up; this file only lists them.
        if path != Path(__file__) and path.parent.name != "clients" and path.name != "test_cli.py":
            source = path.read_text("utf-8")
            found |= used_names(source) | strings(source)
    return found


@pytest.mark.parametrize("kind", TREE, ids=lambda kind: kind.__name__)
def test_every_error_says_what_it_is(kind: type[SessiondError]):
    assert isinstance(kind.status, Status)
    assert re.fullmatch(r"[A-Z]+(_[A-Z]+)*", kind.reason)
    assert any(base.__doc__ for base in kind.__mro__[:2]), "a docstring of its own, or its parent's"


def test_a_reason_names_one_class():
    reasons = [kind.reason for kind in TREE]
    assert len(set(reasons)) == len(reasons)


def test_a_reason_is_the_name_of_its_class():
    for kind in TREE[1:]:
        assert kind.reason == re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).upper()


def test_classes_below_one_status_share_it():
    for parent in SessiondError.__subclasses__():
        assert {kind.status for kind in walk(parent)} == {parent.status}


def test_statuses_are_grpcs():
    codes = {code.name: code.value[0] for code in grpc.StatusCode}
    for status in Status:
        assert codes[status.name] == status.value


def test_every_reason_is_in_the_contract():
    named = {name.removeprefix("ERROR_REASON_") for name in errors_pb2.ErrorReason.DESCRIPTOR.values_by_name} - {
        "UNSPECIFIED"
    }
    assert {kind.reason for kind in TREE} == named


def test_the_drawing_shows_the_tree():
    drawn = set(re.findall(r"[A-Z]\w+", (errors.__doc__ or "").partition("SessiondError")[2]))
    assert drawn == {kind.__name__ for kind in TREE[1:]}


def test_metadata_is_text():
    error = errors.SessionBusy("busy", retry_after=2.0, request_id="a", count=3)
    assert error.metadata == {"request_id": "a", "count": "3"}
    assert error.retry_after == 2.0
    assert str(error) == error.message == "busy"


@pytest.mark.parametrize("kind", LEAVES, ids=lambda kind: kind.__name__)
def test_every_error_that_can_be_raised_has_a_test_that_raises_it(
    kind: type[SessiondError], raised: set[str], tested: set[str]
):
    if kind.__name__ in NOT_RAISED_YET:
        assert kind.__name__ not in raised, "it is raised now: test it, and take it from NOT_RAISED_YET"
        return
    assert kind.__name__ in raised, "nothing raises it: say so in NOT_RAISED_YET, or delete it"
    assert tested & {kind.__name__, kind.reason}
