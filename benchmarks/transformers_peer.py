"""transformers as its authors intend it, in a process of its own: an order a line of JSON in, an answer a line out.

`generate` with a DynamicCache and default attention for one prompt; for several `generate_batch`, its continuous
batching, with a persistent manager, so that it keeps its pages and shares prompts that it has computed. bf16. Times are
those of `time.perf_counter`, which processes of one machine share.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, DynamicCache, GenerationConfig
from transformers.generation.streamers import BaseStreamer
from transformers.utils.logging import disable_progress_bar

PAGE_TOKENS = 256  # transformers' default
SPARE_PAGES = 32
Found = dict[str, Any]


class Clock(BaseStreamer):  # type: ignore[misc]
    """Notes when each token comes; `generate` hands over the prompt first."""

    def __init__(self) -> None:
        self.found: Found = {"began": time.perf_counter(), "arrivals": [], "token_ids": []}
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.found["token_ids"] += value.flatten().tolist()
        self.found["arrivals"].append((time.perf_counter(), len(self.found["token_ids"])))

    def end(self) -> None:
        """Nothing to do."""


class Peer:
    def __init__(self, path: str, threads: int) -> None:
        torch.set_num_threads(threads)
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, local_files_only=True)
        self._model = loaded.eval()
        self._model.generation_config.eos_token_id = None  # decode as many tokens as were asked for
        self.attention = str(self._model.config._attn_implementation)
        self._prompts: dict[int, list[int]] = {}
        self._caches: dict[int, Any] = {}

    def prefill(self, ids: list[int]) -> list[Found]:
        return [self._generate(ids, DynamicCache(config=self._model.config), 1)]

    def hold(self, prompts: dict[str, list[int]]) -> list[Found]:
        """Compute prompts, by what will decode them: `generate` a single one, `generate_batch` several."""
        self._prompts |= {int(number): ids for number, ids in prompts.items()}
        self.decode([int(number) for number in prompts], 2)
        return []

    def decode(self, numbers: list[int], n_tokens: int) -> list[Found]:
        if len(numbers) > 1:
            return self._batch([self._prompts[number] for number in numbers], n_tokens)
        [number] = numbers
        ids = self._prompts[number]
        cache = self._caches.get(number)
        if cache is None:
            cache = self._caches[number] = DynamicCache(config=self._model.config)
            self._generate(ids, cache, 1)
        # All but the prompt's last token, which is fed again for its logits.
        cache.crop(len(ids) - 1 - cache.get_seq_length())
        return [self._generate(ids, cache, n_tokens)]

    def release(self) -> list[Found]:
        self._prompts.clear()
        self._caches.clear()
        self._model.destroy_cached_continuous_batching_manager()
        return []

    @torch.inference_mode()
    def _generate(self, ids: list[int], cache: Any, n_tokens: int) -> Found:
        clock, prompt = Clock(), torch.tensor([ids])
        self._model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=cache,
            max_new_tokens=n_tokens,
            do_sample=False,
            use_cache=True,
            streamer=clock,
        )
        return clock.found

    def _batch(self, prompts: list[list[int]], n_tokens: int) -> list[Found]:
        longest = max(map(len, prompts)) + n_tokens
        pages = len(prompts) * -(-longest // PAGE_TOKENS) + SPARE_PAGES
        began = time.perf_counter()
        done = self._model.generate_batch(
            prompts,
            # No token ends a turn. The pages are said, as without a GPU's memory to go by it takes most of the host's.
            generation_config=GenerationConfig(max_new_tokens=n_tokens, do_sample=False, eos_token_id=-1),
            continuous_batching_config=ContinuousBatchingConfig(num_blocks=pages),
            record_timestamps=True,
            persistent_manager=True,
        )
        found = []
        for one in done.values():
            if one.error is not None:
                raise RuntimeError(f"generate_batch: {one.error}")
            arrivals = [(at, n) for n, at in enumerate(one.timestamps, 1)]
            found.append({"began": began, "arrivals": arrivals, "token_ids": one.generated_tokens})
        return found


def main() -> None:
    disable_progress_bar()
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    peer = Peer(sys.argv[1], int(sys.argv[2]))
    answers, sys.stdout = sys.stdout, sys.stderr  # what the library prints is no answer
    print(json.dumps({"attention": peer.attention}), file=answers, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        streams = getattr(peer, order.pop("do"))(**order)
        print(json.dumps({"streams": streams}), file=answers, flush=True)


if __name__ == "__main__":
    main()
