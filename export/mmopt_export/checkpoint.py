"""Loads a model, its tokenizer and its adapters, and refuses what does not fit together.

A model is a local folder or a hub id. Weights are read from safetensors only: a pickle may run
code. A folder that `mmopt train` wrote carries `mmopt-train.json`, which is checked here.
"""

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import transformers
from safetensors import SafetensorError, safe_open

from mmopt_export.adapters.spec import AdapterSpec
from mmopt_export.files import sha256, sha256_of_all
from mmopt_export.siglip_tokenizer import is_siglip_tokenizer, siglip_tokenizer
from mmopt_export.weights import QuantizedTensor, StoredTensor, dequantized, stored_tensors
from mmopt_kernels.errors import InputError, MmoptError, one_line

if TYPE_CHECKING:
    from mmopt_export.adapters.swap import Swap

TRAIN_RECORD = "mmopt-train.json"
"""Written by `mmopt train` beside an adapter: the base it was trained on and its files' hashes."""

_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]

Adapt = Literal["attach", "merge", "swap"]
Weights = Mapping[str, StoredTensor | QuantizedTensor]


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model and where it came from.

    Attributes:
        model: a `PreTrainedModel`, or a `PeftModel` with an attached adapter; eval mode, CPU.
        tokenizer: of the first adapter's folder that has one, else of the model's; None when
            neither has one.
        source: the model as the caller named it.
        base_sha256: over the base's weight files.
        adapters: the adapters' folders, in the order given.
        records: for the manifest, one per adapter that is not attached: `path`, `sha256`, `method`,
            `weight` and `scale` by module; of a merged one `whole`, the base's parameters that it
            replaces, and of a swapped one `name` and `rank`.
        quantized: what the base was dequantized from, such as `{"method": "nf4", "blocksize": 64,
            "double": True, "dtype": "bfloat16", "weights": 14}`; None for a base that was not.
        warnings: what the caller should tell the user.
        swap: the adapters as arrays beside a model that takes them as inputs; None unless asked.
    """

    model: Any
    tokenizer: Any
    source: str
    base_sha256: str
    adapters: tuple[Path, ...]
    records: tuple[dict[str, Any], ...] = ()
    quantized: dict[str, Any] | None = None
    warnings: tuple[str, ...] = ()
    swap: "Swap | None" = None


def load_checkpoint(
    model: str,
    *,
    adapters: Sequence[str | AdapterSpec] = (),
    adapt: Adapt = "attach",
    dtype: torch.dtype = torch.float32,
) -> Checkpoint:
    """Load `model` with its own architecture and weights, and its adapters.

    An adapter folder with a `config.json` (as `mmopt train` writes it) decides the head: its
    architecture and labels.

    Args:
        model: a local folder or a hub id.
        adapters: PEFT adapter folders or hub ids, each with a weight where it is not 1.
        adapt: what becomes of the adapters. `"attach"`: one LoRA on the model, which becomes a
            `PeftModel`; a quantized base stays quantized. `"merge"`: added to the weights in fp32.
            `"swap"`: LoRAs kept beside the model, whose target layers take them as inputs. For
            the last two a quantized base is dequantized first.
        dtype: of the weights, those of the adapter too; transformers keeps in fp32 what an
            architecture declares so. Merging is in fp32 all the same, and cast at the end.

    Raises:
        InputError: not a model, damaged weights, weights missing, an adapter of another base, or
            one that cannot be merged or swapped.
        CheckFailedError: merged weights that are not finite.
        MmoptError: a hub id that cannot be reached (exit 3).
    """
    if adapt not in get_args(Adapt):
        raise InputError(f"adapt is {adapt!r}, expected one of {', '.join(get_args(Adapt))}.")
    specs = [AdapterSpec(one) if isinstance(one, str) else one for one in adapters]
    if adapt == "attach" and (len(specs) > 1 or any(spec.weight != 1 for spec in specs)):
        raise InputError(
            f"{len(specs)} adapters with the weights {', '.join(str(s.weight) for s in specs)} "
            "were given, expected at most one, of weight 1: several are merged by `mmopt export`, "
            "not attached."
        )
    base_folder = resolve(model)
    folders = tuple(resolve(spec.path, config="adapter_config.json") for spec in specs)
    base_sha256 = weights_sha256(base_folder)
    for folder in folders:
        check_train_record(folder, base_folder, base_sha256)
    config_folder = next(
        (folder for folder in folders if (folder / "config.json").is_file()), base_folder
    )
    config, notes = _base_config(base_folder, config_folder)
    stays_quantized = adapt == "attach" and hasattr(config, "quantization_config")
    weights, quantized = None, None
    if not stays_quantized:
        weights, quantized = read_weights(base_folder, config)
    encoder = _sentence_encoder(base_folder, config) if config_folder == base_folder else None
    base, missing = load_base(
        base_folder,
        config=config,
        architecture=encoder,
        dtype=torch.float32 if adapt == "merge" and specs else dtype,
        weights=weights,
    )
    if encoder is not None:  # of which the hidden states are used
        missing = [name for name in missing if not name.startswith("pooler.")]
    loaded, swap = base, None
    records: tuple[dict[str, Any], ...] = ()
    if pairs := list(zip(specs, folders, strict=True)):
        from mmopt_export.adapters.attach import attach_adapter
        from mmopt_export.adapters.merge import merge_adapters
        from mmopt_export.adapters.swap import make_swappable

        if adapt == "attach":
            attached = attach_adapter(base, folders[0], only="LORA")
            loaded, provided, new = attached.model, attached.whole, attached.warnings
        elif adapt == "merge":
            merged = merge_adapters(base, pairs, absent=missing)
            loaded, provided, new = merged.model.to(dtype), merged.whole, merged.warnings
            records = merged.records
        else:
            swap = make_swappable(base, pairs)
            loaded, provided, new = swap.model, set[str](), swap.warnings
            records = tuple(adapter.record for adapter in swap.adapters)
        others = (_other_base(folder, model, base_folder) for folder in folders)
        notes = [*notes, *new, *(note for note in others if note is not None)]
        missing = [name for name in missing if name not in provided]
    if missing:
        raise InputError(
            f"{model} has no weights for {_first(missing)}, expected a complete "
            f"{type(base).__name__}. Fine-tune it with `mmopt train`, or pass the --adapter that "
            "has them."
        )
    return Checkpoint(
        model=loaded.eval(),
        tokenizer=load_tokenizer(*folders, base_folder),
        source=model,
        base_sha256=base_sha256,
        adapters=folders,
        records=records,
        quantized=quantized,
        warnings=tuple(notes),
        swap=swap,
    )


def _other_base(adapter: Path, model: str, base: Path) -> str | None:
    """What to say where an adapter's config names another base, which may be the same elsewhere."""
    if (adapter / TRAIN_RECORD).is_file():  # held against the weights themselves
        return None
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    trained_on = config.get("base_model_name_or_path")
    if not trained_on or Path(trained_on).name in (Path(model).name, base.resolve().name):
        return None
    return (
        f"the adapter {adapter} was trained on {trained_on}, and {model} is the base: whether they "
        "are the same is not known, only that names and shapes fit."
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
    except (ValueError, RecursionError, KeyError, OSError) as error:
        raise InputError(
            f"{folder / 'config.json'} is not a configuration that transformers "
            f"{transformers.__version__} knows: {one_line(error)}"
        ) from error


def read_weights(folder: Path, config: Any) -> tuple[Weights, dict[str, Any] | None]:
    """The tensors of a model folder, read when they are needed and dequantized where quantized.

    Args:
        config: of the model; its `quantization_config` is taken off, since it no longer holds.

    Returns:
        The tensors by key, and what they were quantized with, if they were.

    Raises:
        InputError: damaged weights, or quantized with another method than bitsandbytes.
    """
    check_weights(folder)
    tensors = stored_tensors(_model_files(folder))
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return tensors, None
    del config.quantization_config
    settings = quantization if isinstance(quantization, dict) else quantization.to_dict()
    return dequantized(tensors, str(settings.get("quant_method")))


def load_base(
    folder: Path,
    *,
    config: Any,
    architecture: str | None = None,
    dtype: torch.dtype = torch.float32,
    weights: Weights | None = None,
) -> tuple[Any, list[str]]:
    """Load the weights of `folder` into `config`'s architecture, on the CPU.

    Each tensor is read and converted by itself, so that memory holds the model once.

    Args:
        architecture: the class to build; the first of `config.architectures` by default.
        dtype: of the weights.
        weights: what `read_weights` gave for the folder; by default read here, and a quantized
            model stays quantized.

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
    if weights is None:
        check_weights(folder)
        if not hasattr(config, "quantization_config"):
            weights = stored_tensors(_model_files(folder))
    options: dict[str, Any] = {
        "config": config,
        "dtype": dtype,
        "output_loading_info": True,
        # Otherwise the error names none of them.
        "ignore_mismatched_sizes": True,
    }
    try:
        with quiet_transformers():
            if weights is None:
                model, info = model_class.from_pretrained(folder, **options)
            else:
                model, info = model_class.from_pretrained(None, state_dict=weights, **options)
                _name(model, folder)
    except InputError:
        raise
    except (RuntimeError, ValueError, OSError, SafetensorError) as error:
        raise InputError(f"the weights in {folder} do not fit {name}: {one_line(error)}") from error
    if other := sorted(info["mismatched_keys"]):
        shapes = [f"{key} {tuple(has)} for {tuple(wants)}" for key, has, wants in other]
        raise InputError(
            f"the weights in {folder} do not fit {name}: {_first(shapes)} of config.json. "
            "One of the two files is another model's."
        )
    missing = sorted(info["missing_keys"])
    broken = [key for key, value in model.state_dict().items() if not finite(value)]
    if broken := [key for key in broken if key not in missing]:
        raise InputError(
            f"the weights in {folder} hold NaN or Inf in {_first(broken)}. "
            "The file is damaged: download or save it again."
        )
    return model, missing


def _name(model: Any, folder: Path) -> None:
    """Give a model that was built from tensors what loading a folder gives it besides them."""
    model.name_or_path = model.config.name_or_path = str(folder)
    if not model.can_generate():
        return
    config = transformers.GenerationConfig
    if (folder / "generation_config.json").is_file():
        model.generation_config = config.from_pretrained(folder)
    else:  # older models keep the settings of generation in config.json
        model.generation_config = config.from_pretrained(
            folder, "config.json", _from_model_config=True
        )


def _base_config(base: Path, chosen: Path) -> tuple[Any, list[str]]:
    """The config of `chosen`, with the quantization of the base's weights and no other."""
    config, own = load_config(chosen), load_config(base)
    notes = []
    if hasattr(own, "quantization_config"):
        config.quantization_config = own.quantization_config
    elif hasattr(config, "quantization_config"):
        notes.append(
            f"{chosen} was trained on a quantized base, but {base} is not quantized: the merged "
            "model differs by the error of that quantization. Pass the quantized model to merge "
            "onto what the adapter saw."
        )
        del config.quantization_config
    return config, notes


def _sentence_encoder(folder: Path, config: Any) -> str | None:
    """The architecture of a sentence-transformers encoder of texts; None for another model.

    Its config often still names that of the checkpoint it was made from, with a head for masked
    tokens that has no weights.
    """
    path = folder / "modules.json"
    named = next(iter(config.architectures or ()), "")
    if not path.is_file() or not named.endswith(("Model", "ForMaskedLM")):
        return None
    try:
        kinds = [str(one["type"]).rsplit(".", 1)[-1] for one in json.loads(path.read_bytes())]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} is damaged: {error!r}. Download the model again.") from error
    if "Pooling" not in kinds or type(config) not in transformers.MODEL_MAPPING:
        return None
    return str(transformers.MODEL_MAPPING[type(config)].__name__)


