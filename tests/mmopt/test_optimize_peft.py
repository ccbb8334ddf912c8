"""LoRA layers attached to mmopt's op; PEFT, left as it was, is the oracle for each configuration.

Both sides are built alike and fed alike. Where dropout is at work, PEFT's draws the op's own mask.
"""

import contextlib
import copy
import re

import pytest
import torch
from peft import (
    AdaptionPromptConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PromptTuningConfig,
    get_peft_model,
)
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import mmopt
from mmopt.attach.gradients import check_gradients, dead_adapters
from mmopt.attach.lora import OP, attach_lora
from mmopt_kernels.dropout.reference import keep_mask
from mmopt_kernels.errors import CheckFailedError

# A row is an NF4 block at least: bitsandbytes' dequantization on a CPU is wrong for shorter ones.
ROWS, LENGTH, WIDTH = 3, 5, 64
BF16 = torch.bfloat16


pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """A gated block and a head, as in a decoder: one input read twice, biases here and there."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.gate = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, 7)

    def forward(self, x):
        return self.head(x + self.down(nn.functional.silu(self.gate(x)) * self.up(x)))


def quantized(net, kind, dtype=torch.float32):
    """The net with bitsandbytes' layers in place of three linears."""
    bnb = pytest.importorskip("bitsandbytes")
    for name in ("up", "gate", "down"):
        linear = getattr(net, name)
        shape = (linear.in_features, linear.out_features, linear.bias is not None)
        if kind == "int8":
            made = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False)
        else:
            made = bnb.nn.Linear4bit(
                *shape, quant_type=kind.removesuffix("-nested"), compute_dtype=dtype,
                compress_statistics=kind.endswith("-nested"),
            )  # fmt: skip
        made.load_state_dict(linear.state_dict())
        setattr(net, name, made.to("cpu"))
    setattr(net, "is_loaded_in_8bit" if kind == "int8" else "is_loaded_in_4bit", True)
    return net


