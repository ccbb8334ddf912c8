"""Janus, both ways: text of text and images, and images of text, through one decoder."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from mmopt_export.checkpoint import Checkpoint, quiet_transformers, resolve
from mmopt_export.decoder.part import LOGITS, cache_map, decoder_part
from mmopt_export.lowering import cache_name
from mmopt_export.manifest import CacheMap
from mmopt_export.multimodal import (
    DECODER,
    GENERATION_EMBEDDING,
    GENERATION_HEAD,
    IMAGE_DECODER,
    STATES,
    TEXT_HEAD,
    MultimodalGenerator,
)
from mmopt_export.parity import RANDOM, StageParity, compare_values, tokens_stage
from mmopt_export.parts import Part, Plan, Proof
from mmopt_export.runtime import Tensors
from mmopt_export.tasks import towers
from mmopt_export.tasks import vision_language as language
from mmopt_export.tasks.placed import as_decoder
from mmopt_export.tasks.text import require_tokenizer
from mmopt_kernels.errors import InputError

TASK = "any-to-any"
ARCHITECTURE = "JanusForConditionalGeneration"

# What transformers takes where neither the call nor the model's settings say.
_GUIDANCE = 5.0


def plan(checkpoint: Checkpoint, calibration: Path | None) -> Plan:
    """The plan for Janus.

    Raises:
        InputError: another architecture, no tokenizer or image processor, settings of generation
            that lack the token that begins an image, or calibration data, which nothing here reads.
    """
    model, name = checkpoint.model, type(checkpoint.model).__name__
    if name != ARCHITECTURE:
        raise InputError(f"{name} cannot be exported for {TASK}, expected {ARCHITECTURE}.")
    language.refuse_calibration(name, calibration)
    tokenizer, folder = checkpoint.tokenizer, resolve(checkpoint.source)
    require_tokenizer(model, tokenizer)
    side = int(model.config.vision_config.image_size)
    vision = towers.image_part(model.model, size=side)
    image_token = tokenizer.convert_ids_to_tokens(model.config.image_token_id)
    preprocessing = {
        "image": language.image_constants(
            model, folder, "padded", tokens=language.tokens_of(vision)
        ),
        "prompt": {
            "placeholder": image_token,
            "image": image_token,
            "before": tokenizer.boi_token,
            "after": tokenizer.eoi_token,
        },
        "tokens": language.token_constants(model, tokenizer),
        "drawing": _drawing(model, tokenizer),
    }
    decoder = states_part(model)
    cache, longest = cache_map(decoder), language.positions(model)
    return Plan(
        task=TASK,
        kind="decoder",
        parts=(vision, language.embedding_part(model), decoder, *head_parts(model)),
        write=lambda output: language.write_processor(tokenizer, folder, output),
        max_length=longest,
        preprocessing=preprocessing,
        caches={DECODER: cache},
        proof=lambda: _proof(model, preprocessing, cache, longest),
    )


def _drawing(model: Any, tokenizer: Any) -> dict[str, Any]:
    """`manifest.preprocessing["drawing"]`: what the runtime needs to let the model draw."""
    settings = model.generation_config
    begin = (getattr(settings, "generation_kwargs", None) or {}).get("boi_token_id")
    ids = []
    for name, value in (
        ("bos_token_id", settings.bos_token_id),
        ("generation_kwargs.boi_token_id", begin),
        ("pad_token_id", settings.pad_token_id),
    ):
        if not isinstance(value, int):
            raise InputError(
                f"the generation config of {type(model).__name__} has {value!r} for {name}, "
                "expected an id: images cannot be drawn without it. Set it and save the model."
            )
        ids.append(value)
    return {
        "tokens": int(model.config.vision_config.num_image_tokens),
        "guidance": float(settings.guidance_scale or _GUIDANCE),
        "kept": ids[:2],
        "pad": ids[2],
        "begin": tokenizer.boi_token,
    }


# ------------------------------------------------------------------- parts


class _States(nn.Module):
    """The language model without a head: its last hidden states stand for logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model.model.language_model
        self.config = model.config
        self.head = nn.Identity()

    def get_input_embeddings(self) -> Any:
        """The language model's own."""
        return self.model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """What is called with each row's last state."""
        return self.head

    def forward(
        self, inputs_embeds: Tensor, position_ids: Tensor, cache: Any, **arguments: Any
    ) -> Any:
        """As the language model's, with `logits` that are hidden states."""
        arguments[cache_name(self.model)] = cache
        states = self.model(
            inputs_embeds=inputs_embeds, position_ids=position_ids, **arguments
        ).last_hidden_state
        return SimpleNamespace(logits=self.head(states))


def states_part(model: Any) -> Part:
    """The decoder: `decoder_part`'s graph with `hidden_states` `[batch, 1, hidden]` for logits.

    Text and images are written by the same weights, and each by its own head, in a graph of its
    own: so neither computes what the other needs.
    """
    kind = type(ARCHITECTURE, (_States,), {})
    part = decoder_part(kind(model).eval(), name=DECODER, embeds=True)

    def renamed(values: Tensors) -> Tensors:
        return {STATES if name == LOGITS else name: value for name, value in values.items()}

    def reference(feeds: Tensors) -> Tensors:
        return renamed(part.expect(feeds))

    def valid(feeds: Tensors) -> Tensors:
        assert part.valid is not None
        return renamed(part.valid(feeds))

    states = (STATES, *part.outputs[1:])
    return as_decoder(replace(part, outputs=states, scores=(), reference=reference, valid=valid))


class _Named(nn.Module):
    """A function of one input with one output, by their names."""

    def __init__(
        self, module: nn.Module, function: Callable[[Tensor], Tensor], given: str, output: str
    ) -> None:
        super().__init__()
        self.module = module
        self._function = function
        self._given = given
        self._output = output

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """The output by its name."""
        return {self._output: self._function(inputs[self._given])}


