"""`mmopt.optimize` over kinds of attention that models bring; eager transformers is the oracle."""

import copy

import pytest
import torch
from families import (
    BOTH_KINDS,
    GEMMA,
    IMAGE_TOKEN,
    IMAGE_TOKENS,
    SEQUENCE_TO_SEQUENCE,
    TEXT,
    bert,
    gemma3,
    siglip,
    vit,
    whisper,
)
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
)

import mmopt
from mmopt.attach import attention as plumbing

ROWS, LENGTH = 3, 13


def gemma2(**changes):
    # A cap near the scores, so that it bends them.
    return Gemma2ForCausalLM(
        Gemma2Config(
            **{**GEMMA, "layer_types": BOTH_KINDS, "attn_logit_softcapping": 0.5, **changes}
        )
    )


def gpt_oss(**changes):
    config = GptOssConfig(
        **{
            **TEXT,
            "head_dim": 8,
            "sliding_window": 4,
            "layer_types": BOTH_KINDS,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            **changes,
        }
    )
    return GptOssForCausalLM(config)


def mistral():
    return MistralForCausalLM(MistralConfig(**TEXT, sliding_window=4))


def one_layer(window):
    return MistralForCausalLM(
        MistralConfig(**{**TEXT, "num_hidden_layers": 1}, sliding_window=window)
    )


def qwen2():
    return Qwen2ForCausalLM(
        Qwen2Config(**TEXT, use_sliding_window=True, sliding_window=4, layer_types=BOTH_KINDS)
    )


def deepseek_v3():
    """Multi-head latent attention: keys of 12 dimensions, values of 8."""
    sizes = {**TEXT, "num_key_value_heads": 4, "moe_intermediate_size": 16}
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **sizes, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8,
            v_head_dim=8, first_k_dense_replace=2,
        )
    )  # fmt: skip


def bart():
    return BartForConditionalGeneration(
        BartConfig(**SEQUENCE_TO_SEQUENCE, max_position_embeddings=32, forced_eos_token_id=None)
    )


def t5gemma():
    part = {**GEMMA, "layer_types": BOTH_KINDS, "attn_logit_softcapping": 0.5}
    return T5GemmaForConditionalGeneration(T5GemmaConfig(encoder=part, decoder=part))


def ids():
    torch.manual_seed(1)
    return torch.randint(5, 95, (ROWS, LENGTH))


def text(padding=None):
    """Token ids with labels; 4 padded tokens in the first row."""
    batch = {"input_ids": ids()}
    batch["labels"] = batch["input_ids"].clone()
    if padding is not None:
        batch["attention_mask"] = torch.ones(ROWS, LENGTH, dtype=torch.int64)
        batch["attention_mask"][0, slice(-4, None) if padding == "right" else slice(0, 4)] = 0
        batch["labels"][batch["attention_mask"] == 0] = -100
        if padding == "left":  # the padding before it would predict it: nobody trains that
            batch["labels"][0, 4] = -100
    return batch


def packed():
    """Two documents in each row, told by position ids alone."""
    positions = torch.tensor([[*range(5), *range(LENGTH - 5)]]).expand(ROWS, -1).contiguous()
    return {**text(), "position_ids": positions, "use_cache": False}


def classes(padding=None):
    return {**text(padding), "labels": torch.tensor([0, 2, 1])}


def pixels(rows=ROWS):
    torch.manual_seed(2)
    return {"pixel_values": torch.randn(rows, 3, 16, 16), "labels": torch.tensor([0, 2, 1])}


def with_images(padding=None):
    """An image block inside the text of each row, longer than half the window and across it."""
    batch = text(padding)
    block = slice(5, 5 + IMAGE_TOKENS)
    batch["input_ids"][:, block] = IMAGE_TOKEN
    batch["labels"][:, block] = -100
    batch["token_type_ids"] = (batch["input_ids"] == IMAGE_TOKEN).long()
    return {**batch, "pixel_values": pixels()["pixel_values"]}


def spoken():
    torch.manual_seed(2)
    return {"input_features": torch.randn(ROWS, 8, 40), "labels": ids()[:, :5].contiguous()}


def translated():
    return {**text("right"), "labels": ids()[:, :5].contiguous()}


