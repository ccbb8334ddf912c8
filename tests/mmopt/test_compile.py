"""`mmopt.compile`: one graph, equal results, and said so when not."""

import re

import families
import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutput

import mmopt
from mmopt.attach.attention import interval_mask
from mmopt.attach.optimize import transformers_model
from mmopt.compilation import parity
from mmopt.compilation.inputs import example_batch
from mmopt_kernels.errors import CheckFailedError, InputError

SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


def bert():
    torch.manual_seed(0)
    config = BertConfig(**SMALL, attention_probs_dropout_prob=0.0, num_labels=3)
    return BertForSequenceClassification(config).eval()


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2)).eval()


def with_adapter(model):
    return families.with_adapter(model).eval()


def batch_of(model, length, *, rows=3):
    return example_batch(transformers_model(model), batch=rows, length=length, train=True)


# Op by op test_families.py has one graph at every size too.
@pytest.mark.slow
@pytest.mark.parametrize(
    "factory", [pytest.param(bert, id="bert"), pytest.param(llama, id="llama-gqa")]
)
def test_one_graph_trains_at_every_length_and_matches_eager(factory):
    """Attention and LoRA attached: outputs, loss and gradients; no break, no recompile."""
    model = with_adapter(factory())
    lengths = {length: batch_of(model, length) for length in (12, 7, 15)}
    expected = {}
    for length, batch in lengths.items():
        output = model(**batch)
        loss = mmopt.compilation.model.loss_of(output)
        expected[length] = output.logits, parity.gradients(loss, model)

    mmopt.optimize(model)
    compiled = mmopt.compile(model, lengths[12], mode="train")
    for length, batch in lengths.items():
        output = compiled(**batch)
        logits, grads = expected[length]
        torch.testing.assert_close(output.logits, logits, rtol=1e-4, atol=1e-5)
        got = parity.gradients(mmopt.compilation.model.loss_of(output), model)
        assert parity.compare("gradients", grads, got).holds
    assert compiled.graph_breaks == ()
    assert compiled.recompiles == ()
    assert compiled.module is model

    # What PEFT changes at run time is guarded: the compiled model follows.
    with model.disable_adapter():
        torch.testing.assert_close(
            compiled(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-5
        )
    assert len(compiled.recompiles) == 1


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["infer", "train"])
def test_the_graph_is_lowered_once_and_the_second_time_taken_from_the_cache(mode, tmp_path):
    torch._dynamo.reset()
    lowered = torch._dynamo.utils.counters["aot_autograd"]
    with torch._inductor.utils.fresh_cache(dir=str(tmp_path)):
        for outcome in ("miss", "hit"):
            model = with_adapter(bert())
            batch = batch_of(model, 12)
            mmopt.optimize(model)
            lowered.clear()
            torch._dynamo.reset()
            mmopt.compile(model, batch, mode=mode)
            assert lowered["total"] == 1
            assert lowered[f"autograd_cache_{outcome}"] == 1


def test_compiled_mask_with_a_gap_is_refused():
    """As in eager mode; a C++ assertion in the graph would end the process."""
    model = bert()
    mmopt.optimize(model)
    batch = batch_of(model, 12)
    compiled = mmopt.compile(model, batch, mode="infer")
    batch["attention_mask"][0, 3] = 0
    with pytest.raises(InputError, match=r"keys with a gap between them.*impl='sdpa'"):
        compiled(**batch)


class BrokenModel(PreTrainedModel):
    config_class = PreTrainedConfig
    main_input_name = "x"

    def __init__(self, config):
        super().__init__(config)
        self.layer = nn.Linear(4, 4)
        self.post_init()

    def forward(self, x, shift=0.0):
        y = self.layer(x)
        if y.sum() > 1e9:  # the deliberate break
            y = y + 1
        return BaseModelOutput(last_hidden_state=y + shift)


def test_graph_break_is_named_with_file_and_line():
    """An error by default; counted and run in pieces when allowed."""
    model = BrokenModel(PreTrainedConfig())
    batch = {"x": torch.randn(3, 4)}
    with open(__file__, encoding="utf-8") as file:
        line = next(i for i, text in enumerate(file, 1) if "# the deliberate break" in text)
    with pytest.raises(CheckFailedError, match=rf"(?s)test_compile\.py:{line}: .*allow_breaks"):
        mmopt.compile(model, batch)

    compiled = mmopt.compile(model, batch, mode="infer", allow_breaks=True)
    (found,) = compiled.graph_breaks
    assert (found.file, found.line) == (__file__, line)
    assert compiled.recompiles == ()
    torch.testing.assert_close(
        compiled(**batch).last_hidden_state, model(**batch).last_hidden_state
    )


def test_compiling_nothing_is_no_success():
    """With Dynamo switched off (TORCHDYNAMO_DISABLE=1) there is no break, and no graph either."""
    with (
        torch._dynamo.config.patch(disable=True),
        pytest.raises(CheckFailedError, match=r"test_compile\.py:\d+: nothing was compiled"),
    ):
        mmopt.compile(BrokenModel(PreTrainedConfig()), {"x": torch.randn(3, 4)})


