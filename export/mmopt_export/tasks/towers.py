"""Vision towers of vision-language models as Parts: pixels in, features of the text's width out."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmopt_export.image_layouts import patch_layout
from mmopt_export.multimodal import FEATURES, VISION
from mmopt_export.parts import Part
from mmopt_export.runtime import Tensors

_AXES = {0: "images"}


def image_part(model: Any, tower: nn.Module | None = None, *, size: int) -> Part:
    """A tower that takes images of one size: `pixel_values` `[images, 3, size, size]`.

    Args:
        model: has `get_image_features(pixel_values)`, which is what the graph is held against.
        tower: what is traced; None calls `get_image_features`, which must then give one tensor.
        size: of the images, in pixels.

    Returns:
        The part, whose `image_features` are `[features, hidden]`, one image's after another's.
    """

    def samples() -> Iterator[tuple[str, Tensors]]:
        for count in (1, 3):
            yield "images", {"pixel_values": _pixels(count, 3, size, size)}

    def reference(feeds: Tensors) -> Tensors:
        with torch.no_grad():
            output = model.get_image_features(torch.from_numpy(feeds["pixel_values"]))
        return {FEATURES: _flat(output.pooler_output)}

    return Part(
        name=VISION,
        module=tower or _Pooled(model).eval(),
        inputs={"pixel_values": torch.from_numpy(_pixels(2, 3, size, size))},
        axes={"pixel_values": _AXES},
        outputs=(FEATURES,),
        samples=samples,
        reference=reference,
        kind="encoder",
    )


class _Pooled(nn.Module):
    """`get_image_features` of models that give one tensor."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        features: Tensor = self.model.get_image_features(pixel_values).pooler_output
        return {FEATURES: features.flatten(0, 1)}


class LayerTower(nn.Module):
    """LLaVA's: hidden states of chosen layers, projected; its own code makes a list of images."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """`image_features` `[features, hidden]` of `pixel_values` `[images, 3, size, size]`."""
        config, inner = self.model.config, self.model.model
        states = inner.vision_tower(pixel_values, output_hidden_states=True).hidden_states
        layers = config.vision_feature_layer
        chosen = [states[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
        if config.vision_feature_select_strategy == "default":
            chosen = [state[:, 1:] for state in chosen]
        features: Tensor = inner.multi_modal_projector(torch.cat(chosen, dim=-1))
        return {FEATURES: features.flatten(0, 1)}


# ------------------------------------------------------------- tiles: SmolVLM and Idefics3


def tile_part(model: Any) -> Part:
    """A tower that takes tiles, of which a part may be padding.

    `pixel_values` `[images, 3, size, size]` and `pixel_attention_mask` int64 `[images, size, size]`
    (1 for pixels of the image) to `image_features` `[features, hidden]`. Every tile is real:
    transformers drops those that are all 0, which are what it pads batches with.
    """
    size = model.config.vision_config.image_size

    def feeds(count: int, kept: int) -> Tensors:
        mask = np.zeros((count, size, size), dtype=np.int64)
        mask[:, :kept, :] = 1
        mask[0] = 1
        return {"pixel_values": _pixels(count, 3, size, size), "pixel_attention_mask": mask}

    def samples() -> Iterator[tuple[str, Tensors]]:
        yield "images", feeds(1, size)
        yield "images", feeds(3, size)
        yield "images-padded", feeds(3, size // 2)

    def reference(feeds: Tensors) -> Tensors:
        with torch.no_grad():
            output = model.model.get_image_features(
                torch.from_numpy(feeds["pixel_values"])[None],
                torch.from_numpy(feeds["pixel_attention_mask"])[None].bool(),
            )
        return {FEATURES: _flat(output.pooler_output)}

    return Part(
        name=VISION,
        module=_Tiles(model).eval(),
        inputs={name: torch.from_numpy(value) for name, value in feeds(2, size // 2).items()},
        axes={"pixel_values": _AXES, "pixel_attention_mask": _AXES},
        outputs=(FEATURES,),
        samples=samples,
        reference=reference,
        kind="encoder",
    )


class _Tiles(nn.Module):
    """SmolVLM's and Idefics3's tower and connector, without the search for tiles of padding."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, pixel_attention_mask: Tensor) -> dict[str, Tensor]:
        inner = self.model.model
        patch = inner.config.vision_config.patch_size
        side = inner.config.vision_config.image_size // patch
        patches = pixel_attention_mask.view(-1, side, patch, side, patch).sum(dim=(2, 4)) > 0
        hidden = inner.vision_model(pixel_values=pixel_values, patch_attention_mask=patches)
        features: Tensor = inner.connector(hidden.last_hidden_state)
        return {FEATURES: features.flatten(0, 1)}


# ------------------------------------------------------------- patches: Qwen2-VL and Qwen2.5-VL


