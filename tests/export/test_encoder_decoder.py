"""Encoder-decoder artifacts, held against what transformers itself generates."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
import transformers
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

import tiny_seq2seq as tiny
from mmopt_export import Runner, export, load_checkpoint
from mmopt_export.checkpoint import quiet_transformers
from mmopt_export.encoder_decoder import part
from mmopt_export.encoder_decoder.modules import EagerDecoder
from mmopt_export.encoder_decoder.seq2seq import DECODER, ENCODER, Seq2Seq
from mmopt_export.encoder_decoder.speech import Transcriber
from mmopt_export.encoder_decoder.text import TextGenerator
from mmopt_export.graph import trace
from mmopt_export.lowering import cache_name
from mmopt_export.parity import RANDOM, compare_samples
from mmopt_export.runtime import open_session
from mmopt_export.tasks import make_plan
from mmopt_kernels.errors import InputError

TEXTS = ["translate this", "a", "the quick brown fox jumps over the lazy dog 0123456789"]
CORE = ("t5", "whisper")
MORE = pytest.param("moonshine-padded", marks=pytest.mark.slow)


@dataclasses.dataclass(frozen=True)
class Exported:
    """An artifact and the model that it was made from."""

    folder: Path
    model: Any
    tokenizer: Any


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """Exports a family once."""
    made: dict[str, Exported] = {}

    def make(family: str) -> Exported:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            source = tiny.save_seq2seq(folder / "model", family)
            report = export(str(source), folder / "artifact")
            assert report.status == "verified"
            checkpoint = load_checkpoint(str(source))
            made[family] = Exported(folder / "artifact", checkpoint.model, checkpoint.tokenizer)
        return made[family]

    return make


@pytest.fixture(scope="module")
def graphs(exported: Callable[[str], Exported]) -> Seq2Seq:
    """T5's."""
    return Seq2Seq.of(Runner(exported("t5").folder))


@pytest.fixture(scope="module")
def transcriber(exported: Callable[[str], Exported]) -> Transcriber:
    """Whisper's."""
    return Transcriber(exported("whisper").folder)


def greedy(model: Any, ids: list[list[int]] | None = None, **arguments: Any) -> list[list[int]]:
    """transformers' greedy tokens without the prompt, padding after the end cut off."""
    prompt = {} if ids is None else {"decoder_input_ids": torch.tensor(ids)}
    with torch.no_grad(), quiet_transformers():
        rows = transformers.GenerationMixin.generate(
            model,
            num_beams=1,
            do_sample=False,
            # The default one has as many layers as the encoder.
            **{cache_name(model): EncoderDecoderCache(DynamicCache(), DynamicCache())},
            **prompt,
            **arguments,
        )
    start = 1 if ids is None else len(ids[0])
    eos = arguments.get("eos_token_id", model.generation_config.eos_token_id)
    cut = []
    for row in rows[:, start:].tolist():
        cut.append(row[: row.index(eos) + 1] if eos in row else row)
    return cut


def texts_to(exported: Exported, side: str = "right") -> dict[str, torch.Tensor]:
    encoded = exported.tokenizer(
        TEXTS, padding=True, padding_side=side, return_tensors="pt", truncation=True
    )
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def arrays(inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: value.numpy() for name, value in inputs.items()}


@pytest.mark.parametrize("family", ["t5", pytest.param("whisper", marks=pytest.mark.slow), MORE])
def test_artifact_is_verified_with_32_greedy_tokens_of_three_rows(
    family: str, exported: Callable[[str], Exported]
) -> None:
    artifact = exported(family).folder
    stages = json.loads((artifact / "parity.json").read_text())["stages"]
    (tokens,) = [stage for stage in stages if stage["stage"] == "greedy"]
    # Rows that end sooner have fewer.
    assert 60 <= tokens["rows"] <= 3 * 32
    assert tokens["argmax_agreement"] == 1.0
    assert tokens["gates"]
    assert {stage["component"] for stage in stages} == {ENCODER, DECODER}


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_batch_of_texts_of_three_lengths_gives_the_tokens_of_transformers(
    side: str, exported: Callable[[str], Exported], graphs: Seq2Seq
) -> None:
    made = exported("t5")
    inputs = texts_to(made, side)
    rows = graphs.generate(graphs.encode(arrays(inputs)), [[tiny.PAD]] * 3, max_new_tokens=40)
    expected = greedy(made.model, **inputs, max_new_tokens=40)
    assert rows == expected
    # Otherwise the tokens say little: they must differ between rows and change within one.
    assert len({tuple(row) for row in rows}) == 3
    assert min(len(set(row)) for row in rows) > 3


