"""Runs artifacts that read text and images, and write text or draw. Needs no torch.

`MultimodalGenerator.open(artifact)` is an artifact's; what it needs to know of the model is in
`manifest.preprocessing`: `image` and `prompt` (see `image_layouts`), `tokens` and, where the model
draws, `drawing`.
"""

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mmopt_export.generation import (
    GREEDY,
    AdapterFeeds,
    Conversation,
    Generator,
    Sampling,
    choose,
    no_adapters,
)
from mmopt_export.image_layouts import (
    Picture,
    block_ends,
    image_text,
    lay_out,
    rope_positions,
    tower_inputs,
)
from mmopt_export.manifest import CacheMap
from mmopt_export.runtime import Runner, Tensors
from mmopt_export.texts import require_texts
from mmopt_kernels.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

VISION = "vision"
EMBEDDING = "embedding"
DECODER = "decoder"
TEXT_HEAD = "text_head"
GENERATION_HEAD = "generation_head"
GENERATION_EMBEDDING = "generation_embedding"
IMAGE_DECODER = "image_decoder"

FEATURES = "image_features"
POSITIONS = "rope_positions"
ENDS = "visible_ends"
STATES = "hidden_states"

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Answer:
    """What a model wrote.

    Attributes:
        tokens: new ids by row, with the end-of-sequence token where there was one.
        texts: what they say, by row, without special tokens; empty without a tokenizer.
        reasons: by row `eos`, or `length` where a limit ended it.
    """

    tokens: list[list[int]]
    texts: list[str]
    reasons: list[str]


@dataclass(frozen=True)
class Drawing:
    """What a model drew.

    Attributes:
        tokens: image tokens, int64 `[B, N]`.
        pixels: float32 `[B, height, width, 3]` as the image decoder gives them.
        images: the same as uint8 `[B, height, width, 3]`.
    """

    tokens: npt.NDArray[np.int64]
    pixels: Floats
    images: npt.NDArray[np.uint8]


class _StepGenerator(Generator):
    """A generator whose graph takes an input of each new token, or gives what a head reads.

    Args:
        extra: the name of an input that is made anew for each call.
        values: makes it, of the tokens that each row has in the cache and of the new ones.
        head: makes logits `[B, V]` of what the graph gives, `[B, H]`.
        vocabulary: ids that a prompt may have.
    """

    def __init__(
        self,
        session: Any,
        cache: CacheMap,
        *,
        extra: str | None,
        values: Callable[[Array, Array], Array],
        head: Callable[[Floats], Floats] | None,
        vocabulary: int,
        **settings: Any,
    ) -> None:
        super().__init__(session, cache, **settings)
        self._extra = extra
        self._values = values
        self._head = head
        self._ids = vocabulary

    def _most_ids(self) -> int:
        return self._ids

    def _run(self, rows: list[Array], conversation: Conversation) -> Floats:
        if self._extra is not None:
            from onnxruntime import OrtValue

            counts = np.asarray([len(row) for row in rows])
            values = np.ascontiguousarray(self._values(conversation.lengths, counts))
            binding, _ = self._bound(conversation)
            binding.bind_ortvalue_input(self._extra, OrtValue.ortvalue_from_numpy(values))
        output = super()._run(rows, conversation)
        return output if self._head is None else self._head(output)