def build(changes, base="dense", dtype=torch.float32):
    """The net with its adapters (named default, or by `changes`), each B with a value."""
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2)
    if base != "dense":
        net = quantized(net, base, dtype)
    net = net.to(dtype)
    adapters = changes if isinstance(changes, list) else [changes]
    model = None
    for index, each in enumerate(adapters):
        settings = {"r": 4, "lora_alpha": 6, "target_modules": ["up", "gate", "down"], **each}
        name = settings.pop("name", "default" if index == 0 else f"more{index}")
        config = LoraConfig(**settings)
        if model is None:
            model = get_peft_model(net, config, name)
        else:
            model.add_adapter(name, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
            if "lora_magnitude" in name:
                parameter.mul_(1.1)
    return model.eval()


def pair(changes, base="dense", dtype=torch.float32):
    plain, attached = build(changes, base, dtype), build(changes, base, dtype)
    rows, _ = attach_lora(attached)
    return plain, attached, rows


def batch(dtype=torch.float32, seed=1):
    torch.manual_seed(seed)
    return torch.randn(ROWS, LENGTH, WIDTH).to(dtype)


def loss_of(model, x, **kwargs):
    torch.manual_seed(7)
    output = model(x, **kwargs)
    return output, output.float().square().mean()


def run(model, x, **kwargs):
    """Output, and the gradients of x and of everything trained."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    output, loss = loss_of(model, x, **kwargs)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output.detach(), {"x": x.grad, **grads}


def off(got, expected):
    """The difference over the size of what is expected; every element counts the same."""
    assert got.dtype == expected.dtype
    got, expected = got.double(), expected.double()
    assert got.isfinite().all()
    return float(((got - expected).norm() / expected.norm().clamp(min=1e-30)).detach())


def assert_same(got, expected, tolerance):
    assert off(got[0], expected[0]) <= tolerance
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert off(got[1][name], gradient) <= tolerance, name


def never_peft(model, monkeypatch):
    """PEFT's forward of LoRA layers raises where the op is attached: it must not be needed."""
    for module in model.modules():
        if "forward" in vars(module):
            monkeypatch.setattr(
                type(module), "forward", lambda *_args, **_kwargs: pytest.fail("PEFT's forward ran")
            )


# --- the configurations ---------------------------------------------------------------------------


class OwnMask(nn.Module):
    """Dropout by the mask that the op draws, from the same seed of the same generator."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training:
            return x
        seed = torch.randint(2**63 - 1, (1,), device=x.device)
        keep = keep_mask(seed, self.p, x.numel() // x.shape[-1], x.shape[-1]).view(x.shape)
        return torch.where(keep, x / (1 - self.p), 0)


def with_own_masks(model):
    for module in model.modules():
        for name, dropout in getattr(module, "lora_dropout", {}).items():
            if isinstance(dropout, nn.Dropout):
                module.lora_dropout[name] = OwnMask(dropout.p).train(dropout.training)


PATTERNS = {
    "rank_pattern": {"gate": 7, "down": 1},
    "alpha_pattern": {"up": 3, "down": 11},
}
TWO = [{}, {"r": 3, "lora_alpha": 5, "target_modules": ["up", "down"], "use_rslora": True}]
CONFIGS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "rank-and-alpha-pattern": PATTERNS,
    "dropout": {"lora_dropout": 0.3},
    "dora": {"use_dora": True},
    "dora-dropout": {"use_dora": True, "lora_dropout": 0.3},
    "dora-patterns": {"use_dora": True, **PATTERNS},
    "lora-bias": {"lora_bias": True},
    "modules-to-save": {"modules_to_save": ["head"]},
    "two-active": TWO,
}
BASES = ("dense", "nf4", "nf4-nested", "int8")
FEW = ("plain", "dropout", "dora", "dora-dropout", "lora-bias", "two-active")
CASES = [
    *((config, "dense", torch.float32) for config in CONFIGS),
    *((config, "dense", BF16) for config in FEW),
    *((config, "nf4", torch.float32) for config in FEW),
    ("plain", "nf4", BF16),
    ("dropout", "nf4", BF16),
    *((config, "nf4-nested", torch.float32) for config in ("plain", "dora-dropout")),
    *((config, "int8", torch.float32) for config in FEW),
    ("plain", "int8", BF16),
]


def name_of(case):
    return case if isinstance(case, str) else str(case).removeprefix("torch.")


def activate(model, config):
    if config == "two-active":
        model.base_model.set_adapter(["default", "more1"])


# float32 sums in another order; bfloat16 has 8 bits, and PEFT rounds the sum of base and adapter
# where the op rounds nothing. The updates of 20 steps add the errors of 20 gradients.
TOLERANCE = {torch.float32: 2e-5, BF16: 2e-2}
TRAINED = {torch.float32: 1e-4, BF16: 5e-2}


@pytest.mark.parametrize(("config", "base", "dtype"), CASES, ids=name_of)
def test_outputs_gradients_and_20_steps_are_those_of_peft(config, base, dtype):
    """In evaluation, in training, and after 20 steps of it; the op serves every layer."""
    plain, attached, rows = pair(CONFIGS[config], base, dtype)
    for each in (plain, attached):
        activate(each, config)
    assert [row.became for row in rows] == [OP] * 3
    x = batch(dtype)
    if base != "int8":  # in evaluation bitsandbytes rounds activations to int8, on a CPU too
        assert_same(run(attached, x), run(plain, x), TOLERANCE[dtype])
    with_own_masks(plain)
    for each in (plain, attached):
        each.train()
    with pytest.MonkeyPatch.context() as patch:
        expected = run(plain, x)
        never_peft(attached, patch)
        got = run(attached, x)
    assert_same(got, expected, TOLERANCE[dtype])
    assert len(expected[1]) > 6
    if base == "int8" and "dora" in config:
        return  # in PEFT's second forward bitsandbytes has lost the scales of the rows

    start = {name: p.detach().clone() for name, p in plain.named_parameters() if p.requires_grad}
    ends = []
    for each in (plain, attached):
        optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.02)
        for step in range(20):
            optimizer.zero_grad()
            loss_of(each, batch(dtype, step))[1].backward()
            optimizer.step()
        ends.append(dict(each.named_parameters()))
    for name, before in start.items():
        plain_moved, moved = (end[name].detach() - before for end in ends)
        assert plain_moved.norm() > 0, name
        assert off(moved, plain_moved) <= TRAINED[dtype], name


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("config", ["plain", "dora", "lora-bias", "two-active", "dropout"])
def test_autocast_computes_what_peft_does_under_autocast(config, base, monkeypatch):
    """float32 weights and adapters under bfloat16 autocast; an NF4 base computes in it."""
    plain, attached, _ = pair(
        CONFIGS[config], base, torch.float32 if base == "dense" else BF16
    )  # the head is the only other layer
    if base == "nf4":
        for each in (plain, attached):
            each.base_model.model.head.float()
    for each in (plain, attached):
        activate(each.train(), config)
    with_own_masks(plain)
    with torch.autocast("cpu", BF16):
        expected = run(plain, batch())
        never_peft(attached, monkeypatch)
        got = run(attached, batch())
    assert_same(got, expected, 3e-2)


def test_dropout_keeps_mean_and_spread_of_peft():
    """PEFT draws other masks; over many draws of one layer mean and variance are the same."""
    p, draws = 0.3, 4000
    model = build({"lora_dropout": p, "target_modules": ["up"]}).train()
    attach_lora(model)
    layer = model.base_model.model.up
    x = batch()[0, :1]
    with torch.no_grad():
        torch.manual_seed(3)
        got = layer(x.expand(draws, WIDTH))
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        mean = layer.base_layer(x) + x @ a.T @ b.T * 1.5
        variance = p / (1 - p) * x.square() @ (1.5 * b @ a).square().T
    assert ((got.mean(0) - mean).abs() <= 5 * (variance / draws).sqrt()).all()
    torch.testing.assert_close(got.var(0), variance[0], rtol=0.2, atol=0)


# --- rows of one batch with adapters of their own -------------------------------------------------

MIXED = [{}, {"r": 7, "target_modules": ["up", "down"]}, {"r": 1, "lora_alpha": 3}]


@pytest.mark.parametrize("base", BASES)
def test_adapter_names_serve_each_row_with_its_own(base, monkeypatch):
    """Adapters of different rank and scale, some not in every layer, and the base alone."""
    plain, attached, _ = pair(MIXED, base)
    x = batch()
    names = [["more1", "__base__", "default"], ["more2"] * 3, ["default", "more1", "more2"]]
    for model in (plain, attached):
        for module in model.modules():
            # Or bitsandbytes repacks NF4 weights in evaluation, and rounds them.
            module.support_avx512bf16_for_cpu = False
    with torch.no_grad():  # PEFT writes into results of bitsandbytes, which autograd forbids
        expected = [plain(x, adapter_names=each) for each in names]
        for each, output in zip(names, expected, strict=True):
            with monkeypatch.context() as patch:
                never_peft(attached, patch)
                got = attached(x, adapter_names=each)
            # bitsandbytes rounds int8 activations in evaluation: to 1/127 of the largest of a row.
            assert off(got, output) <= (2e-2 if base == "int8" else 2e-5)
        assert off(expected[0], expected[2]) > 0.01
        alone = ["__base__"] * ROWS
        assert off(attached(x, adapter_names=alone), plain(x, adapter_names=alone)) == 0


def test_adapter_names_that_the_op_cannot_serve_are_served_by_peft():
    """lora_bias for some rows; and PEFT's own complaints stay."""
    plain, attached, _ = pair([{}, {"lora_bias": True}])
    names = ["default", "more1", "__base__"]
    assert off(attached(batch(), adapter_names=names), plain(batch(), adapter_names=names)) <= 2e-5
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        attached(batch(), adapter_names=names[:2])
    attached.merge_adapter()
    with pytest.raises(ValueError, match="there are merged adapters"):
        attached(batch(), adapter_names=names)


# --- what PEFT does afterwards --------------------------------------------------------------------


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("config", ["plain", "dora", "rank-and-alpha-pattern"])
def test_peft_operations_keep_their_results(config, base, tmp_path):
    """set_adapter, disable, add, scale, merge, unmerge, save and load, delete, unload."""
    plain, attached, _ = pair(CONFIGS[config], base)
    both = (plain, attached)
    # Needs a gradient: in evaluation without one, bitsandbytes repacks the weight of a layer that
    # it computes itself, which rounds it, on a CPU with AVX512-BF16.
    x = batch().requires_grad_()

    def same(tolerance=2e-5):
        assert off(attached(x), plain(x)) <= tolerance

    for each in both:
        torch.manual_seed(5)
        each.add_adapter("later", LoraConfig(r=2, lora_alpha=5, target_modules=["up", "gate"]))
        for name, parameter in each.named_parameters():
            if "lora_B.later" in name:
                nn.init.normal_(parameter, std=0.2)
    first = attached(x)
    same()
    for each in both:
        each.set_adapter("later")
    same()
    assert off(attached(x), first) > 0.01
    with attached.disable_adapter(), plain.disable_adapter():
        same()
    for each in both:
        each.base_model.model.up.set_scale("later", 2.5)
    same()
    for each in both:
        each.base_model.set_adapter(["default", "later"])
    same()
    for each in both:
        each.set_adapter("default")
        each.merge_adapter()
    same()
    for each in both:
        each.unmerge_adapter()
    same()
    for each, folder in zip(both, ("plain", "attached"), strict=True):
        each.save_pretrained(tmp_path / folder)
    saved = [tmp_path / at / "adapter_model.safetensors" for at in ("plain", "attached")]
    assert saved[0].read_bytes() == saved[1].read_bytes()
    for each in both:
        each.load_adapter(tmp_path / "attached" / "later", "loaded")
        each.set_adapter("loaded")
        each.delete_adapter("later")
    same()
    for each in both:
        each.set_adapter("default")
    same()
    if base == "dense":  # merging and unmerging quantizes an NF4 base anew, twice
        assert off(attached(x), first) <= 1e-5
    plain, attached = (each.merge_and_unload() for each in both)
    same()
    assert not any("forward" in vars(module) for module in attached.modules())


def test_unloading_leaves_the_base_as_it_was():
    plain, attached, _ = pair({})
    plain, attached = plain.unload(), attached.unload()
    assert off(attached(batch()), plain(batch())) == 0
    assert not any("forward" in vars(module) for module in attached.modules())


@pytest.mark.parametrize("compiled", [False, True])
def test_hot_swapped_adapter_is_the_one_that_runs(compiled, tmp_path):
    """Weights of another rank and scale, copied into place; compiled, without a recompile."""
    plain, attached, _ = pair({})
    other = build({"r": 8, "lora_alpha": 2})
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    for each in (plain, attached):
        prepare_model_for_compiled_hotswap(each, target_rank=8)
    assert off(attached(batch()), plain(batch())) <= 2e-5
    other.save_pretrained(tmp_path)
    call = attached
    if compiled:
        torch._dynamo.reset()
        call = torch.compile(attached, fullgraph=True, backend="aot_eager")
        call(batch())
    for each in (plain, attached):
        hotswap_adapter(each, tmp_path, adapter_name="default", torch_device="cpu")
    with torch._dynamo.config.patch(error_on_recompile=True):
        got = call(batch())
    assert off(got, plain(batch())) <= 2e-5
    assert off(got, other(batch())) <= 2e-5


def test_a_swapped_adapter_of_another_scale_compiles_nothing_again(tmp_path):
    """In mmopt.compile floats are constants; after PEFT's preparation scales are tensors."""
    config = LlamaConfig(vocab_size=64, hidden_size=WIDTH, intermediate_size=96,
                         num_hidden_layers=1, num_attention_heads=2)  # fmt: skip

    def llama(alpha):
        torch.manual_seed(0)
        lora = LoraConfig(r=4, lora_alpha=alpha, target_modules=["q_proj", "down_proj"])
        model = get_peft_model(LlamaForCausalLM(config), lora).eval()
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                nn.init.normal_(parameter)
        return model

    model, other = llama(8), llama(32)
    other.save_pretrained(tmp_path)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    mmopt.optimize(model)
    ids = torch.randint(5, 60, (2, 12))
    with torch.no_grad():
        compiled = mmopt.compile(model, {"input_ids": ids}, mode="infer")
        before = compiled(input_ids=ids).logits
        recompiles = len(compiled.recompiles)
        hotswap_adapter(model, tmp_path, adapter_name="default", torch_device="cpu")
        after, want = compiled(input_ids=ids).logits, other(input_ids=ids).logits
    assert len(compiled.recompiles) == recompiles
    assert off(after, want) <= 2e-5
    assert off(before, want) > 1e-2


def test_layers_added_later_are_peft_s_until_attached_again():
    """A new adapter on a new module makes a new layer."""
    model = build({"target_modules": ["up"]})
    attach_lora(model)
    model.add_adapter("more", LoraConfig(r=2, target_modules=["down"]))
    assert "forward" not in vars(model.base_model.model.down)
    rows, restore = attach_lora(model)
    assert [row.became for row in rows] == [OP] * 2
    restore()
    assert not any("forward" in vars(module) for module in model.modules())


# --- what is left to PEFT -------------------------------------------------------------------------


def remarks(model):
    return {row.name.rpartition(".")[2]: (row.became, row.reason) for row in attach_lora(model)[0]}


def test_two_active_adapters_with_dropout_are_peft_s_in_training():
    """Each has a mask of its own there; in evaluation the op serves both."""
    changes = [{"lora_dropout": 0.3}, {"lora_dropout": 0.3}]
    plain, attached, _ = pair(changes)
    for each in (plain, attached):
        each.base_model.set_adapter(["default", "more1"])
        each.train()
    assert_same(run(attached, batch()), run(plain, batch()), 0)
    reason = "2 adapters are active in training, each with a dropout of its own: PEFT's forward"
    assert remarks(attached)["up"][1].startswith(reason)
    for each in (plain, attached):
        each.eval()
    with pytest.MonkeyPatch.context() as patch:
        expected = run(plain, batch())
        never_peft(attached, patch)
        assert_same(run(attached, batch()), expected, 2e-5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"}, "'default' is ALora"),
    ],
    ids=["alora"],
)
def test_variants_that_the_op_does_not_have_are_left_alone(changes, reason):
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_llama())
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], **changes))
    for became, why in remarks(model).values():
        assert became is None
        assert reason in why


