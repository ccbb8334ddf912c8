"""Image encoders: scores per picture, or hidden states."""

from pathlib import Path
from typing import Any

import torch

from mmopt_export.checkpoint import Checkpoint, resolve
from mmopt_export.parts import Outputs, Part, Plan
from mmopt_export.runtime import MODEL
from mmopt_export.tasks import image
from mmopt_export.texts import class_names
from mmopt_kernels.errors import InputError

# Convolutions see a picture of any size alike; they quantize statically. By `model_type`.
_CONVOLUTIONAL = ("resnet", "convnext", "convnextv2", "regnet", "mobilenet_v1", "mobilenet_v2")
# Sides beside the processor's on which graphs of any size are held: neither equal nor even.
_OTHER_SIZES = ((1, 65, 96), (2, 128, 71))
# Below two rows after all strides, which are 32 together, a convolution is another case to trace.
_LEAST_SIDE = 64
# What a model without a head may give, in this order; all of it is exported.
_STATES = ("last_hidden_state", "pooler_output", "image_embeds")


def plan(checkpoint: Checkpoint, calibration: Path | None) -> Plan:
    """The plan for a classifier of pictures (`logits` `[B, C]`) or an encoder (hidden states).

    `pixel_values` is `[B, C, H, W]`: height and width are the processor's, and free for
    convolutional models.

    Raises:
        InputError: no image processor or one that cannot be exported, pictures of another size
            than the model takes, several labels a picture, or calibration data without pictures or
            with other labels.
    """
    model = checkpoint.model
    name = type(model).__name__
    config = model.config
    vision = getattr(config, "vision_config", config)
    classifies = "ForImageClassification" in name
    if getattr(config, "problem_type", None) == "multi_label_classification":
        raise InputError(f"{name} is a multi-label classifier, expected one label per image.")
    channels = int(getattr(vision, "num_channels", 3))
    processing = image.ImageProcessing(resolve(checkpoint.source), channels=channels)
    convolutional = config.model_type in _CONVOLUTIONAL
    free = convolutional and min(processing.size or (224,)) >= _LEAST_SIDE
    if processing.size is None and not free:
        raise InputError(
            f"the image processor of {name} gives pictures of any size, expected one size: the "
            "model's positions are those of one. Set do_center_crop or a height and a width."
        )
    height, width = processing.size or (224, 224)
    sizes = [(1, height, width), (3, height, width), *(_OTHER_SIZES if free else ())]
    example = image.example_images(channels, height, width)
    outputs = ("logits",) if classifies else _states(model, example)
    records = image.calibration_images(calibration)
    labels = class_names(config) if classifies else ()
    right = image.calibration_labels(calibration, labels) if classifies else None
    axes = {0: "batch", 2: "height", 3: "width"} if free else {0: "batch"}
    return Plan(
        task="image-classification" if classifies else "image-feature-extraction",
        kind="convolutional" if convolutional else "encoder",
        parts=(
            Part(
                name=MODEL,
                module=Outputs(model, {name: name for name in outputs}),
                inputs=example,
                axes={"pixel_values": axes},
                outputs=outputs,
                samples=image.image_samples(processing, channels, sizes, records, right),
                minimums=dict.fromkeys(("height", "width"), _LEAST_SIDE) if free else {},
                scores=("logits",) if classifies else (),
            ),
        ),
        write=processing.write,
        labels=labels,
        preprocessing={"image": processing.constants},
    )


def _states(model: Any, example: dict[str, torch.Tensor]) -> tuple[str, ...]:
    """Which outputs a model without a head gives; also that it takes pictures of this size."""
    try:
        with torch.no_grad():
            result = model(**example)
    except (ValueError, RuntimeError) as error:
        size = " x ".join(map(str, example["pixel_values"].shape[2:]))
        raise InputError(
            f"{type(model).__name__} does not take the {size} pixels that its image processor "
            f"gives: {error}"
        ) from error
    return tuple(name for name in _STATES if getattr(result, name, None) is not None)
