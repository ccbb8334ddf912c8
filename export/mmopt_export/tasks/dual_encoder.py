"""CLIP and SigLIP: a tower for texts and one for images, whose embeddings are compared."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmopt_export.checkpoint import Checkpoint, resolve
from mmopt_export.parity import RANDOM, Sample, StageParity, compare_samples
from mmopt_export.parts import Part, Plan, Proof
from mmopt_export.runtime import MODEL_NAME, Tensors, open_session, run_graph
from mmopt_export.tasks import image, text
from mmopt_kernels.errors import InputError

OUTPUT = "embeddings"
SCORES = "logits_per_image"
_TEXTS, _IMAGES = "text", "vision"
# Endings of names fit other models too, such as ChineseCLIPModel, whose towers are others.
_KNOWN = ("CLIPModel", "SiglipModel")


class Tower(nn.Module):
    """`embeddings` `[B, D]` of length 1, of one side of a dual encoder.

    Args:
        model: a `CLIPModel` or a `SiglipModel`.
        side: `text` or `vision`.
    """

    def __init__(self, model: Any, side: str) -> None:
        super().__init__()
        self.model = model
        self._side = side

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """The embeddings of a batch of texts or of images."""
        model = self.model
        embed = model.get_text_features if self._side == _TEXTS else model.get_image_features
        result = embed(**inputs)
        # transformers before 5 gave the tensor itself.
        features: Tensor = result if isinstance(result, Tensor) else result.pooler_output
        return {OUTPUT: features / features.norm(p=2, dim=-1, keepdim=True)}


def plan(checkpoint: Checkpoint, calibration: Path | None) -> Plan:
    """The plan for a dual encoder: the parts `text` and `vision`, each with `embeddings` `[B, D]`.

    `scale * vision @ text.T + bias`, whose constants are `scores` in the preprocessing, are the
    model's `logits_per_image`, which the plan's proof checks.

    Raises:
        InputError: another model, no tokenizer or image processor, or calibration data without a
            text and an image in each line.
    """
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    name = type(model).__name__
    if name not in _KNOWN:
        raise InputError(f"{name} cannot be exported, expected one of: {', '.join(_KNOWN)}.")
    text.require_tokenizer(model, tokenizer)
    channels = int(getattr(model.config.vision_config, "num_channels", 3))
    processing = image.ImageProcessing(resolve(checkpoint.source), channels=channels)
    if processing.size is None:
        raise InputError(
            f"the image processor of {name} gives pictures of any size, expected one size. Set a "
            "height and a width."
        )
    records = image.calibration_images(calibration, text="text")
    reader = _Texts(model, tokenizer)
    sides = processing.size
    vision = Part(
        name=_IMAGES,
        module=Tower(model, _IMAGES).eval(),
        inputs=image.example_images(channels, *sides),
        axes={"pixel_values": {0: "batch"}},
        outputs=(OUTPUT,),
        samples=image.image_samples(processing, channels, [(1, *sides), (3, *sides)], records),
    )
    texts = Part(
        name=_TEXTS,
        module=Tower(model, _TEXTS).eval(),
        inputs={key: torch.from_numpy(x) for key, x in reader.random(2, 16).items()},
        axes=dict.fromkeys(reader.inputs, {0: "batch"} if reader.fixed else text.AXES),
        outputs=(OUTPUT,),
        samples=lambda: reader.samples([record.values["text"] for record in records]),
        limits={} if reader.fixed else {"sequence": reader.longest},
    )
    bias = getattr(model, "logit_bias", None)
    scores = {
        "scale": float(model.logit_scale.detach().exp()),
        "bias": float(bias.detach()) if bias is not None else 0.0,
    }

    def write(folder: Path) -> None:
        text.write_tokenizer(tokenizer, folder, reader.longest, fixed=reader.fixed)
        processing.write(folder)

    return Plan(
        task="zero-shot-image-classification",
        kind="encoder",
        parts=(texts, vision),
        write=write,
        max_length=reader.longest,
        preprocessing={"image": processing.constants, "scores": scores},
        proof=lambda: _proof(model, reader, texts, vision, scores),
    )


class _Texts:
    """What the text tower reads.

    Attributes:
        inputs: names of the graph's inputs.
        longest: tokens of a text.
        fixed: whether each text has that many: SigLIP was trained with padding up to the full
            length, takes the last token's state, and its tokenizer gives no mask.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._config = model.config.text_config
        self.fixed = type(model).__name__ == "SiglipModel"
        if self.fixed:
            self.longest = int(self._config.max_position_embeddings)
            given = tokenizer.model_input_names
            self.inputs = [name for name in ("input_ids", "attention_mask") if name in given]
        else:
            self.longest = text.longest_text(model.text_model, tokenizer)
            self.inputs = text.text_inputs(model.text_model, tokenizer)

    def random(self, batch: int, length: int, *, seed: int = 0) -> Tensors:
        """Seeded ids `[batch, length]` with an end of text in each row and padding after it.

        CLIP takes the state at the end of the text, so that a text without one means nothing.
        """
        generator = np.random.default_rng((seed, batch, length))
        length = self.longest if self.fixed else min(length, self.longest)
        vocabulary, end = self._config.vocab_size, self._config.eos_token_id
        if not self.fixed and end == 2:
            end = vocabulary - 1  # configs of before 2023 name a wrong one: the largest id it is
        ids = generator.integers(0, vocabulary - 1, (batch, length))
        ids[ids == end] = vocabulary - 1 if end != vocabulary - 1 else 0
        lengths = generator.integers(1, length + 1, batch)
        lengths[0] = length
        ids[np.arange(batch), lengths - 1] = end
        mask = np.arange(length)[None, :] < lengths[:, None]
        ids = np.where(mask, ids, self._tokenizer.pad_token_id)
        columns = {"input_ids": ids, "attention_mask": mask}
        return {name: columns[name].astype(np.int64) for name in self.inputs}

    def samples(self, texts: Sequence[str]) -> Iterator[tuple[str, Tensors]]:
        """The batches of parity: random ids, then real texts."""
        for batch, length in ((1, 1), (1, 17), (3, 33), (2, self.longest)):
            yield RANDOM, self.random(batch, length)
        for start in range(0, len(texts), text.BATCH):
            chosen = texts[start : start + text.BATCH]
            yield (
                "text",
                text.encode(
                    self._tokenizer, chosen, self.inputs, longest=self.longest, fixed=self.fixed
                ),
            )


