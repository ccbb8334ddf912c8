"""Models that read text and images and write text: a tower, an embedding and a decoder."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from mmopt_export.checkpoint import Checkpoint, quiet_transformers, resolve
from mmopt_export.decoder.part import cache_map, decoder_part
from mmopt_export.image_layouts import Picture, lay_out
from mmopt_export.manifest import CacheMap
from mmopt_export.multimodal import DECODER, EMBEDDING, FEATURES, MultimodalGenerator
from mmopt_export.parity import StageParity, tokens_stage
from mmopt_export.parts import Part, Plan, Proof
from mmopt_export.preprocessing import resample_name
from mmopt_export.runtime import MODEL_NAME, Tensors, open_session
from mmopt_export.tasks import placed, processors, towers
from mmopt_export.tasks.image import edges, load_processor, per_channel, scaling
from mmopt_export.tasks.placed import as_decoder
from mmopt_export.tasks.text import require_tokenizer
from mmopt_export.tasks.text_generation import eos_ids
from mmopt_kernels.errors import InputError

TASK = "image-text-to-text"

Inputs = Callable[[Tensor, int], dict[str, Tensor]]
"""What a model's own forward takes besides ids and pixels, of ids and the image token."""


def _no_inputs(ids: Tensor, image_token: int) -> dict[str, Tensor]:
    return {}


@dataclass(frozen=True)
class Family:
    """How an architecture is taken apart.

    Attributes:
        layout: of its pictures, as in `image_layouts`.
        vision: makes the tower's part.
        decoder: makes the decoder's part.
        prompt: `manifest.preprocessing["prompt"]` of the model's tokenizer.
        inputs: what the model's own forward takes besides.
    """

    layout: str
    vision: Callable[[Any], Part]
    decoder: Callable[[Any], Part]
    prompt: Callable[[Any, str], dict[str, str]]
    inputs: Inputs = _no_inputs


def _plain_decoder(model: Any) -> Part:
    return as_decoder(decoder_part(model, name=DECODER, embeds=True))


def _image_size(model: Any) -> int:
    return int(model.config.vision_config.image_size)


def _bare(tokenizer: Any, image: str) -> dict[str, str]:
    return {"placeholder": image, "image": image, "before": "", "after": ""}


def _tiled(tokenizer: Any, image: str) -> dict[str, str]:
    fake = getattr(tokenizer, "fake_image_token", "<fake_token_around_image>")
    whole = getattr(tokenizer, "global_image_token", "<global-img>")
    return {
        "placeholder": image,
        "image": image,
        "before": f"{fake}{whole}",
        "after": fake,
        "tile": f"{fake}<row_{{row}}_col_{{column}}>",
        "row_end": "\n",
    }


def _bracketed(tokenizer: Any, image: str) -> dict[str, str]:
    begin, end = tokenizer.boi_token, tokenizer.eoi_token
    return {
        "placeholder": begin,
        "image": image,
        "before": f"\n\n{begin}",
        "after": f"{end}\n\n",
    }


_TILES = Family("tiles", towers.tile_part, _plain_decoder, _tiled)
_PATCHES = Family(
    "patches",
    towers.patch_part,
    lambda model: placed.positioned_part(model, name=DECODER),
    _bare,
    lambda ids, token: {"mm_token_type_ids": (ids == token).int()},
)
FAMILIES = {
    "SmolVLMForConditionalGeneration": _TILES,
    "Idefics3ForConditionalGeneration": _TILES,
    "LlavaForConditionalGeneration": Family(
        "whole",
        lambda model: towers.image_part(
            model, towers.LayerTower(model).eval(), size=_image_size(model)
        ),
        _plain_decoder,
        _bare,
    ),
    "Gemma3ForConditionalGeneration": Family(
        "whole",
        lambda model: towers.image_part(model.model, size=_image_size(model)),
        lambda model: placed.blocked_part(model, name=DECODER),
        _bracketed,
        lambda ids, token: {"token_type_ids": (ids == token).long()},
    ),
    "Qwen2VLForConditionalGeneration": _PATCHES,
    "Qwen2_5_VLForConditionalGeneration": _PATCHES,
}