def test_padding_of_the_encoder_does_not_change_what_comes_out(
    exported: Callable[[str], Exported], graphs: Seq2Seq
) -> None:
    made = exported("t5")
    together = graphs.generate(
        graphs.encode(arrays(texts_to(made))), [[tiny.PAD]] * 3, max_new_tokens=24
    )
    for text, row in zip(TEXTS, together, strict=True):
        feeds = arrays(dict(made.tokenizer(text, return_tensors="pt")))
        assert graphs.generate(graphs.encode(feeds), [[tiny.PAD]], max_new_tokens=24) == [row]


def test_rows_end_at_their_own_end_token(
    exported: Callable[[str], Exported], graphs: Seq2Seq
) -> None:
    made = exported("t5")
    inputs = texts_to(made)
    encoded = graphs.encode(arrays(inputs))
    free = graphs.generate(encoded, [[tiny.PAD]] * 3, max_new_tokens=24)
    # A token that one row has early and another late or never.
    eos = next(
        token
        for token in free[0][2:]
        if len({row.index(token) if token in row else -1 for row in free}) > 1
    )
    rules = dataclasses.replace(graphs.rules, eos=(eos,))
    rows = graphs.generate(encoded, [[tiny.PAD]] * 3, max_new_tokens=24, rules=rules)
    assert rows == greedy(made.model, **inputs, max_new_tokens=24, eos_token_id=eos)
    assert len({len(row) for row in rows}) > 1


def test_texts_stream_and_join_to_the_answers(exported: Callable[[str], Exported]) -> None:
    made = exported("t5")
    generator = TextGenerator(made.folder)
    said: dict[int, str] = {}

    def hear(index: int, text: str) -> None:
        said[index] = said.get(index, "") + text

    answers = generator.generate(TEXTS, max_new_tokens=20, batch_size=2, on_text=hear)
    expected = [
        made.tokenizer.decode(row, skip_special_tokens=True)
        for row in greedy(made.model, **texts_to(made), max_new_tokens=20)
    ]
    assert answers == expected
    assert [said[index] for index in range(3)] == expected


def test_the_first_token_can_be_chosen(exported: Callable[[str], Exported]) -> None:
    made = exported("t5")
    generator = TextGenerator(made.folder)
    answer = generator.generate(TEXTS[:1], max_new_tokens=8, first="q")[0]
    assert answer.startswith("q")
    with pytest.raises(InputError, match=r"first='<nothing>' is no token"):
        generator.generate(TEXTS[:1], first="<nothing>")


def test_a_string_is_no_list_of_texts(exported: Callable[[str], Exported]) -> None:
    with pytest.raises(
        InputError, match=r"texts is the string 'a b', .* Pass it as texts=\[text\]"
    ):
        TextGenerator(exported("t5").folder).generate("a b")


# -------------------------------------------------------------------- speech


def whisper_tokens(model: Any, features: Any, **arguments: Any) -> list[list[int]]:
    """The tokens of Whisper's own `generate`, prompt and end cut off."""
    with torch.no_grad(), quiet_transformers():
        rows = model.generate(
            torch.from_numpy(features),
            num_beams=1,
            do_sample=False,
            force_unique_generate_call=True,
            **arguments,
        )
    return [
        [token for token in row if token not in range(tiny.END, tiny.FIRST_TIME)]
        for row in rows.tolist()
    ]


