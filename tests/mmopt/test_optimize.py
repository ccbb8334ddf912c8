"""`mmopt.optimize`: transformers and PEFT, left as they were, are the oracle."""

import copy
import json
import pickle
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace

import families
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BeitConfig,
    BeitModel,
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    BloomForCausalLM,
    CLIPConfig,
    CLIPModel,
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    DogeConfig,
    DogeForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Kosmos2Config,
    Kosmos2ForConditionalGeneration,
    LayoutLMConfig,
    LayoutLMModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MllamaConfig,
    MllamaForConditionalGeneration,
    PixtralVisionConfig,
    PixtralVisionModel,
    PreTrainedConfig,
    PreTrainedModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SwinConfig,
    SwinForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    masking_utils,
)
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaPreTrainedModel

import mmopt
from mmopt.attach import attention as plumbing
from mmopt_kernels.attention import bounds
from mmopt_kernels.errors import InputError

SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


def bert(**changes):
    config = BertConfig(**{**SMALL, "attention_probs_dropout_prob": 0.0, **changes}, num_labels=3)
    return BertForSequenceClassification(config)


def vit():
    return ViTForImageClassification(ViTConfig(**SMALL, image_size=16, patch_size=8, num_labels=3))


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0.0)
    )


def llama(**changes):
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2, **changes))


def mistral():
    return MistralForCausalLM(MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=4))


def clip(**text):
    parts = {key: value for key, value in SMALL.items() if key != "vocab_size"}
    return CLIPModel(
        CLIPConfig(
            text_config={**SMALL, "eos_token_id": 98, "max_position_embeddings": 32, **text},
            vision_config={**parts, "image_size": 16, "patch_size": 8},
            projection_dim=16,
        )
    )


SEEING = {
    **{key: value for key, value in SMALL.items() if key != "vocab_size"},
    "image_size": 16,
    "patch_size": 8,
}


def mllama():
    vision = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_global_layers": 1, "attention_heads": 4,
        "intermediate_size": 48, "vision_output_dim": 64, "image_size": 16, "patch_size": 8,
        "max_num_tiles": 1, "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]],
    }  # fmt: skip
    text = {**SMALL, "num_key_value_heads": 2, "cross_attention_layers": [1], "pad_token_id": 0}
    return MllamaForConditionalGeneration(MllamaConfig(text_config=text, vision_config=vision))


def text(padding=None, labels=None):
    """Ids `[3, 11]`; a mask with 4 padded tokens in row 0; labels of classes or of tokens."""
    torch.manual_seed(1)
    batch = {"input_ids": torch.randint(5, 98, (3, 11))}
    if padding is not None:
        batch["attention_mask"] = torch.ones(3, 11, dtype=torch.int64)
        batch["attention_mask"][0, slice(-4, None) if padding == "right" else slice(0, 4)] = 0
    if labels == "classes":
        batch["labels"] = torch.tensor([0, 2, 1])
    if labels == "tokens":
        batch["labels"] = batch["input_ids"].clone()
        if padding is not None:
            batch["labels"][batch["attention_mask"] == 0] = -100
    return batch


def images():
    torch.manual_seed(1)
    return {"pixel_values": torch.randn(3, 3, 16, 16), "labels": torch.tensor([0, 2, 1])}


def packed():
    """Two documents in each row, told by position ids alone."""
    batch = text(labels="tokens")
    batch["position_ids"] = torch.tensor([[*range(4), *range(7)]]).expand(3, -1).contiguous()
    return {**batch, "use_cache": False}


CASES = {
    "bert": (bert, lambda: text(labels="classes")),
    "bert-right-padding": (bert, lambda: text("right", "classes")),
    "vit": (vit, images),
    "gpt2": (gpt2, lambda: text(labels="tokens")),
    "gpt2-left-padding": (gpt2, lambda: text("left", "tokens")),
    "llama-gqa": (llama, lambda: text(labels="tokens")),
    "llama-gqa-left-padding": (llama, lambda: text("left", "tokens")),
    "llama-gqa-packed": (llama, packed),
    "mistral-sliding-window-right-padding": (mistral, lambda: text("right", "tokens")),
    "clip": (clip, lambda: {**text("right"), **images(), "return_loss": True}),
}