def test_other_layers_and_other_adapters_are_left_alone_with_the_reason():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(9, 4)
            self.conv = nn.Conv1d(4, 4, 1)
            self.linear = nn.Linear(4, 4)
            self.eighth = nn.Linear(4, 4)

        def forward(self, ids):
            return self.linear(self.conv(self.embedding(ids).mT).mT)

    targets = ["embedding", "conv", "linear", "eighth"]
    model = get_peft_model(Mixed(), LoraConfig(r=2, target_modules=targets))
    model.base_model.model.eighth.base_layer.weight.data = torch.zeros(4, 4).to(torch.float8_e5m2)
    found = remarks(model)
    assert found["linear"] == (OP, None)
    assert found["embedding"][1].startswith("peft's Embedding layer is not covered")
    assert found["conv"][1].startswith("peft's Conv1d layer is not covered")
    assert found["eighth"][1].startswith("its base weight is torch.float8_e5m2, expected")
    model = get_peft_model(Mixed(), IA3Config(target_modules=["linear"], feedforward_modules=[]))
    assert remarks(model) == {"linear": (None, "its adapter is ia3's Linear, expected LoRA")}


def test_a_mixed_model_has_its_lora_layers_served_and_the_others_named():
    """PEFT's other wrapper, around adapters of several types at once."""

    def mixed():
        torch.manual_seed(0)
        model = get_peft_model(
            LlamaForCausalLM(tiny_llama()), LoraConfig(target_modules=["v_proj"]), "a", mixed=True
        )
        model.add_adapter("h", LoHaConfig(r=2, target_modules=["q_proj"]))
        model.set_adapter(["a", "h"])
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.1)
        return model.train()

    plain, attached = mixed(), mixed()
    rows = {row.name.rpartition(".")[2]: row for row in mmopt.optimize(attached).rows}
    assert rows["v_proj"].became == OP
    assert rows["q_proj"].reason == "its adapter is loha's Linear, expected LoRA"
    ids = torch.arange(8).view(1, 8)
    got, want = (model(input_ids=ids, labels=ids).loss for model in (attached, plain))
    torch.testing.assert_close(got, want)
    got.backward()
    want.backward()
    for one, other in zip(attached.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        AdaptionPromptConfig(adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM"),
    ],
    ids=["prompts", "prompts in layers"],
)
def test_adapters_that_adapt_no_layer_are_named(config):
    model = get_peft_model(LlamaForCausalLM(tiny_llama()), config, "a")
    (row,) = [row for row in mmopt.optimize(model).rows if row.kind == "lora"]
    kind = config.peft_type.value
    assert (row.name, row.became) == ("", None)
    assert row.reason == f"adapter 'a' is PEFT's {kind}, without layers of LoRA's"


