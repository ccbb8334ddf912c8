"""Generates text with an exported decoder on ONNX Runtime: caches, batches, sampling. No torch.

One graph does prefill and decode. Its KV buffers are memory that this module owns: each is bound as
a past input and as the present output at once, so that a step writes its one row in place and
copies nothing. A row's tokens lie from 0 without gaps; lengths say how many, so a batch may hold
rows of different lengths, and a row that is done keeps its cache while others go on.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mmopt_export.manifest import CacheMap
from mmopt_export.runtime import MODEL, Runner, open_session
from mmopt_kernels.errors import InputError, MmoptError, one_line

CPU = "CPUExecutionProvider"
LOGITS = "logits"
MASK = "attention_mask"
IDS = "input_ids"
EMBEDS = "inputs_embeds"

# Buffers start at this many rows and double: growing copies them, and 256 rows of a 124M Llama are
# 18 MB, less than a twentieth of its weights.
_FIRST_CAPACITY = 256

# What holds a buffer, by ONNX Runtime's name of its type. NumPy has no bfloat16: bits, and the type
# as onnx.TensorProto numbers it.
_BUFFERS: dict[str, npt.DTypeLike] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(bfloat16)": np.uint16,
}
_BFLOAT16 = 16

Ids = Sequence[int]
Floats = npt.NDArray[np.float32]
Embed = Callable[[npt.NDArray[np.int64]], npt.NDArray[Any]]
"""Embeddings `[B, S, H]` of ids `[B, S]`, for a graph that takes `inputs_embeds`."""
AdapterFeeds = Callable[[str | None, str], Mapping[str, npt.NDArray[Any]]]
"""From an adapter's name and a graph's the inputs that run it there: `Runner.adapter_feeds`."""


def no_adapters(adapter: str | None, component: str) -> Mapping[str, npt.NDArray[Any]]:
    """`AdapterFeeds` of sessions that were opened without their artifact.

    Raises:
        InputError: an adapter is asked for.
    """
    if adapter is None:
        return {}
    raise InputError(
        f"adapter is {adapter!r}, and this was made of sessions alone. Open the artifact, or pass "
        "adapters=."
    )


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the logits, in this order.

    Attributes:
        repetition_penalty: logits of tokens that the row holds already are divided by it where
            positive and multiplied where negative; 1 is none (Keskar et al. 2019).
        temperature: logits are divided by it; 0 takes the most likely token.
        top_k: keep this many most likely tokens; 0 keeps all.
        top_p: keep the most likely tokens whose probabilities first reach this sum; 1 keeps all.
        seed: of the random numbers. Each row draws its own, so that what a row gets does not
            depend on the others.

    Raises:
        InputError: a value out of its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, fine, expected in (
            ("temperature", 0 <= self.temperature < np.inf, "0 or more"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < np.inf, "above 0"),
            ("seed", self.seed >= 0, "0 or more"),
        ):
            if not fine:
                raise InputError(f"{name} is {getattr(self, name)}, expected {expected}.")


GREEDY = Sampling(temperature=0.0)


@dataclass
class Conversation:
    """What rows have said so far, and their KV cache; `Generator.start` makes one.

    Attributes:
        lengths: int64 `[B]`, tokens of each row in the cache.
        pending: for each row the tokens that came out and are not in the cache yet: the last one.
        history: for each row all of its tokens by id, in and out.
        capacity: rows of each buffer.
    """

    lengths: npt.NDArray[np.int64]
    pending: list[list[int]]
    history: list[list[int]]
    capacity: int
    _buffers: dict[str, Any] = field(default_factory=dict, repr=False)
    _arrays: dict[str, npt.NDArray[Any]] = field(default_factory=dict, repr=False)
    _constants: dict[str, Any] = field(default_factory=dict, repr=False)
    _binding: Any = field(default=None, repr=False)
    _logits: Any = field(default=None, repr=False)

    @property
    def batch(self) -> int:
        """Rows."""
        return len(self.lengths)


@dataclass(frozen=True)
class Generation:
    """What came out.

    Attributes:
        tokens: new ids by row, with the end-of-sequence token where there was one.
        reasons: by row `eos`, or `length` where a limit ended it.
        conversation: pass it on with the next turn's tokens.
    """

    tokens: list[list[int]]
    reasons: list[str]
    conversation: Conversation


class Generator:
    """Generates with one session of an exported decoder; `Generator.open` opens an artifact's.

    A batch that already has a cache takes several new tokens row by row on the CPU and token by
    token on other providers: ONNX Runtime's GroupQueryAttention refuses more than one row with a
    past and several new tokens. Everything else runs as one batch. Not thread-safe per
    `Conversation`; several conversations may share a generator.

    Args:
        model: an ONNX Runtime session, or the path of the graph, which is then opened.
        cache: the names and sizes of the KV cache, from the manifest; their type is the graph's.
        provider: where buffers are; the session must run there.
        threads, huge_pages: for a session that is opened here, as `open_session` takes them.
        max_length: tokens that a row may have: `max_length` of the manifest, where the model's
            positions end. Without it ONNX Runtime fails there, or a GPU reads what is behind them.
        embed: for a graph that takes `inputs_embeds`: what makes them of ids.
        output: what the graph gives beside the cache, `[B, 1, V]`, under another name.
        adapters: what an `adapter` is for this graph.

    Raises:
        InputError: the graph has no such cache, or takes embeddings and `embed` is missing.
        MmoptError: the session cannot be opened.
    """

    def __init__(
        self,
        model: Any,
        cache: CacheMap,
        *,
        provider: str = CPU,
        threads: int | None = None,
        huge_pages: bool = True,
        max_length: int | None = None,
        embed: Embed | None = None,
        output: str = LOGITS,
        adapters: AdapterFeeds = no_adapters,
    ) -> None:
        if isinstance(model, (str, Path)):
            model = open_session(
                Path(model), provider=provider, threads=threads, huge_pages=huge_pages
            )
        self.session = model
        self.cache = cache
        self.max_length = max_length
        self._output = output
        self._adapters = adapters
        self._device = "cuda" if provider == "CUDAExecutionProvider" else "cpu"
        inputs = {one.name: one for one in model.get_inputs()}
        outputs = {one.name: one for one in model.get_outputs()}
        for past_key, past_value, key, value in cache.layers:
            for name, known in (
                (past_key, inputs),
                (past_value, inputs),
                (key, outputs),
                (value, outputs),
            ):
                if name not in known:
                    raise InputError(
                        f"the graph has no {name}, which its cache should be. Pass the cache of "
                        "the manifest that belongs to the graph."
                    )
        self._buffer_type = inputs[cache.layers[0][0]].type
        self._tokens = EMBEDS if EMBEDS in inputs else IDS
        self._embed = embed if self._tokens == EMBEDS else None
        if self._tokens == EMBEDS and embed is None:
            raise InputError(
                "the graph takes inputs_embeds, expected embed= with what makes them of ids."
            )
        self._vocabulary = outputs[output].shape[2]
        self._logits_type = {
            "tensor(float)": np.dtype(np.float32),
            "tensor(float16)": np.dtype(np.float16),
        }.get(outputs[output].type)
        self._embeds_type = np.float16 if "float16" in inputs[self._tokens].type else np.float32

    @classmethod
    def open(cls, artifact: Path | Runner, *, threads: int | None = None) -> "Generator":
        """Check an artifact and open its decoder, with the model's limit and on its provider.

        Args:
            artifact: a folder that `mmopt export` wrote, or an opened one.
            threads: intra-op threads; None takes every core that this process may use.

        Raises:
            InputError: it is no artifact, or of a model that is no decoder alone.
            CheckFailedError: it is not proven, or a file differs from the manifest.
            MmoptError: ONNX Runtime is missing, too old, or cannot load the graph.
        """
        runner = artifact if isinstance(artifact, Runner) else Runner(artifact, threads=threads)
        manifest = runner.manifest
        if MODEL not in manifest.caches:
            raise InputError(
                f"{runner.path} is for {manifest.task}, expected a decoder alone, for "
                "text-generation. TextGenerator, Transcriber and MultimodalGenerator open others "
                "that generate."
            )
        return cls(
            runner.session(),
            manifest.caches[MODEL],
            provider=runner.provider,
            max_length=manifest.max_length,
            adapters=runner.adapter_feeds,
        )

    # ---------------------------------------------------------------- public

    def start(
        self,
        batch: int,
        *,
        capacity: int = _FIRST_CAPACITY,
        constants: Mapping[str, npt.NDArray[Any]] | None = None,
        adapter: str | None = None,
    ) -> Conversation:
        """Empty caches for `batch` rows.

        Args:
            capacity: tokens for which there is room at first; it grows as needed.
            constants: inputs that stay the same in every step.
            adapter: one of the artifact's, for all rows and steps; None runs the base alone.

        Raises:
            InputError: no rows, no room, or there is no such adapter.
        """
        if batch < 1 or capacity < 1:
            raise InputError(f"batch is {batch} and capacity {capacity}, expected at least 1 each.")
        given = {**(constants or {}), **self._adapters(adapter, MODEL)}
        conversation = Conversation(
            lengths=np.zeros(batch, dtype=np.int64),
            pending=[[] for _ in range(batch)],
            history=[[] for _ in range(batch)],
            capacity=0,
            _constants={name: _value(one) for name, one in given.items()},
        )
        self._grow(conversation, min(capacity, self.max_length or capacity))
        return conversation

    def prefill(
        self, prompts: Sequence[Ids | npt.NDArray[Any]], conversation: Conversation
    ) -> Floats:
        """Take tokens in and give the logits `[B, V]` after each row's last one.

        Args:
            prompts: new ids by row, of any lengths; for a graph that takes embeddings also
                `[n, H]` arrays. A row that has a pending token (the last one that came out) takes
                that first. A row without either is left alone and has logits of 0.
            conversation: is changed.

        Raises:
            InputError: another number of rows, an id out of range, or more tokens than positions.
            MmoptError: ONNX Runtime failed, as where positions end and `max_length` is not given.
        """
        return self._prefill(prompts, conversation).copy()

    def _prefill(
        self, prompts: Sequence[Ids | npt.NDArray[Any]], conversation: Conversation
    ) -> Floats:
        logits = self._take(self._rows(prompts, conversation), conversation)
        for row, prompt in enumerate(prompts):
            conversation.pending[row] = []
            if not isinstance(prompt, np.ndarray) or prompt.ndim == 1:
                conversation.history[row] += [int(one) for one in prompt]
        return logits

    def step(self, tokens: Sequence[int | None], conversation: Conversation) -> Floats:
        """Take one token of each row and give the logits `[B, V]` after it.

        Args:
            tokens: an id, or None for a row that is done: its cache stays, its logits are 0.
        """
        return self.prefill([[] if one is None else [one] for one in tokens], conversation)

    def stream(
        self,
        prompts: Sequence[Ids | npt.NDArray[Any]],
        *,
        max_new_tokens: int,
        eos: Collection[int] = (),
        sampling: Sampling = GREEDY,
        conversation: Conversation | None = None,
        adapter: str | None = None,
    ) -> Iterator[dict[int, int]]:
        """Give each step's new tokens by row, as they come; rows that are done are not in it.

        Arguments as for `generate`. Stop iterating to stop generating: the conversation then holds
        what has come out so far.
        """
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens}, expected at least 1.")
        state = self._state(len(prompts), conversation, adapter)
        randoms = [np.random.default_rng((sampling.seed, row)) for row in range(state.batch)]
        logits = self._prefill(prompts, state)
        live = [row for row in range(state.batch) if state.lengths[row]]
        for count in range(1, max_new_tokens + 1):
            chosen = {
                row: choose(logits[row], sampling, state.history[row], randoms[row]) for row in live
            }
            for row, token in chosen.items():
                state.pending[row] = [token]
                state.history[row].append(token)
            yield chosen
            live = [row for row in live if chosen[row] not in eos and self._has_room(state, row)]
            if not live or count == max_new_tokens:
                return
            # A row that ended keeps its last token pending, for the next turn.
            fed = [state.pending[row] if row in live else [] for row in range(state.batch)]
            for row in live:
                state.pending[row] = []
            logits = self._take([self._new(row, one) for row, one in enumerate(fed)], state)

    def generate(
        self,
        prompts: Sequence[Ids | npt.NDArray[Any]],
        *,
        max_new_tokens: int,
        eos: Collection[int] = (),
        sampling: Sampling = GREEDY,
        conversation: Conversation | None = None,
        adapter: str | None = None,
        on_tokens: Callable[[dict[int, int]], None] | None = None,
    ) -> Generation:
        """Continue each prompt until its end-of-sequence token or a limit.

        Args:
            prompts: ids by row, of any lengths, without padding.
            max_new_tokens: at most this many for each row.
            eos: ids that end a row.
            sampling: how tokens are chosen; greedy if left out.
            conversation: of the turns before; the prompts are then only what is new.
            adapter: one of the artifact's, for all rows; None runs the base alone. A conversation
                has that which it was started with.
            on_tokens: called with each step's new tokens by row.

        Raises:
            InputError: a prompt that is empty, holds an unknown id, or has no room for one token;
                there is no such adapter, or a conversation is given as well.
            MmoptError: as for `prefill`.
        """
        state = self._state(len(prompts), conversation, adapter)
        tokens: list[list[int]] = [[] for _ in range(state.batch)]
        for chosen in self.stream(
            prompts,
            max_new_tokens=max_new_tokens,
            eos=eos,
            sampling=sampling,
            conversation=state,
        ):
            for row, token in chosen.items():
                tokens[row].append(token)
            if on_tokens is not None:
                on_tokens(chosen)
        reasons = ["eos" if row and row[-1] in eos else "length" for row in tokens]
        return Generation(tokens, reasons, state)

    def _state(
        self, batch: int, conversation: Conversation | None, adapter: str | None
    ) -> Conversation:
        """The conversation that is given, or a new one."""
        if conversation is None:
            return self.start(batch, adapter=adapter)
        if adapter is not None:
            raise InputError(
                f"adapter is {adapter!r} and a conversation is given, which keeps the one that it "
                "was started with. Leave one of the two out."
            )
        return conversation

    # ---------------------------------------------------------------- rows

    def _rows(
        self, prompts: Sequence[Ids | npt.NDArray[Any]], conversation: Conversation
    ) -> list[npt.NDArray[Any]]:
        """Each row's new tokens with its pending one first."""
        if len(prompts) != conversation.batch:
            raise InputError(
                f"{len(prompts)} prompts for a conversation of {conversation.batch} rows."
            )
        rows = []
        for row, (pending, prompt) in enumerate(zip(conversation.pending, prompts, strict=True)):
            given = self._new(row, prompt)
            rows.append(np.concatenate((self._new(row, pending), given)) if pending else given)
        return rows

    def _new(self, row: int, prompt: Ids | npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Tokens as the graph takes them: ids `[n]`, or embeddings `[n, H]`."""
        given = np.asarray(prompt)
        if given.ndim == 2 and self._embed is not None:
            return given.astype(self._embeds_type)
        if given.ndim != 1:
            raise InputError(f"prompt {row} has the shape {given.shape}, expected a list of ids.")
        ids = given.astype(np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < self._most_ids():
            raise InputError(
                f"prompt {row} has ids from {ids.min()} to {ids.max()}, expected 0 to "
                f"{self._most_ids() - 1}."
            )
        if self._embed is None:
            return ids
        # Nothing has no embeddings: those of one token, cut to none, have their width and type.
        embeds = self._embed(ids[None] if ids.size else np.zeros((1, 1), dtype=np.int64))
        return embeds[0, : ids.size].astype(self._embeds_type)

    def _most_ids(self) -> int:
        return self._vocabulary if isinstance(self._vocabulary, int) else np.iinfo(np.int64).max

    def _has_room(self, conversation: Conversation, row: int) -> bool:
        return self.max_length is None or conversation.lengths[row] < self.max_length

    # ---------------------------------------------------------------- running

    def _take(self, rows: list[npt.NDArray[Any]], conversation: Conversation) -> Floats:
        """Put new tokens, as the graph takes them, into the cache; logits `[B, V]`.

        They are the conversation's own buffer, which the next tokens overwrite: a copy of a large
        vocabulary's takes longer than all else here.
        """
        counts = [len(row) for row in rows]
        if max(counts) == 0:
            raise InputError("every prompt is empty, expected at least one token.")
        needed = int((conversation.lengths + counts).max())
        if self.max_length is not None and needed > self.max_length:
            raise InputError(
                f"a row would have {needed} tokens, and the model has {self.max_length} "
                "positions. Shorten the prompt."
            )
        self._grow(conversation, needed)
        if conversation.batch == 1 or max(counts) == 1 or not conversation.lengths.any():
            return self._run(rows, conversation)
        if self._device == "cpu":
            return self._row_by_row(rows, conversation)
        return self._token_by_token(rows, conversation)

    def _run(self, rows: list[npt.NDArray[Any]], conversation: Conversation) -> Floats:
        """One call of the graph for the whole batch, buffers in place."""
        binding, logits = self._bound(conversation)
        feeds, counts = _padded(rows, conversation.lengths)
        for name, feed in zip((self._tokens, MASK), feeds, strict=True):
            binding.bind_cpu_input(name, feed)
        if logits is None:
            binding.bind_output(self._output, "cpu")
        try:
            self.session.run_with_iobinding(binding)
        except RuntimeError as error:  # what a bound run raises, whatever failed
            longest = int((conversation.lengths + counts).max())
            said = one_line(error).rstrip(".")
            message = f"ONNX Runtime failed where a row has {longest} tokens: {said}."
            if self.max_length is None:
                message += (
                    " No max_length was given: if the model's positions end before, pass that of "
                    "the manifest, or open the artifact with Generator.open."
                )
            raise MmoptError(message) from error
        conversation.lengths += counts
        if logits is None:
            names = [one.name for one in self.session.get_outputs()]
            logits = binding.get_outputs()[names.index(self._output)].numpy()
        result: Floats = logits[:, 0].astype(np.float32, copy=False)
        if not counts.all():
            result[counts == 0] = 0
        return result

    def _bound(self, conversation: Conversation) -> tuple[Any, Any]:
        """The binding of the conversation's buffers, and the array that logits are written to."""
        if conversation._binding is None:
            binding = self.session.io_binding()
            for name, constant in conversation._constants.items():
                binding.bind_ortvalue_input(name, constant)
            for past_key, past_value, key, value in self.cache.layers:
                for past, present in ((past_key, key), (past_value, value)):
                    self._bind_buffer(binding, past, present, conversation._buffers[past])
            if isinstance(self._vocabulary, int) and self._logits_type is not None:
                shape = (conversation.batch, 1, self._vocabulary)
                conversation._logits = np.empty(shape, dtype=self._logits_type)
                binding.bind_ortvalue_output(self._output, _value(conversation._logits))
            conversation._binding = binding
        return conversation._binding, conversation._logits

    def _row_by_row(self, rows: list[npt.NDArray[Any]], conversation: Conversation) -> Floats:
        """Several new tokens after a past: each row by itself, on its part of the buffers."""
        results = []
        for row, new in enumerate(rows):
            if not len(new):
                results.append(np.zeros((1, int(self._vocabulary)), dtype=np.float32))
                continue
            arrays = {name: array[row : row + 1] for name, array in conversation._arrays.items()}
            alone = Conversation(
                lengths=conversation.lengths[row : row + 1],
                pending=[[]],
                history=[[]],
                capacity=conversation.capacity,
                _arrays=arrays,
                _buffers={name: self._buffer(array) for name, array in arrays.items()},
                _constants=conversation._constants,
            )
            # `lengths` is a view: the run counts into the conversation's own.
            results.append(self._run([new], alone))
        return np.concatenate(results)

    def _token_by_token(self, rows: list[npt.NDArray[Any]], conversation: Conversation) -> Floats:
        """Several new tokens after a past where buffers cannot be taken apart."""
        result: Floats | None = None
        for column in range(max(len(row) for row in rows)):
            logits = self._run([row[column : column + 1] for row in rows], conversation)
            if result is None:
                result = np.zeros_like(logits)
            taken = [column < len(row) for row in rows]
            result[taken] = logits[taken]
        assert result is not None
        return result

    # ---------------------------------------------------------------- buffers

    def _grow(self, conversation: Conversation, needed: int) -> None:
        """Make room for `needed` tokens in a row and one that is thrown away.

        A row without a new token writes one that means nothing behind its own.
        """
        if needed + 1 <= conversation.capacity:
            return
        capacity = max(needed + 1, 2 * conversation.capacity)
        if self.max_length is not None:
            capacity = min(capacity, self.max_length + 1)
        held = int(conversation.lengths.max())
        shape = (conversation.batch, self.cache.heads, capacity, self.cache.head_size)
        for layer in self.cache.layers:
            for name in layer[:2]:
                array = np.zeros(shape, dtype=_BUFFERS[self._buffer_type])
                if held:
                    array[:, :, :held] = self._held(conversation, name)[:, :, :held]
                if self._device == "cpu":
                    conversation._arrays[name] = array
                conversation._buffers[name] = self._buffer(array)
        conversation.capacity = capacity
        conversation._binding = None

    def _held(self, conversation: Conversation, name: str) -> npt.NDArray[Any]:
        if name in conversation._arrays:
            return conversation._arrays[name]
        values: npt.NDArray[Any] = conversation._buffers[name].numpy()
        return values

    def _buffer(self, array: npt.NDArray[Any]) -> Any:
        from onnxruntime import OrtValue

        # On the CPU this is the array's own memory, on a device a copy.
        return OrtValue.ortvalue_from_numpy(array, self._device, 0)

    def _bind_buffer(self, binding: Any, past: str, present: str, buffer: Any) -> None:
        """Let the graph read and write one buffer in place."""
        if self._buffer_type != "tensor(bfloat16)":
            binding.bind_ortvalue_input(past, buffer)
            binding.bind_ortvalue_output(present, buffer)
            return
        # The buffer holds bits under an integer's type, since no value in bf16 can be put on a
        # device from an array or read back from one. Bound by its address it has the graph's type.
        where = (self._device, 0, _BFLOAT16, buffer.shape(), buffer.data_ptr())
        binding.bind_input(past, *where)
        binding.bind_output(present, *where)


def choose(
    logits: Floats, sampling: Sampling, history: Ids, random: np.random.Generator | None = None
) -> int:
    """The next token from logits `[V]`, as `Sampling` says.

    Args:
        history: tokens that the row holds already, for the repetition penalty.
        random: draws; None is `Sampling.seed` anew.
    """
    if sampling.temperature == 0 and sampling.repetition_penalty == 1:
        return int(np.argmax(logits))
    scores = logits.astype(np.float64)
    penalize(scores, history, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return int(np.argmax(scores))
    probabilities = distribution(scores, sampling)
    drawn = (random or np.random.default_rng(sampling.seed)).random()
    # Of the tokens that may come, the first whose cumulated probability exceeds the draw.
    kept = np.flatnonzero(probabilities)
    edge = np.searchsorted(np.cumsum(probabilities[kept]), drawn, side="right")
    return int(kept[min(int(edge), len(kept) - 1)])


def penalize(scores: npt.NDArray[Any], tokens: Ids, penalty: float) -> None:
    """Divide the scores `[V]` of `tokens` by `penalty` where positive, else multiply, in place."""
    if penalty == 1:
        return
    seen = np.unique(np.asarray(tokens, dtype=np.int64))
    old, factor = scores[seen], scores.dtype.type(penalty)
    scores[seen] = np.where(old < 0, old * factor, old / factor)


def distribution(scores: npt.NDArray[np.float64], sampling: Sampling) -> npt.NDArray[np.float64]:
    """Probabilities `[V]` after temperature, top-k and top-p, 0 for what was cut."""
    scores = scores / sampling.temperature
    if 0 < sampling.top_k < len(scores):
        smallest = np.partition(scores, -sampling.top_k)[-sampling.top_k]
        scores = np.where(scores < smallest, -np.inf, scores)
    probabilities = np.exp(scores - scores.max())
    probabilities /= probabilities.sum()
    if sampling.top_p < 1:
        order = np.argsort(-probabilities, kind="stable")
        before = np.cumsum(probabilities[order]) - probabilities[order]
        probabilities[order[before >= sampling.top_p]] = 0
        probabilities /= probabilities.sum()
    result: npt.NDArray[np.float64] = probabilities
    return result


def _padded(
    rows: list[npt.NDArray[Any]], lengths: npt.NDArray[np.int64]
) -> tuple[tuple[npt.NDArray[Any], npt.NDArray[np.int64]], npt.NDArray[np.int64]]:
    """The graph's tokens and mask, and how many new tokens each row has."""
    counts = np.asarray([len(row) for row in rows], dtype=np.int64)
    most, past = int(counts.max()), int(lengths.max())
    if len(rows) == 1:
        return (np.ascontiguousarray(rows[0][None]), np.ones((1, past + most), np.int64)), counts
    tokens = np.zeros((len(rows), most, *rows[0].shape[1:]), dtype=rows[0].dtype)
    for row, new in enumerate(rows):
        tokens[row, : len(new)] = new
    columns = np.arange(past + most)
    mask = (columns < lengths[:, None]) | ((columns >= past) & (columns < past + counts[:, None]))
    return (tokens, mask.astype(np.int64)), counts


def _value(array: npt.NDArray[Any]) -> Any:
    from onnxruntime import OrtValue

    return OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