def build(factory, *, lora=False):
    torch.manual_seed(0)
    model = factory().eval()
    if lora:
        targets = "all-linear" if not isinstance(model, GPT2LMHeadModel) else ["c_attn"]
        model = get_peft_model(model, LoraConfig(r=4, target_modules=targets))
        randomize(model)
    return model


def randomize(model):
    """Give every B a value: as initialized they are zero and the adapter has no effect."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)


def run(model, batch):
    batch = {k: v for k, v in batch.items() if not (k == "labels" and "return_loss" in batch)}
    output = model(**batch)
    trained = {name: x for name, x in model.named_parameters() if x.requires_grad}
    grads = torch.autograd.grad(output.loss, list(trained.values()), allow_unused=True)
    logits = output.logits if hasattr(output, "logits") else output.logits_per_text
    mask = batch.get("attention_mask")
    if mask is not None and logits.dim() == 3:
        logits = logits[mask.bool()]  # what stands at padding nobody reads
    return logits, output.loss, dict(zip(trained, grads, strict=True))


def assert_same(got, expected):
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=1e-6)
    assert got[2].keys() == expected[2].keys()
    for name, gradient in expected[2].items():
        if gradient is None:
            assert got[2][name] is None, name
        else:
            torch.testing.assert_close(
                got[2][name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("case", CASES)
def test_outputs_loss_and_every_gradient_match_untouched(case, lora):
    """Attached or not, a model computes the same."""
    factory, batch = CASES[case]
    model = build(factory, lora=lora)
    expected = run(model, batch())
    report = mmopt.optimize(model)
    assert report.attached > 0
    assert_same(run(model, batch()), expected)


@pytest.mark.parametrize("case", ["llama-gqa-left-padding", "llama-gqa-packed", "bert"])
def test_masks_are_bounds_or_nothing(case, monkeypatch):
    """The attention function gets int32 bounds, or None where causal or full says it all."""
    factory, batch = CASES[case]
    model = build(factory)
    mmopt.optimize(model)
    seen = []

    def spy(module, query, key, value, attention_mask, **kwargs):
        seen.append(attention_mask)
        return plumbing.interval_attention(module, query, key, value, attention_mask, **kwargs)

    from transformers import AttentionInterface

    monkeypatch.setitem(AttentionInterface._global_mapping, plumbing.NAME, spy)
    model(**batch())
    assert len(seen) == 2
    for mask in seen:
        if case == "bert":
            assert mask is None
        else:
            assert mask.dtype == torch.int32
            assert mask.shape == (3, 1, 11, 2)


def test_blocks_of_queries_give_the_same_bounds(monkeypatch):
    """Eager mode evaluates the mask in blocks; a block of one row is the extreme."""
    keep = text("left")["attention_mask"].bool()
    arguments = {"batch_size": 3, "q_length": 11, "kv_length": 11, "attention_mask": keep}
    whole = plumbing.interval_mask(**arguments)
    monkeypatch.setattr(bounds, "BLOCK_ELEMENTS", 1)
    torch.testing.assert_close(plumbing.interval_mask(**arguments), whole, rtol=0, atol=0)
    assert whole[0, 0, :5].tolist() == [[0, 0]] * 4 + [[4, 5]]


def test_generation_with_a_cache_gives_the_same_tokens():
    """Prefill, then one query against all cached keys."""
    model = build(llama)
    batch = text("left")
    expected = model.generate(**batch, max_new_tokens=5, do_sample=False, pad_token_id=0)
    mmopt.optimize(model)
    got = model.generate(**batch, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert got.tolist() == expected.tolist()


@torch.no_grad()
def test_a_prompt_in_two_parts_gives_the_same_logits():
    """The second part's first query sees the first part and itself: bounds, though no mask is."""
    model = build(llama)
    ids = text()["input_ids"]
    expected = model(ids).logits
    mmopt.optimize(model)
    first = model(ids[:, :5], use_cache=True)
    second = model(ids[:, 5:], past_key_values=first.past_key_values)
    got = torch.cat([first.logits, second.logits], 1)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_bounds_of_a_sliding_cache_count_from_its_first_key():
    """The cache has dropped 4 keys; transformers' own mask is the oracle."""
    sizes = {"batch_size": 1, "q_length": 2, "kv_length": 5, "q_offset": 7, "kv_offset": 4}
    function = masking_utils.sliding_window_causal_mask_function(3)
    options = {"mask_function": function, "allow_is_causal_skip": False}
    found = plumbing.interval_mask(**sizes, **options)
    key = torch.arange(5)
    seen = (found[..., :1] <= key) & (key < found[..., 1:])
    assert torch.equal(seen, masking_utils.sdpa_mask(**sizes, **options))


