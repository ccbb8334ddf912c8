"""One fine-tuning run, from top to bottom: data, model, adapter, training, test, save."""

import json
import math
import re
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Group, RenderableType

import mmopt
from mmopt.train.recipe import Recipe
from mmopt.train.trainer import CompiledTrainer
from mmopt_export.checkpoint import (
    TRAIN_RECORD,
    finite,
    load_base,
    load_config,
    load_tokenizer,
    quiet_transformers,
    resolve,
    weights_sha256,
)
from mmopt_export.files import require_new_folder, sha256, staged_folder
from mmopt_export.progress import Progress, silent
from mmopt_export.texts import LabelledTexts, read_texts
from mmopt_kernels.errors import CheckFailedError, InputError, one_line


@dataclass(frozen=True)
class TrainReport:
    """What a run reached.

    Attributes:
        test_accuracy: share of right labels on the test data, the PyTorch model in fp32.
        train_loss: mean over the run.
        train_seconds: wall time of the training loop, compilation included.
        trainable, parameters: counts of values.
        attached: how many modules run mmopt's ops; 0 with `optimize: false`.
        recompiles: compilations of the training step after the first, which was one graph; None
            when the step ran eagerly.
    """

    output: Path
    labels: tuple[str, ...]
    train_examples: int
    test_examples: int
    test_accuracy: float
    train_loss: float
    train_seconds: float
    trainable: int
    parameters: int
    attached: int
    recompiles: int | None

    @property
    def exit_code(self) -> int:
        """0: the run ended; what it reached is for the caller to judge."""
        return 0

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {**asdict(self), "output": str(self.output)}

    def render(self) -> RenderableType:
        """Lines for a terminal."""
        share = self.trainable / self.parameters
        step = "eager"
        if self.recompiles is not None:
            step = f"one compiled graph, {self.recompiles} recompiles"
        return Group(
            f"trained {self.trainable:,} of {self.parameters:,} values ({share:.1%}) on "
            f"{self.train_examples} texts in {self.train_seconds:.0f} s; {step}, "
            f"{self.attached} modules on mmopt's ops",
            f"test accuracy {self.test_accuracy:.2%} of {self.test_examples} texts",
            f"adapter: {self.output}",
        )


def run_recipe(recipe: Recipe, *, progress: Progress = silent) -> TrainReport:
    """Fine-tune, test and save the adapter into `recipe.output`, which appears whole or not at all.

    Raises:
        InputError: bad data, model or adapter settings, or the output is not new (exit 2).
        CheckFailedError: an adapter whose gradient is zero, a graph break, or weights that
            diverged (exit 1).
        MmoptError: the hub cannot be reached, or the disk is full (exit 3).
    """
    # Setup
    require_new_folder(recipe.output)
    transformers.set_seed(recipe.training.seed)
    train = read_texts(recipe.data.train, text=recipe.data.text, label=recipe.data.label)
    test = read_texts(recipe.data.test, text=recipe.data.text, label=recipe.data.label)
    labels = tuple(sorted(set(train.labels or ())))
    _require_labels(recipe, labels, test)
    with progress("load model", None):
        folder = resolve(recipe.model)
        tokenizer = load_tokenizer(folder)
        if tokenizer is None:
            raise InputError(f"{recipe.model} has no tokenizer. Save one beside it.")
        if tokenizer.pad_token is None:
            raise InputError(
                f"the tokenizer of {recipe.model} has no padding token, expected one to fill up "
                "the shorter texts of a batch. Set its pad_token and save it again."
            )
        base = _load_classifier(recipe, folder, labels, tokenizer.pad_token_id)
        # Saved with the adapter: whoever runs it later must cut texts where training cut them.
        tokenizer.model_max_length = min(recipe.data.max_length, tokenizer.model_max_length)
    model = _add_adapter(base, recipe)
    attached = mmopt.optimize(model) if recipe.optimize else None

    # Train
    collator = transformers.DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = _arguments(recipe, Path(scratch), len(train.texts))
        started = time.perf_counter()
        with progress("train", _steps(recipe, len(train.texts))) as advance:
            trainer = CompiledTrainer(
                compile_step=recipe.compile,
                advance=advance,
                model=model,
                args=arguments,
                train_dataset=_encode(tokenizer, train, labels),
                data_collator=collator,
            )
            result = trainer.train()
        seconds = time.perf_counter() - started
        _require_finite(model)

        # Test, on every text: the dropped last batch was for the compiled step.
        trainer.args.dataloader_drop_last = False
        with progress("test", None):
            predictions = trainer.predict(_encode(tokenizer, test, labels))
    right = predictions.predictions.argmax(axis=-1) == predictions.label_ids

    # Save
    report = TrainReport(
        output=recipe.output,
        labels=labels,
        train_examples=len(train.texts),
        test_examples=len(test.texts),
        test_accuracy=float(right.mean()),
        train_loss=float(result.training_loss),
        train_seconds=seconds,
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        parameters=sum(p.numel() for p in model.parameters()),
        attached=attached.attached if attached else 0,
        recompiles=trainer.recompiles,
    )
    if attached:
        attached.undo()
    _save(model, tokenizer, recipe, folder, report)
    return report


def _require_labels(recipe: Recipe, labels: tuple[str, ...], test: LabelledTexts) -> None:
    if len(labels) < 2:
        raise InputError(f"{recipe.data.train} has {len(labels)} label, expected two or more.")
    if unknown := sorted(set(test.labels or ()) - set(labels)):
        raise InputError(
            f"{recipe.data.test} has the label {unknown[0]!r}, which {recipe.data.train} has not; "
            f"expected one of: {', '.join(labels)}."
        )


