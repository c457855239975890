"""Python arguments become the requests they should."""

from datetime import UTC, datetime, timedelta

import pytest

from sessiond.clients import messages, requests
from sessiond.v1 import sessions_pb2, types_pb2


def test_a_text_is_a_message_of_the_user() -> None:
    request = requests.generate("s", "hello", {})
    assert [(m.role, m.content[0].text) for m in request.messages] == [("user", "hello")]
    assert len(request.request_id) == 32
    assert not request.HasField("sampling")


def test_request_ids_differ_unless_given() -> None:
    assert requests.generate("s", "a", {}).request_id != requests.generate("s", "a", {}).request_id
    assert requests.generate("s", "a", {"request_id": "mine"}).request_id == "mine"


def test_sampling_keeps_unset_and_zero_apart() -> None:
    sampling = requests.generate("s", "a", {"temperature": 0.0, "stop": "END", "seed": 0}).sampling
    assert sampling.HasField("temperature")
    assert sampling.HasField("seed")
    assert not sampling.HasField("top_p")
    assert list(sampling.stop) == ["END"]


def test_every_field_of_the_turn_and_its_sampling_can_be_given() -> None:
    options = set(requests.GenerateOptions.__annotations__)
    turn = {field.name for field in sessions_pb2.GenerateRequest.DESCRIPTOR.fields}
    sampling = {field.name for field in types_pb2.Sampling.DESCRIPTOR.fields}
    renamed = {"base_revision_id": "base_revision"}
    wanted = {renamed.get(name, name) for name in turn | sampling} - {"session_id", "messages", "sampling"}
    assert options == wanted


def test_modes_have_names() -> None:
    request = requests.generate("s", None, {"mode": "continue", "context_overflow": "slide"})
    assert request.mode == sessions_pb2.GENERATE_MODE_CONTINUE
    assert request.context_overflow == sessions_pb2.CONTEXT_OVERFLOW_SLIDE
    with pytest.raises(ValueError, match="append_only"):
        requests.generate("s", None, {"mode": "go"})  # type: ignore[typeddict-item]


def test_tool_calls_and_results_in_either_common_shape() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    calls, result = messages.to_messages(
        [
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "2"}]},
        ]
    )
    assert calls.tool_calls[0] == types_pb2.ToolCall(id="c1", name="add", arguments_json='{"a": 1}')
    assert (result.tool_call_id, result.content[0].text) == ("c1", "2")
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    assert messages.to_tool(tool).parameters_json_schema == '{"type": "object"}'


def test_what_a_message_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="colour"):
        messages.to_message({"role": "user", "content": "a", "colour": "red"})
    with pytest.raises(ValueError, match="image"):
        messages.to_message({"role": "user", "content": [{"type": "image", "url": ""}]})


def test_a_policy_is_a_name_or_a_name_with_knobs() -> None:
    assert messages.to_policy("full") == types_pb2.Policy(name="full")
    policy = messages.to_policy({"name": "window", "n_recent": 512})
    assert policy is not None
    assert dict(policy.knobs) == {"n_recent": 512}


def test_expiry_is_given_one_way_and_with_a_zone() -> None:
    assert requests.create_session({"ttl": 90}).ttl.seconds == 90
    assert requests.create_session({"ttl": timedelta(hours=1)}).ttl.seconds == 3600
    moment = datetime(2030, 1, 1, tzinfo=UTC)
    request = requests.create_session({"expire_time": moment})
    assert request.WhichOneof("expiration") == "expire_time"
    with pytest.raises(ValueError, match="give one"):
        requests.create_session({"ttl": 1, "expire_time": moment})
    with pytest.raises(ValueError, match="zone"):
        requests.create_session({"expire_time": datetime(2030, 1, 1)})


def test_update_names_what_it_was_given_and_clears_with_none() -> None:
    request = requests.update_session("s", "e1", {"ttl": None, "labels": {"a": "b"}})
    assert list(request.update_mask.paths) == ["labels", "ttl"]
    assert not request.session.HasField("ttl")
    assert (request.session.etag, dict(request.session.labels)) == ("e1", {"a": "b"})
    with pytest.raises(ValueError, match="nothing"):
        requests.update_session("s", "", {})
