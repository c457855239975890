"""One run of bench-speed: who takes part in which phase, and on which prompts."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from _bench import console
from _contender import Contender
from _daemon import DaemonProcess
from _floors import Floors
from _peers_llama import LlamaServer
from _peers_transformers import TransformersPeer
from _speed_ours import Ours
from _speed_phases import Field, Measured, Text, batch, decode, own_code, prefill, stall
from _speed_report import SPARSE
from _turns import prose
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from sessiond import modelstore
from sessiond.config import Settings
from sessiond.template import ChatTemplate

DEFAULT_WEIGHTS = "int4"
SLOT_ROOM = 256  # tokens of a slot of llama-server beyond prompt and answer
OWN_CONTEXT = 512
FLOOR_SAMPLES = 5
out = console()


class Run:
    """One run: the model, the text, and what was measured so far."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.path = modelstore.resolve(options.model).path
        tokenizer = AutoTokenizer.from_pretrained(self.path, local_files_only=True)
        eos = GenerationConfig.from_pretrained(self.path).eos_token_id
        self.stop_ids = sorted(ChatTemplate(tokenizer, eos if isinstance(eos, list) else [eos]).stop_ids)
        self.text = Text(tokenizer.encode(prose(), add_special_tokens=False))
        self.max_context = int(AutoConfig.from_pretrained(self.path).get_text_config().max_position_embeddings)
        self.measured, self.floors = Measured(), Floors()
        self.weights: list[str] = options.weights or ([DEFAULT_WEIGHTS] if "weights" in Settings.model_fields else [""])
        self.ours: list[Ours] = []
        self.transformers: TransformersPeer | None = None

    @property
    def names(self) -> dict[str, str]:
        """Our daemons, with the suffix of their figures."""
        rest = {f"ours_{weights}": f"_{weights}" for weights in self.weights[1:]}
        return {"ours": "", **rest}

    @contextmanager
    def started(self) -> Iterator[None]:
        """Our daemons and transformers, which idle through the whole run when they are not asked."""
        with ExitStack() as stack:
            for name, weights in zip(self.names, self.weights, strict=True):
                flags = ["--threads", str(self.options.threads), *(["--weights", weights] if weights else [])]
                daemon = DaemonProcess(self.folder / name, *flags, model=self.options.model)
                self.ours.append(Ours(name, stack.enter_context(daemon), self.stop_ids))
            if "transformers" not in self.options.without:
                self.transformers = stack.enter_context(TransformersPeer(self.path, self.options.threads))
            yield

    @contextmanager
    def field(self, n_slots: int, slot_tokens: int) -> Iterator[Field]:
        """All contenders, with a llama-server of so many slots."""
        contenders: list[Contender] = [*self.ours, *([self.transformers] if self.transformers else [])]
        with ExitStack() as stack:
            if "llama" not in self.options.without:
                gguf = modelstore.fetch(self.options.model)
                size = self.options.threads, n_slots, slot_tokens
                contenders.insert(1, stack.enter_context(LlamaServer(gguf, self.folder / "llama.log", *size)))
            yield Field(contenders, self.measured, out.print)

    def prompt_tokens(self, context: int) -> int:
        """Tokens of the prompt that stands for a context: the longest leaves room for the answer."""
        return min(context, self.max_context - self.options.tokens - 8)

    def alone(self) -> None:
        """One session: prefill and decoding at every context; transformers' long prefill is no figure, and left out."""
        options, longest = self.options, max(self.options.contexts)
        with self.field(1, min(self.max_context, longest + options.tokens + SLOT_ROOM)) as field:
            for contender in field.contenders:  # first forwards page weights in
                contender.prefill(self.text.take(SLOT_ROOM))
            without = Field([one for one in field.contenders if one.name != "transformers"], self.measured, field.say)
            for context in sorted(options.contexts):
                n_tokens = self.prompt_tokens(context)
                self.floors.sample(FLOOR_SAMPLES)
                if "prefill" in options.phases:
                    repeats = options.prefill_repeats if context == longest else options.repeats
                    prefill(without if context == longest else field, context, self.text, n_tokens, repeats)
                if "decode" in options.phases:
                    policies = SPARSE if context == longest else ()
                    ids = self.text.take(n_tokens)
                    decode(field, context, ids, options.tokens, options.repeats, policies)
            field.check_rest()

    def many(self) -> None:
        """Many sessions at once."""
        options, most = self.options, max(self.options.sessions)
        # And the token that decoding begins with: transformers shares whole pages of what it has computed.
        prompts = {number: self.text.take(options.batch_context + 1) for number in range(most)}
        self.floors.sample(FLOOR_SAMPLES)
        ours = Field(self.ours, self.measured, out.print)
        if "batch" in options.phases:
            with self.field(most, options.batch_context + options.tokens + SLOT_ROOM) as field:
                field.hold(prompts)
                batch(field, sorted(options.sessions), options.tokens, options.repeats)
                field.check_rest()
                if self.transformers:
                    self.transformers.release()
        else:
            ours.hold(prompts)
        if "stall" in options.phases:
            stall(ours, most - 1, self.text, options.stall_tokens, options.tokens, options.prefill_repeats)
        ours.release()

    def share(self) -> None:
        """The daemon's own code, beside many short contexts."""
        options = self.options
        n_tokens = min(OWN_CONTEXT, options.batch_context)
        field = Field(self.ours, self.measured, out.print)
        field.hold({number: self.text.take(n_tokens) for number in range(options.own_sessions)})
        own_code(field, options.own_sessions, 2 * options.tokens, options.repeats)
        field.release()
