"""Text encoders as embeddings: pooling, projections and normalization are in the graph."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mmopt_export.checkpoint import Checkpoint, resolve
from mmopt_export.parts import Part, Plan
from mmopt_export.runtime import MODEL
from mmopt_export.tasks import text
from mmopt_kernels.errors import InputError

OUTPUT = "sentence_embedding"

# How sentence-transformers calls its poolings in `1_Pooling/config.json`, in the order in which it
# concatenates several. Newer files have one key, `pooling_mode`, with the name or a list of names.
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_ACTIVATIONS: dict[str, type[nn.Module]] = {
    one.__name__: one for one in (nn.Identity, nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid)
}


@dataclass(frozen=True)
class Sentence:
    """What becomes of the hidden states of a text's tokens.

    Attributes:
        pooling: names of `_FLAGS`, whose vectors are concatenated.
        dense: folders of linear layers after it.
        normalize: whether the result gets length 1.
        longest: tokens that are kept of a text; None where the folder does not say.
        lower: whether texts are made lower case before the tokenizer.
        prompts: texts by name that users may put before their own.
        default_prompt: the name of the one that is put there when none is asked for.
        found: whether the folder says all this; else it is the default.
    """

    pooling: tuple[str, ...] = ("mean",)
    dense: tuple[Path, ...] = ()
    normalize: bool = False
    longest: int | None = None
    lower: bool = False
    prompts: tuple[tuple[str, str], ...] = ()
    default_prompt: str | None = None
    found: bool = False


class SentenceEmbedding(nn.Module):
    """`sentence_embedding` `[B, H]` of a text encoder's hidden states.

    Tokens that the mask leaves out have no part in it, on whichever side they are.

    Args:
        model: gives `last_hidden_state` `[B, L, H]`.
        pooling: names of poolings, concatenated.
        layers: applied to the pooled vector.
        normalize: whether the result gets length 1.
    """

    def __init__(
        self, model: Any, pooling: Sequence[str], layers: Sequence[nn.Module], *, normalize: bool
    ) -> None:
        super().__init__()
        self.model = model
        self.layers = nn.ModuleList(layers)
        self._pooling = tuple(pooling)
        self._normalize = normalize

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """The embeddings of a batch of texts."""
        hidden = self.model(**inputs).last_hidden_state
        mask = inputs["attention_mask"]
        vectors = [pool(hidden, mask, mode) for mode in self._pooling]
        vector = vectors[0] if len(vectors) == 1 else torch.cat(vectors, dim=-1)
        for layer in self.layers:
            vector = layer(vector)
        if self._normalize:
            vector = nn.functional.normalize(vector, dim=-1)
        return {OUTPUT: vector}


def pool(hidden: Tensor, mask: Tensor, mode: str) -> Tensor:
    """One vector `[B, H]` of hidden states `[B, L, H]` whose `mask` `[B, L]` is 1.

    Args:
        mode: `mean`, `mean_sqrt_len_tokens` (the sum over the root of the count), `weightedmean`
            (later tokens weigh more), `max`, `cls` (the first token) or `lasttoken`.
    """
    kept = mask.to(hidden.dtype).unsqueeze(-1)
    if mode == "max":
        return hidden.masked_fill(kept == 0, -6e4).amax(dim=1)  # as low as float16 reaches
    if mode in ("cls", "lasttoken"):
        # The first or the last token that is not padding: of numbers that fall or rise over the
        # text, the largest. ONNX Runtime's ArgMax takes no integers on a GPU, its ReduceMax does.
        length = mask.shape[1]
        order = torch.arange(1, length + 1, device=mask.device)
        if mode == "cls":
            index = (length - (mask * (length + 1 - order)).amax(dim=1)).clamp(max=length - 1)
        else:
            index = ((mask * order).amax(dim=1) - 1).clamp(min=0)
        return hidden.gather(1, index[:, None, None].expand(-1, 1, hidden.shape[-1])).squeeze(1)
    if mode == "weightedmean":
        kept = kept * mask.cumsum(dim=1).to(hidden.dtype).unsqueeze(-1)
    count = kept.sum(dim=1).clamp(min=1)
    return (hidden * kept).sum(dim=1) / (count.sqrt() if mode == "mean_sqrt_len_tokens" else count)


def plan(checkpoint: Checkpoint, calibration: Path | None) -> Plan:
    """The plan for an encoder of texts: `sentence_embedding` `[B, H]`.

    The pooling, the projections and the normalization are those of a sentence-transformers folder;
    elsewhere the mean over tokens, not normalized.

    Raises:
        InputError: no tokenizer, or modules that cannot be exported; the message names them.
    """
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    text.require_tokenizer(model, tokenizer)
    inputs = text.text_inputs(model, tokenizer)
    if not {"input_ids", "attention_mask"} <= set(inputs):
        raise InputError(
            f"{type(model).__name__} takes no attention mask, expected an encoder of texts."
        )
    sentence = read_sentence(resolve(checkpoint.source))
    if sentence.lower and tokenizer("A")["input_ids"] != tokenizer("a")["input_ids"]:
        raise InputError(
            f"{checkpoint.source} lowers the case of texts before its tokenizer (do_lower_case in "
            "sentence_bert_config.json), expected a tokenizer that does it itself."
        )
    longest = text.longest_text(model, tokenizer)
    longest = min(longest, sentence.longest) if sentence.longest else longest
    vocabulary = model.config.vocab_size
    texts = text.calibration_texts(calibration)
    preprocessing: dict[str, Any] = {
        "pooling": {
            "modes": list(sentence.pooling),
            "projections": len(sentence.dense),
            "normalized": sentence.normalize,
            "from": "sentence-transformers" if sentence.found else "default",
        }
    }
    if sentence.prompts:
        preprocessing["prompts"] = dict(sentence.prompts)
        preprocessing["default_prompt"] = sentence.default_prompt
    return Plan(
        task="feature-extraction",
        kind="encoder",
        parts=(
            Part(
                name=MODEL,
                module=SentenceEmbedding(
                    model,
                    sentence.pooling,
                    [dense_layer(folder) for folder in sentence.dense],
                    normalize=sentence.normalize,
                ).eval(),
                inputs=text.example_inputs(inputs, vocabulary=vocabulary, longest=longest),
                axes=dict.fromkeys(inputs, text.AXES),
                outputs=(OUTPUT,),
                samples=lambda: text.text_samples(
                    tokenizer, inputs, texts, vocabulary=vocabulary, longest=longest
                ),
                limits={"sequence": longest},
            ),
        ),
        write=lambda folder: text.write_tokenizer(tokenizer, folder, longest),
        max_length=longest,
        preprocessing=preprocessing,
    )


def read_sentence(folder: Path) -> Sentence:
    """What a sentence-transformers folder does with hidden states; the default where it is none.

    Raises:
        InputError: a file is damaged, or names something that cannot be exported.
    """
    path = folder / "modules.json"
    if not path.is_file():
        return Sentence()
    modules = _read_json(path, list)
    try:
        kinds = [(str(one["type"]).rsplit(".", 1)[-1], folder / one["path"]) for one in modules]
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged: {error!r}. Download the model again.") from error
    if not kinds or kinds[0] != ("Transformer", folder):
        raise InputError(
            f"{path} begins with {kinds[0][0] if kinds else 'nothing'}, expected a Transformer "
            "whose files lie in the folder itself."
        )
    pooling: tuple[str, ...] | None = None
    dense: list[Path] = []
    normalize = False
    for kind, place in kinds[1:]:
        # After normalization only another may come: the graph normalizes last.
        known = kind == "Normalize" or (kind in ("Dense", "Dropout") and not normalize)
        if kind == "Pooling" and pooling is None:
            pooling = _pooling(place / "config.json")
        elif not known or pooling is None:
            raise InputError(
                f"{path} has the module {kind} after {len(dense)} Dense, expected a Pooling, then "
                "Dense layers, then a Normalize: others cannot be exported."
            )
        elif kind == "Dense":
            dense.append(place)
        elif kind == "Normalize":
            normalize = True
    if pooling is None:
        raise InputError(f"{path} has no Pooling, expected one: a text gets one vector.")
    prompts, default = _prompts(folder)
    longest, lower = _settings(folder)
    return Sentence(
        pooling=pooling,
        dense=tuple(dense),
        normalize=normalize,
        longest=longest,
        lower=lower,
        prompts=prompts,
        default_prompt=default,
        found=True,
    )


def dense_layer(folder: Path) -> nn.Module:
    """A linear layer and its activation, as sentence-transformers saved them.

    Raises:
        InputError: an activation that is not known, or weights that are missing or do not fit.
    """
    config = _read_json(folder / "config.json", dict)
    name = str(config.get("activation_function", "torch.nn.Tanh")).rsplit(".", 1)[-1]
    if name not in _ACTIVATIONS:
        raise InputError(
            f"{folder / 'config.json'} has the activation {name}, expected one of: "
            f"{', '.join(_ACTIVATIONS)}."
        )
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise InputError(
            f"{folder} has no model.safetensors. A pickle may run code when loaded: save the model "
            "again with sentence-transformers."
        )
    try:
        linear = nn.Linear(
            config["in_features"], config["out_features"], bias=config.get("bias", True)
        )
        state = {key.removeprefix("linear."): x.float() for key, x in load_file(weights).items()}
        linear.load_state_dict(state)
    except (KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise InputError(f"the weights in {folder} do not fit its config.json: {error}") from error
    return nn.Sequential(linear, _ACTIVATIONS[name]())


def _pooling(path: Path) -> tuple[str, ...]:
    config = _read_json(path, dict)
    named = config.get("pooling_mode")
    if named is None:
        # A file without any of the keys means the mean, as the library's default is.
        flags = {key: config.get(key, key == "pooling_mode_mean_tokens") for key in _FLAGS}
        modes = [mode for key, mode in _FLAGS.items() if flags[key]]
    else:
        modes = [named] if isinstance(named, str) else list(named)
    if not modes or not set(modes) <= set(_FLAGS.values()):
        raise InputError(
            f"{path} asks for the pooling {', '.join(map(str, modes)) or 'nothing'}, expected some "
            f"of: {', '.join(_FLAGS.values())}."
        )
    if not config.get("include_prompt", True):
        raise InputError(
            f"{path} leaves the prompt's tokens out of the pooling (include_prompt is false), "
            "which the graph cannot know. Export a model that includes them."
        )
    return tuple(modes)


def _settings(folder: Path) -> tuple[int | None, bool]:
    """Longest text and lower case, of `sentence_bert_config.json` or that of another encoder."""
    for path in sorted(folder.glob("sentence_*_config.json")):
        config = _read_json(path, dict)
        longest = config.get("max_seq_length")
        return int(longest) if longest else None, bool(config.get("do_lower_case"))
    return None, False


def _prompts(folder: Path) -> tuple[tuple[tuple[str, str], ...], str | None]:
    path = folder / "config_sentence_transformers.json"
    if not path.is_file():
        return (), None
    config = _read_json(path, dict)
    prompts, default = config.get("prompts") or {}, config.get("default_prompt_name")
    # The library writes empty prompts for models that have none.
    return tuple((str(key), str(x)) for key, x in prompts.items() if x), default


def _read_json(path: Path, kind: type) -> Any:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}. Download the model again.") from error
    if not isinstance(document, kind):
        raise InputError(f"{path} holds no {kind.__name__}. Download the model again.")
    return document