def gemma4():
    """Of four layers the last two share keys, of a window and of all."""
    kinds = ["sliding_attention", "full_attention"]
    return Gemma4ForCausalLM(
        Gemma4TextConfig(
            **{**SMALL, "num_hidden_layers": 4},
            vocab_size_per_layer_input=99,
            hidden_size_per_layer_input=8,
            num_key_value_heads=2,
            head_dim=8,
            global_head_dim=8,
            num_kv_shared_layers=2,
            sliding_window=4,
            layer_types=kinds * 2,
            pad_token_id=0,
        )
    )


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("kept", [1, 3])
def test_layers_that_share_keys_see_all_of_them_where_they_get_the_last_queries_alone(
    kept, padding
):
    """Gemma 4 computes no more than the logits that are asked for; its guard knows sdpa's name."""
    model = build(gemma4)
    batch = text(padding)
    expected = model(**batch).logits[:, -kept:]
    mmopt.optimize(model)
    seen = []
    last = model.model.layers[-1].self_attn
    last.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["hidden_states"].shape[1]), with_kwargs=True
    )
    torch.testing.assert_close(model(**batch, logits_to_keep=kept).logits, expected)
    assert seen == [kept]


def test_bool_mask_that_the_caller_prepared_is_reduced():
    """transformers passes a 4-D mask on as it is."""
    model = build(llama)
    keep = text("right")["attention_mask"].bool()
    mask = torch.ones(11, 11, dtype=torch.bool).tril()[None, None] & keep[:, None, None, :]
    batch = {**text(), "attention_mask": mask}
    expected = model(**batch).logits
    mmopt.optimize(model)
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match=r"float32 \(3, 1, 11, 11\), expected the bounds"):
        model(**{**batch, "attention_mask": torch.zeros(3, 1, 11, 11)})


@pytest.mark.parametrize(
    ("S", "T", "module", "given", "seen"),
    [
        (5, 5, True, {}, lambda i, j: j <= i),
        (5, 5, None, {}, lambda i, j: j <= i),
        (5, 5, True, {"is_causal": False}, lambda i, j: j >= 0),
        (5, 5, False, {"is_causal": True}, lambda i, j: j <= i),
        (3, 7, True, {}, lambda i, j: j <= i),
        (1, 7, True, {}, lambda i, j: j >= 0),
        (5, 5, False, {"cu_seq_lens_q": torch.tensor([0, 2, 5])}, lambda i, j: (i < 2) == (j < 2)),
        (5, 5, True, {"cu_seq_lens_q": torch.tensor([0, 2, 5])}, lambda i, j: j <= i),
    ],
    ids=[
        "causal",
        "unsaid",
        "not",
        "after all",
        "static-prefill",
        "decode",
        "pieces",
        "causal-pieces",
    ],
)
def test_attention_without_a_mask_sees_what_transformers_means(S, T, module, given, seen):
    """A static cache has keys behind the queries of its prefill that nobody has written yet."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 8, generator=g) for n in (S, T, T))
    owner = SimpleNamespace() if module is None else SimpleNamespace(is_causal=module)
    out, weights = plumbing.interval_attention(owner, q, k, v, None, **given)
    mask = seen(torch.arange(S)[:, None], torch.arange(T)[None])
    want = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), attn_mask=mask
    )
    torch.testing.assert_close(out.double(), want.transpose(1, 2), rtol=1e-5, atol=1e-5)
    assert out.is_contiguous()
    assert weights is None


def test_sinks_keep_the_dtype_of_the_checkpoint():
    """PEFT's float32 adapters make the query float32, and not the sinks."""
    q, sinks = torch.ones(1, 2, 3, 8), torch.tensor([0.5, 1.0])
    out, want = (
        plumbing.interval_attention(nn.Identity(), q, q, q, None, s_aux=each)[0]
        for each in (sinks.bfloat16(), sinks)
    )
    assert torch.equal(out, want)


