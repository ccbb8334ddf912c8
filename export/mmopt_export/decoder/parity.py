"""Holds what an exported decoder generates against eager PyTorch, token by token.

Both sides always continue with eager's token, so that a step where they part does not end the
comparison: every step of every row is compared, and until the first difference this is what free
generation gives. A difference at a near-tie is no error: where logits are right to `tolerance`, two
of them that are closer than twice that may come out in either order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers.cache_utils import DynamicCache

from mmopt_export.decoder.lowering import call, eager_attention
from mmopt_export.decoder.part import IDS, EagerDecoder, cache_map
from mmopt_export.generation import Generator
from mmopt_export.parity import StageParity
from mmopt_export.parts import Part, Proof
from mmopt_export.runtime import MODEL, MODEL_NAME, open_session
from mmopt_kernels.errors import InputError

STEPS = 32
"""New tokens of each row that are compared."""

TOLERANCES = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 4e-2}
"""How far logits may be off, by precision: mobius's published tiers for fp32 and fp16, and for bf16
the second times 8, since it keeps 3 bits of mantissa less. Weights of few bits move logits by more
than any margin: their steps are reported, and the artifact's other stages judge them."""

# Logits of a step that are kept to judge a difference: the margin to a token that is not among
# these is larger than to the last of them.
_KEPT = 16


@dataclass(frozen=True)
class GreedyReference:
    """What eager PyTorch generates greedily, in fp32.

    Attributes:
        prompts: ids by row.
        tokens: int64 `[B, steps]`.
        best: int64 `[B, steps, K]`, the most likely ids of each step, most likely first.
        logits: float32 `[B, steps, K]`, of those.
    """

    prompts: tuple[tuple[int, ...], ...]
    tokens: npt.NDArray[np.int64]
    best: npt.NDArray[np.int64]
    logits: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Difference:
    """A step at which the graph chose another token.

    Attributes:
        row, step: where.
        expected, found: eager's token and the graph's.
        margin: by how much eager's logit of its token is larger than that of the graph's; a lower
            bound where the graph's is not among eager's best.
        near_tie: whether the margin is within twice the tolerance.
    """

    row: int
    step: int
    expected: int
    found: int
    margin: float
    near_tie: bool


@dataclass(frozen=True)
class GreedyParity:
    """All steps compared.

    Attributes:
        steps: how many, over all rows.
        differences: those with another token.
        max_error: the largest difference of the logits of eager's best tokens.
    """

    steps: int
    differences: tuple[Difference, ...]
    max_error: float

    @property
    def holds(self) -> bool:
        """Whether every difference is a near-tie."""
        return all(one.near_tie for one in self.differences)


def greedy_reference(
    part: Part, prompts: Sequence[Sequence[int]], *, steps: int = STEPS
) -> GreedyReference:
    """Generate greedily with the eager model of a decoder's part, each prompt by itself.

    Raises:
        InputError: the part takes embeddings, or a prompt has no room for `steps` tokens.
    """
    module = part.module
    if not isinstance(module, EagerDecoder) or IDS not in part.inputs:
        raise InputError(f"the part {part.name} is no decoder of ids.")
    limit = part.limits.get("total")
    longest = max(len(one) for one in prompts)
    if not all(prompts) or (limit is not None and longest + steps > limit):
        raise InputError(
            f"prompts of 1 to {longest} tokens and {steps} new ones were asked for, expected at "
            f"least one token and at most {limit} in all."
        )
    rows = [_eager_row(module.model, list(prompt), steps) for prompt in prompts]
    return GreedyReference(
        prompts=tuple(tuple(prompt) for prompt in prompts),
        tokens=np.asarray([best[:, 0] for best, _ in rows], dtype=np.int64),
        best=np.stack([best for best, _ in rows]),
        logits=np.stack([logits for _, logits in rows]),
    )


