"""What lies beside a model's weights and the tasks take from there: processors and their files."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmopt_export.checkpoint import quiet_transformers
from mmopt_kernels.errors import InputError, MmoptError, one_line

FILES = ("preprocessor_config.json", "processor_config.json")
"""Where the constants of a processor are; a folder has one of them or both."""


def load_processor(what: str, auto: Any, folder: Path, **options: Any) -> Any:
    """A processor of a model's folder.

    Args:
        what: what messages call it, such as `image processor`.
        auto: transformers' class that finds the right one, such as `AutoImageProcessor`.
        options: of its `from_pretrained`.

    Raises:
        InputError: the folder has none, or one that cannot be loaded.
        MmoptError: transformers lacks a library that it needs (exit 3).
    """
    if not any((folder / name).is_file() for name in FILES):
        raise InputError(
            f"{folder} has no {what} ({' or '.join(FILES)}). Save one beside the model with "
            "save_pretrained."
        )
    return load(what, auto, folder, **options)


def load(what: str, auto: Any, folder: Path, **options: Any) -> Any:
    """As `load_processor`, for what has other files, such as a tokenizer."""
    try:
        with quiet_transformers():
            return auto.from_pretrained(folder, **options)
    except ImportError as error:  # transformers' own say what to install
        raise MmoptError(
            f"the {what} in {folder} needs a library that is missing: {one_line(error)}"
        ) from error
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise InputError(f"{folder} has no usable {what}: {one_line(error)}") from error


def copy_files(source: Path, target: Path, names: Sequence[str] = FILES) -> None:
    """Copy the files of these names that a folder has."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
