"""What is traced and proven: one graph of an artifact, its inputs, and what it is held against."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import torch
from torch import Tensor, nn

from mmopt_export.manifest import CacheMap
from mmopt_export.parity import Sample, StageParity
from mmopt_export.runtime import Tensors
from mmopt_kernels.errors import CheckFailedError

Samples = Callable[[], Iterable[tuple[str, Tensors] | tuple[str, Tensors, Tensors]]]
"""Gives the batches of parity: their kind (`grid`, `text`, ...), the feeds, and where there are any
the labels, by output as in `Sample.labels`."""


@dataclass(frozen=True)
class Part:
    """One graph of an artifact.

    Attributes:
        name: `model` where an artifact has one, else `vision`, `text`, `decoder` and the like.
        module: eval mode, fp32, CPU; `forward(**inputs)` returns a dict of tensors by output name.
        inputs: examples to trace with, in the order of the graph's inputs.
        axes: symbolic dimensions by input and axis, such as `{"input_ids": {0: "batch"}}`.
        outputs: names of the outputs, in the order of the graph's.
        samples: gives the batches of parity.
        limits: the largest value of a symbolic dimension, by its name.
        minimums: the smallest value that the trace is proven for, by name, where 1 is too small.
        scores: outputs of which the largest value of a row means something, such as logits.
        valid: for feeds, by output, which leading positions mean something (bool, of the output's
            first dimensions); the others, such as padding, are not compared.
        lowered: what is traced where that is not `module`: ops that exist only in ONNX.
        reference: eager fp32 outputs for feeds; None runs `module`.
        tracer: makes the graph for a target, where transformers' exporter does not.
        kind: its row of the capability table, where that is not its plan's.
        excluded: by target the kinds of samples that its graph cannot run there; runtimes must not
            feed it such either.
        generated: for a decoder what the eager model generates, as a sample that the finished graph
            is held against, at export and by `mmopt verify`; called once the graph is traced.
    """

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]
    axes: dict[str, dict[int, str]]
    outputs: tuple[str, ...]
    samples: Samples
    limits: Mapping[str, int] = field(default_factory=dict)
    minimums: Mapping[str, int] = field(default_factory=dict)
    scores: tuple[str, ...] = ()
    valid: Callable[[Tensors], Tensors] | None = None
    lowered: nn.Module | None = None
    reference: Callable[[Tensors], Tensors] | None = None
    tracer: "Callable[[Part, str], onnx_ir.Model] | None" = None
    kind: str | None = None
    excluded: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    generated: Callable[[], Sample] | None = None

    def expect(self, feeds: Tensors) -> Tensors:
        """The eager outputs for `feeds`, by name."""
        if self.reference is not None:
            return self.reference(feeds)
        with torch.no_grad():
            outputs = self.module(**{name: torch.from_numpy(x) for name, x in feeds.items()})
        return {name: outputs[name].numpy() for name in self.outputs}

    def sampled(self, target: str = "cpu") -> Iterator[Sample]:
        """The batches of parity on a target, with what PyTorch gives for them.

        Raises:
            CheckFailedError: the PyTorch model itself gives NaN or Inf.
        """
        for kind, feeds, *labels in self.samples():
            if kind in self.excluded.get(target, ()):
                continue
            sample = Sample(
                component=self.name,
                kind=kind,
                feeds=feeds,
                expected=self.expect(feeds),
                valid=self.valid(feeds) if self.valid is not None else {},
                scores=self.scores,
                labels=labels[0] if labels else {},
            )
            for name in sample.expected:
                if not np.isfinite(sample.rows(name, sample.expected[name])).all():
                    raise CheckFailedError(
                        f"the PyTorch model gives NaN or Inf in {name} on {kind} samples; there is "
                        "nothing to hold an export against. Check its training."
                    )
            yield sample


def not_padding(
    outputs: Sequence[str], mask: str = "attention_mask"
) -> Callable[[Tensors], Tensors]:
    """A `Part.valid` for outputs that have a row for every token: those that `mask` marks."""
    return lambda feeds: dict.fromkeys(outputs, feeds[mask] != 0)


Proof = Callable[[Path, str, str], Sequence[StageParity]]
"""Checks an artifact's folder, in which the graphs have their final precision; that precision and
the execution provider are its other arguments."""


@dataclass(frozen=True)
class Plan:
    """How a model becomes an artifact.

    Attributes:
        task: the hub's name of what the model does, such as `text-classification`.
        kind: the row of the capability table: `encoder`, `convolutional` or `decoder`.
        parts: the graphs.
        write: saves the tokenizer and the processor into the artifact's folder.
        write_for: saves what another runtime wants there, for an execution provider.
        labels: class names by index.
        max_length: as in the manifest.
        preprocessing: constants that a runtime needs before and after the graphs.
        caches: the KV cache by part.
        proof: called while the model is there; gives what then checks the finished folder beyond
            the outputs of each graph: generated tokens, say.
    """

    task: str
    kind: str
    parts: tuple[Part, ...]
    write: Callable[[Path], None]
    write_for: Callable[[Path, str], None] | None = None
    labels: tuple[str, ...] = ()
    max_length: int | None = None
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    caches: Mapping[str, CacheMap] = field(default_factory=dict)
    proof: Callable[[], Proof] | None = None


class Outputs(nn.Module):
    """Names the outputs of a Hugging Face model: a `Part.module` for those that need no more.

    Args:
        model: a `PreTrainedModel`, eval mode.
        outputs: for each name of an output the attribute of the model's own that it is.
        arguments: what is passed to every call besides the inputs.
    """

    def __init__(self, model: Any, outputs: Mapping[str, str], **arguments: Any) -> None:
        super().__init__()
        self.model = model
        self._outputs = dict(outputs)
        self._arguments = arguments

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """The chosen outputs of the model, by their new names."""
        result = self.model(**inputs, **self._arguments)
        return {name: getattr(result, attribute) for name, attribute in self._outputs.items()}