def greedy_parity(
    reference: GreedyReference, generator: Generator, *, tolerance: float = TOLERANCES["fp32"]
) -> GreedyParity:
    """Compare every step of a graph with the reference, all rows as one batch.

    Args:
        tolerance: how far logits may be off; see the module for what a near-tie then is.
    """
    rows, steps, kept = reference.best.shape
    conversation = generator.start(rows)
    logits = generator.prefill([list(one) for one in reference.prompts], conversation)
    differences: list[Difference] = []
    error = 0.0
    for step in range(steps):
        best, expected = reference.best[:, step], reference.logits[:, step]
        error = max(error, float(np.abs(np.take_along_axis(logits, best, 1) - expected).max()))
        for row, found in enumerate(logits.argmax(axis=1).tolist()):
            if found == reference.tokens[row, step]:
                continue
            place = int(np.argmax(np.append(best[row], found) == found))
            margin = float(expected[row, 0] - expected[row, min(place, kept - 1)])
            near = place < kept and margin <= 2 * tolerance
            differences.append(
                Difference(row, step, int(reference.tokens[row, step]), found, margin, near)
            )
        if step + 1 < steps:
            logits = generator.step(reference.tokens[:, step].tolist(), conversation)
    return GreedyParity(rows * steps, tuple(differences), error)


def greedy_proof(
    part: Part, prompts: Sequence[Sequence[int]], *, steps: int = STEPS
) -> Callable[[], Proof]:
    """`Plan.proof` of a decoder: greedy tokens of the finished graph, prompts of any lengths."""

    def prove() -> Proof:
        reference = greedy_reference(part, prompts, steps=steps)
        cache, name, longest = cache_map(part), part.name, part.limits.get("total")

        def check(folder: Path, precision: str, provider: str) -> list[StageParity]:
            file = folder / MODEL_NAME if name == MODEL else folder / name / MODEL_NAME
            session = open_session(file, provider=provider)
            typed = _with_type_of(session, cache)
            generator = Generator(session, typed, provider=provider, max_length=longest)
            tolerance = TOLERANCES.get(precision, TOLERANCES["fp16"])
            result = greedy_parity(reference, generator, tolerance=tolerance)
            return [_stage(result, name, precision in TOLERANCES, len(reference.prompts))]

        return check

    return prove


def _with_type_of(session: Any, cache: Any) -> Any:
    """The cache with the type of its buffers in this graph, which a precision may have changed."""
    from dataclasses import replace

    names = {"tensor(float)": "float32", "tensor(float16)": "float16"}
    inputs = {one.name: one.type for one in session.get_inputs()}
    return replace(cache, dtype=names.get(inputs[cache.layers[0][0]], "bfloat16"))


def _stage(result: GreedyParity, component: str, gates: bool, rows: int) -> StageParity:
    ties = sum(one.near_tie for one in result.differences)
    wrong = [one for one in result.differences if not one.near_tie]
    notes = [f"{result.steps // rows} tokens of {rows} prompts"]
    if ties:
        notes.append(f"{ties} near-ties")
    if wrong:
        first = wrong[0]
        notes.append(
            f"row {first.row} step {first.step} gives {first.found} for {first.expected}, which "
            f"eager has ahead by {first.margin:.3g}"
        )
    return StageParity(
        component=component,
        stage="greedy",
        kind="generated",
        output="tokens",
        rows=result.steps,
        finite=bool(np.isfinite(result.max_error)),
        max_abs=result.max_error if np.isfinite(result.max_error) else None,
        mean_abs=None,
        cosine=None,
        worst_cosine=None,
        argmax_agreement=1 - len(result.differences) / result.steps,
        accuracy=None,
        expected_accuracy=None,
        gates=gates,
        holds=result.holds and bool(np.isfinite(result.max_error)),
        note=", ".join(notes),
    )


def _eager_row(model: Any, prompt: list[int], steps: int) -> tuple[Any, Any]:
    """The best ids and their logits, `[steps, K]` each."""
    cache = DynamicCache()
    best, logits = [], []
    new, past = prompt, 0
    with torch.no_grad(), eager_attention(model):
        for _ in range(steps):
            inputs = {
                IDS: torch.tensor([new]),
                "position_ids": torch.arange(past, past + len(new)).unsqueeze(0),
            }
            last = call(model, cache, inputs)[0, -1].float()
            top = torch.topk(last, min(_KEPT, len(last)))
            ids = top.indices.numpy()
            # As NumPy's argmax, which the other side takes: of equal logits the first.
            ids[0] = int(last.numpy().argmax())
            best.append(ids)
            logits.append(top.values.numpy())
            past, new = past + len(new), [int(ids[0])]
    return np.stack(best), np.stack(logits)
