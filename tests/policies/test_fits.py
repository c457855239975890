"""Which policies a model can run under, by its layers; what does not fit is refused with what would."""

from __future__ import annotations

import pytest
from engine_harness import make_pair
from small_policies import SMALL

from sessiond.errors import InvalidConfig
from sessiond.policies.base import ModelFacts
from sessiond.policies.registry import parse

SLIDING = ModelFacts(n_layers=3, n_kv_heads=2, head_dim=22, attending=(), max_context=2048)
WHOLE = ModelFacts(n_layers=3, n_kv_heads=2, head_dim=22, attending=(0, 1, 2), max_context=2048)


@pytest.mark.parametrize("name", sorted(SMALL))
def test_every_policy_fits_a_model_whose_layers_see_all_of_history(name: str):
    parse(name, SMALL[name]).fits(WHOLE)


@pytest.mark.parametrize("name", sorted(SMALL.keys() - {"full"}))
def test_where_every_layer_has_a_window_only_full_fits(name: str):
    parse("full", {}).fits(SLIDING)
    with pytest.raises(InvalidConfig) as caught:
        parse(name, SMALL[name]).fits(SLIDING)
    assert caught.value.metadata["policy"] == name
    assert caught.value.metadata["range"] == "full"


@pytest.mark.parametrize(("rank", "fits"), [(44, True), (45, False)])
def test_a_rank_is_at_most_the_number_of_channels(rank: int, fits: bool):
    policy = parse("shadowkv", {"rank": rank})
    if fits:
        policy.fits(WHOLE)
        return
    with pytest.raises(InvalidConfig) as caught:
        policy.fits(WHOLE)
    assert caught.value.metadata["knob"] == "rank"
    assert caught.value.metadata["range"] == "[0, 44]"


@pytest.mark.parametrize(
    ("architecture", "attending"),
    [("llama", (0, 1, 2)), ("mistral", ()), ("gemma3", (2,)), ("qwen2-sliding", (0,)), ("qwen3", (0, 1, 2))],
)
def test_a_model_tells_which_layers_see_all_of_history(architecture: str, attending: tuple[int, ...]):
    assert make_pair(architecture).ours.facts.attending == attending