def test_a_merged_model_has_no_adapters_to_name():
    model = get_peft_model(LlamaForCausalLM(tiny_llama()), LoraConfig(target_modules=["q_proj"]))
    assert {row.kind for row in mmopt.optimize(model.merge_and_unload()).rows} == {
        "attention",
        "loss",
    }


@pytest.mark.parametrize("base", ["fp4", "int8"])
def test_quantized_rows_say_what_differs(base):
    """FP4 is another code; int8 activations are rounded by bitsandbytes on a GPU, not here."""
    found = remarks(build({}, base))
    for became, reason in found.values():
        assert became == (OP if base == "int8" else None)
        assert ("activations" if base == "int8" else "is fp4, expected nf4") in reason


def test_hooks_run_wherever_they_are_put():
    """On the base, on A, on B, on the dropout and on the magnitude; forward and backward."""
    attached = build({"use_dora": True, "lora_dropout": 0.1})
    attach_lora(attached)
    layer = attached.train().base_model.model.up
    places = {
        "base": layer.base_layer,
        "a": layer.lora_A["default"],
        "b": layer.lora_B["default"],
        "dropout": layer.lora_dropout["default"],
        "magnitude": layer.lora_magnitude_vector["default"],
    }
    for name, module in places.items():
        seen = []
        for handle in (
            module.register_forward_hook(lambda *_, n=name, s=seen: s.append(n)),
            module.register_full_backward_hook(lambda *_, n=name, s=seen: s.append(n)),
        ):
            seen.clear()
            run(attached, batch())
            assert name in seen
            handle.remove()


