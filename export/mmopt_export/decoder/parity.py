"""Holds what an exported decoder generates against eager PyTorch, token by token.

Only `greedy_reference` needs torch: an artifact stores what it gives, and `mmopt verify` holds the
graph against that again.

Both sides always continue with eager's token, so that a step where they part does not end the
comparison: every step of every row is compared, and until the first difference this is what free
generation gives. A difference at a near-tie is no error.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mmopt_export.generation import IDS, Generator
from mmopt_export.manifest import CacheMap
from mmopt_export.parity import GENERATED, Sample, StageParity, gates_tokens, is_near_tie
from mmopt_export.runtime import runtime_errors
from mmopt_kernels.errors import InputError, MmoptError

if TYPE_CHECKING:
    from mmopt_export.parts import Part

STEPS = 32
"""New tokens of each row that are compared."""

# Logits of a step that are kept to judge a difference: the margin to a token that is not among
# these is larger than to the last of them.
_KEPT = 16


@dataclass(frozen=True)
class GreedyReference:
    """What eager PyTorch generates greedily, in fp32.

    Attributes:
        prompts: ids by row.
        best: int64 `[B, steps, K]`, the most likely ids of each step, most likely first.
        logits: float32 `[B, steps, K]`, of those.
    """

    prompts: tuple[tuple[int, ...], ...]
    best: npt.NDArray[np.int64]
    logits: npt.NDArray[np.float32]

    @property
    def tokens(self) -> npt.NDArray[np.int64]:
        """What is generated, `[B, steps]`."""
        tokens: npt.NDArray[np.int64] = self.best[..., 0]
        return tokens

    def sample(self, component: str) -> Sample:
        """The form in which an artifact stores it; prompts are filled up to one length with -1."""
        prompts = np.full((len(self.prompts), max(map(len, self.prompts))), -1, dtype=np.int64)
        for row, prompt in zip(prompts, self.prompts, strict=True):
            row[: len(prompt)] = prompt
        return Sample(
            component,
            GENERATED,
            {"prompts": prompts},
            {"best": self.best, "logits": self.logits},
        )

    @classmethod
    def of(cls, sample: Sample) -> "GreedyReference":
        """What `sample` gave.

        Raises:
            InputError: it gave something else.
        """
        prompts = sample.feeds.get("prompts", np.empty(0))
        best, logits = (sample.expected.get(name, np.empty(0)) for name in ("best", "logits"))
        if not (
            (prompts.ndim, best.ndim) == (2, 3)
            and best.size
            and len(prompts) == len(best)
            and best.shape == logits.shape
            and (prompts.dtype.kind, best.dtype.kind, logits.dtype.kind) == ("i", "i", "f")
        ):
            raise InputError(
                f"what the graph {sample.component} should generate is not stored as prompts with "
                "the most likely tokens of each step. Export the model again."
            )
        return cls(tuple(tuple(row[row >= 0].tolist()) for row in prompts), best, logits)


@dataclass(frozen=True)
class Difference:
    """A step at which the graph chose another token.

    Attributes:
        row, step: where.
        expected, found: eager's token and the graph's.
        margin: by how much eager's logit of its token is larger than that of the graph's; a lower
            bound where the graph's is not among eager's best.
        near_tie: whether either is right; see `mmopt_export.parity.is_near_tie`.
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
    part: "Part", prompts: Sequence[Sequence[int]], *, steps: int = STEPS
) -> GreedyReference:
    """Generate greedily with the eager model of a decoder's part, each prompt by itself.

    Raises:
        InputError: the part takes embeddings, or a prompt has no room for `steps` tokens.
    """
    from mmopt_export.decoder.part import EagerDecoder

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
        best=np.stack([best for best, _ in rows]),
        logits=np.stack([logits for _, logits in rows]),
    )


