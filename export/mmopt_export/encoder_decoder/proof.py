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
from mmopt_export.parity import StageParity
from mmopt_export.parts import Proof
from mmopt_export.runtime import MODEL_NAME, Tensors, open_session
from mmopt_kernels.errors import CheckFailedError

TOKENS = 32
"""New tokens of each row that are held against transformers'."""

# Two scores closer than this are a tie: fp32 of two runtimes differs by about 1e-5 of logits that
# are of order 1 to 10, and either winner is right.
_TIE = 1e-3


@dataclass(frozen=True)
class Expected:
    """What transformers generated for a row.

    Attributes:
        tokens: new ids.
        margins: for each how far the winner was ahead of the next.
    """

    tokens: tuple[int, ...]
    margins: tuple[float, ...]


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
        margins = []
        for at, token in enumerate(tokens):
            of_row = scores[at][index]
            behind = np.partition(of_row, -2)[-2:]
            margins.append(float(min(behind[1] - behind[0], np.finfo(np.float32).max)))
            if int(of_row.argmax()) != token and of_row[token] < behind[1] - _TIE:
                raise CheckFailedError(
                    f"{type(model).__name__} generates token {token} at place {at} of row {index}, "
                    f"and the rules of its generation settings give {int(of_row.argmax())}: it has "
                    "a setting that an artifact does not keep to."
                )
        expected.append(Expected(tuple(tokens), tuple(margins)))
    return Case(kind, feeds, prompts, limit - size, expected)


def proof(cases: Sequence[Case], rules: Rules, cache: CacheMap, positions: int | None) -> Proof:
    """What checks a finished folder: the tokens of `cases` again, from its graphs.

    Where a winner is ahead by no more than a tie, either is right, and what follows in its row is
    not compared. Graphs whose weights are not fp32 are reported and do not gate.
    """

    def check(folder: Path, precision: str, provider: str) -> list[StageParity]:
        files = [folder / name / MODEL_NAME for name in (ENCODER, DECODER)]
        encoder, decoder = (open_session(file, provider=provider) for file in files)
        graphs = Seq2Seq(encoder, decoder, cache, rules, positions=positions, provider=provider)
        exact = precision == "fp32"
        return [
            _stage(
                case,
                graphs.generate(graphs.encode(case.feeds), case.prompts, max_new_tokens=case.most),
                exact,
            )
            for case in cases
        ]

    return check


def _stage(case: Case, rows: list[list[int]], exact: bool) -> StageParity:
    compared = same = ties = 0
    for expected, tokens in zip(case.expected, rows, strict=True):
        for at, token in enumerate(expected.tokens):
            compared += 1
            if at < len(tokens) and tokens[at] == token:
                same += 1
                continue
            if expected.margins[at] <= _TIE:
                compared -= 1
                ties += 1
            else:
                # What follows another token says nothing.
                compared += len(expected.tokens) - at - 1
            break
        else:
            compared += len(tokens) - len(expected.tokens)
    return StageParity(
        component=DECODER,
        stage="greedy",
        kind=case.kind,
        output="tokens",
        rows=compared,
        finite=True,
        max_abs=None,
        mean_abs=None,
        cosine=None,
        worst_cosine=None,
        argmax_agreement=same / compared if compared else 1.0,
        accuracy=None,
        expected_accuracy=None,
        gates=exact,
        holds=same == compared,
        note=f"{ties} near ties" if ties else None,
    )