def test_gpt2_s_transposed_base_is_served(monkeypatch):
    """Conv1D stores [in, out]; what PEFT merges is transposed too."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=99, n_embd=32, n_layer=1, n_head=4)
    model = get_peft_model(
        GPT2LMHeadModel(config).eval(),
        LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    attached = copy.deepcopy(model)
    rows, _ = attach_lora(attached)
    assert [row.became for row in rows] == [OP] * 3
    ids = torch.randint(0, 99, (2, 9))
    results = []
    for each in (model, attached):
        output = each(input_ids=ids, labels=ids)
        output.loss.backward()
        grads = {n: p.grad for n, p in each.named_parameters() if p.grad is not None}
        results.append((output.logits.detach(), grads))
        never_peft(attached, monkeypatch)
    assert_same(results[1], results[0], 5e-5)
    assert len(results[0][1]) == 6


# --- casts ----------------------------------------------------------------------------------------


class Casts(TorchDispatchMode):
    """The casts between floating dtypes that ran: the number of elements of each."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and args[0].dtype != out.dtype:
            self.sizes.append(out.numel())
        return out


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_only_adapters_are_cast_never_activations(dropout):
    """float32 adapters over a bfloat16 base, forward and backward; PEFT casts the activations.

    With dropout all of ours happens inside ops, where nothing here looks.
    """
    plain, attached, _ = pair({"lora_dropout": dropout}, dtype=BF16)
    rows = 500  # an activation is larger than every weight
    activations, adapters = [], []
    for each in (plain, attached):
        x = torch.randn(rows, WIDTH, dtype=BF16, requires_grad=True)
        layer = each.train().base_model.model.up
        with Casts() as casts:
            layer(x).sum().backward()
        activations.append(sum(size >= rows * WIDTH for size in casts.sizes))
        adapters.append(sum(size <= 4 * 2 * WIDTH for size in casts.sizes))
    assert activations[0] >= 4
    assert activations[1] == 0
    assert adapters[0] == 0
    assert adapters[1] >= 2 or dropout > 0


