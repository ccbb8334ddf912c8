"""The training loss attached to mmopt's op; transformers and PEFT, left as they were, the oracle.

Both sides are built alike and fed alike, in float32.
"""

import copy
import inspect

import pytest
import torch
from peft import AdaptionPromptConfig, LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    Blip2Config,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
)

import mmopt
from mmopt.attach.gradients import check_gradients
from mmopt.attach.loss import OP, attach_loss
from mmopt.attach.loss_source import without_logits
from mmopt.attach.source import CannotRewriteError

VOCABULARY, ROWS, LENGTH = 101, 3, 7  # no other tensor has 101 columns
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48,
    "image_size": 16, "patch_size": 4,
}  # fmt: skip


def llama(**changes):
    return LlamaForCausalLM(LlamaConfig(**{**TEXT, **changes}))


def tied():
    return llama(tie_word_embeddings=True)


def qwen3():
    return Qwen3ForCausalLM(Qwen3Config(**TEXT, head_dim=8))


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=32, attn_pdrop=0.0,
            embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


# Caps near the logits, so that they bend them.
def gemma2():
    return Gemma2ForCausalLM(Gemma2Config(**TEXT, head_dim=8, final_logit_softcapping=0.3))


def gemma3_text():
    return Gemma3ForCausalLM(Gemma3TextConfig(**TEXT, head_dim=8, final_logit_softcapping=0.3))


def gemma3():
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config={**TEXT, "head_dim": 8},
            vision_config={**VISION, "vision_use_head": False},
            mm_tokens_per_image=4, image_token_id=97, boi_token_id=95, eoi_token_id=96,
        )
    )  # fmt: skip


def qwen2_5_vl():
    text = {
        **TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
        "tie_word_embeddings": False,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "depth": 1, "num_heads": 4, "intermediate_size": 48,
        "out_hidden_size": 32, "patch_size": 4,
    }  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    )


def cohere():
    return CohereForCausalLM(CohereConfig(**TEXT, logit_scale=0.0625))


def gpt_neox():
    sizes = {key: value for key, value in TEXT.items() if key != "num_key_value_heads"}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes))


def mixtral():
    """Its forward adds the routers' loss in place."""
    return MixtralForCausalLM(
        MixtralConfig(
            **TEXT, num_local_experts=2, num_experts_per_tok=1, output_router_logits=True,
            router_aux_loss_coef=0.5, experts_implementation="eager",
        )
    )  # fmt: skip


PLAIN = [
    llama, tied, qwen3, gpt2, gpt_neox, mixtral, gemma2, gemma3_text, gemma3, qwen2_5_vl, cohere,
]  # fmt: skip


def build(make, peft=None):
    """A model in training whose logits differ, with an adapter whose B has a value."""
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    if peft is not None:
        settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "lm_head"], **peft}
        model = get_peft_model(model, LoraConfig(**settings))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.2)
    return model.train()


