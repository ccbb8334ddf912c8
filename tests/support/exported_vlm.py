"""A tiny vision-language model as graphs on disk, with every figure of its parity."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx_ir
from PIL import Image

from mmopt_export.checkpoint import load_checkpoint
from mmopt_export.graph import trace
from mmopt_export.multimodal import DECODER, MultimodalGenerator
from mmopt_export.parity import StageParity, compare_samples
from mmopt_export.parts import Plan
from mmopt_export.runtime import MODEL_NAME, open_session
from mmopt_export.tasks import make_plan
from tests.support import tiny_vlm

CPU = "CPUExecutionProvider"
_held: list[TemporaryDirectory[str]] = []


@dataclass(frozen=True)
class Exported:
    """What an export made.

    Attributes:
        model: the PyTorch model.
        source: its folder.
        folder: the graphs'.
        stages: of each part, without optimizations and with them.
        proof: of the finished folder.
    """

    model: Any
    source: Path
    plan: Plan
    folder: Path
    stages: list[StageParity]
    proof: Sequence[StageParity]

    def session(self, part: str) -> Any:
        """The ONNX Runtime session of a part."""
        return open_session(self.folder / part / MODEL_NAME, provider=CPU)

    def generator(self) -> MultimodalGenerator:
        """The runtime over the graphs."""
        from tokenizers import Tokenizer

        return MultimodalGenerator(
            {part.name: self.session(part.name) for part in self.plan.parts},
            self.plan.caches[DECODER],
            self.plan.preprocessing,
            tokenizer=Tokenizer.from_file(str(self.folder / "tokenizer.json")),
            max_length=self.plan.max_length,
        )


@cache
def exported(family: str) -> Exported:
    """Export a family of `tiny_vlm` for the CPU; once in a process."""
    held = TemporaryDirectory(prefix=f"{family}-")
    # Removed when the process ends.
    _held.append(held)
    source = Path(held.name)
    tiny_vlm.save(family, source)
    checkpoint = load_checkpoint(str(source))
    plan = make_plan(checkpoint)
    assert plan.proof is not None
    proof = plan.proof()
    folder = source / "graphs"
    folder.mkdir()
    plan.write(folder)
    stages = []
    for part in plan.parts:
        file = folder / part.name / MODEL_NAME
        file.parent.mkdir()
        onnx_ir.save(trace(part, target="cpu"), file, external_data=f"{MODEL_NAME}.data")
        samples = list(part.sampled())
        for stage, optimize in (("fp32-unoptimized", False), ("fp32", True)):
            session = open_session(file, provider=CPU, optimize=optimize)
            stages += compare_samples(stage, "fp32", samples, session)
    return Exported(checkpoint.model, source, plan, folder, stages, proof(folder, "fp32", CPU))


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """A picture with slopes, an edge and noise."""
    import numpy as np

    generator = np.random.default_rng((height, width, seed))
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 255 / width, y * 255 / height, (x + y) % 64 * 4], axis=-1)
    pixels[height // 3 :, : width // 2] += 60 + 100 * seed
    pixels += generator.normal(0, 10, pixels.shape)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