# --- compiled -------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", ["plain", "dropout", "dora", "two-active", "lora-bias"])
def test_one_graph_serves_every_length_and_every_scale(config):
    """fullgraph, dynamic=True: no recompile when the batch or PEFT's scaling changes."""
    plain, attached, _ = pair(CONFIGS[config])
    with_own_masks(plain)
    for each in (plain, attached):
        activate(each.train(), config)
    torch._dynamo.reset()
    compiled = torch.compile(attached, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length, scale in ((5, 1.0), (7, 2.0), (3, 0.3)):
            torch.manual_seed(2)
            x = torch.randn(ROWS, length, WIDTH)
            for each in (plain, attached):
                for layer in each.modules():
                    if hasattr(layer, "set_scale"):
                        layer.set_scale("default", scale)
            got, expected = run(compiled, x), run(plain, x)
            grads = {name.removeprefix("_orig_mod."): grad for name, grad in got[1].items()}
            assert_same((got[0], grads), expected, 5e-5)


def test_a_new_scale_costs_one_recompile_at_most_where_sizes_are_static():
    """Dynamo's own step from a constant to a number that may change."""
    _, attached, _ = pair({})
    torch._dynamo.reset()
    graphs = []

    def counting(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(attached, fullgraph=True, backend=counting)
    for scale in (1.0, 2.0, 3.0, 0.7):
        for layer in attached.modules():
            if hasattr(layer, "set_scale"):
                layer.set_scale("default", scale)
        assert off(compiled(batch()), attached(batch())) <= 2e-5
    assert len(graphs) == 2


def test_quantized_base_compiles_into_one_graph():
    """Eager, silently, is what QLoRA under torch.compile becomes elsewhere."""
    for base in ("nf4", "nf4-nested", "int8"):
        plain, attached, _ = pair({"lora_dropout": 0.3}, base)
        with_own_masks(plain)
        for each in (plain, attached):
            each.train()
        torch._dynamo.reset()
        compiled = torch.compile(attached, fullgraph=True, dynamic=True, backend="aot_eager")
        with torch._dynamo.config.patch(error_on_recompile=True):
            for length in (5, 7):
                x = torch.randn(ROWS, length, WIDTH)
                got, expected = run(compiled, x), run(plain, x)
                grads = {name.removeprefix("_orig_mod."): grad for name, grad in got[1].items()}
                assert_same((got[0], grads), expected, 5e-5)


def vision_language_model():
    """Gemma 3 with a tower of images, one layer of each kind; LoRA with dropout everywhere."""
    text = {
        "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8, "sliding_window": 4,
        "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"],
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
        "intermediate_size": 48, "image_size": 16, "patch_size": 4, "vision_use_head": False,
    }  # fmt: skip
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=text,
            vision_config=vision,
            mm_tokens_per_image=4,
            image_token_id=97,
            boi_token_id=95,
            eoi_token_id=96,
        )
    )
    model = get_peft_model(
        model, LoraConfig(r=4, lora_dropout=0.25, target_modules=r".*\.(q|k|v|o|up|down)_proj")
    )
    for name, parameter in model.named_parameters():
        # The projection of images starts at zero, and hides the tower from the loss.
        if "lora_B" in name or "mm_input_projection" in name:
            nn.init.normal_(parameter, std=0.2)
    return model.train()


