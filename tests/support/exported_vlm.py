"""A tiny vision-language model as graphs on disk, with every figure of its parity."""

from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx_ir
from PIL import Image

from mmopt_export.checkpoint import load_checkpoint
from mmopt_export.graph import trace
from mmopt_export.multimodal import DECODER, MultimodalGenerator
from mmopt_export.parity import StageParity, compare_samples
from mmopt_export.parts import Part
from mmopt_export.runtime import MODEL_NAME, open_session
from mmopt_export.tasks import make_plan
from tests.support import tiny_encoders, tiny_vlm

CPU = "CPUExecutionProvider"


class Exported:
    """A family of `tiny_vlm` for the CPU; a graph is traced when it is first asked for.

    Attributes:
        model: the PyTorch model.
        source: its folder.
        plan: of its export.
    """

    def __init__(self, family: str) -> None:
        # Removed when the process ends.
        self._held = TemporaryDirectory(prefix=f"{family}-")
        self.source = Path(self._held.name, "model")
        self._graphs = Path(self._held.name, "graphs")
        self._sessions: dict[str, Any] = {}
        tiny_vlm.save(family, self.source)
        checkpoint = load_checkpoint(str(self.source))
        self.model = checkpoint.model
        self.plan = make_plan(checkpoint)
        self._graphs.mkdir()
        self.plan.write(self._graphs)

    @property
    def folder(self) -> Path:
        """With every graph, each in a folder of its part's name."""
        for part in self.plan.parts:
            self.file(part.name)
        return self._graphs

    def part(self, name: str) -> Part:
        """A part of the plan."""
        return next(one for one in self.plan.parts if one.name == name)

    def file(self, name: str) -> Path:
        """The graph of a part."""
        file = self._graphs / name / MODEL_NAME
        if not file.is_file():
            file.parent.mkdir()
            graph = trace(self.part(name), target="cpu")
            onnx_ir.save(graph, file, external_data=f"{MODEL_NAME}.data")
        return file

    def session(self, name: str) -> Any:
        """The ONNX Runtime session of a part."""
        if name not in self._sessions:
            self._sessions[name] = open_session(self.file(name), provider=CPU)
        return self._sessions[name]

    def generator(self) -> MultimodalGenerator:
        """The runtime over the graphs."""
        from tokenizers import Tokenizer

        return MultimodalGenerator(
            {part.name: self.session(part.name) for part in self.plan.parts},
            self.plan.caches[DECODER],
            self.plan.preprocessing,
            tokenizer=Tokenizer.from_file(str(self._graphs / "tokenizer.json")),
            max_length=self.plan.max_length,
        )

    @cached_property
    def stages(self) -> list[StageParity]:
        """Of each part, without optimizations and with them."""
        stages = []
        for part in self.plan.parts:
            samples = list(part.sampled())
            plain = open_session(self.file(part.name), provider=CPU, optimize=False)
            stages += compare_samples("fp32-unoptimized", "fp32", samples, plain)
            stages += compare_samples("fp32", "fp32", samples, self.session(part.name))
        return stages

    @cached_property
    def proof(self) -> Sequence[StageParity]:
        """Of the finished folder."""
        assert self.plan.proof is not None
        return self.plan.proof()(self.folder, "fp32", CPU)


@cache
def exported(family: str) -> Exported:
    """A family's graphs, of which each is made once in a process."""
    return Exported(family)


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """A picture with edges and noise; another seed gives another."""
    return Image.fromarray(tiny_encoders.picture(height, width, seed=seed))
