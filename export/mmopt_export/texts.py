"""Texts of callers, and JSON Lines of them: `{"text": ..., "label": ...}`, one object a line."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmopt_kernels.errors import InputError


def require_texts(texts: Sequence[Any], name: str = "texts") -> None:
    """Raise InputError for a string where several are taken, of which each letter would be one.

    Likewise for half of a surrogate pair in one of them, which tokenizers take for no text.

    Args:
        name: of the argument.
    """
    if isinstance(texts, str):
        raise InputError(
            f"{name} is the string {texts[:40]!r}, expected a list of texts. "
            f"Pass it as {name}=[text]."
        )
    for index, one in enumerate(texts):
        if isinstance(one, str) and _is_broken(one):
            raise InputError(
                f"{name}[{index}] has half of a surrogate pair, which is no character "
                f"({json.dumps(one)[:80]})."
            )


def _is_broken(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


@dataclass(frozen=True)
class LabelledTexts:
    """Texts and, where the file has them, the label of each as a string."""

    texts: list[str]
    labels: list[str] | None


def read_texts(path: Path, *, text: str = "text", label: str | None = None) -> LabelledTexts:
    """Read a JSON Lines file.

    Args:
        text: the key of the text.
        label: the key of the label (a string, an integer or a boolean); None reads no labels.

    Raises:
        InputError: the file is missing, empty, not UTF-8, or a line is not an object with the
            keys; the message names the line.
    """
    texts: list[str] = []
    labels: list[str] = []
    for number, row in read_rows(path):
        texts.append(string_at(path, number, row, text))
        if label is not None:
            value = row.get(label)
            if not isinstance(value, str | int):
                raise InputError(
                    f'{path}, line {number}: expected a "{label}" that is a string or an integer, '
                    f"got {value!r}."
                )
            labels.append(str(value))
    if not texts:
        raise InputError(f"{path} has no lines, expected at least one text.")
    return LabelledTexts(texts, labels if label is not None else None)


def class_names(config: Any) -> tuple[str, ...]:
    """A classifier's labels in the order of its logits, from transformers' config of it."""
    return tuple(str(config.id2label[index]) for index in range(len(config.id2label)))


_MOST_NAMES = 20  # that a message lists


def read_class_labels(path: Path, names: Sequence[str], *, limit: int) -> list[int] | None:
    """The labels of the first lines of a JSON Lines file, for a classifier.

    Args:
        names: the classes.
        limit: how many are returned; every line is checked.

    Returns:
        For each line the index of its "label" in `names`, -1 where it has none; None where no line
        has one.

    Raises:
        InputError: as `read_rows`, or a label is none of `names`; the message names the line.
    """
    index = {name: number for number, name in enumerate(names)}
    labels: list[int] = []
    for number, row in read_rows(path):
        label = row.get("label")
        if label is not None and str(label) not in index:
            more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
            raise InputError(
                f"{path}, line {number}: the model has no label {label!r}, expected one of: "
                f"{', '.join(names[:_MOST_NAMES])}{more}. Correct it, or leave it out."
            )
        labels.append(-1 if label is None else index[str(label)])
    return labels[:limit] if any(label >= 0 for label in labels) else None


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON Lines file, each with the number of its line; empty lines are skipped.

    Raises:
        InputError: the file is missing or not UTF-8, or a line is not an object.
    """
    if not path.is_file():
        what = "is no file" if path.exists() else "does not exist"
        raise InputError(f"{path} {what}, expected a JSON Lines file.")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason}).") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        # Integers of 5000 digits are no JSONDecodeError.
        except (ValueError, RecursionError) as error:
            fault = error.msg if isinstance(error, json.JSONDecodeError) else error
            raise InputError(f"{path}, line {number}: not JSON ({fault}).") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: expected an object, got {line[:80]}")
        yield number, row


def string_at(path: Path, number: int, row: Mapping[str, Any], key: str) -> str:
    """The string that a row of `read_rows` has under `key`.

    Raises:
        InputError: it has none; the message names the line.
    """
    value = row.get(key)
    if not isinstance(value, str):
        raise InputError(
            f'{path}, line {number}: expected an object with a string "{key}", got '
            f"{json.dumps(row, ensure_ascii=False)[:80]}"
        )
    if _is_broken(value):
        raise InputError(
            f'{path}, line {number}: "{key}" has half of a surrogate pair, which is no character '
            f"({json.dumps(value)[:80]})."
        )
    return value
