"""The fast form of SigLIP's tokenizer, which transformers has only as sentencepiece.

Serving has the library tokenizers alone. A text is made lower case, loses ASCII punctuation and
runs of spaces, and goes through the model's own normalization and unigrams.
"""

import json
import re
import string
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from mmopt_kernels.errors import InputError

_MODEL = "spiece.model"
_SPACE = "▁"
_UNIGRAM = 1  # `TrainerSpec.ModelType`
# What the tokenizer has where its config says nothing.
_DEFAULTS = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "</s>"}


def is_siglip_tokenizer(folder: Path) -> bool:
    """Whether a folder's tokenizer is SigLIP's own, and not the one of SigLIP 2."""
    path = folder / "tokenizer_config.json"
    if not (folder / _MODEL).is_file() or not path.is_file():
        return False
    return _read(path).get("tokenizer_class") == "SiglipTokenizer"


def siglip_tokenizer(folder: Path) -> Any:
    """A `PreTrainedTokenizerFast` that gives the ids of transformers' `SiglipTokenizer`.

    Only behind a special token that a text spells out, such as `</s>`, they differ.

    Raises:
        InputError: the files are damaged, or the sentencepiece model is of another kind.
    """
    config = _read(folder / "tokenizer_config.json")
    pieces, unknown, charsmap = _pieces(folder / _MODEL)
    tokens = {key: _content(config.get(key, value)) for key, value in _DEFAULTS.items()}
    ids = {piece: index for index, (piece, _) in enumerate(pieces)}
    if absent := sorted({token for token in tokens.values() if token not in ids}):
        raise InputError(
            f"{folder / _MODEL} has no piece {', '.join(absent)}, which tokenizer_config.json "
            "names. Download the model again."
        )
    fast = Tokenizer(models.Unigram(pieces, unk_id=unknown, byte_fallback=False))
    steps: list[Any] = [normalizers.Replace(_SPACE, " ")]
    if config.get("do_lower_case", True):
        steps.append(normalizers.Lowercase())
    steps.append(normalizers.Replace(Regex(f"[{re.escape(string.punctuation)}]"), ""))
    if charsmap:
        steps.append(normalizers.Precompiled(charsmap))
    steps += [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    fast.normalizer = normalizers.Sequence(steps)
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    fast.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    end = tokens["eos_token"]
    fast.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, ids[end])]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast,
        model_max_length=int(config.get("model_max_length", 64)),
        # The model was trained on padding without a mask.
        model_input_names=["input_ids"],
        padding_side="right",
        **tokens,
    )


def _pieces(path: Path) -> tuple[list[tuple[str, float]], int, bytes]:
    """The unigrams with their scores, the index of the unknown one, and the normalization."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from transformers.utils import sentencepiece_model_pb2_new as format_of

    model = format_of.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise InputError(f"{path} is damaged: {error}. Download the model again.") from error
    trainer = model.trainer_spec
    if not model.pieces or trainer.model_type != _UNIGRAM or trainer.byte_fallback:
        raise InputError(f"{path} holds no unigrams without bytes, as SigLIP's tokenizer has.")
    pieces = [(one.piece, float(one.score)) for one in model.pieces]
    return pieces, int(trainer.unk_id), bytes(model.normalizer_spec.precompiled_charsmap)


def _content(token: Any) -> str:
    """A token's text; newer files describe a token as an object."""
    return str(token["content"] if isinstance(token, dict) else token)


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}). Download it again.") from error
    if not isinstance(document, dict):
        raise InputError(f"{path} holds no JSON object. Download it again.")
    return document