CASES = {
    "gemma2-softcap": (gemma2, text),
    "gemma2-softcap-left-padding": (gemma2, lambda: text("left")),
    "gpt-oss-sinks": (gpt_oss, text),
    "gpt-oss-sinks-right-padding": (gpt_oss, lambda: text("right")),
    "gemma3-image-blocks": (gemma3, with_images),
    "gemma3-image-blocks-left-padding": (gemma3, lambda: with_images("left")),
    "mistral-sliding-left-padding": (mistral, lambda: text("left")),
    "mistral-sliding-packed": (mistral, packed),
    "qwen2-sliding-and-full": (qwen2, lambda: text("right")),
    "deepseek-v3-narrow-values": (deepseek_v3, lambda: text("right")),
    "bert-padded": (bert, lambda: classes("right")),
    "vit": (vit, pixels),
    "siglip": (siglip, lambda: {**text(), **pixels(), "return_loss": True}),
    "whisper-cross-attention": (whisper, spoken),
    "bart-cross-attention-padded": (bart, translated),
    "t5gemma-softcap-cross-attention": (t5gemma, translated),
}


def pair(factory):
    """The model in eager attention, and a copy with the op."""
    torch.manual_seed(0)
    plain = factory().eval()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if name.endswith("sinks"):
                parameter.normal_()
            elif parameter.dim() > 1:
                # Wider than the usual 0.02: scores far from zero, so that masks and caps matter.
                parameter.mul_(5)
    attached = copy.deepcopy(plain)
    report = mmopt.optimize(attached, loss=False)
    left = [row.reason for row in report.rows if not row.became]
    assert all("nn.MultiheadAttention" in reason for reason in left), left
    plain.set_attn_implementation("eager")
    return plain, attached


def run(model, batch):
    batch = {k: v for k, v in batch.items() if not (k == "labels" and "return_loss" in batch)}
    output = model(**batch)
    logits = output.logits if hasattr(output, "logits") else output.logits_per_text
    mask = batch.get("attention_mask")
    if mask is not None and logits.shape[:2] == mask.shape:
        logits = logits[mask.bool()]  # what stands at padding nobody reads
    model.zero_grad()
    # Not autograd.grad: re-entrant checkpointing cannot do that.
    output.loss.backward()
    grads = {name: x.grad for name, x in model.named_parameters() if x.requires_grad}
    return logits.detach(), output.loss.detach(), grads


