"""How transformers' generation settings bind greedy decoding. Needs no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from mmopt_export.generation import penalize
from mmopt_kernels.errors import InputError

Floats = npt.NDArray[np.float32]

# Settings of transformers' GenerationConfig that change greedy tokens and that nothing here does,
# with the value that means they are off.
_UNKNOWN: dict[str, tuple[Any, ...]] = {
    "guidance_scale": (None, 1, 1.0),
    "sequence_bias": (None,),
    "encoder_repetition_penalty": (None, 1.0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "exponential_decay_length_penalty": (None,),
    "stop_strings": (None,),
    "watermarking_config": (None,),
}
# transformers' own limit where neither the model nor the caller says one.
_DEFAULT_LENGTH = 20


@dataclass(frozen=True)
class Rules:
    """What may come next, in the order in which transformers applies it.

    Attributes:
        eos: ids that end a row.
        pad: what fills a row that has ended.
        max_length: tokens of a row, its prompt included.
        max_new_tokens: of a row, without its prompt; wins over `max_length`.
        repetition_penalty: logits of tokens that the row holds already are divided by it where
            positive and multiplied where negative.
        no_repeat_ngram_size: no sequence of so many tokens comes twice in a row; 0 is no rule.
        bad_words: sequences of ids that never come.
        min_length: tokens of a row, its prompt included, before it may end.
        min_new_tokens: the same without its prompt.
        forced_bos: the second token of a row, where its prompt is one token.
        forced_eos: the last token of a row that reaches its limit.
        begin_suppress: ids that are not the first after the prompt.
        suppress: ids that never come.
    """

    eos: tuple[int, ...]
    pad: int
    max_length: int = _DEFAULT_LENGTH
    max_new_tokens: int | None = None
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words: tuple[tuple[int, ...], ...] = ()
    min_length: int = 0
    min_new_tokens: int = 0
    forced_bos: int | None = None
    forced_eos: int | None = None
    begin_suppress: tuple[int, ...] = ()
    suppress: tuple[int, ...] = ()

    def limit(self, prompt: int, most: int | None, positions: int | None) -> int:
        """Tokens that a row may have in all.

        Args:
            prompt: tokens of its prompt.
            most: new tokens that the caller wants at most; None takes the settings'.
            positions: that the model has.
        """
        new = most if most is not None else self.max_new_tokens
        limit = prompt + new if new is not None else self.max_length
        return min(limit, positions) if positions is not None else limit

    def apply(
        self, logits: Floats, rows: Sequence[Sequence[int]], prompt: int, limit: int
    ) -> Floats:
        """Scores `[B, V]` of the next tokens, from logits `[B, V]`.

        Args:
            rows: the tokens so far, prompts included; as many in each.
            prompt: how many of them are prompt.
            limit: how many there may be.
        """
        scores = np.array(logits, dtype=np.float32)
        for row, tokens in zip(scores, rows, strict=True):
            self._repetition(row, tokens)
        length = len(rows[0])
        if length < self.min_length or length - prompt < self.min_new_tokens:
            scores[:, list(self.eos)] = -np.inf
        if self.forced_bos is not None and length == 1:
            scores = _only(scores, self.forced_bos)
        if self.forced_eos is not None and length == limit - 1:
            scores = _only(scores, self.forced_eos)
        begin = prompt if prompt > 1 or self.forced_bos is None else prompt + 1
        if length == begin:
            scores[:, list(self.begin_suppress)] = -np.inf
        scores[:, list(self.suppress)] = -np.inf
        return scores

    def _repetition(self, scores: Floats, tokens: Sequence[int]) -> None:
        penalize(scores, tokens, self.repetition_penalty)
        if size := self.no_repeat_ngram_size:
            before = tuple(tokens[len(tokens) - size + 1 :]) if size > 1 else ()
            for start in range(len(tokens) - size + 1):
                if tuple(tokens[start : start + size - 1]) == before:
                    scores[tokens[start + size - 1]] = -np.inf
        for word in self.bad_words:
            *before_last, last = word
            if len(before_last) <= len(tokens) and (
                not before_last or list(tokens[-len(before_last) :]) == before_last
            ):
                scores[last] = -np.inf

    def to_dict(self) -> dict[str, Any]:
        """The rules as JSON values, for the manifest."""
        return asdict(self)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> "Rules":
        """The rules that `to_dict` gave.

        Raises:
            InputError: they are of another version of mmopt.
        """
        known = {one.name for one in fields(cls)}
        if set(document) != known:
            raise InputError(
                f"the generation rules of the artifact have the fields {', '.join(document)}, "
                f"expected {', '.join(sorted(known))}. Export the model again."
            )
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in document.items()
        }
        values["bad_words"] = tuple(tuple(word) for word in document["bad_words"])
        return cls(**values)


def read_rules(model: Any) -> Rules:
    """The rules of a model's `generation_config`.

    Raises:
        InputError: it has no end or start token, or a setting that cannot be kept to; named.
    """
    settings = model.generation_config
    name = type(model).__name__
    for setting, off in _UNKNOWN.items():
        value = getattr(settings, setting, None)
        if value not in off:
            raise InputError(
                f"the generation settings of {name} have {setting}={value}, which an artifact does "
                "not keep to. Remove it from generation_config.json."
            )
    eos = _ids(settings.eos_token_id)
    if not eos:
        raise InputError(f"the generation settings of {name} have no eos_token_id, expected one.")
    pad = settings.pad_token_id
    forced_eos = _ids(settings.forced_eos_token_id)
    if len(forced_eos) > 1:
        raise InputError(
            f"the generation settings of {name} force the end tokens {forced_eos}, expected one."
        )
    return Rules(
        eos=eos,
        pad=eos[0] if pad is None else int(pad),
        max_length=int(settings.max_length or _DEFAULT_LENGTH),
        max_new_tokens=settings.max_new_tokens,
        repetition_penalty=float(settings.repetition_penalty or 1.0),
        no_repeat_ngram_size=int(settings.no_repeat_ngram_size or 0),
        # A word that is an end token alone is no bad word to transformers.
        bad_words=tuple(
            tuple(int(one) for one in word)
            for word in settings.bad_words_ids or ()
            if not (len(word) == 1 and word[0] in eos)
        ),
        min_length=int(settings.min_length or 0),
        min_new_tokens=int(settings.min_new_tokens or 0),
        forced_bos=settings.forced_bos_token_id,
        forced_eos=forced_eos[0] if forced_eos else None,
        begin_suppress=_ids(settings.begin_suppress_tokens),
        suppress=_ids(settings.suppress_tokens),
    )


def start_token(model: Any) -> int:
    """The token that a decoder starts with; InputError where the model says none."""
    settings = model.generation_config
    for value in (settings.decoder_start_token_id, settings.bos_token_id):
        if value is not None:
            return int(value)
    raise InputError(
        f"the generation settings of {type(model).__name__} have no decoder_start_token_id, "
        "expected one. Set it in generation_config.json."
    )


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(int(one) for one in (value if isinstance(value, (list, tuple)) else [value]))


def _only(scores: Floats, token: int) -> Floats:
    forced = np.full_like(scores, -np.inf)
    forced[:, token] = 0
    return forced
