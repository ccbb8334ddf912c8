"""What kinds of models become artifacts, and how: one module per kind."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from mmopt_export.checkpoint import Checkpoint
from mmopt_export.parts import Plan
from mmopt_kernels.errors import InputError

Planner = Callable[[Checkpoint, Path | None], Plan]
"""From a checkpoint, its adapters merged, and a file of real inputs to a plan."""

# The hub's name of a task, the module in this package whose `plan` makes an artifact for it, and
# the endings of the names of the architectures that do it. The first that fits is taken; `--task`
# chooses among the others.
TASKS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        "audio-classification",
        "speech",
        (
            *("Wav2Vec2ForSequenceClassification", "HubertForSequenceClassification"),
            *("WavLMForSequenceClassification", "UniSpeechSatForSequenceClassification"),
        ),
    ),
    ("text-classification", "classification", ("ForSequenceClassification",)),
    ("token-classification", "classification", ("ForTokenClassification",)),
    ("image-classification", "vision", ("ForImageClassification",)),
    ("zero-shot-image-classification", "dual_encoder", ("CLIPModel", "SiglipModel")),
    (
        "image-feature-extraction",
        "vision",
        (
            *("ViTModel", "DeiTModel", "Dinov2Model", "Dinov2WithRegistersModel", "SwinModel"),
            *("DINOv3ViTModel", "DINOv3ConvNextModel"),
            *("SiglipVisionModel", "CLIPVisionModel", "CLIPVisionModelWithProjection"),
            *("ResNetModel", "ConvNextModel", "ConvNextV2Model"),
        ),
    ),
    ("text-generation", "text_generation", ("ForCausalLM", "LMHeadModel")),
    ("automatic-speech-recognition", "speech", ("ForCTC",)),
    (
        "image-text-to-text",
        "vision_language",
        (
            *("SmolVLMForConditionalGeneration", "Idefics3ForConditionalGeneration"),
            *("Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"),
            *("Gemma3ForConditionalGeneration", "LlavaForConditionalGeneration"),
        ),
    ),
    ("any-to-any", "janus", ("JanusForConditionalGeneration",)),
    (
        "feature-extraction",
        "embedding",
        (
            *("BertModel", "RobertaModel", "AlbertModel", "ElectraModel", "DebertaV2Model"),
            *("MPNetModel", "CamembertModel", "XLMRobertaXLModel"),
        ),
    ),
    (
        "automatic-speech-recognition",
        "speech_to_text",
        ("WhisperForConditionalGeneration", "MoonshineForConditionalGeneration"),
    ),
    (
        "text2text-generation",
        "text2text",
        (
            # Endings: the first is also that of MT5 and UMT5, the second that of MBart and PLBart.
            *("T5ForConditionalGeneration", "BartForConditionalGeneration", "MarianMTModel"),
            *("PegasusForConditionalGeneration", "BlenderbotForConditionalGeneration"),
            "BlenderbotSmallForConditionalGeneration",
        ),
    ),
)


def make_plan(
    checkpoint: Checkpoint, *, task: str | None = None, calibration: Path | None = None
) -> Plan:
    """The plan for a checkpoint.

    Args:
        checkpoint: its adapters merged.
        task: a name in `TASKS`; None takes the first that fits the architecture.
        calibration: JSON Lines of real inputs, to measure parity on.

    Raises:
        InputError: no such task, an architecture that cannot be exported for it, or data without
            the column that the task reads.
    """
    name = type(checkpoint.model).__name__
    known = dict.fromkeys(name for name, _, _ in TASKS)
    if task is not None and task not in known:
        raise InputError(f"--task {task} is not known, expected one of: {', '.join(known)}.")
    for candidate, module, endings in TASKS:
        if task in (None, candidate) and name.endswith(endings):
            planner: Planner = import_module(f"{__name__}.{module}").plan
            return planner(checkpoint, calibration)
    wanted = [one for known, _, endings in TASKS if task in (None, known) for one in endings]
    raise InputError(
        f"{name} cannot be exported{f' for {task}' if task else ''}, expected an architecture "
        f"whose name ends in one of: {', '.join(wanted)}."
    )
