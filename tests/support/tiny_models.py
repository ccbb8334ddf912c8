"""Small real models on disk: a WordPiece tokenizer and a random BERT classifier of 2 layers."""

from pathlib import Path
from typing import Any

WORDS = [
    "the",
    "a",
    "sum",
    "of",
    "two",
    "numbers",
    "graph",
    "return",
    "class",
    "method",
    "function",
    "edge",
    "node",
    "matrix",
    "is",
]
LABELS = ("class", "function", "method")


def save_tokenizer(folder: Path) -> Any:
    """Save a WordPiece tokenizer of a few words and all letters, and return it."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *WORDS,
        *letters,
        *(f"##{one}" for one in letters),
    ]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
    )
    fast.save_pretrained(folder)
    return fast


def save_classifier(folder: Path, *, seed: int = 0, hidden: int = 32) -> Path:
    """Save a random BERT text classifier with its tokenizer."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = save_tokenizer(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=2 * hidden,
        max_position_embeddings=64,
        attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)},
    )
    # Wider than BERT's 0.02, so that logits are far from zero and parity means something.
    config.initializer_range = 0.2
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def save_adapter(model: Path, folder: Path, *, seed: int = 1) -> Path:
    """Save a LoRA adapter whose B is not zero, with its head, for the classifier in `model`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import BertForSequenceClassification

    torch.manual_seed(seed)
    base = BertForSequenceClassification.from_pretrained(model)
    config = LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=["query", "value"])
    adapted = get_peft_model(base, config)
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(folder)
    base.config.save_pretrained(folder)
    return folder