@pytest.mark.parametrize(
    ("mask", "given", "message"),
    [
        (None, {"position_bias": torch.zeros(1)}, "asks for position_bias, which the op does not"),
        (None, {"indices": torch.zeros(1)}, "asks for indices, which the op does not have"),
        (torch.ones(1, 2, 3, 3).bool(), {}, "the mask differs between 2 heads, expected one"),
        (
            torch.ones(1, 3, 3).bool(),
            {},
            r"the mask is torch.bool \(1, 3, 3\), expected",
        ),
        (
            torch.zeros(1, 1, 3, 3),
            {},
            r"the mask is torch.float32 \(1, 1, 3, 3\), expec",
        ),
        (
            torch.zeros(1, 1, 3, 3).int(),
            {},
            r"the mask is torch.int32 \(1, 1, 3, 3\), expect",
        ),
    ],
    ids=["bias", "keys", "heads", "dimensions", "additive", "no-bounds"],
)
def test_what_the_op_cannot_be_given_is_refused_in_the_call(mask, given, message):
    q = torch.zeros(1, 2, 3, 8)
    with pytest.raises(InputError, match=message):
        plumbing.interval_attention(nn.Identity(), q, q, q, mask, **given)


@pytest.mark.parametrize("factory", [bert, llama], ids=["bert", "llama"])
def test_mask_with_a_gap_is_refused(factory):
    """Not an interval: the message names the way out."""
    model = build(factory)
    mmopt.optimize(model)
    batch = text("right")
    batch["attention_mask"][1, 3] = 0
    row = 0 if factory is bert else 4  # a causal row sees the gap from behind it only
    place = rf"The first is query {row} of sequence 1\."
    with pytest.raises(InputError, match=rf"keys with a gap between them.*impl='sdpa'.*{place}"):
        model(**batch)


def test_undo_restores_and_can_be_repeated():
    """Same implementation, same forwards, nothing left behind."""
    model = build(clip, lora=True)
    before = {
        name: (set(vars(module)), getattr(module, "config", None) and attn(module))
        for name, module in model.named_modules()
    }
    report = mmopt.optimize(model)
    assert attn(model.base_model.model.text_model) == "mmopt"
    report.undo()
    report.undo()
    after = {
        name: (set(vars(module)), getattr(module, "config", None) and attn(module))
        for name, module in model.named_modules()
    }
    assert after == before


def attn(module):
    return getattr(module.config, "_attn_implementation", None)


def test_layers_that_peft_repeats_read_the_towers_masks():
    """Each has a copy of the config, which says what implementation it calls."""
    config = LoraConfig(r=4, target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]])
    model = get_peft_model(build(llama), config)
    randomize(model)
    plain = copy.deepcopy(model)
    report = mmopt.optimize(model)
    layers = model.base_model.model.model.layers
    assert [attn(layer.self_attn) for layer in layers] == ["mmopt"] * 3
    batch = text("left", "tokens")
    assert_same(run(model, batch), run(plain, batch))
    report.undo()
    assert [attn(layer.self_attn) for layer in layers] == ["sdpa"] * 3


def test_optimizing_again_changes_nothing_and_its_report_can_undo():
    """The second report knows what the first replaced."""
    model = build(llama, lora=True)
    expected = run(model, text(labels="tokens"))
    first = mmopt.optimize(model)
    second = mmopt.optimize(model)
    assert second.rows == first.rows
    assert_same(run(model, text(labels="tokens")), expected)
    second.undo()
    assert model.config._attn_implementation == "sdpa"
    assert not any("forward" in vars(module) for module in model.modules())


def test_undo_leaves_a_later_choice_alone():
    """The caller switched to eager in between."""
    model = build(llama)
    report = mmopt.optimize(model)
    model.set_attn_implementation("eager")
    report.undo()
    assert model.config._attn_implementation == "eager"


def test_towers_are_reported_and_decided_one_by_one():
    """One tower's refusal does not keep the other from the op; the composite keeps its masks."""
    model = build(clip)
    model.text_model.set_attn_implementation("eager")
    model.text_model.config.output_attentions = True
    report = mmopt.optimize(model)
    rows = {row.name: row for row in report.rows}
    assert rows["vision_model"].became == "mmopt::attention"
    assert rows["text_model"].became is None
    assert "asks for attention weights" in rows["text_model"].reason
    assert attn(model) == "sdpa"
    batch = {**text("right"), **images()}
    del batch["labels"]
    expected = build(clip)(**batch).logits_per_text
    torch.testing.assert_close(model(**batch).logits_per_text, expected, rtol=1e-5, atol=1e-5)