def test_compiled_mask_is_never_formed():
    """The three reductions evaluate it; no buffer is as large as queries times keys."""

    def bounds(keep):
        return interval_mask(3, keep.shape[1], keep.shape[1], attention_mask=keep)

    keep = torch.ones(3, 33, dtype=torch.bool)
    keep[0, :5] = False
    compiled = torch.compile(bounds, dynamic=True, fullgraph=True)
    out, (code,) = run_and_get_code(compiled, keep)
    assert torch.equal(out, bounds(keep))
    sizes = re.findall(r"= empty_strided_cpu\(\((.*?)\),", code)
    assert sizes
    assert all(len(re.findall(r"s\d+", size)) <= 1 for size in sizes)


@pytest.mark.usefixtures("without_inductor")
def test_recompile_is_named_with_its_reason():
    """A batch of one where two were promised free."""
    model = bert()
    compiled = mmopt.compile(model, batch_of(model, 12), mode="infer")
    compiled(**batch_of(model, 12, rows=1))
    (found,) = compiled.recompiles
    assert found.line > 0
    assert "size" in found.reason


def test_bad_arguments_are_refused_with_one_message():
    """What was wrong, what was expected."""
    model, good = bert(), batch_of(bert(), 8)
    with pytest.raises(InputError, match="Linear, expected a transformers PreTrainedModel"):
        mmopt.compile(nn.Linear(2, 2), {})
    with pytest.raises(InputError, match="expected 'train' or 'infer'"):
        mmopt.compile(model, good, mode="fast")
    with pytest.raises(InputError, match="is a list, expected a mapping"):
        mmopt.compile(model, [1, 2])
    with pytest.raises(InputError, match=r"rejects the example batch \(pixel_values \(2, 3\)\)"):
        mmopt.compile(model, {"pixel_values": torch.zeros(2, 3)})
    with pytest.raises(InputError, match=r"rejects the example batch .* IndexError"):
        mmopt.compile(model, {**good, "input_ids": good["input_ids"] + 1000})
    with pytest.raises(InputError, match="no parameter of the model requires a gradient"):
        mmopt.compile(model.requires_grad_(False), good)


def test_parity_names_the_worst_and_never_passes_a_nan():
    """Finiteness first; rounding noise beside large gradients is not an error."""
    reference = {"a": torch.tensor([2.0, 1.0]), "noise": torch.tensor([1e-9])}
    close = {"a": torch.tensor([2.0, 1.00001]), "noise": torch.tensor([-1e-9])}
    assert parity.compare("g", reference, close).holds
    off = parity.compare("g", reference, {**close, "a": torch.tensor([2.0, 1.5])})
    assert (off.worst, off.error, off.holds) == ("a", 0.25, False)
    broken = parity.compare("g", reference, {**close, "noise": torch.tensor([float("nan")])})
    assert (broken.worst, broken.error, broken.holds) == ("noise", None, False)
    missing = parity.compare("g", reference, {"a": reference["a"]})
    assert (missing.worst, missing.holds) == ("noise", False)


def test_float32_is_held_to_a_ten_thousandth_of_what_counts():
    """Of its own largest value, or of a hundredth of the largest of all where that is more."""
    exact = {"large": torch.tensor([1.0]), "small": torch.tensor([0.02]), "tiny": torch.zeros(1)}

    def held(**off):
        actual = {name: value + off.get(name, 0.0) for name, value in exact.items()}
        return parity.compare("g", exact, actual).holds

    assert held(large=0.9e-4, small=0.9 * 0.02e-4, tiny=0.9e-6)
    assert not held(large=1.1e-4)
    assert not held(small=1.1 * 0.02e-4)
    assert not held(tiny=1.1e-6)


def test_half_precision_is_held_to_twice_what_eager_is_off():
    """A tensor that eager has exact by luck is held to what is usual in its group."""
    exact = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([1.0, -1.0]), "c": torch.ones(2)}
    eager = {"a": exact["a"] + 0.02, "b": exact["b"] - 0.02, "c": exact["c"]}

    def held(**off):
        actual = {name: value + off.get(name, 0.0) for name, value in exact.items()}
        return parity.compare("g", exact, actual, same_dtype=eager, rounding=1e-3)

    within = held(a=-0.035, b=0.039, c=0.015)
    assert within.holds
    assert (within.worst, within.tolerance) == ("b", pytest.approx(0.04))
    assert within.eager_error == pytest.approx(0.02)
    assert "eager's own: 2.0e-02" in str(within)
    beyond = held(a=0.05)
    assert (beyond.worst, beyond.holds) == ("a", False)
    assert (held(c=0.05).worst, held(c=0.05).holds) == ("c", False)
    assert held(b=float("nan")).error is None
    assert not held(b=float("inf")).holds

    # Eager exact throughout: one rounding is allowed, twice.
    actual = {name: value + 0.0015 for name, value in exact.items()}
    assert parity.compare("g", exact, actual, same_dtype=exact, rounding=1e-3).holds
    assert not parity.compare("g", exact, actual, same_dtype=exact, rounding=5e-4).holds
    lost = parity.compare("g", exact, exact, same_dtype={"a": exact["a"], "b": exact["b"]})
    assert (lost.worst, lost.holds) == ("c", False)