@pytest.mark.parametrize(
    "choice",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"language": "de"},
        {"language": "german", "task": "translate"},
        {"task": "transcribe"},
        {"timestamps": True},
        {"language": "<|fr|>", "timestamps": True},
    ],
    ids=str,
)
def test_transcription_gives_the_tokens_of_whispers_own_generate(
    choice: dict[str, Any], exported: Callable[[str], Exported], transcriber: Transcriber
) -> None:
    made = exported("whisper")
    sounds = tiny.sounds(1.0, 0.4, 0.7)
    rows, languages = transcriber.speech.run(sounds, max_new_tokens=20, **choice)
    features = transcriber.speech.features(sounds)["input_features"]
    arguments = {"return_timestamps" if k == "timestamps" else k: v for k, v in choice.items()}
    expected = whisper_tokens(made.model, features, max_new_tokens=20, **arguments)
    said = [
        [token for token in row if token not in range(tiny.END, tiny.FIRST_TIME)] for row in rows
    ]
    assert said == expected
    assert len({tuple(row) for row in said}) == 3
    if "language" in choice:
        assert languages == ["fr" if "fr" in choice["language"] else "de"] * 3
    else:
        assert set(languages) <= {"en", "de", "fr"}


def test_a_long_sound_is_transcribed_in_windows_one_after_the_other(
    transcriber: Transcriber,
) -> None:
    parts = tiny.sounds(1.0, 1.0, 0.3)
    (whole,) = transcriber.transcribe([np.concatenate(parts)], language="en", max_new_tokens=12)
    alone = transcriber.transcribe(parts, language="en", max_new_tokens=12)
    assert whole.text == " ".join(one.text.strip() for one in alone)
    (timed,) = transcriber.transcribe(
        [np.concatenate(parts)], language="en", timestamps=True, max_new_tokens=12
    )
    starts = [segment.start for segment in timed.segments]
    assert starts == sorted(starts)
    assert starts[-1] >= 2.0
    assert timed.language == "en"


def test_sounds_that_cannot_be_transcribed_are_refused(transcriber: Transcriber) -> None:
    sound = tiny.sounds(0.5)[0]
    with pytest.raises(InputError, match="language 'xx' is not one of this model's: de, en, fr"):
        transcriber.transcribe([sound], language="xx")
    with pytest.raises(InputError, match="task 'sing' is not one of this model's"):
        transcriber.transcribe([sound], task="sing")
    with pytest.raises(InputError, match=r"sound 1 has the shape \(2, 3\)"):
        transcriber.transcribe([sound, np.zeros((2, 3))])
    with pytest.raises(InputError, match="NaN or Inf"):
        transcriber.transcribe([np.full(100, np.nan)])
    with pytest.raises(InputError, match=r"sound 0 has samples of int16.* 16 bits by 32768"):
        transcriber.transcribe([(sound * 32767).astype(np.int16)])
    with pytest.raises(InputError, match=r"sound 0 reaches \d+.* expected samples in \[-1, 1\]"):
        transcriber.transcribe([sound * 32767])


def test_sounds_a_little_beyond_full_scale_are_transcribed(transcriber: Transcriber) -> None:
    sound = tiny.sounds(0.5)[0]
    (loud,) = transcriber.transcribe([sound / np.abs(sound).max() * 1.4], max_new_tokens=4)
    assert loud.text