def head_parts(model: Any) -> tuple[Part, ...]:
    """The heads and what drawing needs besides the decoder.

    `text_head` and `generation_head`: `hidden_states` `[batch, hidden]` to `logits`.
    `generation_embedding`: `image_ids` int64 `[batch, sequence]` to `inputs_embeds`.
    `image_decoder`: `image_ids` int64 `[batch, tokens]` to `pixels` `[batch, height, width, 3]`.
    """
    hidden = int(model.config.get_text_config().hidden_size)
    codes = int(model.config.vq_config.num_embeddings)
    tokens = int(model.config.vision_config.num_image_tokens)

    def states(batch: int) -> Tensors:
        values = np.random.default_rng(batch).standard_normal((batch, hidden))
        return {STATES: values.astype(np.float32)}

    def ids(batch: int, count: int) -> Tensors:
        values = np.random.default_rng((batch, count)).integers(0, codes, (batch, count))
        return {"image_ids": values.astype(np.int64)}

    def part(
        name: str,
        function: Callable[[Tensor], Tensor],
        output: str,
        axes: dict[int, str],
        feeds: Sequence[Tensors],
    ) -> Part:
        given = next(iter(feeds[0]))

        def samples() -> Iterator[tuple[str, Tensors]]:
            for one in feeds[1:]:
                yield RANDOM, one

        return Part(
            name=name,
            module=_Named(model, function, given, output).eval(),
            inputs={key: torch.from_numpy(value) for key, value in feeds[0].items()},
            axes={given: axes},
            outputs=(output,),
            samples=samples,
            scores=(output,) if output == LOGITS else (),
            kind="convolutional" if name == IMAGE_DECODER else None,
        )

    rows = [states(2), states(1), states(5)]
    batch = {0: "batch"}
    return (
        part(TEXT_HEAD, model.lm_head, LOGITS, batch, rows),
        part(GENERATION_HEAD, model.model.generation_head, LOGITS, batch, rows),
        part(
            GENERATION_EMBEDDING,
            model.prepare_embeddings_for_image_generation,
            "inputs_embeds",
            {0: "batch", 1: "sequence"},
            [ids(2, 3), ids(1, 1), ids(4, 1), ids(2, 7)],
        ),
        part(
            IMAGE_DECODER,
            model.decode_image_tokens,
            "pixels",
            batch,
            [ids(2, tokens), ids(1, tokens), ids(3, tokens)],
        ),
    )


# ------------------------------------------------------------------- proof


@dataclass(frozen=True)
class _Drawn:
    """Prompts by row, and what transformers draws: tokens, their leads and pixels."""

    rows: list[list[int]]
    tokens: list[list[int]]
    leads: list[list[tuple[float, float]]]
    pixels: Any


class _Scores(transformers.LogitsProcessor):
    """Notes the scores of each step, after guidance, and changes nothing."""

    def __init__(self, guidance: float) -> None:
        self.guidance = guidance
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        wanted, free = scores.chunk(2)
        self.steps.append(free + self.guidance * (wanted - free))
        return scores


def _proof(model: Any, preprocessing: Mapping[str, Any], cache: CacheMap, longest: int) -> Proof:
    cases = language.text_cases(model, preprocessing, longest)
    drawn = _draw(model, preprocessing)

    def check(folder: Path, precision: str, provider: str) -> Sequence[StageParity]:
        generator = language.opened(folder, cache, preprocessing, longest, provider)
        return [
            *language.text_stages(generator, cases, precision),
            *_drawing_stages(generator, drawn, precision),
        ]

    return check


def _draw(model: Any, preprocessing: Mapping[str, Any]) -> _Drawn:
    """Let transformers draw two prompts of different lengths."""
    drawing, vocabulary = preprocessing["drawing"], preprocessing["tokens"]["image"]
    begin, image = drawing["kept"]
    generator = np.random.default_rng(0)
    rows = [
        [begin, *generator.integers(3, vocabulary, length).tolist(), image] for length in (7, 4)
    ]
    ids, mask = language.left_padded(rows, drawing["pad"])
    noted = _Scores(drawing["guidance"])
    with torch.no_grad(), quiet_transformers():
        tokens = model.generate(
            ids,
            attention_mask=mask,
            generation_mode="image",
            do_sample=False,
            guidance_scale=drawing["guidance"],
            logits_processor=transformers.LogitsProcessorList([noted]),
        )
        pixels = model.decode_image_tokens(tokens).numpy()
    leads = language.leads(torch.stack(noted.steps, dim=1))
    return _Drawn(rows, tokens.tolist(), leads, pixels)


def _drawing_stages(
    generator: MultimodalGenerator, drawn: _Drawn, precision: str
) -> list[StageParity]:
    drawing = generator.draw(drawn.rows)
    actual = drawing.tokens.tolist()
    tokens = tokens_stage(DECODER, "drawing", drawn.tokens, drawn.leads, actual, precision)
    # Of rows with other tokens, after a tie, pixels say nothing.
    same = [want == got for want, got in zip(drawn.tokens, actual, strict=True)]
    finite = bool(np.isfinite(drawing.pixels).all())
    if finite and not any(same):
        return [tokens]
    rows = same if finite else [True] * len(same)
    pixels = compare_values(
        drawn.pixels[rows],
        drawing.pixels[rows],
        precision,
        component=IMAGE_DECODER,
        stage=tokens.stage,
        kind=tokens.kind,
        output="pixels",
        gates=tokens.gates,
        note=None if all(same) else f"{len(same) - sum(same)} rows had ties",
    )
    return [tokens, pixels]
