"""Small random encoder-decoder models, one for each family that the export is held against."""

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

# Wider than the usual 0.02: logits are then far from zero and from each other, so that parity
# means something and greedy tokens differ from step to step.
SPREAD = 0.25
CHARACTERS = string.ascii_lowercase + string.digits
# The tokenizers' ids: padding, end, start of a sentence, unknown, then one for every character.
PAD, EOS, BOS, UNK = range(4)
VOCABULARY = 48

RATE = 16000
# Whisper's ids: characters first, then what has a meaning, then a time for every 20 ms of a window.
END, START, ENGLISH, GERMAN, FRENCH, TRANSCRIBE, TRANSLATE, SILENT = range(40, 48)
FIRST_TIME = SILENT + 1
WINDOW_SECONDS = 1
_WHISPER_TOKENS = (
    *("<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|de|>", "<|fr|>"),
    *("<|transcribe|>", "<|translate|>", "<|notimestamps|>"),
)


def _sizes(**changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 3,  # another number than the encoder's, so that one is not the other
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 56,
        "max_position_embeddings": 64,
        "init_std": SPREAD,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "bos_token_id": BOS,
        "decoder_start_token_id": EOS,
        "forced_eos_token_id": None,
        **changes,
    }


def _t5(**changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "d_kv": 16,
        "d_ff": 48,
        "num_layers": 2,
        "num_decoder_layers": 3,
        "num_heads": 4,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 12,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "decoder_start_token_id": PAD,
        **changes,
    }


def _whisper(**changes: Any) -> dict[str, Any]:
    times = WINDOW_SECONDS * 50
    return _sizes(
        vocab_size=FIRST_TIME + times + 1,
        num_mel_bins=80,
        max_source_positions=times,
        max_target_positions=48,
        pad_token_id=END,
        eos_token_id=END,
        bos_token_id=END,
        decoder_start_token_id=START,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **changes,
    )


def _moonshine(**changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "encoder_num_hidden_layers": 2,
        "decoder_num_hidden_layers": 3,
        "encoder_num_attention_heads": 4,
        "decoder_num_attention_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": SPREAD,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "bos_token_id": BOS,
        "decoder_start_token_id": BOS,
        "partial_rotary_factor": 0.5,
        **changes,
    }


# By family the class of the model without `Config` and `ForConditionalGeneration`, and its sizes.
FAMILIES: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "t5": ("T5", _t5),
    "t5-gated": (
        "T5",
        lambda: _t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    ),
    "mt5": ("MT5", lambda: _t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
    "umt5": ("UMT5", lambda: _t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
    "bart": ("Bart", lambda: _sizes(scale_embedding=True)),
    "mbart": ("MBart", _sizes),
    "pegasus": ("Pegasus", lambda: _sizes(decoder_start_token_id=PAD)),
    "marian": (
        "Marian",
        lambda: _sizes(decoder_start_token_id=PAD, share_encoder_decoder_embeddings=True),
    ),
    "blenderbot": ("Blenderbot", lambda: _sizes(decoder_start_token_id=BOS)),
    "whisper": ("Whisper", _whisper),
    "moonshine": ("Moonshine", lambda: _moonshine(hidden_size=32)),
    # Heads of 9, as the published tiny model's of 36 are: not a multiple of 8.
    "moonshine-padded": (
        "Moonshine",
        lambda: _moonshine(
            hidden_size=36, partial_rotary_factor=0.9, pad_head_dim_to_multiple_of=8
        ),
    ),
}
TEXT = ("t5", "t5-gated", "mt5", "umt5", "bart", "mbart", "pegasus", "marian", "blenderbot")
SPEECH = ("whisper", "moonshine", "moonshine-padded")


def tiny_seq2seq(family: str, seed: int = 0) -> Any:
    """A random model of the family, eval mode, fp32: hidden 32, 2 and 3 layers."""
    import torch
    import transformers

    name, sizes = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**sizes())
    ending = "MTModel" if name == "Marian" else "ForConditionalGeneration"
    torch.manual_seed(seed)
    model = getattr(transformers, name + ending)(config).to(torch.float32)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                # Norms of all ones and biases of zero would hide that one is missing or taken
                # for another.
                parameter.add_(torch.randn(parameter.shape) * 0.1)
            elif "relative_attention_bias" in parameter_name:
                parameter.copy_(torch.randn(parameter.shape))
            elif name in ("T5", "MT5", "UMT5"):
                # T5 does not scale its scores: its own initialization scales queries instead.
                scale = config.d_kv**-0.5 if parameter_name.endswith(".q.weight") else 1
                parameter.copy_(torch.randn(parameter.shape) * SPREAD * scale)
        bias = getattr(model, "final_logits_bias", None)
        if bias is not None:
            bias.copy_(torch.randn(bias.shape))
    return model.eval()