@pytest.mark.slow
def test_moonshine_transcribes_a_batch_of_three_lengths(
    exported: Callable[[str], Exported],
) -> None:
    made = exported("moonshine-padded")
    transcriber = Transcriber(made.folder)
    sounds = tiny.sounds(1.0, 0.4, 0.7)
    rows, languages = transcriber.speech.run(sounds, max_new_tokens=30)
    inputs = {
        name: torch.from_numpy(value) for name, value in transcriber.speech.features(sounds).items()
    }
    assert rows == greedy(made.model, [[tiny.BOS]] * 3, **inputs, max_new_tokens=30)
    assert languages == [None] * 3
    texts = [made.tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    assert [one.text for one in transcriber.transcribe(sounds, max_new_tokens=30)] == texts
    with pytest.raises(InputError, match="no language, task or timestamps"):
        transcriber.transcribe(sounds, language="en")


# -------------------------------------------------------------------- graphs


@pytest.mark.parametrize("family", [*CORE, MORE])
def test_graphs_pass_the_full_check_of_onnx_and_update_the_cache_in_ops_of_ort(
    family: str, exported: Callable[[str], Exported]
) -> None:
    folder = exported(family).folder
    if family != "t5":  # ONNX Runtime's RMS norm is in ONNX's own domain, and not in ONNX
        for name in (ENCODER, DECODER):
            onnx.checker.check_model(folder / name / "model.onnx", full_check=True)
    ops = [node.op_type for node in onnx.load(folder / DECODER / "model.onnx").graph.node]
    assert ops.count("GroupQueryAttention") == 3
    assert ops.count("MultiHeadAttention") == 3
    ops = [node.op_type for node in onnx.load(folder / ENCODER / "model.onnx").graph.node]
    assert ops.count("MultiHeadAttention") == 2
    # Keys and values of cross-attention are made once, in the encoder.
    cross = [spec.name for spec in Runner(folder).manifest.components[ENCODER].outputs]
    assert cross[:6] == [f"cross.{layer}.{side}" for layer in range(3) for side in ("key", "value")]


def parts_hold(folder: Path, family: str, target: str) -> None:
    """Every sample of both graphs, with ONNX Runtime's optimizations and without."""
    source = tiny.save_seq2seq(folder / "model", family)
    plan = make_plan(load_checkpoint(str(source)))
    for one in plan.parts:
        graph = trace(one, target=target)
        file = folder / f"{one.name}.onnx"
        onnx_ir.save(graph, file, external_data=f"{file.name}.data")
        if target == "portable":
            assert {node.domain for node in graph.graph.all_nodes()} == {""}
        samples = list(one.sampled())
        kinds = {sample.kind for sample in samples}
        if one.name == DECODER:
            wanted = ("prefill-left", "prefill-right", "decode-ragged", "resume")
            assert kinds >= {f"{RANDOM} {kind}" for kind in wanted}
        for optimize in (False, True):
            session = open_session(file, provider="CPUExecutionProvider", optimize=optimize)
            stages = compare_samples("fp32", "fp32", samples, session)
            assert all(stage.holds for stage in stages), [
                (stage.kind, stage.output, stage.max_abs) for stage in stages if not stage.holds
            ]


@pytest.mark.slow
@pytest.mark.parametrize("family", [one for one in tiny.FAMILIES if one not in CORE])
def test_graphs_of_the_family_hold_against_eager(family: str, tmp_path: Path) -> None:
    parts_hold(tmp_path, family, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["t5", "bart", "whisper"])
def test_portable_graphs_are_standard_ops_and_hold(family: str, tmp_path: Path) -> None:
    parts_hold(tmp_path, family, "portable")


@pytest.mark.slow
def test_biased_attention_for_cuda_leaves_out_the_op_that_refuses_a_bias(tmp_path: Path) -> None:
    parts_hold(tmp_path, "t5", "cuda")
    ops = [node.op_type for node in onnx.load(tmp_path / "decoder.onnx").graph.node]
    assert "GroupQueryAttention" not in ops


def test_a_lost_mask_of_the_encoder_would_show(tmp_path: Path) -> None:
    """The samples of the decoder tell a graph that ignores the encoder's padding."""
    source = tiny.save_seq2seq(tmp_path / "model", "t5")
    decoder = make_plan(load_checkpoint(str(source))).parts[1]
    module = decoder.module
    assert isinstance(module, EagerDecoder)
    differences = []
    for _, feeds in decoder.samples():
        blind = {**feeds, "encoder_attention_mask": np.ones_like(feeds["encoder_attention_mask"])}
        expected, ignored = decoder.expect(feeds)["logits"], decoder.expect(blind)["logits"]
        differences.append(float(np.abs(expected - ignored).max()))
    assert max(differences) > 0.1


def test_samples_of_a_large_model_hold_some_layers_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny.save_seq2seq(tmp_path / "model", "whisper")
    plan = make_plan(load_checkpoint(str(source)))
    encoder, decoder = plan.parts
    whole = [set(sample.expected) for sample in encoder.sampled()]
    assert whole == [set(encoder.outputs)] * len(whole)
    monkeypatch.setattr(part, "_SAMPLE_BYTES", 1)
    some = [set(sample.expected) for sample in encoder.sampled()]
    assert [len(one) for one in some] == [2] * len(some)
    assert all("logits" in sample.expected for sample in decoder.sampled())


# -------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "config", "reason"),
    [
        (
            "LongT5ForConditionalGeneration",
            {"num_layers": 1, "num_heads": 2, "d_kv": 8, "d_ff": 16, "d_model": 16},
            "encoder of LongT5ForConditionalGeneration has an attention function of its own",
        ),
        (
            "M2M100ForConditionalGeneration",
            {"encoder_layers": 1, "decoder_layers": 1, "d_model": 16, "encoder_ffn_dim": 16}
            | {"decoder_ffn_dim": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2},
            "the decoder of M2M100ForConditionalGeneration computes its positions from the token",
        ),
        (
            "ProphetNetForConditionalGeneration",
            {"num_encoder_layers": 1, "num_decoder_layers": 1, "hidden_size": 16}
            | {"num_encoder_attention_heads": 2, "num_decoder_attention_heads": 2}
            | {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16},
            "ProphetNetForConditionalGeneration",
        ),
    ],
    ids=["longt5", "m2m100", "prophetnet"],
)
def test_an_architecture_that_cannot_be_exported_is_refused_by_name(
    name: str, config: dict[str, Any], reason: str
) -> None:
    made = getattr(transformers, name.replace("ForConditionalGeneration", "Config"))(
        vocab_size=tiny.VOCABULARY, **config
    )
    model = getattr(transformers, name)(made).eval()
    ids = torch.arange(20).reshape(2, 10)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    encoder = part.Encoder(inputs, {}, list)
    with pytest.raises(InputError, match="cannot export this encoder-decoder model") as caught:
        part.encoder_decoder_parts(model, encoder, prompt=[tiny.PAD], longest=32)
    assert reason in str(caught.value)