def plan(checkpoint: Checkpoint, calibration: Path | None) -> Plan:
    """The plan for a model that reads text and images.

    Raises:
        InputError: an architecture that is not known here, no tokenizer or image processor, or one
            that does what an artifact would not; a decoder that cannot be expressed; calibration
            data, which nothing here reads.
    """
    model, name = checkpoint.model, type(checkpoint.model).__name__
    if name not in FAMILIES:
        raise InputError(
            f"{name} cannot be exported for {TASK}, expected one of: {', '.join(FAMILIES)}."
        )
    refuse_calibration(name, calibration)
    family = FAMILIES[name]
    folder = resolve(checkpoint.source)
    require_tokenizer(model, checkpoint.tokenizer)
    vision = family.vision(model)
    preprocessing = {
        "image": image_constants(model, folder, family.layout, tokens=tokens_of(vision)),
        "prompt": family.prompt(
            checkpoint.tokenizer,
            checkpoint.tokenizer.convert_ids_to_tokens(model.config.image_token_id),
        ),
        "tokens": token_constants(model, checkpoint.tokenizer),
    }
    decoder = family.decoder(model)
    cache, longest = cache_map(decoder), positions(model)
    return Plan(
        task=TASK,
        kind="decoder",
        parts=(vision, embedding_part(model), decoder),
        write=lambda output: write_processor(checkpoint.tokenizer, folder, output),
        max_length=longest,
        preprocessing=preprocessing,
        caches={DECODER: cache},
        proof=lambda: _proof(model, family.inputs, preprocessing, cache, longest),
    )


def refuse_calibration(name: str, calibration: Path | None) -> None:
    """Raise InputError where a calibration file is given: nothing here would read it."""
    if calibration is not None:
        raise InputError(
            f"--calibration was given, and the export of {name} reads none: its graphs are held "
            "against PyTorch on random inputs and on what it writes. Leave it out."
        )


def positions(model: Any) -> int:
    """Tokens that a row may have."""
    return int(model.config.get_text_config().max_position_embeddings)


def token_constants(model: Any, tokenizer: Any) -> dict[str, Any]:
    """`manifest.preprocessing["tokens"]`: ids that the runtime needs, and how texts begin."""
    return {
        "image": int(model.config.image_token_id),
        "eos": eos_ids(model.generation_config) or eos_ids(model.config.get_text_config()),
        "bos": tokenizer.bos_token,
        "vocabulary": int(
            max(model.get_input_embeddings().weight.shape[0], model.config.image_token_id + 1)
        ),
    }


def write_processor(tokenizer: Any, source: Path, output: Path) -> None:
    """Save the tokenizer, and copy the processor's files and its chat template."""
    tokenizer.save_pretrained(output)
    templates = ("chat_template.json", "chat_template.jinja")
    processors.copy_files(source, output, (*processors.FILES, *templates))


def tokens_of(vision: Part) -> int:
    """Features of one image of the tower: what a sample of one gives."""
    _, feeds, *_ = next(iter(vision.samples()))
    return len(vision.expect(feeds)[FEATURES])