def _load_classifier(recipe: Recipe, folder: Path, labels: tuple[str, ...], pad: int) -> Any:
    config = load_config(folder)
    if unknown := sorted(key for key in recipe.config if not hasattr(config, key)):
        raise InputError(f"config.{unknown[0]} is not a setting of {type(config).__name__}.")
    classes = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    if type(config) not in classes:
        raise InputError(
            f"{recipe.model} is a {config.model_type} model, which transformers has no text "
            "classifier for. Pass a text encoder such as BERT or RoBERTa."
        )
    architecture = classes[type(config)].__name__
    try:
        for key, value in recipe.config.items():
            setattr(config, key, value)
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
        config.architectures = [architecture]
        # A classifier on a decoder reads the last token that is no padding.
        text = config.get_text_config()
        if getattr(text, "pad_token_id", None) is None:
            text.pad_token_id = pad
        with torch.device("meta"):
            classes[type(config)](config)
    except Exception as error:  # what a model raises for a setting is its own affair
        raise InputError(
            f"no {architecture} can be built from {recipe.model} with config {recipe.config} "
            f"({type(error).__name__}: {one_line(error)}). Correct the config of the recipe."
        ) from error
    model, missing = load_base(folder, config=config)
    backbone = [key for key in missing if key.startswith(f"{model.base_model_prefix}.")]
    # A pooler is part of the head for encoders that were saved without one.
    if lost := [key for key in backbone if ".pooler." not in key]:
        raise InputError(f"{recipe.model} has no weights for {lost[0]}. Pass a complete model.")
    return model


def _add_adapter(base: Any, recipe: Recipe) -> Any:
    from peft import LoraConfig, TaskType, get_peft_model

    adapter = recipe.adapter
    names = {name.rpartition(".")[2] for name, _ in base.named_modules()}
    wanted = [*adapter.train_whole]
    if isinstance(adapter.targets, list):
        wanted += [target.rpartition(".")[2] for target in adapter.targets]
    if unknown := [name for name in wanted if name not in names]:
        raise InputError(
            f"adapter: {type(base).__name__} has no module called {unknown[0]}, "
            f"expected one of: {', '.join(sorted(n for n in names if n and not n.isdigit()))}."
        )
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=adapter.targets,
        modules_to_save=[*adapter.train_whole] or None,
    )
    try:
        return get_peft_model(base, config)
    except (ValueError, TypeError, re.error) as error:
        raise InputError(
            f"adapter.targets {adapter.targets!r} with adapter.train_whole {adapter.train_whole} "
            f"cannot be used on {type(base).__name__}, expected linear layers that are not trained "
            f"whole, such as all-linear: {one_line(error)}"
        ) from error


def _arguments(recipe: Recipe, scratch: Path, examples: int) -> transformers.TrainingArguments:
    training = recipe.training
    steps = _steps(recipe, examples)
    if steps == 0:
        raise InputError(
            f"{recipe.data.train} has {examples} texts, expected at least one batch of "
            f"{training.batch_size}. Lower training.batch_size."
        )
    return transformers.TrainingArguments(
        output_dir=str(scratch),
        num_train_epochs=training.epochs,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=training.batch_size,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        warmup_steps=int(steps * training.warmup),
        seed=training.seed,
        # A shorter last batch would be a second shape for the compiled step.
        dataloader_drop_last=True,
        train_sampling_strategy="group_by_length",
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,  # the data has only what the model takes
        save_strategy="no",
        report_to=[],
        logging_steps=max(1, steps // 10),
        disable_tqdm=True,
        log_level="error",
    )


def _steps(recipe: Recipe, examples: int) -> int:
    """Optimizer steps of the run; an epoch drops its last, shorter batch."""
    return math.ceil(examples // recipe.training.batch_size * recipe.training.epochs)


def _require_finite(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not finite(parameter.detach()):
            raise CheckFailedError(
                f"training diverged: {name} holds NaN or Inf, expected finite weights. "
                "Lower training.learning_rate, or raise training.warmup."
            )


def _encode(
    tokenizer: Any, data: LabelledTexts, labels: tuple[str, ...]
) -> list[Mapping[str, Any]]:
    encoded = tokenizer(data.texts, truncation=True)
    index = {label: number for number, label in enumerate(labels)}
    columns = {**encoded, "labels": [index[label] for label in data.labels or ()]}
    return [
        {name: values[row] for name, values in columns.items()} for row in range(len(data.texts))
    ]


def _save(model: Any, tokenizer: Any, recipe: Recipe, base: Path, report: TrainReport) -> None:
    with staged_folder(recipe.output) as folder, quiet_transformers():
        model.save_pretrained(folder)
        # The head's architecture and labels, which a PEFT adapter does not record.
        model.get_base_model().config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        record = {
            "base": recipe.model,
            "base_sha256": weights_sha256(base),
            "recipe": recipe.model_dump(mode="json"),
            "result": report.to_dict(),
            "files": {
                path.name: sha256(path) for path in sorted(folder.iterdir()) if path.is_file()
            },
        }
        text = json.dumps(record, indent=2, sort_keys=True)
        (folder / TRAIN_RECORD).write_text(text + "\n", encoding="utf-8")
