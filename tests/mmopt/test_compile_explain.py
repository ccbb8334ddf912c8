"""`mmopt compile --explain`: the line of a break or recompile, the model's call, the remedy."""

import copy
import json
import logging
import random
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

import mmopt
from mmopt.compilation import GraphBreak, Recompile
from mmopt.compilation.explain import BREAK_REMEDIES, RECOMPILE_REMEDIES, explain
from mmopt_kernels.errors import CheckFailedError

RECURRENT = nn.LSTM(4, 4)
LOGGER = logging.getLogger("a model")


# What Dynamo says does not depend on what lowers its graphs.
pytestmark = pytest.mark.usefixtures("without_inductor")


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    """Other tests' graphs are not this one's recompiles."""
    torch._dynamo.reset()


class Small(PreTrainedModel):
    """One layer, and what a test does after it."""

    config_class = PreTrainedConfig
    main_input_name = "x"

    def __init__(self, body: Any) -> None:
        super().__init__(PreTrainedConfig())
        self.layer = nn.Linear(4, 4)
        self.body = [body]
        self.scale, self.steps = 1.5, 2
        self.post_init()

    def forward(self, x: torch.Tensor, extra: torch.Tensor | None = None) -> Any:
        y = self.layer(x) * self.scale + self.steps
        y = self.body[0](y)  # the model calls it here
        return BaseModelOutput(last_hidden_state=y if extra is None else y + extra)


def item(y: torch.Tensor) -> torch.Tensor:
    return y * y.sum().item()  # breaks


def branch(y: torch.Tensor) -> torch.Tensor:
    if y.sum() > 1e9:  # breaks
        y = y + 1
    return y


def say(y: torch.Tensor) -> torch.Tensor:
    print(y.sum())  # breaks
    return y


def log(y: torch.Tensor) -> torch.Tensor:
    LOGGER.critical("%s", y.shape)  # breaks
    return y


def warn(y: torch.Tensor) -> torch.Tensor:
    warnings.warn("careful", stacklevel=1)  # breaks
    return y