def _proof(
    model: Any, texts: _Texts, text_part: Part, vision_part: Part, scores: Mapping[str, float]
) -> Proof:
    """What holds the scores of both graphs together against the model's own."""
    pixels = vision_part.inputs["pixel_values"]
    feeds = {
        **texts.random(3, 9, seed=1),
        "pixel_values": image.random_pixels((4, *pixels.shape[1:]), seed=1),
    }
    with torch.no_grad():
        result = model(**{name: torch.from_numpy(x) for name, x in feeds.items()})
    sample = Sample(
        component="model",
        kind=RANDOM,
        feeds=feeds,
        expected={SCORES: result.logits_per_image.numpy()},
        scores=(SCORES,),
    )
    names = text_part.name, vision_part.name

    def check(folder: Path, precision: str, provider: str) -> Sequence[StageParity]:
        text_tower, vision_tower = (
            open_session(folder / name / MODEL_NAME, provider=provider) for name in names
        )
        session = _Scores(text_tower, vision_tower, scores)
        return compare_samples("scores", precision, [sample], session)

    return check


class _Scores:
    """Two towers that answer as one session would: scores per image."""

    def __init__(self, texts: Any, images: Any, constants: Mapping[str, float]) -> None:
        self._texts, self._images, self._constants = texts, images, constants

    def get_inputs(self) -> list[Any]:
        """None whose type is to be known: `run` sees to that."""
        return []

    def run(self, _names: Sequence[str], feeds: Tensors) -> list[Any]:
        """Scores `[images, texts]`."""
        ids = {name: value for name, value in feeds.items() if name != "pixel_values"}
        (texts,) = run_graph(self._texts, [OUTPUT], ids)
        (images,) = run_graph(self._images, [OUTPUT], {"pixel_values": feeds["pixel_values"]})
        return [self._constants["scale"] * images @ texts.T + self._constants["bias"]]
