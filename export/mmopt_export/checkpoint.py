"""Loads a model, its tokenizer and its adapters, and refuses what does not fit together.

A model is a local folder or a hub id. Weights are read from safetensors only: a pickle may run
code. A folder that `mmopt train` wrote carries `mmopt-train.json`, which is checked here.
"""

import inspect
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open

from mmopt_export.files import sha256, sha256_of_all
from mmopt_kernels.errors import InputError, MmoptError, one_line

TRAIN_RECORD = "mmopt-train.json"
"""Written by `mmopt train` beside an adapter: the base it was trained on and its files' hashes."""

_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model and where it came from.

    Attributes:
        model: a `PreTrainedModel`, or a `PeftModel` when there are adapters; eval mode, CPU.
        tokenizer: of the adapter's folder, else of the model's; None when neither has one.
        source: the model as the caller named it.
        base_sha256: over the base's weight files.
        adapters: the adapters' folders.
    """

    model: Any
    tokenizer: Any
    source: str
    base_sha256: str
    adapters: tuple[Path, ...]


def load_checkpoint(
    model: str, *, adapters: Sequence[str] = (), dtype: torch.dtype = torch.float32
) -> Checkpoint:
    """Load `model` with its own architecture and weights, and at most one LoRA adapter on it.

    An adapter folder with a `config.json` (as `mmopt train` writes it) decides the head: its
    architecture and labels.

    Args:
        model: a local folder or a hub id.
        adapters: PEFT adapter folders or hub ids.
        dtype: of the weights, those of the adapter too; transformers keeps in fp32 what an
            architecture declares so.

    Raises:
        InputError: not a model, damaged weights, weights missing, an adapter of another base.
        MmoptError: a hub id that cannot be reached (exit 3).
    """
    if len(adapters) > 1:
        raise InputError(
            f"{len(adapters)} adapters were given, expected at most one. "
            "Merge them into one with PEFT's add_weighted_adapter first."
        )
    base_folder = resolve(model)
    adapter_folders = tuple(resolve(adapter, config="adapter_config.json") for adapter in adapters)
    for folder in adapter_folders:
        check_train_record(folder, base_folder)
    config_folder = next(
        (folder for folder in adapter_folders if (folder / "config.json").is_file()), base_folder
    )
    base, missing = load_base(base_folder, config=load_config(config_folder), dtype=dtype)
    if adapter_folders:
        from mmopt_export.adapters import attach_adapter

        loaded, provided = attach_adapter(base, adapter_folders[0])
        missing = [name for name in missing if name not in provided]
    else:
        loaded = base
    if missing:
        raise InputError(
            f"{model} has no weights for {_first(missing)}, expected a complete "
            f"{type(base).__name__}. Fine-tune it with `mmopt train`, or pass the --adapter that "
            "has them."
        )
    return Checkpoint(
        model=loaded.eval(),
        tokenizer=load_tokenizer(*adapter_folders, base_folder),
        source=model,
        base_sha256=weights_sha256(base_folder),
        adapters=adapter_folders,
    )


def resolve(name: str, *, config: str = "config.json") -> Path:
    """The local folder of a model or adapter, downloaded when `name` is a hub id.

    Args:
        name: a local folder or a hub id such as `org/model`.
        config: the file that makes it one: `config.json` or `adapter_config.json`.

    Raises:
        InputError: a path that is not a model, or a name that no hub id can have.
        MmoptError: the hub cannot be reached or does not have it (exit 3).
    """
    path = Path(name)
    if path.exists():
        if not (path / config).is_file():
            raise InputError(
                f"{name} is not a model folder: it has no {config}. "
                "Pass a folder with config.json and safetensors weights, or a hub id."
                if config == "config.json"
                else f"{name} is not a PEFT adapter: it has no {config}. "
                "Pass the folder that `mmopt train` or PEFT's save_pretrained wrote."
            )
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise InputError(f"{name} does not exist. Pass a local folder or a hub id (org/model).")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except HFValidationError as error:
        raise InputError(
            f"{name!r} is neither a local folder nor a valid hub id (org/model)."
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise MmoptError(
            f"{name} is no local folder, and as a hub id it could not be downloaded "
            f"({type(error).__name__}). Check the name and the network, or pass a local folder."
        ) from error


def load_config(folder: Path) -> Any:
    """The `config.json` of `folder`; InputError when it is damaged or of an unknown type."""
    try:
        return transformers.AutoConfig.from_pretrained(folder)
    except (ValueError, KeyError, OSError) as error:
        raise InputError(
            f"{folder / 'config.json'} is not a configuration that transformers "
            f"{transformers.__version__} knows: {one_line(error)}"
        ) from error


def load_base(
    folder: Path,
    *,
    config: Any,
    architecture: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Any, list[str]]:
    """Load the weights of `folder` into `config`'s architecture, on the CPU.

    Args:
        architecture: the class to build; the first of `config.architectures` by default.
        dtype: of the weights.

    Returns:
        The model, and the names of its parameters that the folder has no weights for.

    Raises:
        InputError: damaged weights, a tensor of another shape than the config says, NaN or Inf.
    """
    name = architecture or next(iter(config.architectures or ()), None)
    model_class: Any = getattr(transformers, name or "", None)
    known = inspect.isclass(model_class) and issubclass(model_class, transformers.PreTrainedModel)
    if not known:
        raise InputError(
            f"{folder / 'config.json'} names the architecture {name!r}, which is no model "
            f"of transformers {transformers.__version__}."
        )
    check_weights(folder)
    try:
        with quiet_transformers():
            model, info = model_class.from_pretrained(
                folder, config=config, dtype=dtype, output_loading_info=True
            )
    except (RuntimeError, ValueError, OSError, SafetensorError) as error:
        raise InputError(f"the weights in {folder} do not fit {name}: {one_line(error)}") from error
    broken = [
        key for key, value in model.state_dict().items() if not bool(torch.isfinite(value).all())
    ]
    missing = sorted(info["missing_keys"])
    if broken := [key for key in broken if key not in missing]:
        raise InputError(
            f"the weights in {folder} hold NaN or Inf in {_first(broken)}. "
            "The file is damaged: download or save it again."
        )
    return model, missing


def load_tokenizer(*folders: Path) -> Any:
    """The fast tokenizer of the first folder that has one; None when none has.

    Raises:
        InputError: its files are damaged, or it has no fast form.
    """
    names = ("tokenizer.json", "tokenizer_config.json")
    chosen = next((f for f in folders if any((f / name).is_file() for name in names)), None)
    if chosen is None:
        return None
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(chosen)
    except (ValueError, OSError, KeyError) as error:
        raise InputError(f"{chosen} has no usable tokenizer: {one_line(error)}") from error
    if not tokenizer.is_fast:
        raise InputError(f"{chosen} has only a slow tokenizer, expected a tokenizer.json.")
    return tokenizer


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of `folder`, in the order of their names."""
    return sorted(folder.glob("*.safetensors"))


