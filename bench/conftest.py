"""What the suites share: threads, markers, and a small random model. README.md has the pattern."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Nothing may wait for a hub, and on a CPU Inductor must not start a pool of processes beside what
# is timed. A GPU does not notice, and its cases would take minutes longer to compile.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if not Path("/dev/nvidiactl").exists():
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

import torch

from mmopt.measure.suites.collection import FIGURES_OPTION
from mmopt.measure.suites.exact import library_versions
from mmopt_export.threads import usable_cores

ROOT = Path(__file__).resolve().parent.parent
PRECISIONS = ("fp32", "int8")

VOCABULARY = 512
LONGEST = 64
LABELS = ("class", "function", "method")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "quick: part of the quick pass; set by conftest.py")
    # As many threads as this process has cores: the gate leaves it one. Exact figures are the same
    # on every machine only with a fixed number: CPU kernels allocate buffers per thread.
    counting = config.getoption(FIGURES_OPTION, None) is not None
    torch.set_num_threads(1 if counting else usable_cores())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the quick pass, and leave out what needs a GPU where there is none."""
    kept, left_out = [], []
    for item in items:
        on_gpu = item.get_closest_marker("gpu") is not None
        if on_gpu and not torch.cuda.is_available():
            left_out.append(item)
            continue
        kept.append(item)
        if not on_gpu and item.get_closest_marker("slow") is None:
            item.add_marker("quick")
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


class TinyBert:
    """A BERT classifier of one layer with random weights: the paths are real, the sizes are not."""

    def model(self) -> Any:
        """A new one, in training mode and without dropout; the same weights each time."""
        from transformers import BertConfig, BertForSequenceClassification

        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=128,
            max_position_embeddings=LONGEST,
            attention_probs_dropout_prob=0.0,
            hidden_dropout_prob=0.0,
            # Unset, the first call with labels sets it, and whatever was compiled is stale.
            problem_type="single_label_classification",
            id2label=dict(enumerate(LABELS)),
            label2id={label: index for index, label in enumerate(LABELS)},
        )
        # Wider than BERT's 0.02: logits far from zero, so that parity means something.
        config.initializer_range = 0.2
        return BertForSequenceClassification(config)

    def adapted(self) -> Any:
        """The same with a LoRA adapter whose B is not zero, as after training."""
        from peft import LoraConfig, get_peft_model

        targets = ["query", "key", "value", "dense"]
        config = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=targets)
        model = get_peft_model(self.model(), config)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.2)
        return model

    def batch(self, rows: int, length: int) -> dict[str, torch.Tensor]:
        """Random ids with labels, every second row padded by a quarter."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(5, VOCABULARY, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[1::2, length * 3 // 4 :] = 0
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(rows) % 3}

    def save(self, folder: Path) -> Path:
        """Save model and tokenizer, whose words are `w4` to `w511`, as a checkpoint."""
        from tokenizers import Tokenizer, models, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast

        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
        words = special + [f"w{index}" for index in range(len(special), VOCABULARY)]
        vocabulary = {word: index for index, word in enumerate(words)}
        tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="[PAD]",
            unk_token="[UNK]",
            model_max_length=LONGEST,
        ).save_pretrained(folder)
        self.model().save_pretrained(folder)
        return folder


@pytest.fixture(scope="session")
def tiny_bert() -> TinyBert:
    """A one-layer BERT classifier, as often as wanted."""
    return TinyBert()


@pytest.fixture(scope="session")
def artifacts(
    tiny_bert: TinyBert, tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> dict[str, Path]:
    """Verified artifacts of the model with its adapter merged, by precision.

    Exact figures are counted on artifacts exported now. Timed tests take those that the same source
    exported before: an export takes seconds, and the gate starts many processes.
    """
    if pytestconfig.getoption(FIGURES_OPTION, None) is not None:
        return export_artifacts(tiny_bert, tmp_path_factory.mktemp("artifacts"))
    kept = ROOT / "build" / "bench-artifacts" / source_key()
    if not kept.is_dir():
        kept.parent.mkdir(parents=True, exist_ok=True)
        for of_other_source in kept.parent.glob("[0-9a-f]*"):
            shutil.rmtree(of_other_source, ignore_errors=True)
        staged = Path(tempfile.mkdtemp(dir=kept.parent, prefix="staged-"))
        export_artifacts(tiny_bert, staged)
        try:
            staged.rename(kept)
        except OSError:  # another process was faster
            shutil.rmtree(staged)
    return {precision: kept / precision for precision in PRECISIONS}


def export_artifacts(tiny_bert: TinyBert, folder: Path) -> dict[str, Path]:
    """Export the model once for each precision, into folders named for it."""
    from mmopt_export import export

    model, adapter = str(tiny_bert.save(folder / "model")), str(folder / "adapter")
    tiny_bert.adapted().save_pretrained(adapter)
    for precision in PRECISIONS:
        report = export(model, folder / precision, adapters=[adapter], precision=precision)
        assert report.exit_code == 0, report
    return {precision: folder / precision for precision in PRECISIONS}


def source_key() -> str:
    """A hash of everything that an export here depends on: our source, and the versions used."""
    found = hashlib.sha256(repr(sorted(library_versions().items())).encode())
    for package in ("kernels", "export", "bench"):
        for path in sorted((ROOT / package).rglob("*.py")):
            found.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:32]


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Dynamo as in a new process: what an earlier test compiled fits and fails nothing here."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