def patch_part(model: Any) -> Part:
    """A tower that takes patches of images of any sizes, one image's after another's.

    `pixel_values` `[tokens, patches, pixels]`, by the patches that become one token, and what
    `image_layouts.patch_layout` makes of the grids: `patch_positions` int64 `[tokens, patches, 2]`;
    `frames` int64 `[frames, longest]`, the patches that attend to each other, -1 for padding; and
    with windows `windows` int64 `[windows, most]`, the same for window layers, and `window_order`
    int64 `[tokens]`. `image_features` are `[tokens, hidden]`.
    """
    vision = model.config.vision_config
    patch, merge = vision.patch_size, vision.spatial_merge_size
    pixels = vision.in_channels * vision.temporal_patch_size * patch * patch
    window = window_of(model)

    def feeds(*grids: tuple[int, int]) -> Tensors:
        grid = np.asarray([(1, merge * high, merge * wide) for high, wide in grids])
        layout = patch_layout(grid, merge=merge, window=window)
        tokens = len(layout["patch_positions"])
        return {"pixel_values": _pixels(tokens, merge * merge, pixels), **layout}

    def samples() -> Iterator[tuple[str, Tensors]]:
        side = window or 2
        yield "one-image", feeds((1, 1))
        yield "one-image", feeds((side, side))
        yield "one-image", feeds((side + 1, 2 * side + 1))
        yield "images-ragged", feeds((side, 2), (2 * side, side + 1), (1, 3))

    def reference(feeds: Tensors) -> Tensors:
        grid = []
        order = feeds.get("window_order", np.arange(len(feeds["patch_positions"])))
        positions = feeds["patch_positions"][order].reshape(-1, 2)
        for frame in feeds["frames"]:
            high, wide = positions[frame[frame >= 0]].max(axis=0) + 1
            grid.append((1, int(high), int(wide)))
        with torch.no_grad():
            output = model.get_image_features(
                torch.from_numpy(feeds["pixel_values"].reshape(-1, pixels)), torch.tensor(grid)
            )
        return {FEATURES: _flat(output.pooler_output)}

    example = feeds((window + 1, 3), (2, 3))
    names = {
        "pixel_values": {0: "tokens"},
        "patch_positions": {0: "tokens"},
        "frames": {0: "frames", 1: "longest"},
        "windows": {0: "windows", 1: "most"},
        "window_order": {0: "tokens"},
    }
    return Part(
        name=VISION,
        module=_Patches(model).eval(),
        inputs={name: torch.from_numpy(value) for name, value in example.items()},
        axes={name: names[name] for name in example},
        outputs=(FEATURES,),
        samples=samples,
        reference=reference,
        kind="encoder",
    )


def window_of(model: Any) -> int:
    """Tokens on a side of an attention window of Qwen's tower; 0 without windows."""
    vision = model.config.vision_config
    pixels = getattr(vision, "window_size", 0)
    return int(pixels // vision.patch_size // vision.spatial_merge_size)


class _Patches(nn.Module):
    """Qwen's tower, with attention over rows of patches instead of a loop over images."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        pixel_values: Tensor,
        patch_positions: Tensor,
        frames: Tensor,
        windows: Tensor | None = None,
        window_order: Tensor | None = None,
    ) -> dict[str, Tensor]:
        visual = self.model.model.visual
        # The tower hands these on to its attention, which is ours, as they are.
        arguments: dict[str, Any] = {
            "position_ids": patch_positions.flatten(0, 1),
            "cu_seqlens": frames,
        }
        if windows is not None:
            arguments |= {"window_index": window_order, "cu_window_seqlens": windows}
        attentions = [block.attn for block in visual.blocks]
        for attention in attentions:
            attention.forward = _segmented(attention)
        try:
            output = visual(pixel_values.flatten(0, 1), grid_thw=None, **arguments)
        finally:
            for attention in attentions:
                del attention.forward
        return {FEATURES: output.pooler_output}


def _segmented(attention: Any) -> Callable[..., Tensor]:
    """Attention among the patches of each row of `cu_seqlens` `[rows, longest]`, -1 for none."""
    import sys

    rotate = vars(sys.modules[type(attention).__module__])["apply_rotary_pos_emb_vision"]

    def forward(
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        **_: Any,
    ) -> Tensor:
        patches = hidden_states.shape[0]
        mixed = attention.qkv(hidden_states).reshape(patches, 3, attention.num_heads, -1)
        query, key, value = mixed.permute(1, 0, 2, 3).unbind(0)
        query, key = rotate(query, key, *position_embeddings)
        real = cu_seqlens >= 0
        index = cu_seqlens.clamp(min=0)
        # [rows, heads, longest, head_size]
        query, key, value = (one[index].transpose(1, 2) for one in (query, key, value))
        output = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=real[:, None, None, :], scale=attention.scaling
        )
        flat = output.transpose(1, 2).flatten(2).flatten(0, 1)
        # Where in the rows each patch is; what is padding there goes behind the last patch.
        places = torch.where(real, cu_seqlens, patches).flatten()
        slots = torch.arange(places.shape[0], device=places.device)
        back = torch.zeros(patches + 1, dtype=torch.int64, device=places.device)
        back = back.scatter(0, places, slots)[:patches]
        result: Tensor = attention.proj(flat[back])
        return result

    return forward


def _pixels(*shape: int) -> Any:
    generator = np.random.default_rng(sum(shape))
    return generator.standard_normal(shape).astype(np.float32)


def _flat(features: Any) -> Any:
    """Features as `[features, hidden]`, whether they come as one tensor or as one per image."""
    if isinstance(features, Tensor):
        return features.flatten(0, -2).numpy()
    return torch.cat([one.flatten(0, -2) for one in features]).numpy()
