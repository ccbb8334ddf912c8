"""Batches of the user's own examples: JSON Lines, made ready by the checkpoint's own processor."""

import wave
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mmopt.attach.optimize import transformers_model
from mmopt.compilation.inputs import (
    IGNORED,
    Contents,
    class_labels,
    head_of,
    is_regression,
    padded,
    parameters_of,
    places_images,
    tokens_of,
)
from mmopt_export.checkpoint import Checkpoint, quiet_transformers, resolve
from mmopt_export.texts import read_rows
from mmopt_kernels.errors import InputError, MmoptError, one_line

INPUT_FIELDS = ("text", "image", "audio")
FIELDS = (*INPUT_FIELDS, "label")

# Where a processor's constants are; a folder with a tokenizer only has neither.
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")

# Bytes per value of a wav file's samples, as numpy reads them; 24 bits are put together by hand.
_WAV_TYPES = {1: np.uint8, 2: np.int16, 4: np.int32}


@dataclass(frozen=True)
class Example:
    """One row of the file.

    Attributes:
        line: its number, for messages.
        text: what a tokenizer reads; of speech, what was said.
        image, audio: files that exist.
        label: a class by name or number, a value of a regression, or the text that a decoder is to
            write.
    """

    line: int
    text: str | None
    image: Path | None
    audio: Path | None
    label: str | float | None

    @property
    def inputs(self) -> tuple[str, ...]:
        """The input fields that the row has."""
        return tuple(name for name in INPUT_FIELDS if getattr(self, name) is not None)


def read_examples(path: Path) -> list[Example]:
    """Read JSON Lines with "text", "image", "audio" (paths relative to the file) and "label".

    Raises:
        InputError: a line that is not an object of these, that has other inputs than the first
            row, or that names a file that is not there; the message names file and line.
    """
    examples: list[Example] = []
    for line, row in read_rows(path):
        where = f"{path}, line {line}"
        if unknown := sorted(set(row) - set(FIELDS)):
            raise InputError(
                f'{where}: unknown field "{unknown[0]}", expected some of: {", ".join(FIELDS)}.'
            )
        for name in INPUT_FIELDS:
            if name in row and not isinstance(row[name], str):
                raise InputError(f'{where}: "{name}" is {row[name]!r}, expected a string.')
        if not isinstance(row.get("label", ""), str | int | float):
            raise InputError(f'{where}: "label" is {row["label"]!r}, expected a string or number.')
        files: dict[str, Path | None] = {
            name: path.parent / row[name] if name in row else None for name in ("image", "audio")
        }
        for name, file in files.items():
            if file is not None and not file.is_file():
                raise InputError(
                    f"{where}: the {name} {file} does not exist. Paths are relative to the folder "
                    f"of {path.name}."
                )
        example = Example(line, row.get("text"), **files, label=row.get("label"))
        if not example.inputs:
            raise InputError(
                f"{where}: no input, expected one or more of: {', '.join(INPUT_FIELDS)}."
            )
        if examples and example.inputs != examples[0].inputs:
            raise InputError(
                f"{where}: has {', '.join(example.inputs)}, expected "
                f"{', '.join(examples[0].inputs)} as in line {examples[0].line}."
            )
        examples.append(example)
    return examples


