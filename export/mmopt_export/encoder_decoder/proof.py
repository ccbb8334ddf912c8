"""Holds what the finished graphs generate against what transformers generates."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmopt_export.encoder_decoder.modules import greedy
from mmopt_export.encoder_decoder.rules import Rules
from mmopt_export.encoder_decoder.seq2seq import DECODER, ENCODER, Seq2Seq, ended
from mmopt_export.manifest import CacheMap
from mmopt_export.parity import StageParity, is_near_tie, tokens_stage
from mmopt_export.parts import Proof
from mmopt_export.runtime import MODEL_NAME, Tensors, open_session
from mmopt_kernels.errors import CheckFailedError

TOKENS = 32
"""New tokens of each row that are held against transformers'."""


@dataclass(frozen=True)
class Expected:
    """What transformers generated for a row.

    Attributes:
        tokens: new ids.
        leads: for each the two best scores.
    """

    tokens: tuple[int, ...]
    leads: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Case:
    """Rows that are generated together.

    Attributes:
        kind: what they are.
        feeds: the encoder's.
        prompts: ids by row.
        most: new tokens of a row at most.
        expected: by row.
    """

    kind: str
    feeds: Tensors
    prompts: list[list[int]]
    most: int
    expected: list[Expected]


def expect(
    model: Any,
    rules: Rules,
    *,
    kind: str,
    feeds: Tensors,
    prompts: list[list[int]],
    positions: int | None,
) -> Case:
    """Let transformers generate greedily, and hold our rules against it.

    Args:
        feeds: the encoder's inputs.
        prompts: ids by row, as many in each.
        positions: of the decoder.

    Raises:
        CheckFailedError: the rules do not give transformers' tokens on the model's own logits.
    """
    size = len(prompts[0])
    limit = rules.limit(size, TOKENS, positions)
    sequences = greedy(model, feeds, prompts, limit - size)
    with torch.no_grad():
        inputs = {name: torch.from_numpy(value) for name, value in feeds.items()}
        logits = model(**inputs, decoder_input_ids=sequences).logits.numpy()
    rows = [[int(one) for one in row] for row in sequences]
    expected = []
    scores = [
        rules.apply(logits[:, at - 1], [row[:at] for row in rows], size, limit)
        for at in range(size, len(rows[0]))
    ]
    for index, row in enumerate(rows):
        tokens = ended(row[size:], rules.eos)
        leads = []
        for at, token in enumerate(tokens):
            of_row = scores[at][index]
            second, best = np.partition(of_row, -2)[-2:].tolist()
            leads.append((best, second))
            if not is_near_tie(best, float(of_row[token]), "fp32"):
                raise CheckFailedError(
                    f"{type(model).__name__} generates token {token} at place {at} of row {index}, "
                    f"and the rules of its generation settings give {int(of_row.argmax())}: it has "
                    "a setting that an artifact does not keep to."
                )
        expected.append(Expected(tuple(tokens), tuple(leads)))
    return Case(kind, feeds, prompts, limit - size, expected)


def proof(cases: Sequence[Case], rules: Rules, cache: CacheMap, positions: int | None) -> Proof:
    """What checks a finished folder: the tokens of `cases` again, from its graphs."""

    def check(folder: Path, precision: str, provider: str) -> list[StageParity]:
        files = [folder / name / MODEL_NAME for name in (ENCODER, DECODER)]
        encoder, decoder = (open_session(file, provider=provider) for file in files)
        graphs = Seq2Seq(encoder, decoder, cache, rules, positions=positions, provider=provider)
        return [
            tokens_stage(
                DECODER,
                case.kind,
                [one.tokens for one in case.expected],
                [one.leads for one in case.expected],
                graphs.generate(graphs.encode(case.feeds), case.prompts, max_new_tokens=case.most),
                precision,
            )
            for case in cases
        ]

    return check
