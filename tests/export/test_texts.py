"""JSON Lines are read line by line, and a bad line is named by its number."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from mmopt_export.texts import class_names, read_class_labels, read_texts
from mmopt_kernels.errors import InputError


def test_texts_and_labels_are_read_and_blank_lines_skipped(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "one\\u2028two", "label": 3}\n\n{"text": "b", "label": "x"}\n')
    data = read_texts(path, label="label")
    assert data.texts == ["one\u2028two", "b"]
    assert data.labels == ["3", "x"]
    assert read_texts(path).labels is None


def test_a_line_ends_at_a_line_feed_only(tmp_path: Path) -> None:
    """JSON allows U+2028 and U+0085 in a string, at which Python's own `splitlines` would cut."""
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "one\u2028two\x85three"}\r\n{"text": "b"}\n', encoding="utf-8")
    assert read_texts(path).texts == ["one\u2028two\x85three", "b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no lines"),
        (b'{"text": "a", "label": 1}\n{', "line 2: not JSON"),
        (b'{"text": "a", "label": ' + b"1" * 5000 + b"}", "line 1: not JSON"),
        (b'{"text": ' + b"[" * 100_000, "line 1: not JSON"),
        (b'{"txt": "a", "label": 1}', 'line 1: expected an object with a string "text"'),
        (b'["a"]', "line 1: expected an object"),
        (b'{"text": "a"}', 'line 1: expected a "label"'),
        (b'{"text": "a", "label": 1.5}', 'line 1: expected a "label"'),
        (b'{"text": "a", "label": ["x"]}', 'line 1: expected a "label"'),
        (b"\xff\xfe", "not UTF-8"),
        (b'{"text": "a \\ud800", "label": 1}', 'line 1: "text" has half of a surrogate pair'),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_texts(path, label="label")


def test_labels_of_a_classifier_are_indices_and_may_be_missing(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"label": "b"}\n{"label": null}\n{}\n{"label": 7}\n')
    assert read_class_labels(path, ("a", "b", "7"), limit=9) == [1, -1, -1, 2]
    assert read_class_labels(path, ("a", "b", "7"), limit=2) == [1, -1]
    # The first class counts as a label like any other.
    path.write_text('{"label": "a"}\n{}\n')
    assert read_class_labels(path, ("a", "b"), limit=9) == [0, -1]
    path.write_text('{"text": "a"}\n')
    assert read_class_labels(path, ("a", "b"), limit=9) is None


def test_a_label_that_a_classifier_has_not_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"label": "a"}\n{"label": 1}\n')
    with pytest.raises(InputError, match="line 2: the model has no label 1, expected one of: a, b"):
        read_class_labels(path, ("a", "b"), limit=1)
    names = [f"class {index}" for index in range(1000)]
    with pytest.raises(InputError, match=r"no label 'a', .* class 18, class 19 and 980 more"):
        read_class_labels(path, names, limit=1)


def test_classes_are_in_the_order_of_the_logits() -> None:
    """Whatever order the configuration has them in."""
    config = SimpleNamespace(id2label={1: "b", 2: 7, 0: "a"})
    assert class_names(config) == ("a", "b", "7")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no file, expected a JSON Lines file"):
        read_texts(tmp_path)


def test_a_whole_surrogate_pair_is_a_character(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "\\ud83d\\ude00"}\n')
    assert read_texts(path).texts == ["\U0001f600"]