def test_a_feature_extractor_of_another_model_is_refused(tmp_path: Path) -> None:
    source = tiny.save_seq2seq(tmp_path / "model", "whisper")
    other = transformers.WhisperFeatureExtractor(feature_size=80, chunk_length=2)
    other.save_pretrained(source)
    with pytest.raises(InputError, match="80 bins of 200 frames, expected 80 of 100"):
        make_plan(load_checkpoint(str(source)))
    (source / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match="has no feature extractor"):
        make_plan(load_checkpoint(str(source)))


def test_a_generation_setting_that_is_not_kept_to_is_refused(tmp_path: Path) -> None:
    source = tiny.save_seq2seq(tmp_path / "model", "t5", encoder_no_repeat_ngram_size=2)
    with pytest.raises(InputError, match="encoder_no_repeat_ngram_size=2"):
        make_plan(load_checkpoint(str(source)))


def test_an_artifact_of_another_kind_generates_nothing(
    artifact: Path, exported: Callable[[str], Exported]
) -> None:
    with pytest.raises(InputError, match="generates nothing, expected an encoder-decoder model"):
        TextGenerator(artifact)
    with pytest.raises(InputError, match="reads sounds, expected a model for text"):
        TextGenerator(exported("whisper").folder)
    with pytest.raises(InputError, match="reads texts, expected a model for speech"):
        Transcriber(exported("t5").folder)


@pytest.mark.slow
def test_two_exports_are_the_same_bytes(
    exported: Callable[[str], Exported], tmp_path: Path
) -> None:
    first = exported("t5").folder
    source = first.parent / "model"
    assert export(str(source), tmp_path / first.name).status == "verified"
    again = tmp_path / first.name
    names = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    differ = [one for one in names if (first / one).read_bytes() != (again / one).read_bytes()]
    assert differ == []
    shutil.rmtree(again)