def test_output_attentions_is_refused():
    """The weights are never formed; None would be a silent lie."""
    model = build(llama)
    mmopt.optimize(model)
    with pytest.raises(InputError, match="asks for output_attentions"):
        model(**text(), output_attentions=True)


class NoDispatchAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.project = nn.Linear(8, 8)

    def forward(self, x):
        return self.project(x)


class NoDispatchModel(PreTrainedModel):
    config_class = PreTrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.layer = NoDispatchAttention(config)
        self.post_init()

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        (lambda: NoDispatchModel(PreTrainedConfig()), "AttentionInterface"),
        (
            lambda: BloomForCausalLM(
                BloomConfig(vocab_size=99, hidden_size=32, n_layer=1, n_head=2)
            ),
            "AttentionInterface",
        ),
        (
            lambda: T5ForConditionalGeneration(
                T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
            ),
            "Attention passes position_bias to its attention function",
        ),
        (
            lambda: DeepseekV32ForCausalLM(
                DeepseekV32Config(
                    **SMALL,
                    num_key_value_heads=4,
                    moe_intermediate_size=16,
                    q_lora_rank=16,
                    kv_lora_rank=16,
                    qk_rope_head_dim=4,
                    qk_nope_head_dim=4,
                    v_head_dim=8,
                    index_n_heads=2,
                    index_head_dim=8,
                    index_topk=4,
                )
            ),
            "DeepseekV32Attention passes indices to its attention function",
        ),
        (
            lambda: DogeForCausalLM(DogeConfig(**SMALL, num_key_value_heads=2)),
            "DogeAttention computes the mask that it passes to its attention function, attn_mask",
        ),
        (
            lambda: SwinForImageClassification(
                SwinConfig(image_size=16, patch_size=4, embed_dim=8, depths=[1], num_heads=[2])
            ),
            "SwinAttention computes the mask that it passes to its attention function, combined",
        ),
        (
            lambda: BeitModel(BeitConfig(**SEEING, use_relative_position_bias=True)),
            "BeitRelativePositionBias makes a bias of positions",
        ),
        (
            mllama,
            "MllamaModel adds a mask of its own, _prepare_cross_attention_mask, to scores",
        ),
        (
            lambda: LayoutLMModel(LayoutLMConfig(**SMALL)),
            "does not support other attention backends",
        ),
        (
            lambda: llama(output_attentions=True, attn_implementation="eager"),
            "asks for attention weights",
        ),
    ],
    ids=[
        "own-class",
        "bloom",
        "t5",
        "deepseek-v32-sparse",
        "doge",
        "swin",
        "beit-position-bias",
        "mllama-own-masks",
        "layoutlm-own-masks",
        "weights",
    ],
)
def test_attention_that_the_op_cannot_serve_is_left_alone(factory, reason):
    """With the reason in the report, and the implementation as it was."""
    model = factory()
    before = model.config._attn_implementation
    report = mmopt.optimize(model, loss=False)
    assert report.attached == 0
    assert report.rows
    assert all(reason in row.reason for row in report.rows)
    assert model.config._attn_implementation == before


def test_masks_that_a_tower_makes_in_methods_of_its_own_leave_that_tower_alone():
    text = {"vocab_size": 99, "embed_dim": 32, "layers": 1, "ffn_dim": 48, "attention_heads": 4}
    config = Kosmos2Config(text_config=text, vision_config=SEEING, latent_query_num=2)
    report = mmopt.optimize(Kosmos2ForConditionalGeneration(config), loss=False)
    reasons = {row.name: row.reason for row in report.rows if row.kind == "attention"}
    assert reasons["text_model"] == (
        "Kosmos2TextTransformer adds a mask of its own, _prepare_decoder_attention_mask, to scores"
    )
    assert reasons["vision_model"] is None


class PickingAttention(LlamaAttention):
    def forward(self, x, attention_mask=None, **kwargs):
        return attention_interface(self, x, attention_mask, block_indices=x)  # noqa: F821


class SinkingAttention(LlamaAttention):
    def forward(self, x, attention_mask=None, **kwargs):
        return attention_interface(self, x, attention_mask, sinks=x)  # noqa: F821


