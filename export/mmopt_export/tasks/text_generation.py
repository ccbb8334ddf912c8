"""Causal language models: one graph for the prompt and every token after it."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mmopt_export.caches import pasts
from mmopt_export.checkpoint import Checkpoint
from mmopt_export.decoder import genai
from mmopt_export.decoder.parity import STEPS, greedy_reference
from mmopt_export.decoder.part import (
    IDS,
    LOGITS,
    MASK,
    SAMPLE_CAPACITY,
    cache_map,
    decoder_part,
)
from mmopt_export.parity import Sample
from mmopt_export.parts import Part, Plan
from mmopt_export.runtime import MODEL, Tensors
from mmopt_export.tasks import text
from mmopt_export.tasks.placed import as_decoder

# Prompts of a calibration file that parity reads, and tokens of each: the oracle runs in eager
# attention, one row at a time, and its buffers are kept until the graphs have been held against it.
_PROMPTS = 32
_BATCH = 8
_PROMPT_TOKENS = 128


def plan(checkpoint: Checkpoint, calibration: Path | None) -> Plan:
    """The plan for a decoder: ids and a KV cache to the logits of the next token.

    Raises:
        InputError: no tokenizer, or attention that the graph cannot express.
    """
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    text.require_tokenizer(model, tokenizer, padding=False)
    part = decoder_part(model, name=MODEL)
    longest = part.limits.get("total")
    kept = _PROMPT_TOKENS if longest is None else min(_PROMPT_TOKENS, longest)
    prompts = [
        tokenizer(one, truncation=True, max_length=kept)["input_ids"]
        for one in text.calibration_texts(calibration)[:_PROMPTS]
    ]
    config = model.generation_config

    def samples() -> Iterator[tuple[str, Tensors]]:
        yield from part.samples()  # type: ignore[misc]
        yield from _prompts(part, [one for one in prompts if one])

    def generated() -> Sample:
        return greedy_reference(part, _proof_prompts(part, prompts)).sample(MODEL)

    def write(folder: Path) -> None:
        tokenizer.save_pretrained(folder)
        config.save_pretrained(folder)

    def write_for(folder: Path, provider: str) -> None:
        # For onnxruntime-genai, where it knows the architecture; an adapter is an input it has not.
        if (
            checkpoint.swap is None
            and genai.supports(model.config)
            and config.eos_token_id is not None
        ):
            genai.write_genai_config(
                folder, model.config, cache_map(part), provider=provider, generation=config
            )

    return Plan(
        task="text-generation",
        kind="decoder",
        parts=(
            as_decoder(
                dataclasses.replace(
                    part, samples=samples, reference=_reference(part), generated=generated
                )
            ),
        ),
        write=write,
        write_for=write_for,
        max_length=longest,
        preprocessing={
            "bos_token_id": config.bos_token_id,
            "eos_token_ids": eos_ids(config),
            "pad_token_id": config.pad_token_id,
        },
        caches={MODEL: cache_map(part)},
    )


def eos_ids(config: Any) -> list[int]:
    """The tokens that end a text, of a generation config."""
    found = config.eos_token_id
    if found is None:
        return []
    return [int(one) for one in found] if isinstance(found, list) else [int(found)]


def _proof_prompts(part: Part, prompts: list[list[int]]) -> list[list[int]]:
    """Up to three prompts of different lengths, real ones where there are any."""
    longest = part.limits.get("total")
    room = _PROMPT_TOKENS if longest is None else max(1, longest - STEPS)
    real = sorted((one[:room] for one in prompts if one), key=len)
    if real:
        return [real[index] for index in sorted({0, len(real) // 2, len(real) - 1})]
    ids = next(iter(part.samples()))[1][IDS][0]
    return [ids[:length].tolist() for length in (1, 7, len(ids))]


def _prompts(part: Part, prompts: list[list[int]]) -> Iterator[tuple[str, Tensors]]:
    """Real prompts in batches, padded on the left, into empty caches."""
    cache = cache_map(part)
    ordered = sorted(prompts, key=len)
    for start in range(0, len(ordered), _BATCH):
        batch = ordered[start : start + _BATCH]
        size = max(map(len, batch))
        ids = np.zeros((len(batch), size), np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(batch):
            ids[row, size - len(prompt) :] = prompt
            mask[row, size - len(prompt) :] = 1
        empty = np.zeros((len(batch), cache.heads, 0, cache.head_size), np.float32)
        yield "text", {IDS: ids, MASK: mask, **dict.fromkeys(pasts(cache), empty)}


def _reference(part: Part) -> Any:
    """The eager outputs; for long prompts without the buffers, which are as large as the model."""

    def run(feeds: Tensors) -> Tensors:
        outputs = part.expect(feeds)
        long = feeds[IDS].shape[1] > SAMPLE_CAPACITY
        return {LOGITS: outputs[LOGITS]} if long else outputs

    return run
