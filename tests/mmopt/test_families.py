"""The families that mmopt promises: one graph, forward and backward, at every size, and undone.

The oracle is the same model in eager transformers, as it was before `mmopt.optimize`, in float32.
"""

import copy

import families
import pytest
import torch
from families import FAMILIES
from torch import nn
from torch.nn.functional import ctc_loss, log_softmax
from transformers.loss.loss_utils import ForCTCLoss

import mmopt
from mmopt.attach import traceable
from mmopt.compilation.model import loss_of, tensors_of
from mmopt.compilation.parity import compare, gradients
from mmopt_kernels.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    """Other tests' graphs are not this one's recompiles."""
    torch._dynamo.reset()


def trained(family, adapter):
    """A model in training, with `adapter`: "none", "frozen" (its base) or "all" (trained)."""
    model = FAMILIES[family].model()
    if adapter != "none":
        model = families.with_adapter(model)
    if adapter == "all":
        model.requires_grad_(True)
    return model.train()


def assert_one_graph_that_matches_eager(family, adapter):
    model = trained(family, adapter)
    eager = copy.deepcopy(model)
    report = mmopt.optimize(model)
    compiled = mmopt.compile(model, FAMILIES[family].batch(0), mode="train")
    for size in range(len(families.SIZES)):
        batch = FAMILIES[family].batch(size)
        expected, actual = eager(**batch), compiled(**batch)
        assert isinstance(actual.loss, torch.Tensor)
        outputs = tensors_of(expected), tensors_of(actual)
        if any(row.became == "mmopt::linear_cross_entropy" for row in report.rows):
            outputs[0].pop("logits")  # never formed
        wanted, got = gradients(expected.loss, eager), gradients(actual.loss, model)
        for group in (compare("outputs", *outputs), compare("gradients", wanted, got)):
            assert group.tensors
            assert group.holds, group
        assert any(gradient.any() for gradient in wanted.values())
    assert compiled.graph_breaks == ()
    assert compiled.recompiles == ()
    return compiled


# Text and vision. The others take two minutes more, most of it for images in text and for speech.
QUICK = ("bert", "vit", "llama")


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize(
    "family",
    [
        family if family in QUICK else pytest.param(family, marks=pytest.mark.slow)
        for family in FAMILIES
    ],
)
def test_one_graph_trains_base_and_adapter_at_every_size(family):
    """Outputs, loss and every gradient, of the model's own weights and of a LoRA adapter's.

    Then, where the model holds a batch against itself, one that does not fit is still refused.
    """
    compiled = assert_one_graph_that_matches_eager(family, "all")
    if family in UNFIT:
        batch = FAMILIES[family].batch(1)
        UNFIT[family](batch)
        with pytest.raises(InputError, match="the batch does not fit the model"):
            compiled(**batch)


def one_image_token_too_few(batch):
    batch["input_ids"][1, 3] = 7


def a_letter_too_many(batch):
    batch["labels"][1, 0] = 12


UNFIT = {
    "gemma3": one_image_token_too_few,
    "qwen2.5-vl": one_image_token_too_few,
    "janus": one_image_token_too_few,
    "wav2vec2": a_letter_too_many,
}


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["none", "frozen"])
@pytest.mark.parametrize("family", FAMILIES)
def test_inductor_trains_at_every_size_in_one_graph(family, adapter):
    """All parameters without an adapter, and an adapter alone."""
    assert_one_graph_that_matches_eager(family, adapter)


# --- attached, and undone -------------------------------------------------------------------------


def instance_state(model):
    """What is set on the modules themselves: attributes, methods."""
    return {name: set(vars(module)) for name, module in model.named_modules()}


def run(model, batch):
    output = model(**batch)
    grads = gradients(loss_of(output), model)
    return {**tensors_of(output), **{f"gradient of {name}": x for name, x in grads.items()}}


@pytest.mark.parametrize("family", FAMILIES)
def test_undo_restores_every_bit(family):
    """Outputs, loss and gradients equal, and no module keeps anything."""
    model, batch = trained(family, "frozen"), FAMILIES[family].batch(1)
    implementations = [module.config._attn_implementation for module in configured(model)]
    before, state = run(model, batch), instance_state(model)
    report = mmopt.optimize(model)
    attached = run(model, batch)
    assert any(not torch.equal(before[name], attached[name]) for name in before.keys() & attached)
    report.undo()
    after = run(model, batch)
    assert before.keys() == after.keys()
    for name, expected in before.items():
        assert torch.equal(after[name], expected), name
    assert instance_state(model) == state
    assert [module.config._attn_implementation for module in configured(model)] == implementations