def assert_same(got, expected, *, rtol=1e-4):
    torch.testing.assert_close(got[0], expected[0], rtol=rtol, atol=1e-5)
    torch.testing.assert_close(got[1], expected[1], rtol=rtol, atol=1e-6)
    for name, gradient in expected[2].items():
        if gradient is None:
            assert got[2][name] is None, name
            continue
        # Sums over tokens: what cancels leaves an error of the size of what was added.
        atol = 1e-5 * max(0.1, float(gradient.abs().max()))
        torch.testing.assert_close(
            got[2][name], gradient, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("case", CASES)
def test_outputs_loss_and_every_gradient_match_eager(case):
    """Softcap, sinks, windows, image blocks, cross attention: the op computes what eager does."""
    factory, batch = CASES[case]
    plain, attached = pair(factory)
    assert_same(run(attached, batch()), run(plain, batch()))


@pytest.mark.parametrize("case", ["gemma2-softcap", "gpt-oss-sinks", "gemma3-image-blocks"])
def test_autocast_matches_eager_under_autocast(case):
    """bfloat16 carries 8 bits; sinks and cap are applied in float32 like the scores."""
    factory, batch = CASES[case]
    plain, attached = pair(factory)
    with torch.no_grad():
        exact = plain(**batch()).logits
        with torch.autocast("cpu", torch.bfloat16):
            got, expected = attached(**batch()).logits, plain(**batch()).logits
    assert got.dtype == expected.dtype
    error, eager_error = ((x.float() - exact).abs().mean() for x in (got, expected))
    assert 0 < error <= 2 * eager_error


# --- dropout ------------------------------------------------------------------------------------


DROPOUT = {
    "bert": (lambda: bert(attention_probs_dropout_prob=0.2), lambda: classes("right")),
    "gpt-oss": (lambda: gpt_oss(attention_dropout=0.2), lambda: text("right")),
    "gemma2": (lambda: gemma2(attention_dropout=0.2), text),
}


def seeded(model, batch):
    torch.manual_seed(5)
    return run(model, batch)


@pytest.mark.parametrize("case", DROPOUT)
def test_dropout_in_training_follows_the_seed_of_torch_and_evaluation_has_none(case):
    factory, batch = DROPOUT[case]
    plain, attached = pair(factory)
    assert_same(run(attached, batch()), run(plain, batch()))
    attached.train()
    first, second = seeded(attached, batch()), seeded(attached, batch())
    assert_same(second, first, rtol=0)
    assert not torch.equal(run(attached, batch())[0], first[0])


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_dropout_keeps_the_mean_and_the_spread_of_eager_dropout(softcap):
    """Over many draws both have the mean of no dropout, and one variance."""
    torch.manual_seed(0)
    module = torch.nn.Module().train()
    module.is_causal, module.num_key_value_groups, module.head_dim = True, 2, 8
    q, k, v = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
    n, p = 4000, 0.3
    sink = torch.randn(4)

    def ours(dropout, copies):
        return plumbing.interval_attention(
            module, *(x.expand(copies, -1, -1, -1) for x in (q, k, v)), None, dropout=dropout,
            scaling=0.5, softcap=softcap, s_aux=sink,
        )[0]  # fmt: skip

    # [6, 6] probabilities of each head, the sink's taken off.
    scores = 0.5 * q @ k.repeat_interleave(2, 1).mT
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~torch.ones(6, 6).tril().bool(), -torch.inf)
    scores = torch.cat([scores, sink.view(1, 4, 1, 1).expand(1, 4, 6, 1)], 3)
    weights = scores.softmax(3)[..., :-1]
    values = v.repeat_interleave(2, 1)
    mean = (weights @ values).transpose(1, 2)
    torch.testing.assert_close(ours(0.0, 1), mean, rtol=1e-5, atol=1e-6)
    variance = (p / (1 - p) * weights.square() @ values.square()).transpose(1, 2)
    draws = ours(p, n)
    # Five standard errors; a variance estimated from n draws of few values is off by some 10%.
    assert ((draws.mean(0) - mean[0]).abs() <= 5 * (variance[0] / n).sqrt() + 1e-6).all()
    torch.testing.assert_close(draws.var(0), variance[0], rtol=0.2, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("case", DROPOUT)
def test_checkpointing_recomputes_the_dropout_that_it_saw(case, reentrant):
    """Gradients with activation checkpointing are those without, for one seed."""
    factory, batch = DROPOUT[case]
    _, attached = pair(factory)
    attached.train()
    expected = seeded(attached, batch())
    attached.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        attached.enable_input_require_grads()
    forwards = []
    layer = next(m for m in attached.modules() if "Attention" in type(m).__name__)
    layer.register_forward_hook(lambda *_: forwards.append(1))
    got = seeded(attached, batch())
    assert len(forwards) == 2  # the second to recompute it
    assert_same(got, expected, rtol=0)


# --- compiled -----------------------------------------------------------------------------------


def lengthened(batch, length):
    """The batch with `length` tokens: more, or fewer, at the end."""
    torch.manual_seed(3)
    more = {}
    for name, x in batch.items():
        if not isinstance(x, torch.Tensor) or x.dim() != 2 or name == "pixel_values":
            more[name] = x
        elif length <= LENGTH:
            more[name] = x[:, :length].clone()  # a view is guarded with its base
        else:
            extra = torch.randint(5, 95, (ROWS, length - LENGTH))
            if name == "position_ids":
                extra = torch.arange(LENGTH - 5, length - 5).expand(ROWS, -1)
            elif name == "attention_mask":
                extra = torch.ones_like(extra)
            elif name == "token_type_ids":
                extra = torch.zeros_like(extra)
            more[name] = torch.cat([x, extra], 1)
    return more


# A layer takes seconds to trace.
ONE = {"num_hidden_layers": 1}
COMPILED = {
    "causal": (lambda: one_layer(None), text),
    "packed-sliding": (lambda: one_layer(4), packed),
    # Two layers, sliding and full. Its text part alone: the vision tower has no mask.
    "image-blocks-padded": (gemma3, lambda: {**with_images("left"), "pixel_values": None}),
    "softcap": (lambda: gemma2(layer_types=BOTH_KINDS[1:], **ONE), lambda: text("left")),
    "sinks-and-dropout": (
        lambda: gpt_oss(attention_dropout=0.2, layer_types=BOTH_KINDS[:1], **ONE),
        lambda: text("left"),
    ),
}


QUICK = ("packed-sliding",)


@pytest.mark.parametrize(
    "case",
    [pytest.param(one, marks=() if one in QUICK else pytest.mark.slow) for one in COMPILED],
)
def test_one_compiled_graph_serves_every_length(case):
    """fullgraph, dynamic: no break, and an error on any recompile; forward and backward.

    What Inductor makes of the mask is held in test_compile.py.
    """
    factory, batch = COMPILED[case]
    _, attached = pair(factory)
    attached.train("dropout" in case)
    torch._dynamo.reset()
    compiled = torch.compile(attached, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (LENGTH, 11, 17):
            each = {**lengthened(batch(), length), "use_cache": False}
            got = seeded(compiled, each)
            expected = seeded(attached, each)
            grads = {f"_orig_mod.{name}": gradient for name, gradient in expected[2].items()}
            assert_same(got, (*expected[:2], grads))