@pytest.mark.parametrize(
    ("kind", "option"), [(PickingAttention, "block_indices"), (SinkingAttention, "sinks")]
)
def test_attention_that_is_given_what_the_op_has_not_is_left_alone(kind, option):
    """MiniMax-M3 picks keys block by block, Inkling's sinks are other sinks."""
    model = build(llama)
    model.model.layers[1].self_attn.__class__ = kind
    (row,) = mmopt.optimize(model, loss=False).rows
    assert row.became is None
    assert row.reason == f"{kind.__name__} passes {option} to its attention function"


@pytest.mark.parametrize(("flash", "became"), [(True, "mmopt::attention"), (False, None)])
def test_without_sdpa_a_model_is_taken_that_takes_flash_attention(flash, became, monkeypatch):
    """With softcap or sinks it does, and one that takes neither rewrites keys or masks."""
    monkeypatch.setattr(LlamaPreTrainedModel, "_supports_sdpa", False)
    monkeypatch.setattr(LlamaPreTrainedModel, "_supports_flash_attn", flash)
    report = mmopt.optimize(build(lambda: llama(attn_implementation="eager")), loss=False)
    (row,) = report.rows
    assert row.became == became
    assert flash or "takes neither sdpa nor flash attention" in row.reason


def pixtral():
    return PixtralVisionModel(PixtralVisionConfig(**SEEING))


def test_a_tower_of_packed_images_hands_over_where_they_end():
    """Pixtral's: no mask of all patches against all, and what it computes is what it did."""
    model = build(pixtral)
    torch.manual_seed(1)
    pixels = torch.randn(3, 3, 40, 48)
    sizes = torch.tensor([[24, 48], [40, 8], [8, 16]])  # 18, 5 and 2 patches

    def result(sizes):
        features = model(pixels, image_sizes=sizes).last_hidden_state
        loss = (features * torch.linspace(-1, 1, features.numel()).view_as(features)).sum()
        names, trained = zip(*model.named_parameters(), strict=True)
        grads = torch.autograd.grad(loss, trained)
        return features, loss, dict(zip(names, grads, strict=True))

    cases = [sizes, None]
    expected = [result(case) for case in cases]
    report = mmopt.optimize(model)
    assert [(row.kind, row.became) for row in report.rows] == [
        ("attention", "mmopt::attention"),
        ("graph", "traceable forward"),
    ]
    seen = []
    layer = model.transformer.layers[0].attention
    layer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(
            (kwargs["attention_mask"], kwargs["cu_seq_lens_q"].tolist())
        ),
        with_kwargs=True,
    )
    for case, reference in zip(cases, expected, strict=True):
        assert_same(result(case), reference)
    assert seen == [(None, [0, 18, 23, 25]), (None, [0, 30, 60, 90])]
    report.undo()
    assert attn(model) == "sdpa"
    assert "forward" not in vars(model)


def test_without_graph_a_tower_of_packed_images_is_left_alone():
    """Its forward, which is not replaced then, makes a mask that is added to the scores."""
    model = build(pixtral)
    (row,) = mmopt.optimize(model, graph=False).rows
    assert row.became is None
    assert row.reason == (
        "PixtralVisionModel adds a mask of its own, generate_block_attention_mask, to scores"
    )
    assert attn(model) == "sdpa"


def test_a_tower_of_packed_images_goes_by_the_forward_that_it_has():
    """Somebody else's leaves it alone; one that was replaced before serves it."""
    model = build(pixtral)
    held = model.forward
    model.forward = lambda *args, **kwargs: held(*args, **kwargs)
    attention, graph = mmopt.optimize(model).rows
    assert attention.became is None
    assert "adds a mask of its own" in attention.reason
    assert graph.reason == "its forward is already replaced by something else"
    del model.forward
    mmopt.optimize(model)
    assert mmopt.optimize(model, graph=False).rows[0].became == "mmopt::attention"


def test_a_tower_whose_head_takes_a_mask_for_torch_s_attention_is_left_alone():
    """Siglip2's would be given bounds; BEiT without a bias of positions is attached."""
    torch.manual_seed(0)
    sizes = {key: value for key, value in SEEING.items() if key != "image_size"}
    model = Siglip2VisionModel(Siglip2VisionConfig(**sizes, num_patches=16)).eval()
    batch = {
        "pixel_values": torch.randn(2, 16, 3 * 8 * 8),
        "pixel_attention_mask": torch.tensor([[1] * 16, [1] * 6 + [0] * 10]),
        "spatial_shapes": torch.tensor([[4, 4], [2, 3]]),
    }
    expected = model(**batch).pooler_output
    report = mmopt.optimize(model)
    assert "makes a mask for torch's nn.MultiheadAttention" in report.rows[0].reason
    assert torch.equal(model(**batch).pooler_output, expected)
    assert mmopt.optimize(BeitModel(BeitConfig(**SEEING))).attached