class _Embedding(nn.Module):
    """Embeddings of ids, with the features of images in the places of the image token."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.embed = model.get_input_embeddings()
        self.image_token = int(model.config.image_token_id)
        self.known = self.image_token < self.embed.weight.shape[0]

    def forward(self, input_ids: Tensor, image_features: Tensor) -> dict[str, Tensor]:
        """`inputs_embeds` `[batch, sequence, hidden]`; see `embedding_part`."""
        # 0 is a row that stands for none, so that there may be no features.
        none = image_features.new_zeros(1, image_features.shape[1])
        rows = torch.cat((none, image_features))
        given = torch.ones_like(rows[:, 0]).sum() > 1
        images = input_ids == self.image_token
        ids = input_ids if self.known else torch.where(images, 0, input_ids)
        # The n-th image token takes the n-th feature; one too many is an error of Gather.
        places = images & given
        index = places.flatten().long().cumsum(0).view_as(input_ids) * places
        embeds = torch.where(places.unsqueeze(-1), rows[index], self.embed(ids))
        return {"inputs_embeds": embeds}


def embedding_part(model: Any) -> Part:
    """Ids and features in, embeddings out, for text alone as well.

    `input_ids` int64 `[batch, sequence]` and `image_features` `[features, hidden]`, one for each
    image token, row by row, to `inputs_embeds` `[batch, sequence, hidden]`. Without any features
    there are no images: an image token is then one that the model wrote, with its own embedding.
    """
    embed, image_token = model.get_input_embeddings(), int(model.config.image_token_id)
    vocabulary, hidden = embed.weight.shape

    def feeds(*rows: int, length: int, features: bool = True) -> Tensors:
        """Rows of `length` with so many image tokens each."""
        generator = np.random.default_rng(length)
        ids = generator.integers(0, min(vocabulary, image_token), (len(rows), length))
        for row, count in zip(ids, rows, strict=True):
            row[generator.permutation(length)[:count]] = image_token
        values = generator.standard_normal((sum(rows) if features else 0, hidden))
        return {"input_ids": ids.astype(np.int64), FEATURES: values.astype(np.float32)}

    def samples() -> Iterator[tuple[str, Tensors]]:
        yield "text-only", feeds(0, length=1)
        yield "text-only", feeds(0, 0, 0, length=9)
        yield "text-only", feeds(1, 0, length=3, features=False)
        yield "images", feeds(1, length=1)
        yield "images", feeds(4, length=7)
        yield "images", feeds(0, 8, 3, length=11)

    def reference(feeds: Tensors) -> Tensors:
        ids, features = (torch.from_numpy(feeds[name]) for name in ("input_ids", FEATURES))
        places = ids == image_token
        with torch.no_grad():
            embeds = embed(ids.masked_fill(places, 0) if image_token >= vocabulary else ids)
        if len(features):
            embeds = embeds.masked_scatter(places[..., None], features)
        return {"inputs_embeds": embeds.numpy()}

    return Part(
        name=EMBEDDING,
        module=_Embedding(model).eval(),
        inputs={n: torch.from_numpy(x) for n, x in feeds(2, 3, length=5).items()},
        axes={"input_ids": {0: "batch", 1: "sequence"}, FEATURES: {0: "features"}},
        outputs=("inputs_embeds",),
        samples=samples,
        reference=reference,
    )


# ------------------------------------------------------------------- pictures


def image_constants(model: Any, folder: Path, layout: str, *, tokens: int) -> dict[str, Any]:
    """`manifest.preprocessing["image"]` of a model's image processor, held against it.

    Args:
        layout: as in `image_layouts`.
        tokens: image tokens of a picture or a tile.

    Raises:
        InputError: no processor, or one whose pixels an artifact would not compute.
        MmoptError: transformers lacks a library that it needs (exit 3).
    """
    processor = load_processor(folder, backend="pil")
    name = type(processor).__name__
    if getattr(processor, "do_pan_and_scan", None):
        raise InputError(f"{name} pans and scans, which is not supported. Set do_pan_and_scan off.")
    constants = {
        "layout": layout,
        "tokens": tokens,
        "channels": "RGB",
        "resize": None,
        "crop": None,
        "resample": resample_name(int(processor.resample)),
        **scaling(processor, 3),
    }
    size = edges(processor.size)
    vision = model.config.vision_config
    if layout == "whole":
        crop = getattr(processor, "do_center_crop", False)
        constants |= {"resize": size, "crop": edges(processor.crop_size) if crop else None}
    elif layout == "padded":
        background = [int(one * 255) for one in per_channel(processor.image_mean, 3)]
        side, least = size["height"], int(processor.min_size)
        constants |= {"side": side, "least": least, "background": background}
    elif layout == "tiles":
        side = edges(processor.max_image_size)["longest_edge"]
        split = bool(processor.do_image_splitting)
        constants |= {"longest": size["longest_edge"], "side": side, "split": split}
    else:
        constants |= {
            "least": size["shortest_edge"],
            "most": size["longest_edge"],
            "patch": int(vision.patch_size),
            "merge": int(vision.spatial_merge_size),
            "temporal": int(vision.temporal_patch_size),
            "window": towers.window_of(model),
        }
    _require_same_pixels(processor, name, constants)
    if layout != "patches" and (sides := _sides(constants)) != (_image_size(model),) * 2:
        raise InputError(
            f"{name} gives images of {sides[0]} x {sides[1]} pixels, and the tower takes "
            f"{_image_size(model)}. Save the processor that belongs to the model beside it."
        )
    return constants


def _sides(constants: Mapping[str, Any]) -> tuple[int, int]:
    height, width = lay_out(_probe(97, 131), constants).pixels.shape[2:]
    return height, width


def _probe(height: int, width: int, seed: int = 0) -> Any:
    """A picture with slopes, an edge and noise."""
    from PIL import Image

    generator = np.random.default_rng((height, width, seed))
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 255 / width, y * 255 / height, (x + y) % 64 * 4], axis=-1)
    pixels[height // 3 :, : width // 2] += 60
    pixels += generator.normal(0, 10, pixels.shape)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _require_same_pixels(processor: Any, name: str, constants: dict[str, Any]) -> None:
    """Raise InputError unless our pixels are the processor's, to one step of uint8."""
    for height, width in ((97, 131), (150, 64), (33, 32)):
        image = _probe(height, width)
        expected = processor(images=[image], return_tensors="np")
        picture = lay_out(image, constants)
        actual = picture.pixels
        if constants["layout"] == "patches":
            actual = actual.reshape(-1, actual.shape[2])
            fits = tuple(expected["image_grid_thw"][0]) == (1, *picture.grid)
        else:
            fits = True
        pixels = np.asarray(expected["pixel_values"]).reshape(-1, *actual.shape[1:])
        # torchvision and Pillow round the same filter to neighbouring values.
        step = (constants["rescale"] or 1.0) / min(constants["std"] or [1.0])
        if (
            not fits
            or pixels.shape != actual.shape
            or not np.allclose(pixels, actual, rtol=0, atol=1.01 * step)
        ):
            raise InputError(
                f"{name} makes of {height} x {width} pixels others than an artifact would compute: "
                "this model cannot be exported with it."
            )