def greedy_parity(
    reference: GreedyReference, generator: Generator, *, precision: str = "fp32"
) -> GreedyParity:
    """Compare every step of a graph of `precision` with the reference, all rows as one batch."""
    rows, steps, kept = reference.best.shape
    conversation = generator.start(rows)
    logits = generator.prefill([list(one) for one in reference.prompts], conversation)
    if not 0 <= reference.best.min() <= reference.best.max() < logits.shape[1]:
        raise InputError(
            f"tokens from {reference.best.min()} to {reference.best.max()} are expected, and the "
            f"graph knows {logits.shape[1]}. Export the model again."
        )
    differences: list[Difference] = []
    error = 0.0
    for step in range(steps):
        best, expected = reference.best[:, step], reference.logits[:, step]
        # Not Python's max, which drops a NaN, and argmax may land on one as if it had won.
        off = np.abs(np.take_along_axis(logits, best, 1) - expected).max()
        error = float(np.maximum(error, off))
        for row, found in enumerate(logits.argmax(axis=1).tolist()):
            if found == reference.tokens[row, step]:
                continue
            place = int(np.argmax(np.append(best[row], found) == found))
            best_logit = float(expected[row, 0])
            other = float(expected[row, min(place, kept - 1)])
            near = place < kept and is_near_tie(best_logit, other, precision)
            token = int(reference.tokens[row, step])
            differences.append(Difference(row, step, token, found, best_logit - other, near))
        if step + 1 < steps:
            logits = generator.step(reference.tokens[:, step].tolist(), conversation)
    return GreedyParity(rows * steps, tuple(differences), error)


def prove_greedy(
    sample: Sample,
    model: Path,
    precision: str,
    *,
    provider: str,
    cache: CacheMap | None,
    longest: int | None,
) -> StageParity:
    """Let a finished graph generate what a `GreedyReference.sample` says that eager generated.

    Args:
        cache: of the graph, from the manifest.
        longest: tokens that a row may have; None where the model has no end.

    Raises:
        InputError: the sample or the cache is not that of the graph.
        MmoptError: ONNX Runtime cannot run the graph (exit 3).
    """
    reference = GreedyReference.of(sample)
    if cache is None:
        raise InputError(
            f"the graph {sample.component} has no cache to generate with. Export the model again."
        )
    generator = Generator(model, cache, provider=provider, max_length=longest, huge_pages=False)
    try:
        result = greedy_parity(reference, generator, precision=precision)
    except runtime_errors() as error:
        raise MmoptError(f"ONNX Runtime could not generate with {model}: {error}") from error
    return _stage(result, sample.component, gates_tokens(precision), len(reference.prompts))


def _stage(result: GreedyParity, component: str, gates: bool, rows: int) -> StageParity:
    finite = bool(np.isfinite(result.max_error))
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
        kind=GENERATED,
        output="tokens",
        rows=result.steps,
        finite=finite,
        max_abs=result.max_error if finite else None,
        mean_abs=None,
        cosine=None,
        worst_cosine=None,
        argmax_agreement=1 - len(result.differences) / result.steps,
        accuracy=None,
        expected_accuracy=None,
        gates=gates or not finite,
        holds=result.holds and finite,
        note=", ".join(notes),
    )


def _eager_row(model: Any, prompt: list[int], steps: int) -> tuple[Any, Any]:
    """The best ids and their logits, `[steps, K]` each."""
    import torch
    from transformers.cache_utils import DynamicCache

    from mmopt_export.decoder.lowering import call
    from mmopt_export.lowering import attention_implementation

    cache = DynamicCache()
    best, logits = [], []
    new, past = prompt, 0
    with torch.no_grad(), attention_implementation(model, "eager"):
        for _ in range(steps):
            inputs = {
                IDS: torch.tensor([new]),
                "position_ids": torch.arange(past, past + len(new)).unsqueeze(0),
            }
            last = call(model, cache, inputs)[0, -1].float()
            top = torch.topk(last, min(_KEPT, len(last)))
            ids = top.indices.numpy()
            # As NumPy's argmax, which the other side takes: of equal logits the first.
            first = int(last.numpy().argmax())
            ids[ids == first] = ids[0]
            ids[0] = first
            best.append(ids)
            logits.append(top.values.numpy())
            past, new = past + len(new), [int(ids[0])]
    return np.stack(best), np.stack(logits)