def two_adapters(**changes):
    model = get_peft_model(
        build(bert), LoraConfig(r=4, target_modules=["query", "value"], **changes), "first"
    )
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=5, target_modules=["query", "key"]))
    randomize(model)
    return model.eval()


def test_peft_operations_keep_their_results(tmp_path):
    """set_adapter, several at once, disable_adapter, merge, unmerge, save, unload."""
    model = two_adapters()
    plain = copy.deepcopy(model)
    mmopt.optimize(model)
    batch = text("right")

    def same():
        torch.testing.assert_close(
            model(**batch).logits, plain(**batch).logits, rtol=1e-5, atol=1e-6
        )

    same()
    for each in (model, plain):
        each.set_adapter("second")
    same()
    for each in (model, plain):
        each.base_model.set_adapter(["first", "second"])
    same()
    with model.disable_adapter(), plain.disable_adapter():
        same()
    names = ["first", "second", "__base__"]
    torch.testing.assert_close(
        model(**batch, adapter_names=names).logits, plain(**batch, adapter_names=names).logits
    )
    for each in (model, plain):
        each.base_model.set_adapter("first")
        each.merge_adapter()
    same()
    for each in (model, plain):
        each.unmerge_adapter()
    same()
    for each, folder in ((model, "attached"), (plain, "plain")):
        each.save_pretrained(tmp_path / folder)
    saved = [tmp_path / folder / "first" for folder in ("attached", "plain")]
    weights, plain_weights = ((at / "adapter_model.safetensors").read_bytes() for at in saved)
    assert weights == plain_weights
    config, plain_config = (json.loads((at / "adapter_config.json").read_text()) for at in saved)
    for each in (config, plain_config):  # PEFT writes a set, in the order of its hashes
        each["target_modules"].sort()
    assert config == plain_config
    model, plain = model.merge_and_unload(), plain.merge_and_unload()
    same()
    assert not any("forward" in vars(module) for module in model.modules())


def test_saved_config_does_not_name_mmopt(tmp_path):
    """A checkpoint saved while attached loads where mmopt is not installed."""
    model = build(bert)
    mmopt.optimize(model)
    model.save_pretrained(tmp_path)
    assert "mmopt" not in (tmp_path / "config.json").read_text()