# ------------------------------------------------------------------- proof

TOKENS = 32
"""New tokens of each row that are held against transformers'."""


@dataclass(frozen=True)
class Case:
    """Rows that are generated together, and what transformers writes.

    Attributes:
        kind: what they are.
        rows: ids by row.
        pictures: by row.
        expected: new ids by row.
        leads: for each the two best scores.
    """

    kind: str
    rows: list[list[int]]
    pictures: list[list[Picture]]
    expected: list[list[int]]
    leads: list[list[tuple[float, float]]]


def _proof(
    model: Any,
    extra: Inputs,
    preprocessing: Mapping[str, Any],
    cache: CacheMap,
    longest: int,
) -> Proof:
    """Let transformers write, and give what holds the finished graphs against it."""
    cases = text_cases(model, preprocessing, longest, extra)

    def check(folder: Path, precision: str, provider: str) -> Sequence[StageParity]:
        generator = opened(folder, cache, preprocessing, longest, provider)
        return text_stages(generator, cases, precision)

    return check


def text_cases(
    model: Any,
    preprocessing: Mapping[str, Any],
    longest: int,
    extra: Inputs = _no_inputs,
) -> list[Case]:
    """What transformers writes of text alone, of images in both rows, and of one in one.

    Args:
        extra: as `Family.inputs`.

    Raises:
        InputError: the model has no positions left behind the images.
    """
    constants, tokens = preprocessing["image"], preprocessing["tokens"]
    first, second = (lay_out(_probe(*size), constants) for size in ((70, 90), (64, 45)))
    cases = []
    chosen: tuple[tuple[str, list[list[Picture]]], ...] = (
        ("text", [[], []]),
        ("images", [[first], [second, first]]),
        ("mixed", [[], [second]]),
    )
    for kind, pictures in chosen:
        rows = [
            _prompt(own, tokens, constants, length)
            for own, length in zip(pictures, (9, 4), strict=True)
        ]
        most = min(TOKENS, longest - max(map(len, rows)))
        if most < 1:
            raise InputError(
                f"an image takes {max(map(len, rows))} tokens and the model has {longest} "
                "positions. Make the processor's images smaller."
            )
        cases.append(_expect(model, extra, kind, rows, pictures, preprocessing, most))
    return cases


