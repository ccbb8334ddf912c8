"""Tiny models of every family exported to CUDA, where it is: parity and placement hold there."""

from pathlib import Path

import pytest

import tiny_decoders
import tiny_encoders
import tiny_seq2seq
from mmopt_export import export
from mmopt_export.placement import CUDA
from mmopt_export.runtime import has_provider
from tests.support import tiny_vlm

TARGET = "cuda"

_FAMILIES = {
    "text/Bert:ForSequenceClassification": "fp32 fp16 bf16",
    "text/Roberta:ForTokenClassification": "fp16",
    "text/DistilBert:ForSequenceClassification": "fp16",
    "text/ModernBert:ForSequenceClassification": "fp32 fp16",
    "text/XLMRoberta:Model": "fp32",
    "vision/ViT:ForImageClassification": "fp32 fp16",
    "vision/ConvNext:ForImageClassification": "fp16",
    "vision/Dinov2:Model": "fp16",
    "dual/CLIP": "fp32 fp16",
    "dual/Siglip": "fp16",
    "speech/Wav2Vec2:ForCTC": "fp32 fp16",
    "decoder/gpt2": "fp16",
    "decoder/llama": "fp16 bf16 int8 int4",
    "decoder/llama-tied": "fp16",
    "decoder/qwen3": "fp16",
    "decoder/gemma2": "fp16",
    "decoder/gemma3": "fp16 bf16",
    "decoder/phi3": "fp16",
    "decoder/mistral": "fp16",
    "seq2seq/t5": "fp16",
    "seq2seq/bart": "fp16",
    "seq2seq/whisper": "fp16",
    "vlm/smolvlm": "fp16",
    "vlm/gemma3": "fp16",
    "vlm/qwen2.5-vl": "fp16",
    "vlm/janus": "fp16",
}

CASES = [
    pytest.param(name, precision, id=f"{name}-{precision}")
    for name, precisions in _FAMILIES.items()
    for precision in precisions.split()
]


def save(name: str, folder: Path, precision: str) -> None:
    kind, _, family = name.partition("/")
    family, _, head = family.partition(":")
    if kind == "text":
        tiny_encoders.save_text_encoder(folder, family, head)
    elif kind == "vision":
        tiny_encoders.save_vision_encoder(folder, family, head)
    elif kind == "dual":
        tiny_encoders.save_dual_encoder(folder, family)
    elif kind == "speech":
        tiny_encoders.save_speech_encoder(folder, family, head)
    elif kind == "decoder":
        model = tiny_decoders.tiny_decoder(family)
        if precision == "int4":
            tiny_decoders.on_4_bit_grid(model)
        model.save_pretrained(folder)
        tiny_seq2seq.tokenizer("t5").save_pretrained(folder)
    elif kind == "seq2seq":
        tiny_seq2seq.save_seq2seq(folder, family)
    else:
        tiny_vlm.save(family, folder)


@pytest.mark.gpu
@pytest.mark.skipif(not has_provider(CUDA), reason=f"ONNX Runtime here has no {CUDA}")
@pytest.mark.parametrize(("name", "precision"), CASES)
def test_a_tiny_model_holds_on_cuda(tmp_path: Path, name: str, precision: str) -> None:
    """Every gating stage of parity, and every node where it should be without copies."""
    save(name, tmp_path / "model", precision)
    report = export(str(tmp_path / "model"), tmp_path / "out", target=TARGET, precision=precision)
    stages = [str(stage) for stage in report.stages if stage.gates and not stage.holds]
    placed = [line for one in report.placement if not one.holds for line in one.lines()]
    assert report.exit_code == 0, "\n".join([*stages, *placed])