def test_copy_of_an_attached_model_is_attached_to_itself():
    """A bound method copied shallowly would run the original's weights."""
    model = build(bert, lora=True)
    mmopt.optimize(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert other(**text()).logits.abs().sum() > 0


def step(model, batch):
    torch.manual_seed(0)
    loss = model(**batch).loss
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [loss, *torch.autograd.grad(loss, trained, materialize_grads=True)]


@pytest.mark.parametrize("dumps", [pickle.dumps, ForkingPickler.dumps], ids=["file", "process"])
@pytest.mark.parametrize("loss", [True, False], ids=["loss", "no-loss"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "qwen2.5-vl"])
def test_a_pickled_model_comes_back_optimized(family, loss, dumps):
    """With what calls methods of PEFT, of transformers and rewritten ones; `undo` reaches it."""
    torch.manual_seed(0)
    model = families.with_adapter(families.FAMILIES[family].model()).train()
    report = mmopt.optimize(model, loss=loss)
    other = pickle.loads(dumps(model))
    batch = families.FAMILIES[family].batch(0)
    torch.testing.assert_close(step(other, batch), step(model, batch))
    again = mmopt.optimize(other, loss=loss)
    assert again.rows == report.rows
    again.undo()
    assert not any("forward" in vars(module) for module in other.modules())
    report.undo()
    assert other.base_model.model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(step(other, batch), step(model, batch))


def test_a_process_that_only_unpickles_has_the_attention(tmp_path):
    model = build(bert)
    mmopt.optimize(model)
    torch.save(model, tmp_path / "model.pt")
    code = f"""
import torch
model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
assert model.config._attn_implementation == "mmopt"
print(model(input_ids=torch.ones(2, 3, dtype=torch.int64)).logits.shape)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "torch.Size([2, 3])", run.stderr[-2000:]


@pytest.mark.parametrize(
    ("changes", "targets", "became", "reason"),
    [
        ({}, ["query"], True, None),
        ({"use_rslora": True}, ["query"], True, None),
        ({"use_dora": True}, ["query"], True, None),
        ({"lora_bias": True}, ["query"], True, None),
        ({}, ["word_embeddings"], False, "peft's Embedding layer is not covered"),
    ],
    ids=["plain", "rslora", "dora", "lora-bias", "embedding"],
)
def test_lora_rows_say_what_became_of_each_layer(changes, targets, became, reason):
    """And whatever became of them, training or not, gradients are PEFT's."""
    torch.manual_seed(0)
    model = get_peft_model(build(bert), LoraConfig(r=4, target_modules=targets, **changes))
    randomize(model)
    plain = copy.deepcopy(model)
    rows = [row for row in mmopt.optimize(model).rows if row.kind == "lora"]
    assert rows
    for row in rows:
        assert (row.became == "mmopt::lora_linear") is became
        assert (row.reason or "").startswith(reason or "")
        assert bool(row.reason) is bool(reason)
    for training in (False, True):
        results = []
        for each in (model, plain):
            torch.manual_seed(3)
            results.append(run(each.train(training), text("right", "classes")))
        assert_same(*results)


def test_hooks_on_the_layers_within_still_run():
    """The op would not call them."""
    model = build(bert, lora=True)
    mmopt.optimize(model)
    seen = []
    layer = model.base_model.model.bert.encoder.layer[0].attention.self.query
    layer.base_layer.register_forward_hook(lambda *_: seen.append("base"))
    layer.lora_A["default"].register_forward_pre_hook(lambda *_: seen.append("a"))
    model(**text())
    assert seen == ["base", "a"]


@pytest.mark.parametrize("lora", [False, True], ids=["attention", "lora"])
def test_autocast_matches_eager_under_autocast(lora):
    """bfloat16 carries 8 bits; eager itself is as far from float32."""
    model = build(llama, lora=lora)
    plain = copy.deepcopy(model)
    mmopt.optimize(model)
    batch = text("right", "tokens")
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = model(**batch), plain(**batch)
    assert got.logits.dtype == expected.logits.dtype
    torch.testing.assert_close(got.logits, expected.logits, rtol=3e-2, atol=3e-2)


def test_report_renders_and_counts():
    """Rows in full for machines, folded for people."""
    report = mmopt.optimize(build(bert, lora=True), loss=False)
    document = report.to_dict()
    assert document["attached"] == report.attached == len(report.rows)
    assert document["rows"][0] == {
        "name": "base_model.model",
        "kind": "attention",
        "became": "mmopt::attention",
        "reason": None,
    }
    assert report.render().row_count == 2
    assert report.exit_code == 0


def test_choosing_one_kind():
    """What is not asked for is left alone."""
    off = {"attention": False, "lora": False, "loss": False}
    model = build(llama, lora=True)
    for kind in off:
        report = mmopt.optimize(model, **{**off, kind: True})
        assert {row.kind for row in report.rows} == {kind}
        assert (model.config._attn_implementation == "mmopt") is (kind == "attention")
        report.undo()


def test_other_modules_are_refused():
    """One message: what it was, what was expected."""
    with pytest.raises(InputError, match=r"torch\.nn\.modules\.linear\.Linear, expected a trans"):
        mmopt.optimize(nn.Linear(2, 2))


def test_importing_mmopt_imports_neither_torch_nor_transformers():
    """`mmopt --help` answers at once; the lazy names stay functions."""
    code = (
        "import sys, mmopt\n"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)\n"
        "assert sorted(mmopt.__all__) == mmopt.__all__\n"
        "import mmopt.attach, mmopt.compilation, mmopt.cli.compile\n"
        "assert all(callable(getattr(mmopt, n)) for n in mmopt.__all__ if n[0] != '_')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_proof_op_agrees_with_its_fake() -> None:
    found = torch.tensor([[[[0, 1], [0, 2]]]], dtype=torch.int32)
    broken = torch.zeros(1, 2, dtype=torch.bool)
    torch.library.opcheck(torch.ops.mmopt.proven_bounds.default, (found, broken))
