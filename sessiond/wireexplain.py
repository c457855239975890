"""What turns read, to protobuf. No behaviour."""

from __future__ import annotations

from collections.abc import Sequence

from sessiond.explanations import Explanation, LayerRead, ViewRead
from sessiond.types import Tier
from sessiond.v1 import sessions_pb2 as pb
from sessiond.v1 import types_pb2 as types
from sessiond.wireout import restored, timestamp

MOST_BYTES = 3 << 20  # of a reply: below what gRPC lets a client receive that set no limit
TIERS = {Tier.DEVICE: types.TIER_HOT, Tier.HOST: types.TIER_WARM, Tier.DISK: types.TIER_COLD}


def response(turns: Sequence[Explanation]) -> pb.ExplainTurnResponse:
    """The first of the turns, as many as fit, and one at least."""
    out = pb.ExplainTurnResponse()
    size = 0
    for turn in turns:
        told = explanation(turn)
        size += told.ByteSize()
        if out.turns and size > MOST_BYTES:
            break
        out.turns.append(told)
    return out


def explanation(turn: Explanation) -> pb.TurnExplanation:
    out = pb.TurnExplanation(
        revision_id=turn.revision_id,
        request_id=turn.request_id,
        policy=types.Policy(name=turn.policy),
        context_tokens=turn.context_tokens,
        steps=turn.n_steps,
        reads=[_read(read) for read in turn.reads],
        restored=restored(turn.restored) if turn.restored else None,
        milliseconds_by_phase=turn.milliseconds,
        notes=turn.notes,
        start_time=timestamp(turn.began_us),
        read_share=turn.read_share,
        read_range_tokens=turn.range_tokens,
    )
    out.policy.knobs.update(dict(turn.knobs))
    return out


def _read(read: LayerRead) -> pb.AttentionRead:
    return pb.AttentionRead(
        layer=read.layer,
        head_start=read.head_start,
        n_heads=read.n_heads,
        tokens_available=read.available,
        tokens_attended=read.attended,
        mean_tokens_attended=read.mean_attended,
        spans=[types.TokenSpan(start=start, end=end) for start, end in read.spans.tolist()],
        spans_cut=read.spans_cut,
        views=[_view(view) for view in read.views],
        attention_mass=read.mass,
    )


def _view(view: ViewRead) -> pb.ViewRead:
    return pb.ViewRead(view=view.view, tier=TIERS[view.tier], tokens=view.tokens, bytes=view.nbytes)