class ExampleBatches:
    """Makes batches of the rows of one file for one checkpoint.

    Args:
        path: the JSON Lines file.
        checkpoint: the loaded model; its processor, or that of its folder, reads the rows.
        train: add labels, where the rows have what the model's head learns.

    Raises:
        InputError: a file, a row or a field that cannot be used; the message names file and line.
        MmoptError: a library that the processor needs is not installed (exit 3).
    """

    def __init__(self, path: Path, checkpoint: Checkpoint, *, train: bool) -> None:
        self._base = transformers_model(checkpoint.model)
        self._path, self._train = path, train
        self._examples = read_examples(path)
        self._head = head_of(self._base)
        if not self._examples:
            raise InputError(f"{path} has no lines, expected at least one example.")
        self._require_fields()
        self._tokenizer = checkpoint.tokenizer
        self._processor = self._load_processor(resolve(checkpoint.source))
        for tokenizer in (self._tokenizer, getattr(self._processor, "tokenizer", None)):
            if tokenizer is not None and tokenizer.pad_token is None:
                # Many decoders were trained without padding; the mask hides it, whatever it is.
                tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token

    def pair(
        self, *, batch: int, length: int
    ) -> tuple[tuple[dict[str, Any], Contents], tuple[dict[str, Any], Contents]]:
        """The batch to step on, and one of another length to hold the same graph against.

        Args:
            batch: rows in each. The second takes the next rows where the file has as many.
            length: texts are cut to so many tokens, unless images stand in them. The second
                batch's texts and recordings are cut to half; where nothing may be cut, it is padded
                to more.

        Raises:
            InputError: fewer rows than `batch`, or rows that the processor refuses.
        """
        if len(self._examples) < batch:
            raise InputError(
                f"{self._path} has {len(self._examples)} rows, expected at least {batch}, the "
                "batch. Add rows, or pass a smaller --batch."
            )
        rows = self._examples[:batch]
        first = self._encode(rows, cut=length)
        size = self._text_length(first[0])
        others = self._examples[batch : 2 * batch]
        others = others if len(others) == batch else rows
        cut = length if size is None else max(2, size // 2 + 1)
        second = self._encode(others, cut=cut, halve=True)
        if size is not None and self._text_length(second[0]) == size:
            second = self._encode(others, cut=length, pad=size + 3)
        return first, second

    def _encode(
        self,
        rows: Sequence[Example],
        *,
        cut: int,
        pad: int | None = None,
        halve: bool = False,
    ) -> tuple[dict[str, Any], Contents]:
        images = [self._read(row, "image", read_image) for row in rows if row.image]
        audio = [self._read(row, "audio", self._read_audio) for row in rows if row.audio]
        if halve:
            audio = [samples[: len(samples) // 2 + 1] for samples in audio]
        texts = [row.text for row in rows if row.text is not None]
        padding: dict[str, Any] = {"padding": True}
        if pad is not None:
            padding = {"padding": "max_length", "max_length": pad}
        try:
            with quiet_transformers():
                inputs = dict(self._processed(texts, images, audio, cut, padding))
        except (ValueError, TypeError, IndexError, RuntimeError, KeyError) as error:
            first, last = rows[0].line, rows[-1].line
            raise InputError(
                f"{self._path}, lines {first} to {last}: {type(self._processor).__name__} refuses "
                f"the rows: {one_line(error)}"
            ) from error
        reads = parameters_of(self._base)
        inputs = {name: value for name, value in inputs.items() if name in reads}
        if "input_ids" in inputs and "use_cache" in reads:
            inputs["use_cache"] = False
        inputs |= self._targets(rows, inputs, cut)
        if self._train and "return_loss" in reads:
            inputs["return_loss"] = True
        seconds = sum(map(len, audio)) / self._rate if audio else None
        return inputs, Contents(tokens_of(inputs), len(images) or None, seconds)

    def _processed(
        self,
        texts: list[str],
        images: list[Any],
        audio: list[npt.NDArray[np.float32]],
        cut: int,
        padding: dict[str, Any],
    ) -> dict[str, Any]:
        made: dict[str, Any] = {}
        if self._composite:
            given: dict[str, Any] = {"text": texts}
            if images:
                given["images"] = [[image] for image in images]
            if audio:
                given |= {"audio": audio, "sampling_rate": self._rate}
            # Cutting a text might cut off the places of its images.
            if not places_images(self._base):
                padding = {"truncation": True, "max_length": cut, **padding}
            return self._processor(**given, return_tensors="pt", **padding)  # type: ignore[no-any-return]
        if texts and self._reads_text:
            if padding["padding"] is True:
                padding = {"truncation": True, "max_length": cut, **padding}
            made |= self._tokenizer(texts, return_tensors="pt", **padding)
        if images:
            made |= self._processor(images, return_tensors="pt")
        if audio:
            # Raw speech is filled up to the longest; an extractor of features has a length of its
            # own.
            fill = {"padding": True} if "input_values" in parameters_of(self._base) else {}
            made |= self._processor(audio, sampling_rate=self._rate, return_tensors="pt", **fill)
        return made

    @property
    def _reads_text(self) -> bool:
        return "input_ids" in parameters_of(self._base)

    @property
    def _composite(self) -> bool:
        """Whether text and images (or sounds) of a row go into one call."""
        fields = self._examples[0].inputs
        return len(fields) > 1 and "text" in fields and self._reads_text

    @property
    def _rate(self) -> int:
        """Hertz that the feature extractor, alone or of a processor, wants."""
        return int(getattr(self._processor, "feature_extractor", self._processor).sampling_rate)

    def _require_fields(self) -> None:
        """Each input of the rows must have a reader in the model, and its main input a field."""
        reads, name = parameters_of(self._base), type(self._base).__name__
        readers = {
            "text": {"input_ids", "decoder_input_ids"},
            "image": {"pixel_values"},
            "audio": {"input_values", "input_features"},
        }
        first = self._examples[0]
        for field in first.inputs:
            written = field == "text" and self._head in ("target", "transcript")
            if not (readers[field] & reads or written):
                raise InputError(
                    f"{self._path}, line {first.line}: {name} reads no {field}. Leave out "
                    f'"{field}".'
                )
        main = self._base.main_input_name
        field = next((f for f in ("image", "audio") if main in readers[f]), "text")
        if field not in first.inputs:
            raise InputError(
                f'{self._path}, line {first.line}: no "{field}", from which the {main} of {name} '
                "are made. Add it to each row."
            )

    def _load_processor(self, folder: Path) -> Any:
        fields = self._examples[0].inputs
        if "text" in fields and self._tokenizer is None:
            raise InputError(f'{folder} has no tokenizer, which "text" needs. Save one beside it.')
        if fields == ("text",):
            return self._tokenizer
        if "image" in fields and find_spec("PIL") is None:
            raise MmoptError(
                "reading images needs Pillow, which is not installed here. Run `pip install "
                "pillow`, or leave out --data."
            )
        if not any((folder / name).is_file() for name in _PROCESSOR_FILES):
            raise InputError(
                f"{folder} has no processor ({' or '.join(_PROCESSOR_FILES)}), which "
                f'"{fields[-1]}" needs. Save the one that the model was trained with beside it.'
            )
        import transformers

        # A folder with a tokenizer and a part of another kind has no processor of both.
        loader = (
            transformers.AutoProcessor
            if self._composite
            else transformers.AutoImageProcessor
            if "image" in fields
            else transformers.AutoFeatureExtractor
        )
        try:
            with quiet_transformers():
                processor = loader.from_pretrained(folder)
        except ImportError as error:
            raise MmoptError(
                f"the processor of {folder} cannot run here: {one_line(error)}"
            ) from error
        except (ValueError, OSError, KeyError, TypeError) as error:
            raise InputError(f"{folder} has no usable processor: {one_line(error)}") from error
        if self._composite and not isinstance(processor, transformers.ProcessorMixin):
            raise InputError(
                f"{folder} has a {type(processor).__name__}, expected a processor that reads "
                f"{' and '.join(fields)} together. Save the one that the model was trained with."
            )
        return processor

    # --- files ----------------------------------------------------------------------------------

    def _read(self, row: Example, field: str, read: Callable[[Path], Any]) -> Any:
        try:
            return read(getattr(row, field))
        except InputError as error:
            raise InputError(f"{self._path}, line {row.line}: {error}") from error

    def _read_audio(self, path: Path) -> npt.NDArray[np.float32]:
        samples, rate = read_wav(path)
        if rate != self._rate:
            raise InputError(
                f"{path} is at {rate} Hz, expected {self._rate} Hz, which the model hears. "
                "Resample it."
            )
        return samples

    # --- labels ---------------------------------------------------------------------------------

    def _targets(self, rows: Sequence[Example], inputs: dict[str, Any], cut: int) -> dict[str, Any]:
        """Labels, or what a decoder starts from."""
        if self._base.config.is_encoder_decoder:
            return self._decoder_targets(rows, cut)
        if not self._train or self._head is None:
            return {}
        if self._head in ("next token", "token"):
            mask = inputs.get("attention_mask")
            labels = inputs["input_ids"].clone()
            if mask is not None:
                labels = labels.masked_fill(mask == 0, IGNORED)
            if (image := getattr(self._base.config, "image_token_id", None)) is not None:
                labels = labels.masked_fill(labels == image, IGNORED)
            return {"labels": labels}
        if self._head == "transcript":
            written = self._written(rows)
            return {} if written is None else {"labels": padded(self._ids(written, cut), IGNORED)}
        if self._head == "class":
            return self._classes(rows)
        return {}

    def _decoder_targets(self, rows: Sequence[Example], cut: int) -> dict[str, Any]:
        written = self._written(rows)
        if written is None:
            raise InputError(
                f'{self._path}, line {rows[0].line}: no "label", the text that '
                f"{type(self._base).__name__} is to write. Add it to each row."
            )
        if self._tokenizer is None:
            raise InputError(f'{self._path}: "label" needs a tokenizer, which the model has not.')
        ids = self._ids(written, cut)
        if self._train and self._head == "target":
            return {"labels": padded(ids, IGNORED)}
        return {"decoder_input_ids": padded(ids, self._tokenizer.pad_token_id or 0)}

    def _written(self, rows: Sequence[Example]) -> list[str] | None:
        """What each row is to be turned into: its label, else the words of its recording."""
        texts = [
            row.text if row.label is None and row.audio is not None else row.label for row in rows
        ]
        return None if self._none_given(rows, texts) else [str(text) for text in texts]

    def _classes(self, rows: Sequence[Example]) -> dict[str, Any]:
        if self._none_given(rows, [row.label for row in rows]):
            return {}
        return {"labels": class_labels(self._base, [self._class(row) for row in rows])}

    def _class(self, row: Example) -> float:
        config, label = self._base.config, row.label
        if is_regression(self._base):
            if isinstance(label, int | float):
                return label
            raise InputError(
                f'{self._path}, line {row.line}: "label" is {label!r}, expected a number, which '
                f"{type(self._base).__name__} predicts here."
            )
        if (number := config.label2id.get(str(label))) is not None:
            return int(number)
        if str(label).isdigit() and int(str(label)) < config.num_labels:
            return int(str(label))
        raise InputError(
            f'{self._path}, line {row.line}: the model has no class "{label}", expected one of: '
            f"{', '.join(list(config.label2id)[:10])}, or a number below {config.num_labels}."
        )

    def _none_given(self, rows: Sequence[Example], values: Sequence[object]) -> bool:
        missing = [row for row, value in zip(rows, values, strict=True) if value is None]
        if missing and len(missing) < len(rows):
            raise InputError(
                f'{self._path}, line {missing[0].line}: no "label", which other rows have.'
            )
        return bool(missing)

    def _ids(self, texts: list[str], cut: int) -> list[list[int]]:
        return list(self._tokenizer(texts, truncation=True, max_length=cut)["input_ids"])

    def _text_length(self, inputs: dict[str, Any]) -> int | None:
        ids = inputs.get("input_ids", inputs.get("decoder_input_ids", inputs.get("labels")))
        return int(ids.shape[1]) if isinstance(ids, torch.Tensor) and ids.dim() == 2 else None


def read_image(path: Path) -> Any:
    """A picture in RGB.

    Raises:
        InputError: the file is no picture that Pillow reads.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise InputError(f"{path} is no readable image ({error}).") from error


def read_wav(path: Path) -> tuple[npt.NDArray[np.float32], int]:
    """The samples of a wav file as float32 from -1 to 1, its channels averaged, and their rate.

    Raises:
        InputError: the file is no wav file of whole-number samples, or holds none.
    """
    try:
        with wave.open(str(path), "rb") as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            raw = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise InputError(
            f"{path} is no readable wav file ({error or 'it ends early'}); expected PCM of 8 to 32 "
            "bits."
        ) from error
    if width == 3:
        # The three bytes become the upper ones of four.
        values = np.zeros((len(raw) // 3, 4), np.uint8)
        values[:, 1:] = np.frombuffer(raw, np.uint8).reshape(-1, 3)
        whole: npt.NDArray[Any] = values.view("<i4")[:, 0]
        width = 4
    else:
        whole = np.frombuffer(raw, np.dtype(_WAV_TYPES[width]).newbyteorder("<"))
    if not whole.size:
        raise InputError(f"{path} holds no sound.")
    centre = 128 if width == 1 else 0  # 8 bits are unsigned
    samples = (whole.astype(np.float64) - centre) / 2 ** (8 * width - 1)
    return samples.reshape(-1, channels).mean(1).astype(np.float32), rate
