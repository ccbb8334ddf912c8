"""SigLIP's tokenizer in its fast form."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from mmopt_export.checkpoint import load_tokenizer
from mmopt_kernels.errors import InputError

WORDS = ["graph", "a", "node", "of", "photo", "cat's", "straße", "naïve", "½", "ﬁne", "漢字"]
TEXTS = [
    "A photo, of a GRAPH!",
    "",
    "  ",
    "!!!",
    "photo_of_a--graph",
    "a▁graph",
    "tab\tand\nline",
]


def save_pieces(folder: Path, pieces: list[tuple[str, float]], **trainer: Any) -> Path:
    """Write a sentencepiece model of unigrams by hand, and the config that goes with it."""
    from transformers.utils import sentencepiece_model_pb2_new as format_of

    model = format_of.ModelProto()
    kinds = {"<pad>": 3, "</s>": 3, "<unk>": 2}
    for piece, score in pieces:
        model.pieces.add(piece=piece, score=score, type=kinds.get(piece, 1))
    model.trainer_spec.unk_id = [piece for piece, _ in pieces].index("<unk>")
    for key, value in trainer.items():
        setattr(model.trainer_spec, key, value)
    (folder / "spiece.model").write_bytes(model.SerializeToString())
    config = {
        "tokenizer_class": "SiglipTokenizer",
        "model_max_length": 16,
        "pad_token": {"content": "</s>", "__type": "AddedToken"},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


PIECES = [
    ("<pad>", 0.0),
    ("</s>", 0.0),
    ("<unk>", 0.0),
    *[("▁", -3.0), ("▁a", -1.0), ("▁graph", -2.0), ("▁of", -2.0), ("s", -4.0)],
]


def test_case_punctuation_and_spaces_are_gone_and_the_text_ends(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save_pieces(tmp_path, PIECES))
    assert tokenizer.is_fast
    assert tokenizer.model_input_names == ["input_ids"]
    assert tokenizer("A graph,  of GRAPHS!!")["input_ids"] == [4, 5, 6, 5, 7, 1]
    assert tokenizer("a-graph")["input_ids"] == tokenizer("agraph")["input_ids"]
    assert tokenizer("?!")["input_ids"] == [1]
    padded = tokenizer(["a", "a graph"], padding="max_length", max_length=5)["input_ids"]
    assert padded == [[4, 1, 1, 1, 1], [4, 5, 1, 1, 1]]
    assert tokenizer("a " * 40, truncation=True, max_length=4)["input_ids"] == [4, 4, 4, 1]


def test_other_sentencepiece_models_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    save_pieces(tmp_path, PIECES, model_type=2)
    with pytest.raises(InputError, match="holds no unigrams without bytes"):
        load_tokenizer(tmp_path)
    save_pieces(tmp_path, [one for one in PIECES if one[0] != "</s>"])
    with pytest.raises(InputError, match=r"has no piece </s>, which tokenizer_config.json names"):
        load_tokenizer(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"\xff\xff junk")
    with pytest.raises(InputError, match=r"spiece.model is damaged"):
        load_tokenizer(tmp_path)


def test_ids_are_those_of_the_slow_tokenizer(tmp_path: Path) -> None:
    library = pytest.importorskip("sentencepiece", reason="the slow tokenizer needs it")
    import transformers

    generator = random.Random(0)
    lines = [" ".join(generator.choices(WORDS, k=generator.randint(2, 9))) for _ in range(500)]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    library.SentencePieceTrainer.train(
        input=str(tmp_path / "lines.txt"),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=90,
        hard_vocab_limit=False,
        model_type="unigram",
        eos_id=1,
        unk_id=2,
        pad_id=0,
        bos_id=-1,
    )
    slow = transformers.SiglipTokenizer(str(tmp_path / "spiece.model"))
    slow.save_pretrained(tmp_path)
    fast = load_tokenizer(tmp_path)
    assert (slow.is_fast, fast.is_fast) == (False, True)
    letters = "abcdefg hijk LMNOP   .,!?_-'\"(){}▁éßÄ漢 ½ﬁ①\t\n<>/s"
    texts = [*TEXTS, *lines[:50]]
    texts += ["".join(generator.choices(letters, k=generator.randint(0, 30))) for _ in range(2000)]
    for text in texts:
        assert fast(text)["input_ids"] == slow(text)["input_ids"], text
