"""`sessiond explain`: tables for people, JSON for scripts, a heat map of where turns read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_server import CannedServer, serve
from test_cli import blocked, run

from sessiond.v1 import sessions_pb2 as pb
from sessiond.v1 import types_pb2 as types


def read(layer: int, attended: int, mass: float | None, *, view: str = "exact") -> pb.AttentionRead:
    views = [pb.ViewRead(view=view, tier=types.TIER_HOT, tokens=attended, bytes=attended * 100)]
    return pb.AttentionRead(
        layer=layer, n_heads=3, tokens_available=6000, tokens_attended=attended, mean_tokens_attended=attended,
        views=views, attention_mass=mass,
    )  # fmt: skip


def turn(revision_id: str, share: list[float], width: int) -> pb.TurnExplanation:
    told = pb.TurnExplanation(
        revision_id=revision_id,
        policy=types.Policy(name="sieve"),
        context_tokens=6000,
        steps=9,
        reads=[read(0, 6000, 1.0), read(1, 6000, 1.0), read(2, 512, 0.987), read(3, 512, None, view="4-bit keys")],
        milliseconds_by_phase={"decode": 88.84, "select": 12.0},
        notes=["a note \x1b[31mof the policy"],
        read_share=share,
        read_range_tokens=width,
    )
    told.policy.knobs.update({"most": 512})
    reason = pb.RecomputeReason(reason=pb.RECOMPUTE_CAUSE_CORRUPT, tokens=128, detail="bad checksum")
    told.restored.CopyFrom(pb.Restored(tokens_restored=5872, tokens_recomputed=128, reasons=[reason]))
    return told


class ExplainingServer(CannedServer):
    turns = [turn("r2", [0.75, 0.25, 0.0], 2048), turn("r1", [0.5, 0.5], 1024)]  # noqa: RUF012

    def ExplainTurn(self, request, context):
        self.requests.append(request)
        return pb.ExplainTurnResponse(turns=self.turns[: request.last_turns])


@pytest.fixture
def server() -> ExplainingServer:
    server = ExplainingServer()
    server.sessions["s1"] = types.Session(session_id="s1")
    return server


@pytest.fixture
def address(server: ExplainingServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("SESSIOND_RETRY_SECONDS", "0.2")
    with serve(server) as address:
        monkeypatch.setenv("SESSIOND_ADDRESS", address)
        yield address


def rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_layers_that_read_alike_share_a_row(address: str) -> None:
    result = rows(run("explain", "s1").stdout)
    assert ["0-1", "0-2", "6,000", "6,000", "6,000.0", "1.0000"] in result
    assert ["2", "0-2", "512", "6,000", "512.0", "0.9870"] in result
    assert ["3", "0-2", "512", "6,000", "512.0", "-"] in result


def test_policy_views_recomputation_phases_and_notes_are_told(address: str) -> None:
    text = run("explain", "s1").stdout
    assert "policy sieve: most 512" in text
    assert ["exact", "hot", "37,536", "1,251,200"] in rows(text)  # of three heads each
    assert ["4-bit", "keys", "hot", "1,536", "51,200"] in rows(text)
    assert "128 tokens again: corrupt (bad checksum)" in text
    assert "decode 88.8 ms, select 12.0 ms" in text
    assert "a note [31mof the policy" in text  # without its escape character


def test_json_is_the_message(address: str, server: ExplainingServer) -> None:
    told = json.loads(run("explain", "s1", "--last", "2", "--json").stdout)
    assert [one["revision_id"] for one in told] == ["r2", "r1"]
    assert told[0]["reads"][0]["views"][0]["bytes"] == 600000
    assert "attention_mass" not in told[0]["reads"][3]
    assert server.requests[-1].last_turns == 2


def test_nothing_remembered_is_said(address: str, server: ExplainingServer) -> None:
    server.turns = []
    result = run("explain", "s1")
    assert result.stdout == ""
    assert "nothing is remembered" in result.stderr


class TestPlot:
    def test_draws_a_png(self, address: str, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib", reason="drawing needs matplotlib, the extra 'plot'")
        run("explain", "s1", "--last", "2", "--plot", str(tmp_path / "reads.png"))
        assert (tmp_path / "reads.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")

    def test_ranges_of_several_widths_become_the_widest(self) -> None:
        pytest.importorskip("matplotlib", reason="drawing needs matplotlib, the extra 'plot'")
        from sessiond.cli_readmap import _wider

        assert _wider(turn("r", [0.1, 0.2, 0.3, 0.3, 0.1], 8), 16).tolist() == pytest.approx([0.3, 0.6, 0.1])

    def test_a_kind_of_image_that_there_is_not_is_an_error(self, address: str, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib", reason="drawing needs matplotlib, the extra 'plot'")
        result = run("explain", "s1", "--plot", str(tmp_path / "reads.docx"), status=1)
        assert result.stderr.startswith("error: ")

    def test_without_the_extra_it_says_what_to_install(self, address: str, tmp_path: Path) -> None:
        result = blocked("matplotlib", "explain", "s1", "--plot", str(tmp_path / "reads.png"))
        assert result.returncode == 1
        assert result.stderr == "error: drawing needs matplotlib: pip install 'sessiond[plot]'\n"

    def test_turns_that_generated_nothing_are_no_map(
        self, address: str, server: ExplainingServer, tmp_path: Path
    ) -> None:
        server.turns = [pb.TurnExplanation(revision_id="r1")]
        result = run("explain", "s1", "--plot", str(tmp_path / "reads.png"), status=1)
        assert "nothing to draw" in result.stderr
        assert not (tmp_path / "reads.png").exists()