def finite(value: torch.Tensor) -> bool:
    """Whether no value is NaN or Inf, without a temporary of the tensor's size."""
    if not value.is_floating_point() or value.numel() == 0:
        return True
    if value.element_size() < 2:  # fp8 has no aminmax
        value = value.float()
    return all(bool(torch.isfinite(bound)) for bound in torch.aminmax(value))


def _shards(index: Path) -> set[str]:
    """The names of the files that a `model.safetensors.index.json` lists."""
    try:
        return {str(name) for name in json.loads(index.read_bytes())["weight_map"].values()}
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index} is damaged: {error!r}. Download the model again.") from error


def _model_files(folder: Path) -> list[Path]:
    """The files that hold the model, which need not be every safetensors file of the folder."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        return [folder / name for name in sorted(_shards(index))]
    if (folder / "adapter_config.json").is_file():
        raise InputError(f"{folder} is an adapter. Pass its base as MODEL and it as --adapter.")
    raise InputError(
        f"{folder} has neither model.safetensors nor model.safetensors.index.json, only "
        f"{_first([path.name for path in weight_files(folder)])}. Pass a complete model folder."
    )


def load_tokenizer(*folders: Path) -> Any:
    """The fast tokenizer of the first folder that has one; None when none has one for texts.

    Raises:
        InputError: its files are damaged, or it has no fast form.
    """
    names = ("tokenizer.json", "tokenizer_config.json")
    chosen = next((f for f in folders if any((f / name).is_file() for name in names)), None)
    if chosen is None:
        return None
    if is_siglip_tokenizer(chosen):
        return siglip_tokenizer(chosen)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(chosen)
    # ImportError: a slow tokenizer whose library, such as sentencepiece, is not there.
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise InputError(f"{chosen} has no usable tokenizer: {one_line(error)}") from error
    if isinstance(tokenizer, transformers.Wav2Vec2CTCTokenizer):
        return None  # the letters that a model hears; there is no text to read
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
    if index.is_file() and (absent := sorted(_shards(index) - {file.name for file in files})):
        raise InputError(f"{folder} lacks {_first(absent)}, which {index.name} lists.")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise InputError(
                f"{file} is truncated or damaged ({error}). Download or save it again."
            ) from error


def check_train_record(adapter: Path, base: Path, base_sha256: str) -> None:
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
    if base_sha256 != trained_on:
        raise InputError(
            f"{adapter} was trained on other weights ({base_name}, SHA-256 {trained_on[:12]}) than "
            f"{base} has ({base_sha256[:12]}). Pass the model that it was trained on."
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
