"""Fixtures that several packages' tests share: a model, an adapter, texts and an artifact."""

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tiny_models import LABELS, WORDS, save_adapter, save_classifier

# Nothing in the suite may wait for a hub; a test that needs another value sets it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# Without a GPU kernels run in Triton's interpreter. Triton reads the variable when it decorates a
# function, its own library's included, so it is set before anything imports Triton.
if not Path("/dev/nvidiactl").exists() and not Path("/dev/kfd").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Sizes are tiny: a second thread only waits, for long where tests run side by side."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo and AOTAutograd make the graphs of `mmopt.compile`; they run as they are, op by op."""
    from torch._dynamo.backends.debugging import aot_eager

    monkeypatch.setattr("mmopt.compilation.model.compile_fx", aot_eager)


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder; tests that change it copy it first."""
    return save_classifier(tmp_path_factory.mktemp("classifier") / "model")


@pytest.fixture(scope="session")
def adapter(classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter folder for `classifier`; tests that change it copy it first."""
    return save_adapter(classifier, tmp_path_factory.mktemp("adapter") / "adapter")


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSON Lines with a text and a label, 50 of them: no multiple of a batch."""
    generator = random.Random(0)
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    lines = []
    for index in range(50):
        label = LABELS[index % 3]
        words = generator.choices(WORDS, k=generator.randint(1, 12))
        lines.append(json.dumps({"text": " ".join([label, *words]), "label": label}))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def artifact(
    classifier: Path, adapter: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A verified int8 artifact; tests that change it copy it first."""
    from mmopt_export import export

    output = tmp_path_factory.mktemp("artifact") / "docstrings"
    report = export(
        str(classifier), output, adapters=[str(adapter)], precision="int8", calibration=texts
    )
    assert report.exit_code == 0
    return output