def weights_sha256(folder: Path) -> str:
    """One hash over the weight files of `folder`."""
    return sha256_of_all(weight_files(folder))


def check_weights(folder: Path) -> None:
    """Refuse weights that are missing, truncated or damaged in their header, or only a pickle.

    Raises:
        InputError: naming the file.
    """
    files = weight_files(folder)
    if not files:
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        raise InputError(
            f"{folder} has only {', '.join(pickles)}, a pickle that may run code when loaded. "
            "Convert it to safetensors with save_pretrained."
            if pickles
            else f"{folder} has no *.safetensors weights. Pass a complete model folder."
        )
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if absent := sorted(shards - {file.name for file in files}):
            raise InputError(f"{folder} lacks {_first(absent)}, which {index.name} lists.")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise InputError(
                f"{file} is truncated or damaged ({error}). Download or save it again."
            ) from error


def check_train_record(adapter: Path, base: Path) -> None:
    """Hold an adapter that `mmopt train` wrote against its record, where it has one.

    Raises:
        InputError: a file changed since training, or the base has other weights than the one
            that the adapter was trained on.
    """
    path = adapter / TRAIN_RECORD
    if not path.is_file():
        return
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        files, trained_on = dict(record["files"]), str(record["base_sha256"])
        base_name = str(record["base"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged: {error!r}. Train the adapter again.") from error
    for name, expected in files.items():
        file = adapter / name
        if not file.is_file():
            raise InputError(f"{adapter} lacks {name}, which {TRAIN_RECORD} lists.")
        if sha256(file) != expected:
            raise InputError(
                f"{file} is not the file that was trained: its SHA-256 differs from "
                f"{TRAIN_RECORD}. Copy the adapter again."
            )
    if (found := weights_sha256(base)) != trained_on:
        raise InputError(
            f"{adapter} was trained on other weights ({base_name}, SHA-256 {trained_on[:12]}) than "
            f"{base} has ({found[:12]}). Pass the model that it was trained on."
        )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' own load report: what is missing is said by our errors."""
    verbosity = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()


def _first(names: Sequence[str], count: int = 3) -> str:
    shown = ", ".join(names[:count])
    return f"{shown} and {len(names) - count} more" if len(names) > count else shown