class MultimodalGenerator:
    """Generates text of text and images, and images of text where the model draws.

    Every call is a turn of its own: caches are not kept. Not thread-safe.

    Args:
        sessions: ONNX Runtime's, by the names of the parts.
        cache: of the decoder.
        preprocessing: `manifest.preprocessing`.
        tokenizer: a `tokenizers.Tokenizer` without padding; None takes ids only.
        max_length: tokens that a row may have.
        provider: on which the decoder's session runs.
        adapters: what an `adapter` is for each of the parts.
    """

    def __init__(
        self,
        sessions: Mapping[str, Any],
        cache: CacheMap,
        preprocessing: Mapping[str, Any],
        *,
        tokenizer: Any = None,
        max_length: int | None = None,
        provider: str = "CPUExecutionProvider",
        adapters: AdapterFeeds = no_adapters,
    ) -> None:
        self.preprocessing = preprocessing
        self._sessions = dict(sessions)
        self._cache = cache
        self._tokenizer = tokenizer
        self._adapters = adapters
        self._adapter: str | None = None
        self._settings: dict[str, Any] = {"max_length": max_length, "provider": provider}
        self._tokens = preprocessing["tokens"]
        inputs = {one.name for one in self._sessions[DECODER].get_inputs()}
        self._extra = next((name for name in (POSITIONS, ENDS) if name in inputs), None)
        features = self._sessions[EMBEDDING].get_inputs()[1]
        self._nothing = np.zeros((0, features.shape[1]), dtype=_dtype(features.type))

    @classmethod
    def open(cls, artifact: Path, *, threads: int | None = None) -> "MultimodalGenerator":
        """Check an artifact and open it.

        Raises:
            InputError: it is no artifact, or of a model that does not read images and write text.
            CheckFailedError: it is not proven, or a file differs from the manifest.
            MmoptError: ONNX Runtime is missing, too old, or cannot load a graph.
        """
        runner = Runner(artifact, threads=threads)
        manifest = runner.manifest
        if missing := {VISION, EMBEDDING, DECODER} - set(manifest.components):
            raise InputError(
                f"{artifact} is for {manifest.task}, expected a model that reads images and "
                f"writes text: it has no graph {', '.join(sorted(missing))}."
            )
        tokenizer = None
        if (path := artifact / "tokenizer.json").is_file():
            from tokenizers import Tokenizer

            tokenizer = Tokenizer.from_file(str(path))
            tokenizer.no_padding()
            tokenizer.no_truncation()
        return cls(
            {name: runner.session(name) for name in manifest.components},
            manifest.caches[DECODER],
            manifest.preprocessing,
            tokenizer=tokenizer,
            max_length=manifest.max_length,
            provider=runner.provider,
            adapters=runner.adapter_feeds,
        )

    # ---------------------------------------------------------------- text

    def generate(
        self,
        prompts: Sequence[Prompt],
        images: Sequence[Sequence["Image.Image"]] | None = None,
        *,
        max_new_tokens: int,
        eos: Collection[int] | None = None,
        sampling: Sampling = GREEDY,
        adapter: str | None = None,
    ) -> Answer:
        """Continue each prompt.

        Args:
            prompts: by row, of any lengths: text that a chat template has been applied to, with
                one placeholder (`preprocessing["prompt"]["placeholder"]`) for each image; or ids
                with one image token for each feature of its images, without padding.
            images: by row the row's pictures; None without any.
            max_new_tokens: of each row.
            eos: ids that end a row; None takes the model's own.
            sampling: how tokens are chosen; greedy if left out.
            adapter: one of the artifact's, for all prompts; None runs the base alone.

        Raises:
            InputError: a prompt whose images and placeholders do not fit, text without a
                tokenizer, an id that is out of range, or more tokens than positions; a string
                instead of a list of prompts; there is no such adapter.
        """
        require_texts(prompts, "prompts")
        pictures = self._pictures(prompts, images)
        rows = [self._ids(prompt, own) for prompt, own in zip(prompts, pictures, strict=True)]
        return self.continue_ids(
            rows,
            pictures,
            max_new_tokens=max_new_tokens,
            eos=eos,
            sampling=sampling,
            adapter=adapter,
        )

    def continue_ids(
        self,
        rows: list[list[int]],
        pictures: list[list[Picture]],
        *,
        max_new_tokens: int,
        eos: Collection[int] | None = None,
        sampling: Sampling = GREEDY,
        adapter: str | None = None,
    ) -> Answer:
        """As `generate`, of ids by row and of pictures that are laid out already."""
        placed = [self._place(ids, own) for ids, own in zip(rows, pictures, strict=True)]
        turn = self._with(adapter)
        head = turn._head(TEXT_HEAD) if TEXT_HEAD in self._sessions else None
        generator = turn._generator(placed, head)
        conversation = generator.start(
            len(rows), capacity=max(map(len, rows)) + max_new_tokens, adapter=adapter
        )
        for history, ids in zip(conversation.history, rows, strict=True):
            history += ids
        result = generator.generate(
            [turn._embedded(ids, own) for ids, own in zip(rows, pictures, strict=True)],
            max_new_tokens=max_new_tokens,
            eos=self._tokens["eos"] if eos is None else eos,
            sampling=sampling,
            conversation=conversation,
        )
        texts = [] if self._tokenizer is None else self._tokenizer.decode_batch(result.tokens)
        return Answer(result.tokens, texts, result.reasons)

    # ---------------------------------------------------------------- images

    def draw(
        self,
        prompts: Sequence[Prompt],
        *,
        guidance: float | None = None,
        sampling: Sampling = GREEDY,
        adapter: str | None = None,
    ) -> Drawing:
        """Draw an image for each prompt.

        Every prompt takes two rows: itself, and itself without its words. The scores of a token are
        those of the second, plus `guidance` times what the first adds to them (Ho and Salimans
        2022, arXiv:2207.12598).

        Args:
            prompts: by row, of any lengths: text that a chat template has been applied to, without
                the token that begins an image; or ids with it.
            guidance: None takes the model's own.
            sampling: how tokens are chosen; greedy if left out.
            adapter: one of the artifact's, for all prompts; None runs the base alone.

        Raises:
            InputError: the artifact does not draw, or as for `generate`.
        """
        require_texts(prompts, "prompts")
        settings = self.preprocessing.get("drawing")
        if settings is None or IMAGE_DECODER not in self._sessions:
            raise InputError("this model does not draw, expected an artifact of one that does.")
        if not prompts:
            raise InputError("no prompts were given, expected at least one.")
        guidance = settings["guidance"] if guidance is None else guidance
        if not np.isfinite(guidance) or guidance < 1:
            raise InputError(f"guidance is {guidance}, expected 1 or more.")
        wanted = [
            self._encode(prompt + settings["begin"])
            if isinstance(prompt, str)
            else [int(one) for one in prompt]
            for prompt in prompts
        ]
        kept, pad = settings["kept"], settings["pad"]
        free = [[one if one in kept else pad for one in row] for row in wanted]
        rows, batch, count = [*wanted, *free], len(wanted), int(settings["tokens"])
        turn = self._with(adapter)
        generator = turn._generator([None] * len(rows), turn._head(GENERATION_HEAD))
        conversation = generator.start(
            len(rows), capacity=max(map(len, rows)) + count, adapter=adapter
        )
        randoms = [np.random.default_rng((sampling.seed, row)) for row in range(batch)]
        tokens = np.zeros((batch, count), dtype=np.int64)
        new = [turn._embedded(row, []) for row in rows]
        for at in range(count):
            scores = generator.prefill(new, conversation)
            guided = scores[batch:] + np.float32(guidance) * (scores[:batch] - scores[batch:])
            for row in range(batch):
                history = tokens[row, :at].tolist()
                tokens[row, at] = choose(guided[row], sampling, history, randoms[row])
            if at + 1 < count:
                new = turn._image_embeds(tokens[:, at : at + 1])
        pixels = turn._run(IMAGE_DECODER, "pixels", {"image_ids": tokens}).astype(np.float32)
        return Drawing(tokens, pixels, _as_bytes(pixels, self.preprocessing["image"]))

    def _image_embeds(self, ids: Array) -> list[Array]:
        """Embeddings `[1, H]` of image tokens `[B, 1]`, for both rows of each prompt."""
        embeds = self._run(GENERATION_EMBEDDING, "inputs_embeds", {"image_ids": ids})
        return [*embeds, *embeds]

    # ---------------------------------------------------------------- graphs

    def _with(self, adapter: str | None) -> "MultimodalGenerator":
        """The same whose graphs run an adapter."""
        other = copy.copy(self)
        other._adapter = adapter
        return other

    def _run(self, name: str, output: str, feeds: Mapping[str, Array]) -> Array:
        """One output of a graph."""
        given = {**feeds, **self._adapters(self._adapter, name)}
        result: Array = self._sessions[name].run([output], given)[0]
        return result

    # ---------------------------------------------------------------- prompts

    def _pictures(
        self, prompts: Sequence[Prompt], images: Sequence[Sequence["Image.Image"]] | None
    ) -> list[list[Picture]]:
        if not prompts:
            raise InputError("no prompts were given, expected at least one.")
        given = images if images is not None else [()] * len(prompts)
        if len(given) != len(prompts):
            raise InputError(
                f"images were given for {len(given)} prompts, expected {len(prompts)}: a list for "
                "each, empty for a prompt without images."
            )
        constants = self.preprocessing["image"]
        return [[lay_out(image, constants) for image in row] for row in given]

    def _ids(self, prompt: Prompt, pictures: list[Picture]) -> list[int]:
        """The ids of a prompt, with the tokens of its images in their places."""
        if not isinstance(prompt, str):
            return [int(one) for one in prompt]
        settings = self.preprocessing["prompt"]
        parts = prompt.split(settings["placeholder"])
        if len(parts) != len(pictures) + 1:
            raise InputError(
                f"a prompt has {len(parts) - 1} times {settings['placeholder']} and "
                f"{len(pictures)} images, expected one for each image."
            )
        text = parts[0]
        for picture, part in zip(pictures, parts[1:], strict=True):
            text += image_text(picture.grid, settings, self._count(picture)) + part
        return self._encode(text)

    def _encode(self, text: str) -> list[int]:
        if self._tokenizer is None:
            raise InputError("a prompt is text and there is no tokenizer, expected ids.")
        # A chat template writes the token that begins a text; the tokenizer would add another.
        begins = self._tokens["bos"]
        begun = begins is not None and text.startswith(begins)
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=not begun).ids
        return ids

    def _count(self, picture: Picture) -> int:
        """Image tokens of a picture, or of each of its tiles."""
        constants = self.preprocessing["image"]
        if constants["layout"] == "patches":
            return len(picture.pixels)
        return int(constants["tokens"])

    def _place(self, ids: list[int], pictures: list[Picture]) -> Array | None:
        """What the decoder takes of each token of a prompt beside its embedding."""
        image_token = self._tokens["image"]
        if self._extra == POSITIONS:
            merge = self.preprocessing["image"]["merge"]
            grids = [one.grid for one in pictures]
            return rope_positions(ids, grids, image_token=image_token, merge=merge)
        if self._extra == ENDS:
            return block_ends(ids, image_token=image_token)
        return None

    def _embedded(self, ids: list[int], pictures: list[Picture]) -> Array:
        """Embeddings `[n, H]` of a prompt."""
        features = self._nothing
        if pictures:
            feeds = tower_inputs(pictures, self.preprocessing["image"])
            features = self._run(VISION, FEATURES, _cast(feeds, self._sessions[VISION]))
            features = features.astype(self._nothing.dtype)
        places = ids.count(self._tokens["image"])
        if places != len(features):
            raise InputError(
                f"a prompt has {places} image tokens and its images {len(features)} features, "
                "expected as many."
            )
        if not ids:
            raise InputError("a prompt is empty, expected at least one token.")
        # Here, since the generator gets embeddings: the graph would say less, and take -1.
        vocabulary = self._tokens["vocabulary"]
        if not 0 <= min(ids) <= max(ids) < vocabulary:
            raise InputError(
                f"a prompt has ids from {min(ids)} to {max(ids)}, expected 0 to {vocabulary - 1}."
            )
        embeds: Array = self._embed(np.asarray([ids], dtype=np.int64), features)[0]
        return embeds

    def _embed(self, ids: Array, features: Array | None = None) -> Array:
        """Embeddings `[B, S, H]` of ids `[B, S]`."""
        # An image token that the model writes is no place for an image: it has no features.
        feeds = {"input_ids": ids, FEATURES: self._nothing if features is None else features}
        return self._run(EMBEDDING, "inputs_embeds", feeds)

    def _generator(
        self, placed: list[Array | None], head: Callable[[Floats], Floats] | None
    ) -> Generator:
        # Text goes on behind the largest position that a prompt has.
        ahead = np.zeros(len(placed), dtype=np.int64)
        if self._extra == POSITIONS:
            ahead += [int(one.max()) + 1 - one.shape[1] for one in placed if one is not None]

        def values(lengths: Array, counts: Array) -> Array:
            new = np.arange(counts.max())
            following = lengths[:, None] + new
            made: Array = following + (1 if self._extra == ENDS else ahead[:, None])
            if self._extra == POSITIONS:
                made = np.stack((made, made, made))
            for row, given in enumerate(placed):
                if not lengths[row] and given is not None:
                    made[..., row, : given.shape[-1]] = given
            result: Array = made.astype(np.int64)
            return result

        return _StepGenerator(
            self._sessions[DECODER],
            self._cache,
            embed=self._embed,
            extra=self._extra,
            values=values,
            head=head,
            vocabulary=self._tokens["vocabulary"],
            adapters=lambda adapter, _: self._adapters(adapter, DECODER),
            **({} if head is None else {"output": STATES}),
            **self._settings,
        )

    def _head(self, name: str) -> Callable[[Floats], Floats]:
        session = self._sessions[name]
        given, output = session.get_inputs()[0], session.get_outputs()[0].name

        def head(states: Floats) -> Floats:
            values = self._run(name, output, {given.name: states.astype(_dtype(given.type))})
            result: Floats = values.astype(np.float32)
            return result

        return head


def _as_bytes(pixels: Floats, constants: Mapping[str, Any]) -> npt.NDArray[np.uint8]:
    """Pixels as the image processor's constants turn them back."""
    if constants["mean"] is not None:
        pixels = pixels * np.asarray(constants["std"], np.float32)
        pixels = pixels + np.asarray(constants["mean"], np.float32)
    if constants["rescale"] is not None:
        pixels = pixels / np.float32(constants["rescale"])
    whole: npt.NDArray[np.uint8] = pixels.clip(0, 255).astype(np.uint8)
    return whole


def _cast(feeds: Tensors, session: Any) -> Tensors:
    """Feeds in the types of the graph's inputs: pixels are half precision where it is."""
    types = {one.name: _dtype(one.type) for one in session.get_inputs()}
    return {name: value.astype(types[name], copy=False) for name, value in feeds.items()}


def _dtype(name: str) -> Any:
    return {"tensor(float16)": np.float16, "tensor(int64)": np.int64}.get(name, np.float32)
