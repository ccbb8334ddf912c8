"""JSON Lines are read line by line, and a bad line is named by its number."""

from pathlib import Path

import pytest

from mmopt_export.texts import read_texts
from mmopt_kernels.errors import InputError


def test_texts_and_labels_are_read_and_blank_lines_skipped(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "one\\u2028two", "label": 3}\n\n{"text": "b", "label": "x"}\n')
    data = read_texts(path, label="label")
    assert data.texts == ["one\u2028two", "b"]
    assert data.labels == ["3", "x"]
    assert read_texts(path).labels is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no lines"),
        (b'{"text": "a", "label": 1}\n{', "line 2: not JSON"),
        (b'{"txt": "a", "label": 1}', 'line 1: expected an object with a string "text"'),
        (b'["a"]', "line 1: expected an object"),
        (b'{"text": "a"}', 'line 1: expected a "label"'),
        (b'{"text": "a", "label": 1.5}', 'line 1: expected a "label"'),
        (b"\xff\xfe", "not UTF-8"),
        (b'{"text": "a \\ud800", "label": 1}', 'line 1: "text" has half of a surrogate pair'),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_texts(path, label="label")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no file, expected a JSON Lines file"):
        read_texts(tmp_path)


def test_a_whole_surrogate_pair_is_a_character(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "\\ud83d\\ude00"}\n')
    assert read_texts(path).texts == ["\U0001f600"]
