"""Text encoders with a head that gives scores per text or per token."""

from pathlib import Path

from mmopt_export.checkpoint import Checkpoint
from mmopt_export.parts import Outputs, Part, Plan, not_padding
from mmopt_export.runtime import MODEL
from mmopt_export.tasks import text
from mmopt_export.texts import class_names
from mmopt_kernels.errors import InputError


def plan(checkpoint: Checkpoint, calibration: Path | None) -> Plan:
    """The plan for a classifier of texts or of their tokens: logits `[B, C]` or `[B, L, C]`.

    Raises:
        InputError: it does not read token ids, has no tokenizer, gives several labels a text, or
            calibration data has other labels.
    """
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    name = type(model).__name__
    per_token = name.endswith("ForTokenClassification")
    text.require_tokenizer(model, tokenizer)
    if getattr(model.config, "problem_type", None) == "multi_label_classification":
        raise InputError(f"{name} is a multi-label classifier, expected one label per text.")
    inputs = text.text_inputs(model, tokenizer)
    if "input_ids" not in inputs:
        raise InputError(f"{name} reads no token ids, expected a classifier of texts.")
    longest = text.longest_text(model, tokenizer)
    vocabulary = model.config.vocab_size
    labels = class_names(model.config)
    texts = text.calibration_texts(calibration)
    right = None if per_token else text.calibration_labels(calibration, labels)
    return Plan(
        task="token-classification" if per_token else "text-classification",
        kind="encoder",
        parts=(
            Part(
                name=MODEL,
                module=Outputs(model, {"logits": "logits"}),
                inputs=text.example_inputs(inputs, vocabulary=vocabulary, longest=longest),
                axes=dict.fromkeys(inputs, text.AXES),
                outputs=("logits",),
                samples=lambda: text.text_samples(
                    tokenizer, inputs, texts, vocabulary=vocabulary, longest=longest, labels=right
                ),
                limits={"sequence": longest},
                scores=("logits",),
                valid=not_padding(["logits"]) if per_token else None,
            ),
        ),
        write=lambda folder: text.write_tokenizer(tokenizer, folder, longest),
        labels=labels,
        max_length=longest,
    )