def text_stages(
    generator: MultimodalGenerator, cases: Sequence[Case], precision: str
) -> list[StageParity]:
    """What the graphs write of the same, held against it."""
    stages = []
    for case in cases:
        answer = generator.continue_ids(
            case.rows, case.pictures, max_new_tokens=len(case.expected[0]), eos=()
        )
        stages.append(
            tokens_stage(DECODER, case.kind, case.expected, case.leads, answer.tokens, precision)
        )
    return stages


def opened(
    folder: Path,
    cache: CacheMap,
    preprocessing: Mapping[str, Any],
    longest: int,
    provider: str,
) -> MultimodalGenerator:
    """The graphs of a folder that is not an artifact yet."""
    sessions = {
        file.parent.name: open_session(file, provider=provider)
        for file in sorted(folder.glob(f"*/{MODEL_NAME}"))
    }
    # A precision may have changed the type of the buffers.
    past = next(one for one in sessions[DECODER].get_inputs() if one.name == cache.layers[0][0])
    types = {"tensor(float)": "float32", "tensor(float16)": "float16"}
    cache = replace(cache, dtype=types.get(past.type, "bfloat16"))
    return MultimodalGenerator(
        sessions, cache, preprocessing, max_length=longest, provider=provider
    )


def _prompt(
    pictures: list[Picture], tokens: Mapping[str, Any], constants: Mapping[str, Any], length: int
) -> list[int]:
    """Random ids with the image tokens of each picture among them."""
    generator = np.random.default_rng((length, len(pictures)))
    ids: list[int] = []

    def text() -> None:
        for one in generator.integers(3, min(tokens["vocabulary"], tokens["image"]), length):
            ids.append(int(one))

    text()
    for picture in pictures:
        each = 1 if constants["layout"] == "patches" else constants["tokens"]
        ids.extend([tokens["image"]] * (each * len(picture.pixels)))
        text()
    return ids


def _expect(
    model: Any,
    extra: Inputs,
    kind: str,
    rows: list[list[int]],
    pictures: list[list[Picture]],
    preprocessing: Mapping[str, Any],
    most: int,
) -> Case:
    ids, mask = left_padded(rows)
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        **_pixels(preprocessing["image"]["layout"], pictures),
        **extra(ids * mask, preprocessing["tokens"]["image"]),
    }
    # Nothing here ends a row: tokens are compared to the last, and -1 is no token.
    with torch.no_grad(), quiet_transformers():
        result = model.generate(
            **inputs,
            generation_config=transformers.GenerationConfig(
                do_sample=False,
                num_beams=1,
                max_new_tokens=most,
                eos_token_id=-1,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_logits=True,
            ),
        )
    new = result.sequences[:, ids.shape[1] :].tolist()
    return Case(kind, rows, pictures, new, leads(torch.stack(result.logits, dim=1)))


def leads(scores: Tensor) -> list[list[tuple[float, float]]]:
    """The two best of `[B, steps, V]`, the better first."""
    best: list[list[list[float]]] = scores.topk(2).values.tolist()
    return [[(first, second) for first, second in row] for row in best]


def left_padded(rows: Sequence[Sequence[int]], pad: int = 0) -> tuple[Tensor, Tensor]:
    """Ids of rows of any lengths, int64 `[B, L]`, and their attention mask."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def _pixels(layout: str, pictures: list[list[Picture]]) -> dict[str, Tensor]:
    """Pictures as the model's own forward takes them."""
    flat = [one for row in pictures for one in row]
    if not flat:
        return {}
    if layout == "patches":
        pixels = np.concatenate([one.pixels.reshape(-1, one.pixels.shape[2]) for one in flat])
        grids = [(1, *one.grid) for one in flat]
        return {"pixel_values": torch.from_numpy(pixels), "image_grid_thw": torch.tensor(grids)}
    if layout != "tiles":
        return {"pixel_values": torch.from_numpy(np.concatenate([one.pixels for one in flat]))}
    rows = [
        np.concatenate([one.pixels for one in row]) if row else flat[0].pixels[:0]
        for row in pictures
    ]
    most = max(map(len, rows))
    padded = [np.pad(row, ((0, most - len(row)), (0, 0), (0, 0), (0, 0))) for row in rows]
    return {"pixel_values": torch.from_numpy(np.stack(padded))}
