"""Encoder-decoder models from text to text: T5, BART, mBART, Pegasus, Marian and the like."""

from pathlib import Path
from typing import Any

import numpy as np

from mmopt_export.checkpoint import Checkpoint
from mmopt_export.encoder_decoder.part import Encoder, encoder_decoder_parts
from mmopt_export.encoder_decoder.proof import expect, proof
from mmopt_export.encoder_decoder.rules import read_rules, start_token
from mmopt_export.encoder_decoder.seq2seq import DECODER, IDS, MASK
from mmopt_export.parity import RANDOM
from mmopt_export.parts import Plan, Proof
from mmopt_export.runtime import Tensors
from mmopt_export.tasks import text

_INPUTS = (IDS, MASK)
# Inputs of the proof: two of different lengths and one of the most of them.
_LENGTHS = (17, 5, 9)


def plan(checkpoint: Checkpoint, calibration: Path | None) -> Plan:
    """The plan for a model that reads a text and writes another.

    Raises:
        InputError: it has no tokenizer, or an architecture or a setting that cannot be exported.
    """
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    text.require_tokenizer(model, tokenizer)
    longest = text.longest_text(model, tokenizer)
    vocabulary = model.config.vocab_size
    texts = text.calibration_texts(calibration)
    positions = decoder_positions(model)
    rules, start = read_rules(model), start_token(model)
    encoder = Encoder(
        inputs=text.example_inputs(_INPUTS, vocabulary=vocabulary, longest=longest),
        axes=dict.fromkeys(_INPUTS, text.AXES),
        samples=lambda: text.text_samples(
            tokenizer, _INPUTS, texts, vocabulary=vocabulary, longest=longest
        ),
        limits={"sequence": longest},
        frames=lambda feeds: feeds[MASK] != 0,
    )
    parts, cache = encoder_decoder_parts(model, encoder, prompt=[start], longest=positions)

    def prove() -> Proof:
        inputs = {RANDOM: _proof_feeds(tokenizer, vocabulary, longest)}
        if texts:
            real = tokenizer(
                texts[: len(_LENGTHS)],
                padding=True,
                truncation=True,
                max_length=longest,
                return_tensors="np",
            )
            inputs["text"] = {name: real[name].astype(np.int64) for name in _INPUTS}
        cases = [
            expect(
                model,
                rules,
                kind=kind,
                feeds=feeds,
                prompts=[[start]] * len(feeds[IDS]),
                positions=positions,
            )
            for kind, feeds in inputs.items()
        ]
        return proof(cases, rules, cache, positions)

    return Plan(
        task="text2text-generation",
        kind="decoder",
        parts=parts,
        write=lambda folder: text.write_tokenizer(tokenizer, folder, longest),
        max_length=longest,
        preprocessing={
            "generation": {"rules": rules.to_dict(), "start": start, "positions": positions}
        },
        caches={DECODER: cache},
        proof=prove,
    )


def decoder_positions(model: Any) -> int | None:
    """Tokens that a row of the decoder may have; None where positions are only relative."""
    config = model.config
    for name in ("max_target_positions", "max_position_embeddings"):
        found = getattr(config, name, None)
        if found is not None:
            return int(found)
    return None


def _proof_feeds(tokenizer: Any, vocabulary: int, longest: int) -> Tensors:
    """A batch of three lengths, padded on the tokenizer's side."""
    lengths = np.minimum(_LENGTHS, longest)
    most = int(lengths.max())
    mask = np.arange(most) < lengths[:, None]
    if tokenizer.padding_side == "left":
        mask = mask[:, ::-1]
    ids = np.random.default_rng(0).integers(0, vocabulary, mask.shape)
    return {
        IDS: np.where(mask, ids, tokenizer.pad_token_id).astype(np.int64),
        MASK: mask.astype(np.int64),
    }
