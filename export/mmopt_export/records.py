"""Reads JSON Lines of images and sounds: `{"image": "cats/1.jpg", "text": ...}`, one a line.

Paths are relative to the file.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmopt_export.preprocessing import open_image, open_sound
from mmopt_export.texts import read_rows, string_at
from mmopt_kernels.errors import InputError


@dataclass(frozen=True)
class Record:
    """One line.

    Attributes:
        line: its number.
        values: by column what it names, decoded: a picture or samples; texts as they are.
    """

    line: int
    values: dict[str, Any]


def read_images(path: Path, column: str, *, limit: int, text: str | None = None) -> list[Record]:
    """The first pictures of a JSON Lines file, as Pillow images.

    Args:
        column: the key of a picture's path.
        limit: how many lines are decoded; every line is checked for its columns.
        text: the key of a text that each line must have as well; None needs none.

    Raises:
        InputError: the file is missing, empty or not JSON Lines, a line lacks a column, or a
            picture is missing or damaged; the message names the line.
    """
    return _read(path, column, open_image, limit=limit, text=text)


def read_sounds(path: Path, column: str, *, limit: int, sampling_rate: int) -> list[Record]:
    """The first sounds of a JSON Lines file, float32 `[samples]`.

    Args:
        column: the key of the path of a wav file.
        limit: how many lines are decoded; every line is checked for its columns.
        sampling_rate: that of the model; a file of another is refused.

    Raises:
        InputError: as `read_images`.
    """

    def decode(sound: Path) -> Any:
        return open_sound(sound, sampling_rate=sampling_rate)

    return _read(path, column, decode, limit=limit, text=None)


def _read(
    path: Path, column: str, decode: Callable[[Path], Any], *, limit: int, text: str | None
) -> list[Record]:
    records: list[Record] = []
    columns = (column,) if text is None else (column, text)
    for number, row in read_rows(path):
        for key in columns:
            string_at(path, number, row, key)
        if len(records) == limit:
            continue
        file = path.parent / row[column]
        if not file.is_file():
            raise InputError(
                f"{path}, line {number}: {file} does not exist; paths are relative to the file."
            )
        try:
            value = decode(file)
        except InputError as error:
            raise InputError(f"{path}, line {number}: {error}") from error
        records.append(Record(number, {**row, column: value}))
    if not records:
        raise InputError(f'{path} has no lines, expected at least one with "{column}".')
    return records