def seed(y: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator()
    generator.manual_seed(1)  # breaks
    return y + 1


def draw(y: torch.Tensor) -> torch.Tensor:
    random.seed(3)  # breaks
    return y + 1


def select(y: torch.Tensor) -> torch.Tensor:
    return y[y > 0]  # breaks


def count(y: torch.Tensor) -> torch.Tensor:
    return y + torch.unique(y).sum()  # breaks


def with_numpy(y: torch.Tensor) -> torch.Tensor:
    return y + np.random.RandomState(2).rand()  # breaks


def off(y: torch.Tensor) -> torch.Tensor:
    return y + left_alone(y)  # breaks


@torch._dynamo.disable
def left_alone(y: torch.Tensor) -> torch.Tensor:
    return y * 2


def deep(y: torch.Tensor) -> torch.Tensor:
    copy.deepcopy(y)  # breaks
    return y


def recur(y: torch.Tensor) -> torch.Tensor:
    return RECURRENT(y)[0]  # breaks


def look_up(y: torch.Tensor) -> torch.Tensor:
    Path("/").stat()  # breaks
    return y


BREAKS = {
    "a value as a number": (item, r"becomes a Python number"),
    "a branch on values": (branch, r"branches on a tensor's values.*torch\.where"),
    "print": (say, r"printed or logged"),
    "logger": (log, r"printed or logged"),
    "warning": (warn, r"printed or logged"),
    "generator": (seed, r"generator|Random numbers"),
    "random": (draw, r"Random numbers"),
    "boolean index": (select, r"number of results depends"),
    "unique": (count, r"number of results depends"),
    "numpy": (with_numpy, r"Random numbers|NumPy"),
    "disabled": (off, r"asks for this break"),
    "deepcopy": (deep, r"copy it once"),
    "recurrent": (recur, r"allow_rnn"),
    "C function": (look_up, r"custom_op"),
}


@pytest.mark.parametrize("case", BREAKS)
def test_a_break_is_explained_with_its_line_and_remedy(
    case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Dynamo's real reason of each kind; the line is the one in this file."""
    body, remedy = BREAKS[case]
    with torch.no_grad():
        compiled = mmopt.compile(
            Small(body), {"x": torch.randn(3, 4)}, mode="infer", allow_breaks=True
        )
    assert compiled.graph_breaks
    found = [explain(place) for place in compiled.graph_breaks]
    assert any(re.search(remedy, each.remedy) for each in found), found
    lines = [place.source for each in found for place in (each.source, each.in_model) if place]
    assert any(line.endswith("# breaks") for line in lines), lines
    for each in found:
        assert json.loads(json.dumps(each.to_dict()))["remedy"] == each.remedy


def test_a_break_within_a_library_names_the_models_call_to_it() -> None:
    """Innermost outside of torch and Python's own library."""
    model = Small(deep)
    with torch.no_grad():
        compiled = mmopt.compile(model, {"x": torch.randn(3, 4)}, mode="infer", allow_breaks=True)
    found = explain(compiled.graph_breaks[0])
    assert found.source.file.endswith("copy.py")
    assert found.in_model is not None
    assert found.in_model.function == "deep"
    assert found.in_model.source == "copy.deepcopy(y)  # breaks"
    assert f"called at {found.in_model}" in found.lines()


def recompiled(model: nn.Module, change: Any, **call: Any) -> Recompile:
    compiled = mmopt.compile(model, {"x": torch.randn(3, 4)}, mode="infer")
    change(model)
    compiled(**{"x": torch.randn(3, 4), **call})
    return compiled.recompiles[-1]


def nothing(_: Any) -> None:
    """Change nothing."""


def dropping(y: torch.Tensor) -> torch.Tensor:
    return y


RECOMPILES = {
    "a size of one": (nothing, {"x": torch.randn(1, 4)}, r"A size was 1 .* 2 or more"),
    "a float attribute": (lambda m: setattr(m, "scale", 2.5), {}, r"constants in a graph"),
    "an integer attribute": (lambda m: setattr(m, "steps", 3), {}, r"constants in a graph"),
    "more arguments": (nothing, {"extra": torch.ones(4)}, r"other arguments|None always or never"),
    "another dtype": (lambda m: m.double(), {"x": torch.ones(3, 4).double()}, r"another dtype"),
}


@pytest.mark.parametrize("case", RECOMPILES)
def test_a_recompile_is_explained_with_its_remedy(case: str) -> None:
    change, call, remedy = RECOMPILES[case]
    place = recompiled(Small(torch.relu), change, **call)
    assert re.search(remedy, explain(place).remedy), (place, explain(place))


def test_training_mode_and_adapters_are_told_apart() -> None:
    """Both are flags of modules; what to do about them differs."""

    class Dropping(Small):
        def __init__(self) -> None:
            super().__init__(dropping)
            self.dropout = nn.Dropout(0.5)
            self.body = [self.dropout]
            self.train(False)

    place = recompiled(Dropping(), lambda model: model.train())
    assert "train() and eval()" in explain(place).remedy
    torch._dynamo.reset()

    model = get_peft_model(Small(torch.relu), LoraConfig(target_modules=["layer"]))
    model.add_adapter("other", LoraConfig(target_modules=["layer"]))
    place = recompiled(model, lambda adapted: adapted.set_adapter("other"))
    found = explain(place)
    assert "prepare_model_for_compiled_hotswap" in found.remedy
    assert found.source.source  # the line that looks at the adapter


@torch._dynamo.config.patch(recompile_limit=2)
def test_the_limit_of_compilations_is_said() -> None:
    """From there the model runs eagerly, which no graph count shows."""
    model = Small(torch.relu)
    compiled = mmopt.compile(model, {"x": torch.randn(3, 4)}, mode="infer")
    for steps in (3, 4):
        model.steps = steps
        compiled(x=torch.randn(3, 4))
    first, second = compiled.recompiles
    assert (first.limit, second.limit) == (False, True)
    assert "limit of compilations is reached" in explain(second).remedy
    assert "constants in a graph" in explain(second).remedy
    with pytest.raises(CheckFailedError, match="earlier models of this process used up Dynamo's"):
        mmopt.compile(Small(torch.relu), {"x": torch.randn(3, 4)}, mode="infer")


def test_what_is_not_known_is_said_with_a_way_to_find_out() -> None:
    """Dynamo's own hint where it has one, else its log."""
    hinted = GraphBreak("x.py", 1, "Odd", "Odd\n  Hint: Please report an issue.\n  Hint: Do so.")
    assert explain(hinted).remedy == "Dynamo's hint: Do so."
    assert "TORCH_LOGS=graph_breaks" in explain(GraphBreak("x.py", 1, "Odd")).remedy
    unknown = explain(Recompile("x.py", 1, "0/0: odd", ("0/0: odd",)))
    assert "TORCH_LOGS=recompiles" in unknown.remedy
    assert str(unknown.source) == "x.py:1: "


def test_every_pattern_speaks_of_something_that_dynamo_says() -> None:
    """A remedy whose reason no longer exists would never be shown."""
    folder = Path(torch._dynamo.__file__).parent
    registry = json.loads((folder / "graph_break_registry.json").read_text())
    said = "\n".join(
        f"{entry['Gb_type']}\n{entry['Explanation']}" for (entry, *_) in registry.values()
    )
    code = "\n".join(
        (folder / name).read_text()
        for name in ("symbolic_convert.py", "guards.py", "variables/builtin.py")
    )
    for pattern, remedy in BREAK_REMEDIES[1:]:  # the first one is mmopt's own
        assert re.search(pattern, said) or re.search(pattern, code), pattern
        assert remedy.endswith((".", "True."))
    assert len({remedy for _, remedy in (*BREAK_REMEDIES, *RECOMPILE_REMEDIES)}) == len(
        BREAK_REMEDIES
    ) + len(RECOMPILE_REMEDIES)
