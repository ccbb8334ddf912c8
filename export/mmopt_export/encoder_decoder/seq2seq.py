"""Generates with the two graphs of an encoder-decoder model on ONNX Runtime. Needs no torch.

The encoder runs once and gives the keys and values that every step of the decoder attends to. The
decoder's own are in buffers that are updated in place; see `mmopt_export.generation`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mmopt_export.encoder_decoder.rules import Rules
from mmopt_export.generation import CPU, AdapterFeeds, Generator, no_adapters
from mmopt_export.manifest import CacheMap, Manifest
from mmopt_export.runtime import Runner, Tensors
from mmopt_kernels.errors import InputError

ENCODER = "encoder"
DECODER = "decoder"
IDS = "input_ids"
MASK = "attention_mask"
FRAMES = "encoder_attention_mask"
"""Which frames of the encoder mean something: the decoder takes it, and some encoders give it."""
LOGITS = "logits"

Floats = npt.NDArray[np.float32]
Process = Callable[[Floats, Sequence[Sequence[int]]], Floats]
"""From scores `[B, V]` and the rows so far to other scores."""


def cross_names(layers: int) -> list[tuple[str, str]]:
    """By layer the names of cross-attention's keys and values."""
    return [(f"cross.{layer}.key", f"cross.{layer}.value") for layer in range(layers)]


class Seq2Seq:
    """The two graphs, ready to generate. Safe to share between threads.

    Args:
        encoder, decoder: ONNX Runtime sessions.
        cache: of the decoder, from the manifest.
        rules: what may come next.
        positions: tokens that a row of the decoder may have; None where the model has no end.
        provider: where the sessions run.
        adapters: what an `adapter` is for the two graphs.
    """

    def __init__(
        self,
        encoder: Any,
        decoder: Any,
        cache: CacheMap,
        rules: Rules,
        *,
        positions: int | None = None,
        provider: str = CPU,
        adapters: AdapterFeeds = no_adapters,
    ) -> None:
        self.encoder = encoder
        self.rules = rules
        self.positions = positions
        self._generator = Generator(decoder, cache, provider=provider, max_length=positions)
        self._adapters = adapters
        self._outputs = [one.name for one in encoder.get_outputs()]
        self._constants = {one.name for one in decoder.get_inputs()}

    @classmethod
    def of(cls, runner: Runner) -> "Seq2Seq":
        """The graphs of an opened artifact.

        Raises:
            InputError: the artifact is of another kind.
        """
        manifest = runner.manifest
        settings = generation_settings(manifest)
        return cls(
            runner.session(ENCODER),
            runner.session(DECODER),
            manifest.caches[DECODER],
            Rules.from_dict(settings["rules"]),
            positions=settings["positions"],
            provider=runner.provider,
            adapters=runner.adapter_feeds,
        )

    def encode(
        self, feeds: Mapping[str, npt.NDArray[Any]], *, adapter: str | None = None
    ) -> Tensors:
        """Run the encoder: what every step of the decoder takes besides its tokens.

        Args:
            adapter: one of the artifact's, for both graphs; None runs the base alone.

        Raises:
            InputError: there is no such adapter.
        """
        given = {**feeds, **self._adapters(adapter, ENCODER)}
        outputs = dict(zip(self._outputs, self.encoder.run(None, given), strict=True))
        if FRAMES in self._constants and FRAMES not in outputs:
            outputs[FRAMES] = feeds[MASK]
        return {**outputs, **self._adapters(adapter, DECODER)}

    def first(self, encoded: Tensors, prompts: Sequence[Sequence[int]]) -> Floats:
        """Logits `[B, V]` of what comes after the prompts, without any rule."""
        conversation = self._generator.start(
            len(prompts), capacity=len(prompts[0]) + 1, constants=encoded
        )
        return self._generator.prefill(prompts, conversation)

    def generate(
        self,
        encoded: Tensors,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int | None = None,
        rules: Rules | None = None,
        process: Process | None = None,
        on_tokens: Callable[[dict[int, int]], None] | None = None,
    ) -> list[list[int]]:
        """The most likely tokens, one after the other, until each row ends.

        Args:
            encoded: what `encode` gave for these rows.
            prompts: ids by row, as many in each.
            max_new_tokens: at most this many for each row; None takes the model's settings.
            rules: other ones than the model's.
            process: applied after the rules.
            on_tokens: called with each step's new tokens by row.

        Returns:
            New ids by row, with the token that ended it where one did.

        Raises:
            InputError: prompts of different lengths, empty, or without room for one token.
        """
        rules = rules or self.rules
        sizes = {len(prompt) for prompt in prompts}
        if len(sizes) != 1 or 0 in sizes:
            raise InputError(
                f"the prompts have {', '.join(map(str, sorted(sizes)))} tokens, expected as many "
                "in each, and at least one."
            )
        if max_new_tokens is not None and max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens}, expected at least 1.")
        prompt = sizes.pop()
        limit = rules.limit(prompt, max_new_tokens, self.positions)
        if limit <= prompt:
            raise InputError(
                f"the prompt has {prompt} tokens and a row may have {limit}. Pass a larger "
                "max_new_tokens, or a shorter prompt."
            )
        rows = [list(one) for one in prompts]
        live = set(range(len(rows)))
        # Room for every token at once: buffers that grow are copied.
        conversation = self._generator.start(
            len(rows), capacity=min(limit, 2 * prompt + 254), constants=encoded
        )
        logits = self._generator.prefill(prompts, conversation)
        while True:
            scores = rules.apply(logits, rows, prompt, limit)
            if process is not None:
                scores = process(scores, rows)
            chosen = scores.argmax(axis=-1)
            fresh = {row: int(chosen[row]) for row in sorted(live)}
            for row, tokens in enumerate(rows):
                tokens.append(fresh.get(row, rules.pad))
            if on_tokens is not None:
                on_tokens(fresh)
            live -= {row for row, token in fresh.items() if token in rules.eos}
            if not live or len(rows[0]) >= limit:
                break
            # A row that has ended goes on with padding, so that all have the same length.
            logits = self._generator.step([row[-1] for row in rows], conversation)
        return [ended(row[prompt:], rules.eos) for row in rows]


def ended(tokens: Sequence[int], eos: Sequence[int]) -> list[int]:
    """`tokens` up to the first that ends a row, which stays."""
    for index, token in enumerate(tokens):
        if token in eos:
            return list(tokens[: index + 1])
    return list(tokens)


def generation_settings(manifest: Manifest) -> dict[str, Any]:
    """`manifest.preprocessing["generation"]`: `rules`, `start` and `positions`.

    Raises:
        InputError: the artifact is no encoder-decoder model.
    """
    settings = manifest.preprocessing.get("generation")
    if not isinstance(settings, dict) or {ENCODER, DECODER} - set(manifest.components):
        raise InputError(
            f"{manifest.name} is for {manifest.task} and generates nothing, expected an "
            "encoder-decoder model."
        )
    return settings