def image_and_text():
    torch.manual_seed(1)
    ids = torch.randint(5, 95, (2, 13))
    ids[:, 5:9] = 97
    labels = ids.clone()
    labels[:, 5:9] = -100
    return {
        "input_ids": ids,
        "labels": labels,
        "token_type_ids": (ids == 97).long(),
        "pixel_values": torch.randn(2, 3, 16, 16),
        "use_cache": False,
    }


def seeded_gradients(call, model):
    model.zero_grad()
    torch.manual_seed(11)
    loss = call(**image_and_text()).loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_checkpointing_with_dropout_on_a_vision_language_model_changes_no_gradient(compiled):
    """peft#3020: checkpointing, LoRA dropout and torch.compile together; no graph break."""
    model = vision_language_model()
    report = mmopt.optimize(model)
    assert sum(row.became == OP for row in report.rows) > 10

    def prepared():
        torch._dynamo.reset()
        return torch.compile(model, fullgraph=True) if compiled else model

    expected = seeded_gradients(prepared(), model)
    if not compiled:  # the seed decides
        assert_same(seeded_gradients(model, model), expected, 0)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    # What re-entrant checkpointing needs: transformers' hook that calls requires_grad_() on the
    # embeddings, which Dynamo refuses.
    model.disable_input_require_grads()
    ran = []
    if not compiled:
        layer = model.base_model.model.model.language_model.layers[1].mlp
        layer.register_forward_hook(lambda *_: ran.append(1))
    got = seeded_gradients(prepared(), model)
    assert compiled or len(ran) == 2  # the second to recompute it
    report.check_gradients()
    assert_same(got, expected, 1e-5 if compiled else 0)