def save_seq2seq(folder: Path, family: str, seed: int = 0, **generation: Any) -> Path:
    """Save a random model with its tokenizer, its feature extractor and its generation settings.

    Args:
        folder: new.
        generation: settings besides those of the family.
    """
    model = tiny_seq2seq(family, seed)
    settings = model.generation_config
    settings._from_model_config = False  # otherwise what is set here is not loaded
    settings.max_length = 40
    # Random models soon say the same thing over and over: tokens that depend on what came before
    # tell more.
    settings.no_repeat_ngram_size = 2
    settings.encoder_no_repeat_ngram_size = 0  # Blenderbot's 3 is a rule that is refused
    if family == "whisper":
        settings.is_multilingual = True
        settings.lang_to_id = {"<|en|>": ENGLISH, "<|de|>": GERMAN, "<|fr|>": FRENCH}
        settings.task_to_id = {"transcribe": TRANSCRIBE, "translate": TRANSLATE}
        settings.no_timestamps_token_id = SILENT
        settings.max_initial_timestamp_index = 10
        settings.suppress_tokens = [3, 5, START, ENGLISH, GERMAN, FRENCH, TRANSCRIBE, TRANSLATE]
        settings.begin_suppress_tokens = [7, END]
    for name, value in generation.items():
        setattr(settings, name, value)
    model.save_pretrained(folder)
    tokenizer(family).save_pretrained(folder)
    if family in SPEECH:
        extractor(family).save_pretrained(folder)
    return folder


def tokenizer(family: str) -> Any:
    """One id for every character; texts end with the end token."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.decoders import Fuse
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    if family == "whisper":
        names = [*CHARACTERS, "<unk>", "<a>", "<b>", "<c>", *_WHISPER_TOKENS]
        names += [f"<|{step * 0.02:.2f}|>" for step in range(WINDOW_SECONDS * 50 + 1)]
        special = {"pad_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
        more = list(_WHISPER_TOKENS)
    else:
        names = ["<pad>", "</s>", "<s>", "<unk>", *CHARACTERS]
        special = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>"}
        more = []
    fast = Tokenizer(WordLevel({name: index for index, name in enumerate(names)}, "<unk>"))
    fast.pre_tokenizer = Split(Regex("."), "isolated")
    fast.decoder = Fuse()
    end = special["eos_token"]
    fast.post_processor = TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, names.index(end))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        unk_token="<unk>",
        model_max_length=64,
        model_input_names=["input_ids", "attention_mask"],
        extra_special_tokens=more,
        **special,
    )


def extractor(family: str) -> Any:
    """What makes a family's inputs of sounds."""
    import transformers

    if family == "whisper":
        return transformers.WhisperFeatureExtractor(feature_size=80, chunk_length=WINDOW_SECONDS)
    return transformers.Wav2Vec2FeatureExtractor(
        do_normalize=False, return_attention_mask=True, padding_value=0.0
    )


def sounds(*seconds: float, seed: int = 0) -> list[npt.NDArray[np.float32]]:
    """Tones in noise, different ones for every length."""
    generator = np.random.default_rng(seed)
    made = []
    for length in seconds:
        time = np.arange(int(length * RATE)) / RATE
        tones = sum(
            np.sin(2 * np.pi * one * time * (1 + time)) for one in generator.uniform(100, 900, 3)
        )
        noise = generator.normal(scale=0.05, size=len(time))
        made.append((0.2 * tones + noise).astype(np.float32))
    return made