def configured(model):
    return [module for module in model.modules() if hasattr(module, "config")]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_attention_is_attached_or_has_a_row_that_says_why(family):
    """transformers' own all run the op; torch's, in SigLIP's pooling, is named."""
    model = FAMILIES[family].model()
    report = mmopt.optimize(model)
    rows = {row.name: row for row in report.rows if row.kind == "attention"}
    for name, module in model.named_modules():
        if type(module) is nn.MultiheadAttention:
            assert rows[name].became is None
            assert "nn.MultiheadAttention" in rows[name].reason
        elif "Attention" in type(module).__name__ and hasattr(module, "config"):
            assert module.config._attn_implementation == "mmopt", name
    assert all(row.became or row.reason for row in report.rows)
    assert all(row.became for row in rows.values() if "MultiheadAttention" not in str(row.reason))
    again = mmopt.optimize(model)
    assert again.rows == report.rows


# --- methods in other words -----------------------------------------------------------------------


def test_a_method_replaced_by_someone_else_is_left_alone():
    model = families.janus(**families.ONE)
    own = model.model.get_placeholder_mask
    model.model.get_placeholder_mask = lambda *args, **kwargs: own(*args, **kwargs)
    (row,) = (row for row in mmopt.optimize(model).rows if row.kind == "graph")
    assert row.became is None
    assert "already replaced by something else" in row.reason


def test_without_graph_no_method_is_replaced():
    model = families.wav2vec2(**families.ONE)
    assert not [row for row in mmopt.optimize(model, graph=False).rows if row.kind == "graph"]
    assert "forward" not in vars(model)


def test_an_uncompiled_call_still_explains_in_transformers_words():
    """With the numbers, which a compiled check does not have."""
    family = FAMILIES["gemma3"]
    model, batch = family.model(), family.batch(0)
    mmopt.optimize(model)
    one_image_token_too_few(batch)
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        model(**batch)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("zero_infinity", [False, True])
def test_traced_ctc_loss_is_torchs(reduction, zero_infinity):
    """Labels with gaps and blanks between, a row without any, one longer than its sound."""
    torch.manual_seed(0)
    logits = torch.randn(4, 9, 6, requires_grad=True)
    labels = torch.tensor([[3, -100, 4, 0], [5, 5, 1, 2], [-100, -100, -100, -100], [1, 2, 3, 4]])
    lengths = torch.tensor([9, 7, 8, 2 if zero_infinity else 6])

    def loss(logits):
        return traceable._ctc_loss(
            ForCTCLoss, logits, labels, lengths, 0, reduction=reduction, zero_infinity=zero_infinity
        )

    real = labels > 0
    expected = ctc_loss(
        log_softmax(logits, -1).transpose(0, 1),
        labels[real],
        lengths,
        real.sum(1),
        reduction=reduction,
        zero_infinity=zero_infinity,
    )
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)
    actual = compiled(logits)
    torch.testing.assert_close(actual, expected)
    weights = torch.rand_like(expected)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), logits)
    (got,) = torch.autograd.grad((actual * weights).sum(), logits)
    torch.testing.assert_close(got, wanted)


def test_ops_pass_opcheck():
    """Schema, fake and autograd agree."""
    torch.library.opcheck(traceable._held, (torch.ones(2, 3), torch.tensor([True, True])))
    arguments = (
        torch.randn(9, 2, 6).log_softmax(-1).requires_grad_(),
        torch.tensor([[1, 2], [3, 4]]),
        torch.tensor([9, 8]),
        torch.tensor([2, 1]),
        0,
        False,
    )
    torch.library.opcheck(traceable._ctc_losses, arguments)


def test_pieces_of_any_length_see_their_own_keys():
    """As attention over each piece alone; one of them is empty."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 11, 8).unbind()
    ends = torch.tensor([0, 3, 3, 4, 11])
    module = nn.Module()
    module.is_causal = False
    got, _ = mmopt.attach.attention.interval_attention(
        module, q, k, v, None, is_causal=False, cu_seq_lens_q=ends
    )
    pieces = [slice(0, 3), slice(3, 4), slice(4, 11)]
    expected = torch.cat(
        [
            torch.nn.functional.scaled_dot_product_attention(q[:, :, s], k[:, :, s], v[:, :, s])
            for s in pieces
        ],
        dim=2,
    )
    torch.testing.assert_close(got, expected.transpose(1, 2))