# --- adapters that do not train -------------------------------------------------------------------


def tiny_llama():
    return LlamaConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=48,
    )  # fmt: skip


def test_an_adapter_that_the_loss_does_not_reach_is_named():
    """None, or only zeros though B is not zero; before that, an initialized adapter passes."""
    model = get_peft_model(LlamaForCausalLM(tiny_llama()), LoraConfig(r=2, target_modules="all-linear"))  # fmt: skip  # noqa: E501
    report = mmopt.optimize(model)
    with pytest.raises(CheckFailedError, match=r"7 trainable adapters got no gradient, first base"):
        report.check_gradients()
    ids = torch.randint(0, 99, (2, 9))
    model(input_ids=ids, labels=ids).loss.backward()
    report.check_gradients()  # B is zero, and so is the gradient of A

    layer = model.base_model.model.model.layers[0].self_attn.v_proj
    layer.lora_A["default"].weight.grad.zero_()
    layer.lora_B["default"].weight.grad.zero_()
    assert dead_adapters(model) == ["base_model.model.model.layers.0.self_attn.v_proj (default)"]
    with pytest.raises(CheckFailedError, match=r"first .*v_proj \(default\); expected one in each"):
        report.check_gradients()
    layer.lora_B["default"].weight.requires_grad = False
    layer.lora_A["default"].weight.requires_grad = False
    report.check_gradients()  # frozen, it need not have one


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [
        ({"trainable_token_indices": [3, 4, 5, 6, 7]}, r"the token ids 3, 4, 5, 6, \.\.\.;"),
        ({"alora_invocation_tokens": [3, 4]}, "its invocation tokens in input_ids and"),
    ],
    ids=["trainable-tokens", "alora"],
)  # fmt: skip
def test_an_adapter_of_certain_tokens_is_not_called_cut_off_when_the_batch_lacks_them(
    changes, tokens
):
    config = LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM", **changes)
    model = get_peft_model(LlamaForCausalLM(tiny_llama()), config)
    ids = torch.randint(10, 99, (2, 9))
    model(input_ids=ids, labels=ids).loss.backward()
    with pytest.raises(CheckFailedError, match=rf"^1 trainable adapters .* acts on {tokens}"):
        check_gradients(model)
    (named,) = dead_adapters(model)
    assert re.search(rf"\(default\), which acts on {tokens.removesuffix(';')}.* only$", named)
    ids[1, 2:4] = torch.tensor([3, 4])
    model(input_ids=ids, labels=ids).loss.backward()
    check_gradients(model)

    model.zero_grad()  # now it is the loss that reaches none of them
    with pytest.raises(CheckFailedError, match="The loss does not reach them") as raised:
        check_gradients(model)
    assert "which acts on" not in str(raised.value)
    assert dead_adapters(model)[0].endswith("(default)")


def test_only_adapters_at_work_need_gradients():
    """Not the inactive, nor the disabled, nor the merged ones."""
    model = build([{}, {}]).train()
    attach_lora(model)
    loss_of(model, batch())[1].backward()
    check_gradients(model)
    model.set_adapter("more1")
    assert [name.rpartition(" ")[2] for name in dead_adapters(model)] == ["(more1)"] * 3
    with model.disable_adapter():
        check_gradients(model)
    model.merge_adapter()
    check_gradients(model)


@contextlib.contextmanager
def detached(layer):
    """The layer cut off the graph."""
    forward = layer.forward
    layer.forward = lambda x: forward(x).detach()
    yield
    layer.forward = forward


def test_a_layer_that_is_cut_off_is_found_after_the_first_backward():
    model = build({}).train()
    attach_lora(model)
    with detached(model.base_model.model.up):
        loss_of(model, batch())[1].backward()
    with pytest.raises(CheckFailedError, match=r"1 trainable adapters .*\.up \(default\)"):
        check_gradients(model)