def batch(rows=ROWS, length=LENGTH, seed=1):
    torch.manual_seed(seed)
    ids = torch.randint(3, 90, (rows, length))
    labels = ids.clone()
    labels[0, : length // 2] = -100
    labels[-1, -1] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def inputs_of(model, **changes):
    given = batch(**changes)
    if "token_type_ids" in inspect.signature(model.forward).parameters and "Gemma3" in repr(model):
        given["token_type_ids"] = torch.zeros_like(given["input_ids"])
    return given


def step(model, given):
    """Loss and all gradients of a training step."""
    model.zero_grad()
    output = model(**given)
    output.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output, grads


def attached_copy(model):
    twin = copy.deepcopy(model)
    rows, restore = attach_loss(twin)
    return twin, rows, restore


class Logits(TorchDispatchMode):
    """Counts the tensors that have a value per token and word."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, (tuple, list)) else [result]
        self.count += sum(
            isinstance(one, torch.Tensor) and one.numel() == ROWS * LENGTH * VOCABULARY
            for one in results
        )
        return result


def is_fused(model, given):
    return model(**given).logits is None


def assert_same_step(plain, attached, given, **tolerance):
    expected, wanted = step(plain, given)
    actual, got = step(attached, given)
    assert actual.logits is None
    assert expected.logits is not None
    torch.testing.assert_close(actual.loss, expected.loss)
    assert got.keys() == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(got[name], grad, msg=lambda m, n=name: f"{n}: {m}", **tolerance)
    return got


@pytest.mark.parametrize("make", PLAIN, ids=lambda make: make.__name__)
def test_loss_and_every_gradient_are_the_models_own(make):
    plain = build(make)
    attached, rows, _ = attached_copy(plain)
    assert [(row.name, row.kind, row.became) for row in rows] == [("", "loss", OP)]
    assert rows[0].reason == "in training with labels, the output's logits are None"
    assert_same_step(plain, attached, inputs_of(plain), atol=2e-6, rtol=1e-4)


PEFT = {
    "head": {},
    "head-only": {"target_modules": ["lm_head"]},
    "head-rslora-bias": {"use_rslora": True, "lora_bias": True},
    "head-not": {"target_modules": ["q_proj"]},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("case", PEFT)
def test_peft_trains_as_it_did(case):
    plain = build(llama, PEFT[case])
    attached, rows, _ = attached_copy(plain)
    assert rows[0].became == OP
    grads = assert_same_step(plain, attached, batch(), atol=2e-6, rtol=1e-4)
    trained = [grad for name, grad in grads.items() if ".lm_head." in name]
    assert len(trained) == {"head-not": 0, "saved": 1, "head-rslora-bias": 3}.get(case, 2)
    assert all(grad.abs().max() > 1e-3 for grad in trained)
    check_gradients(attached)


def test_an_image_language_model_trains_the_adapter_of_its_output_layer():
    settings = {"target_modules": r".*language_model.*q_proj|lm_head"}
    plain = build(gemma3, settings)
    attached, rows, _ = attached_copy(plain)
    assert rows[0].became == OP
    given = inputs_of(plain.get_base_model())
    grads = assert_same_step(plain, attached, given, atol=2e-6, rtol=1e-4)
    assert sum("lm_head" in name for name in grads) == 2


def test_adapters_switched_on_every_call_are_followed():
    plain = build(llama, {})
    plain.add_adapter("other", LoraConfig(r=2, lora_alpha=9, target_modules=["lm_head"]))
    nn.init.normal_(plain.get_base_model().lm_head.lora_B["other"].weight)
    attached, _, _ = attached_copy(plain)
    given = batch()
    for change in (
        lambda model: model.set_adapter("other"),
        lambda model: model.set_adapter("default"),
        lambda model: model.base_model.disable_adapter_layers(),
        lambda model: model.base_model.enable_adapter_layers(),
        lambda model: model.merge_adapter(),
        lambda model: model.unmerge_adapter(),
    ):
        change(plain)
        change(attached)
        expected = plain(**given)
        actual = attached(**given)
        assert actual.logits is None
        torch.testing.assert_close(actual.loss, expected.loss)
    # Disabled while merged: PEFT unmerges in the call.
    for model in (plain, attached):
        model.merge_adapter()
        model.base_model.disable_adapter_layers()
    torch.testing.assert_close(attached(**given).loss, plain(**given).loss)
    assert attached(**given).logits is None
    torch.testing.assert_close(attached(**given).loss, plain(**given).loss)


def test_a_saved_output_layer_is_followed_when_disabled_and_compiled():
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    model = build(lambda: llama(num_hidden_layers=1), settings)
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.mul_(1.5)
    plain = copy.deepcopy(model)
    attach_loss(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    actual = compiled(**batch())
    assert actual.logits is None
    torch.testing.assert_close(actual.loss, plain(**batch()).loss)
    with plain.disable_adapter(), model.disable_adapter():
        disabled = model(**batch())
        assert disabled.logits is None
        torch.testing.assert_close(disabled.loss, plain(**batch()).loss)
    assert (disabled.loss - actual.loss).abs() > 1e-2


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"lora_dropout": 0.5}, "has dropout"),
        ({"use_dora": True}, "is Dora"),
    ],
    ids=["dropout", "dora"],
)
def test_an_adapter_that_the_op_does_not_compute_keeps_the_models_loss(settings, reason):
    plain = build(llama, settings)
    attached, rows, _ = attached_copy(plain)
    assert reason in rows[0].reason
    assert rows[0].reason.endswith("the model's own loss meanwhile")
    given = batch()
    torch.manual_seed(5)
    expected = plain(**given)
    torch.manual_seed(5)
    actual = attached(**given)
    torch.testing.assert_close(actual.logits, expected.logits)
    torch.testing.assert_close(actual.loss, expected.loss)
    attached.base_model.disable_adapter_layers()
    assert attached(**given).logits is None


def test_two_active_adapters_keep_the_models_loss():
    plain = build(llama, {})
    plain.add_adapter("other", LoraConfig(r=2, target_modules=["lm_head"]))
    plain.base_model.set_adapter(["default", "other"])
    attached, rows, _ = attached_copy(plain)
    assert "2 adapters of its output layer are active" in rows[0].reason
    torch.testing.assert_close(attached(**batch()).logits, plain(**batch()).logits)


def test_hooks_of_the_output_layer_keep_running():
    model = build(llama, {})
    attach_loss(model)
    seen = []
    handle = (
        model.get_base_model()
        .lm_head.lora_A["default"]
        .register_forward_hook(lambda *_: seen.append(1))
    )
    assert model(**batch()).logits is not None
    assert seen == [1]
    handle.remove()
    handle = model.get_base_model().lm_head.register_forward_hook(lambda *_: seen.append(2))
    assert model(**batch()).logits is not None
    assert seen == [1, 2]
    handle.remove()
    assert is_fused(model, batch())


@pytest.mark.parametrize("settings", [None, {}], ids=["plain", "lora"])
def test_logits_never_exist(settings):
    plain = build(llama, settings)
    attached, _, _ = attached_copy(plain)
    counts = []
    for model in (plain, attached):
        with Logits() as logits:
            model(**batch()).loss.backward()
        counts.append(logits.count)
    assert counts[0] > 0
    assert counts[1] == 0


def test_number_of_items_in_batch_divides_the_sum():
    plain = build(llama)
    attached, _, _ = attached_copy(plain)
    for items in (5, torch.tensor(11)):
        assert_same_step(plain, attached, {**batch(), "num_items_in_batch": items})


def test_shifted_labels_and_ignored_index_are_taken():
    plain = build(llama)
    attached, _, _ = attached_copy(plain)
    given = batch()
    shifted = given["labels"].roll(-1, 1)
    assert_same_step(plain, attached, {**given, "shift_labels": shifted})
    ignored = given["labels"].masked_fill(given["labels"] == -100, 3)
    assert_same_step(plain, attached, {**given, "labels": ignored, "ignore_index": 3})


def test_without_any_label_the_mean_is_nan():
    plain = build(llama)
    attached, _, _ = attached_copy(plain)
    given = batch()
    given["labels"].fill_(-100)
    assert plain(**given).loss.isnan()
    assert attached(**given).loss.isnan()


def test_accumulated_gradients_are_the_models_own():
    plain = build(llama, {})
    attached, _, _ = attached_copy(plain)
    for model in (plain, attached):
        for seed in range(3):
            given = batch(rows=seed + 2, seed=seed)
            model(**given, num_items_in_batch=torch.tensor(40)).loss.backward()
    pairs = zip(plain.named_parameters(), attached.named_parameters(), strict=True)
    for (name, one), (_, other) in pairs:
        if one.requires_grad:
            torch.testing.assert_close(other.grad, one.grad, msg=name, atol=2e-6, rtol=1e-4)


def test_gradient_checkpointing_changes_nothing():
    plain = build(llama, {})
    attached, _, _ = attached_copy(plain)
    for model in (plain, attached):
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    assert_same_step(plain, attached, batch(), atol=2e-6, rtol=1e-4)


def test_autocast_is_followed():
    plain = build(llama, {})
    attached, _, _ = attached_copy(plain)
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain(**batch()).loss
        actual = attached(**batch()).loss
    assert actual.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(actual, expected, atol=0, rtol=2e-2)


def test_bfloat16_weights_with_a_float32_adapter_train():
    plain = build(lambda: llama(dtype=torch.bfloat16).bfloat16(), {})
    assert plain.get_base_model().lm_head.lora_A["default"].weight.dtype == torch.float32
    attached, _, _ = attached_copy(plain)
    expected, wanted = step(plain, batch())
    actual, got = step(attached, batch())
    assert actual.logits is None
    torch.testing.assert_close(actual.loss, expected.loss, atol=0, rtol=2e-2)
    for name, grad in wanted.items():
        assert got[name].dtype == grad.dtype
        error = (got[name].float() - grad.float()).norm() / grad.float().norm()
        assert error < 0.05, name


def test_one_graph_serves_every_length():
    model = build(lambda: llama(num_hidden_layers=1), {"target_modules": ["lm_head"]})
    attach_loss(model)
    expected = {length: step(model, batch(length=length)) for length in (7, 9, 12)}
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length, (output, grads) in expected.items():
            model.zero_grad()
            actual = compiled(**batch(length=length))
            actual.loss.backward()
            assert actual.logits is None
            torch.testing.assert_close(actual.loss, output.loss)
            for name, parameter in model.named_parameters():
                if name in grads:
                    torch.testing.assert_close(
                        parameter.grad, grads[name], msg=name, atol=2e-6, rtol=1e-4
                    )


def test_a_compiled_model_follows_mode_and_undo():
    model = build(lambda: llama(num_hidden_layers=1))
    rows, restore = attach_loss(model)
    assert rows[0].became == OP
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert compiled(**batch()).logits is None
    model.eval()
    assert compiled(**batch()).logits is not None
    model.train()
    assert compiled(**batch()).logits is None
    restore()
    assert compiled(**batch()).logits is not None


def test_calls_that_are_no_training_step_are_as_before():
    plain = build(llama)
    attached, _, _ = attached_copy(plain)
    given = batch()
    unlabelled = {key: value for key, value in given.items() if key != "labels"}
    torch.testing.assert_close(attached(**unlabelled).logits, plain(**unlabelled).logits)
    wanted = plain(**given, return_dict=False)
    got = attached(**given, return_dict=False)
    torch.testing.assert_close(got[:2], wanted[:2])
    for model in (plain, attached):
        model.eval()
    torch.testing.assert_close(attached(**given).logits, plain(**given).logits)
    torch.testing.assert_close(attached(**given).loss, plain(**given).loss)
    settings = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(
        attached.generate(**unlabelled, **settings), plain.generate(**unlabelled, **settings)
    )
    assert not torch.is_grad_enabled() or attached(**given).loss.requires_grad


def test_undo_leaves_nothing_behind_and_attaching_twice_is_attaching_once():
    model = build(llama)
    before = dict(model.__dict__)
    signature = inspect.signature(model.forward)
    first, _ = attach_loss(model)
    forward = model.__dict__["forward"]
    assert inspect.signature(model.forward) == signature
    second, restore = attach_loss(model)
    assert first == second
    assert model.__dict__["forward"] is forward
    restore()
    assert model.__dict__ == before
    assert not is_fused(model, batch())
    restore()
    attach_loss(model)
    assert is_fused(model, batch())


def test_an_error_in_a_call_leaves_the_model_as_it_was():
    model = build(llama)
    attach_loss(model)
    given = batch()
    hook = model.model.layers[1].register_forward_hook(_raise)
    with pytest.raises(RuntimeError, match="broken"):
        model(**given)
    hook.remove()
    unlabelled = {key: value for key, value in given.items() if key != "labels"}
    assert model(**unlabelled).logits is not None
    assert is_fused(model, given)


def _raise(*_):
    raise RuntimeError("broken")


def test_undo_reaches_through_a_wrapper_put_around_since():
    from accelerate.utils import convert_outputs_to_fp32

    model = build(llama)
    _, restore = attach_loss(model)
    model.forward = convert_outputs_to_fp32(model.forward.__func__).__get__(model)
    wrapper = model.__dict__["forward"]
    assert is_fused(model, batch())
    restore()
    assert not is_fused(model, batch())
    assert model.__dict__["forward"] is wrapper
    rows, _ = attach_loss(model)
    assert rows[0].became == OP
    assert is_fused(model, batch())


def test_a_copy_of_the_model_is_attached_to_itself():
    model = build(llama)
    attach_loss(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    assert twin(**batch()).logits is None
    assert twin(**batch()).loss != model(**batch()).loss


def test_optimize_attaches_the_loss_and_undoes_it():
    model = build(llama, {})
    plain = copy.deepcopy(model)
    report = mmopt.optimize(model, attention=False, loss=True)
    assert report.rows[-1].kind == "loss"
    assert_same_step(plain, model, batch(), atol=2e-6, rtol=1e-4)
    report.check_gradients()
    report.undo()
    assert not is_fused(model, batch())


def test_trainer_reaches_the_same_weights(tmp_path):
    plain = build(llama, {})
    attached, _, _ = attached_copy(plain)
    rows = [{"input_ids": ids, "labels": ids} for ids in batch(rows=8)["input_ids"]]
    for name, model in (("plain", plain), ("attached", attached)):
        arguments = TrainingArguments(
            output_dir=tmp_path / name, per_device_train_batch_size=2, max_steps=3, seed=0,
            gradient_accumulation_steps=2, report_to=[], save_strategy="no", use_cpu=True,
            learning_rate=1e-2, disable_tqdm=True, optim="sgd",
        )  # fmt: skip
        Trainer(model=model, args=arguments, train_dataset=rows).train()
    start = build(llama, {})
    moved = 0.0
    for name, parameter in plain.named_parameters():
        other = attached.get_parameter(name)
        torch.testing.assert_close(other, parameter, msg=name, atol=1e-6, rtol=1e-4)
        if "lm_head.lora" in name:
            moved += (parameter - start.get_parameter(name)).abs().max().item()
    assert moved > 1e-4


# --- left alone -----------------------------------------------------------------------------------


class Reads(LlamaForCausalLM):
    """Its forward reads the logits after the loss."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        hidden = self.model(input_ids=input_ids).last_hidden_state
        logits = self.lm_head(hidden)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return {"loss": loss + logits.square().mean(), "logits": logits}


class Calls(LlamaForCausalLM):
    """Its forward adds something to its base class's."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def custom_loss():
    model = llama()
    model.loss_function = lambda logits, labels, **_: logits.mean()
    return model


def replaced():
    model = llama()
    model.forward = model.forward
    return model


def wrapped_class():
    class Wrapped(LlamaForCausalLM):
        pass

    own = LlamaForCausalLM.forward

    def around(self, *args, **kwargs):
        return own(self, *args, **kwargs)

    around.__wrapped__ = own
    Wrapped.forward = around
    return Wrapped(LlamaConfig(**TEXT))


def odd_head():
    class Head(nn.Linear):
        pass

    model = llama()
    model.lm_head = Head(32, VOCABULARY, bias=False)
    return model


def hooked():
    model = llama()
    model.lm_head.register_forward_hook(lambda *_: None)
    return model


def scaled_with_bias():
    model = cohere()
    model.lm_head = nn.Linear(32, VOCABULARY)
    return model


def masked():
    sizes = {key: value for key, value in TEXT.items() if key != "num_key_value_heads"}
    return BertForMaskedLM(BertConfig(**sizes))


def blip2():
    from transformers import Blip2ForConditionalGeneration

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return Blip2ForConditionalGeneration(
        Blip2Config(
            vision_config={**small, "intermediate_size": 16, "image_size": 8, "patch_size": 4},
            qformer_config={**small, "intermediate_size": 16, "encoder_hidden_size": 16},
            text_config={
                "model_type": "opt", **small, "ffn_dim": 16, "vocab_size": 20,
                "word_embed_proj_dim": 16, "max_position_embeddings": 16,
            },
        )
    )  # fmt: skip


LEFT = {
    "reads": (lambda: Reads(LlamaConfig(**TEXT)), "its forward uses the logits after the loss"),
    "calls": (lambda: Calls(LlamaConfig(**TEXT)), "cannot be compiled outside its class"),
    "custom-loss": (custom_loss, "its loss is <lambda>, expected ForCausalLMLoss"),
    "masked": (masked, "belongs to a module inside it"),
    "inner": (blip2, "belongs to a module inside it"),
    "replaced": (replaced, "its forward is already replaced by something else"),
    "wrapped": (wrapped_class, "its forward is wrapped by more than its decorators"),
    "odd-head": (odd_head, ".Head, expected nn.Linear"),
    "hooked": (hooked, "hooks of its output layer would not run"),
    "scaled-with-bias": (scaled_with_bias, "scales the logits, and its output layer has a bias"),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_is_left_alone_says_why(case):
    make, reason = LEFT[case]
    model = make()
    before = dict(model.__dict__)
    rows, restore = attach_loss(model)
    assert [(row.kind, row.became) for row in rows] == [("loss", None)]
    assert reason in rows[0].reason
    restore()
    assert model.__dict__ == before


def test_a_tuner_that_holds_on_to_the_forward_is_left_alone():
    """Attached before the tuner is made, the one that it holds on to is the replacement."""
    config = AdaptionPromptConfig(adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM")
    model = get_peft_model(build(llama), config).train()
    (row,), _ = attach_loss(model)
    assert row.became is None
    assert row.reason.startswith("peft's AdaptionPromptModel calls the forward that the model had")
    assert model(**inputs_of(model)).logits is not None
    model = build(llama)
    attach_loss(model)
    model = get_peft_model(model, config).train()
    (row,), _ = attach_loss(model)
    assert row.became == OP
    assert model(**inputs_of(model)).logits is None


def test_a_quantized_output_layer_is_left_alone():
    bnb = pytest.importorskip("bitsandbytes")
    model = llama()
    model.lm_head = bnb.nn.Linear4bit(32, VOCABULARY, bias=False)
    rows, _ = attach_loss(model)
    assert rows[0].became is None
    assert "Linear4bit" in rows[0].reason


def test_a_model_without_an_output_layer_has_no_row():
    sizes = {key: value for key, value in TEXT.items() if key != "num_key_value_heads"}
    rows, _ = attach_loss(BertModel(BertConfig(**sizes)))
    assert rows == []


def test_a_loss_set_later_is_the_models_own():
    model = build(llama)
    attach_loss(model)
    model.loss_function = lambda logits, labels, **_: logits.mean()
    assert model(**batch()).logits is not None


# --- the rewriting of a forward -------------------------------------------------------------------


class Holder:
    scale = 0.5
    tensor = torch.ones(1)


def end(lines, after="return Output(loss=loss, logits=logits)"):
    """A forward that ends like this, in a file of its own."""
    body = "\n    ".join(["logits = self.lm_head(x)", *lines, after])
    return f"def forward(self, x, labels=None, **kwargs):\n    {body}\n"


LOSS = ["if labels is not None:", "    loss = self.loss_function(logits, labels, 9, **kwargs)"]
REFUSED = {
    "changed": end(["logits = logits.exp()", *LOSS]),
    "masked": end(["logits[:, 3] = 0", *LOSS]),
    "scaled-by-a-tensor": end(["logits = logits * self.tensor", *LOSS]),
    "capped-otherwise": end(["logits = torch.tanh(logits / 3) * 4", *LOSS]),
    "capped-twice": end(["logits = torch.tanh(logits / 3) * 3"] * 2 + LOSS),
    "scaled-after-the-cap": end(
        ["logits = torch.tanh(logits / 3) * 3", "logits = logits * self.scale", *LOSS]
    ),
    "read-aside": end(["top = logits.max()", *LOSS]),
    "condition": end(["if labels is not None and self.training:", *LOSS[1:]]),
    "read-with-the-loss": end([*LOSS, "    loss = loss + logits.mean()"]),
    "read-later": end(LOSS, "return Output(loss=loss, logits=logits, best=logits.argmax(-1))"),
    "returned-otherwise": end(LOSS, "return Output(loss=loss, logits=logits.float())"),
    "two-heads": end(["other = self.lm_head(x + 1)", *LOSS]),
    "two-losses": end([*LOSS, *LOSS]),
    "no-loss": end([]),
    "loss-of-others": end([LOSS[0], LOSS[1].replace("logits,", "x,")]),
    "loss-in-a-sum": end([LOSS[0], LOSS[1] + " + 1"]),
    "private": end([*LOSS, "self.__count = 1"]),
}
TAKEN = {
    "plain": (end(LOSS), 1.0, None),
    "scaled": (end(["logits = logits * self.scale", *LOSS]), 0.5, None),
    "capped": (end(["logits = torch.tanh(logits / 3) * 3", *LOSS]), 1.0, 3),
    "walrus": (
        end(
            ["if (cap := self.scale) is not None:", "    logits = logits / cap",
             "    logits = torch.tanh(logits)", "    logits = logits * cap", *LOSS]
        ),
        1.0,
        0.5,
    ),
}  # fmt: skip


def compiled_from(source, tmp_path):
    path = tmp_path / "modeling.py"
    path.write_text(f"import torch\nOutput = dict\n{source}")
    names = {"__name__": "modeling"}
    exec(compile(path.read_text(), str(path), "exec"), names)
    return names["forward"]


@pytest.mark.parametrize("case", REFUSED)
def test_other_uses_of_the_logits_are_refused(case, tmp_path):
    with pytest.raises(CannotRewriteError):
        without_logits(compiled_from(REFUSED[case], tmp_path), Holder(), "lm_head", print)


@pytest.mark.parametrize("case", TAKEN)
def test_known_ends_hand_hidden_states_and_cap_to_the_loss(case, tmp_path):
    source, factor, cap = TAKEN[case]
    given = []

    def loss(*args):
        given.append(args)
        return "the loss"

    make, scaled = without_logits(compiled_from(source, tmp_path), Holder(), "lm_head", loss)
    forward = make()
    holder = Holder()
    holder.lm_head = "the layer"
    assert forward(holder, 8.0, labels="labels") == {"loss": "the loss", "logits": None}
    assert given == [("the layer", cap, 8.0 * factor, "labels", 9)]
    assert scaled == (factor != 1)
    assert forward.__code__.co_filename == str(tmp_path / "modeling.py")


def test_a_forward_without_source_is_refused():
    with pytest.raises(CannotRewriteError, match="source"):
        without_logits(eval("lambda self, x: x"), Holder(), "lm_head", print)
