"""`mmopt.compile` under the conditions of training: each step is what eager would have done.

The graphs are those that Inductor gets, run op by op; tests that run Inductor itself are slow.
"""

import copy
import importlib

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch._dynamo.backends.debugging import aot_eager
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import mmopt
from mmopt.compilation import parity
from mmopt.compilation.regions import refuse_compiled
from mmopt.train.trainer import CompiledTrainer
from mmopt_kernels.errors import InputError

SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
FILES = ("mmopt/attach/attention.py", "mmopt/attach/lora.py", "peft/tuners/lora/layer.py")
FUSED = {"mmopt/attach/attention.py", "mmopt/attach/lora.py"}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    """Other tests' graphs are not this one's recompiles."""
    torch._dynamo.reset()


def lowered(name, first, second):
    """Parametrize by `name`: `first` also lowered by Inductor, `second` op by op; slow but one."""
    cases = [(first, "op by op"), (first, "inductor"), (second, "op by op")]
    ids = [f"{getattr(value, '__name__', value)}-{lower}" for value, lower in cases]
    marks = [(), pytest.mark.slow, pytest.mark.slow]
    return pytest.mark.parametrize(
        (name, "graphs"),
        [
            pytest.param(*case, id=each, marks=mark)
            for case, each, mark in zip(cases, ids, marks, strict=True)
        ],
        indirect=["graphs"],
    )


@pytest.fixture
def graphs(request, monkeypatch):
    """Every graph as it goes to be lowered; indirectly parametrized: `inductor` lowers with it."""
    lowered = []
    model = importlib.import_module("mmopt.compilation.model")
    lower = model.compile_fx if getattr(request, "param", None) == "inductor" else aot_eager

    def lower_and_keep(graph, inputs):
        lowered.append(graph)
        return lower(graph, inputs)

    monkeypatch.setattr(model, "compile_fx", lower_and_keep)
    return lowered


def sources(graph):
    """Whose forward the nodes come from: mmopt's attention and LoRA, or PEFT's LoRA."""
    traces = [node.meta.get("stack_trace") or "" for node in graph.graph.nodes]
    return {file for file in FILES if any(file in trace for trace in traces)}


def adapted(model, *, second=False, dropout=0.0):
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "query", "value"], lora_dropout=dropout
    )
    model = get_peft_model(model, config)
    if second:
        model.add_adapter("second", config)
    randomize(model)
    return model.train()


def randomize(model):
    """B of every adapter, which starts at zero."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)


def llama(*, layers=1, **changes):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(**{**SMALL, "num_hidden_layers": layers, "num_key_value_heads": 2, **changes})
    )


def bert(*, dropout=0.0):
    torch.manual_seed(0)
    config = BertConfig(
        **SMALL,
        num_labels=3,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return BertForSequenceClassification(config)


def batch(length=12, *, rows=3, seed=1):
    """Token ids with padding, and labels of a causal model."""
    ids = torch.randint(5, 99, (rows, length), generator=torch.Generator().manual_seed(seed))
    keep = torch.ones_like(ids)
    keep[1, -3:] = 0
    labels = ids.masked_fill(keep == 0, -100)
    return {"input_ids": ids, "attention_mask": keep, "labels": labels, "use_cache": False}


def classes(length=12):
    given = batch(length)
    return {**given, "labels": torch.tensor([0, 2, 1])} | {"use_cache": None}


def gradients(model):
    """What is stored, taken out."""
    found = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    model.zero_grad()
    return found


def step(call, model, *batches):
    """Losses of the batches, and their gradients together."""
    losses = []
    for given in batches:
        loss = call(**given).loss
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses), gradients(model)


def assert_same_step(got, expected):
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-6)
    same = parity.compare("gradients", expected[1], got[1])
    assert same.holds, same


# --- mixed precision ------------------------------------------------------------------------------


@lowered("inside", False, True)
def test_autocast_is_that_of_eager(inside, graphs):
    """Outputs, dtypes and gradients. Entered after compiling, it is one recompile."""
    model = adapted(bert())
    given = classes()

    def cast():
        return torch.autocast("cpu", torch.bfloat16)

    with cast():
        eager = model(**given)
    eager.loss.backward()
    expected = gradients(model)
    exact = model(**given)
    exact.loss.backward()
    close = gradients(model)

    mmopt.optimize(model)
    if inside:
        with cast():
            compiled = mmopt.compile(model, given)
    else:
        compiled = mmopt.compile(model, given)
    with cast():
        output = compiled(**given)
    output.loss.backward()
    got = gradients(model)
    assert len(compiled.recompiles) == (0 if inside else 1)
    assert inside or "autocast" in compiled.recompiles[0].reason
    assert compiled.graph_breaks == ()

    assert output.logits.dtype == eager.logits.dtype == torch.bfloat16
    assert output.loss.dtype == eager.loss.dtype
    assert {name: x.dtype for name, x in got.items()} == {n: x.dtype for n, x in expected.items()}
    # The dtype in which attention and adapters work, by the values that its nodes have.
    for node in graphs[-1].graph.nodes:
        trace = node.meta.get("stack_trace") or ""
        value = node.meta.get("example_value")
        if (
            "in interval_attention" in trace
            and isinstance(value, torch.Tensor)
            and value.dim() == 4
        ):
            assert value.dtype in (torch.bfloat16, torch.int32)
    assert sources(graphs[-1]) == FUSED

    # Both round to bfloat16, each elsewhere: as far from float32 as eager is, or half as far again.
    for group, (ours, theirs, truth) in {
        "logits": ({"": output.logits}, {"": eager.logits}, {"": exact.logits}),
        "gradients": (got, expected, close),
    }.items():
        off = parity.compare(group, truth, ours).error
        assert off <= max(1.5 * parity.compare(group, truth, theirs).error, 2**-8), group

    # And out of it again: the graph in float32 is still there, or is one more.
    before = len(compiled.recompiles)
    assert_same_step(step(compiled, model, given), (exact.loss.detach()[None], close))
    assert len(compiled.recompiles) == before + inside


# --- checkpointing --------------------------------------------------------------------------------


def directional(call, model, given, *, eps=1e-6):
    """The derivative along a fixed direction by differences, and by the gradients; fp64."""
    named = {name: x for name, x in model.named_parameters() if x.requires_grad}
    generator = torch.Generator().manual_seed(7)
    way = {
        name: torch.randn(x.shape, generator=generator, dtype=x.dtype) for name, x in named.items()
    }

    def loss():
        torch.manual_seed(11)
        return call(**given).loss

    def loss_at(shift):
        with torch.no_grad():
            for name, x in named.items():
                x.add_(way[name], alpha=shift)
        found = loss().detach()  # traced with gradients, as the graph is
        with torch.no_grad():
            for name, x in named.items():
                x.sub_(way[name], alpha=shift)
        return found

    model.zero_grad()
    loss().backward()
    grads = gradients(model)
    analytic = sum((grads[name] * way[name]).sum() for name in grads)
    return analytic, (loss_at(eps) - loss_at(-eps)) / (2 * eps), grads


def saved_bytes(call, given):
    """Bytes that backward keeps, parameters and the batch left out."""
    kept = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call(**given)
    assert output.loss.requires_grad
    return sum(kept.values())


@pytest.mark.usefixtures("without_inductor")
def test_checkpointing_enabled_after_compiling_breaks_no_graph():
    model = adapted(bert(), dropout=0.0)
    compiled = mmopt.compile(model, classes(24))
    model.gradient_checkpointing_enable()
    _, expected = step(model, model, classes(24))
    _, found = step(compiled, model, classes(24))
    assert parity.compare("gradients", expected, found).holds
    assert compiled.graph_breaks == ()
    assert len(compiled.recompiles) == 1


@lowered("reentrant", False, True)
def test_checkpointing_recomputes_the_dropout_that_it_saw(reentrant, graphs):
    """Of adapters and attention: gradients are the derivative of the seeded loss, for less memory.

    Enabled as transformers and PEFT do, with their hook on the embeddings.
    """
    model = adapted(bert(dropout=0.2), dropout=0.3).double()
    given = classes(24)
    mmopt.optimize(model)
    plain = mmopt.compile(model, given)
    before = saved_bytes(plain, given)
    torch.manual_seed(11)
    _, expected = step(plain, model, given)

    torch._dynamo.reset()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    compiled = mmopt.compile(model, given)
    analytic, numeric, grads = directional(compiled, model, given)
    torch.testing.assert_close(analytic, numeric, rtol=1e-6, atol=1e-9)
    same = parity.compare("gradients", expected, grads)
    assert same.holds, same
    torch.manual_seed(12)
    _, other = step(compiled, model, given)
    assert not parity.compare("gradients", expected, other).holds  # there is dropout
    assert compiled.graph_breaks == ()
    assert compiled.recompiles == ()
    assert saved_bytes(compiled, given) < 0.7 * before
    # Eagerly the hook does what it did.
    embedded = model.get_input_embeddings()(given["input_ids"])
    assert embedded.requires_grad
    hooks = model.get_input_embeddings()._forward_hooks
    assert hooks
    model.disable_input_require_grads()
    assert not hooks
    assert not model.get_input_embeddings()(given["input_ids"]).requires_grad


# --- accumulation ---------------------------------------------------------------------------------


@lowered("kind", torch.tensor, int)
def test_micro_batches_add_up_whatever_their_lengths_and_number_of_labels(kind, graphs):
    """As Trainer hands it over, `num_items_in_batch` is never a reason to compile again."""
    model = adapted(llama())

    def micro_batches(*lengths):
        made = [batch(length, seed=length) for length in lengths]
        items = sum(int((given["labels"][:, 1:] != -100).sum()) for given in made)
        return [{**given, "num_items_in_batch": kind(items)} for given in made]

    steps = [micro_batches(12, 7), micro_batches(9, 15), micro_batches(8, 8)]
    expected = [step(model, model, *made) for made in steps]
    mmopt.optimize(model)
    compiled = mmopt.compile(model, steps[0][0])
    assert gradients(model) == {}
    for made, wanted in zip(steps, expected, strict=True):
        assert_same_step(step(compiled, model, *made), wanted)
    assert compiled.recompiles == ()
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("factory", "bf16", "graphs"),
    [
        pytest.param(llama, False, "op by op", id="llama"),
        pytest.param(llama, False, "inductor", id="llama-inductor", marks=pytest.mark.slow),
        pytest.param(llama, True, "op by op", id="llama-bf16", marks=pytest.mark.slow),
        pytest.param(bert, False, "op by op", id="bert", marks=pytest.mark.slow),
    ],
    indirect=["graphs"],
)
def test_trainer_reaches_the_weights_of_plain_trainer(factory, bf16, graphs, tmp_path):
    """Accumulating, with other numbers of labels in each micro-batch."""
    start = adapted(factory())
    rows = []
    for index in range(8):
        row = {name: value[1 if index % 3 else 0] for name, value in batch(9, seed=index).items()
               if name != "use_cache"}  # fmt: skip
        rows.append(row if factory is llama else {**row, "labels": index % 3})

    def weights(make, name):
        model = copy.deepcopy(start)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / name), per_device_train_batch_size=2, max_steps=2, seed=0,
            gradient_accumulation_steps=2, report_to=[], save_strategy="no", use_cpu=True,
            learning_rate=1e-1, disable_tqdm=True, optim="sgd", bf16=bf16, max_grad_norm=0.0,
        )  # fmt: skip
        trainer = make(model=model, args=arguments, train_dataset=rows)
        trainer.train()
        moved = {
            name: (x - start.get_parameter(name)).detach() for name, x in model.named_parameters()
        }
        return {name: x for name, x in moved.items() if x.any()}, trainer

    def plain(**arguments):
        trainer = Trainer(**arguments)
        if factory is bert:
            # A classifier's loss is the mean of its own rows; Trainer believes that it is of all.
            trainer.model_accepts_loss_kwargs = False
        return trainer

    def ours(*, model, **arguments):
        mmopt.optimize(model)
        return CompiledTrainer(compile_step=True, advance=lambda _: None, model=model, **arguments)

    expected, _ = weights(plain, "plain")
    got, trainer = weights(ours, "ours")
    same = parity.compare("weights", expected, got)
    assert same.error is not None
    assert same.error <= (0.05 if bf16 else parity.TOLERANCE), same
    assert trainer.recompiles == 0
    assert len(graphs) == 1


# --- adapters come and go -------------------------------------------------------------------------


class Followed:
    """An attached, compiled model beside an untouched one: each change is made to both."""

    def __init__(self, graphs):
        self.model = adapted(bert(), second=True)
        self.untouched = copy.deepcopy(self.model)
        self.graphs = graphs
        mmopt.optimize(self.model)
        self.compiled = mmopt.compile(self.model, classes())

    @property
    def both(self):
        return self.model, self.untouched

    def check(self, recompiles, used):
        """The step is that of the untouched model, and whose forward the newest graph holds."""
        given = classes()
        got = step(self.compiled, self.model, given)
        assert_same_step(got, step(self.untouched, self.untouched, given))
        assert len(self.compiled.recompiles) == recompiles, self.compiled.recompiles[-1]
        assert sources(self.graphs[-1]) == used
        assert self.compiled.graph_breaks == ()


@pytest.mark.slow
def test_an_adapter_that_is_loaded_is_followed_with_one_recompile(graphs, tmp_path):
    """Into layers that are attached; optimize() again has nothing to change."""
    other = adapted(bert())
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    other.save_pretrained(tmp_path)

    here = Followed(graphs)
    for model in here.both:
        model.load_adapter(tmp_path, "loaded", is_trainable=True)
        model.set_adapter("loaded")
    here.check(1, FUSED)
    again = mmopt.optimize(here.model)
    assert all(row.became for row in again.rows)
    here.check(1, FUSED)


def test_undone_and_optimized_again_a_model_has_its_graph_back(graphs):
    model = adapted(bert())
    report = mmopt.optimize(model)
    compiled = mmopt.compile(model, classes(12))
    report.undo()
    mmopt.optimize(model)
    compiled(**classes(12))
    assert compiled.recompiles == ()


@pytest.mark.slow
def test_adapters_added_and_switched_are_followed(graphs):
    """Each state is compiled once; layers new to adapters use the op after optimize() again."""
    here = Followed(graphs)
    for model in here.both:
        model.set_adapter("second")
    here.check(1, FUSED)

    config = LoraConfig(r=2, target_modules=["query", "value", "key"], init_lora_weights=False)
    for model in here.both:
        torch.manual_seed(5)
        model.add_adapter("wider", config)
        model.set_adapter("wider")
    here.check(2, {*FUSED, "peft/tuners/lora/layer.py"})
    again = mmopt.optimize(here.model)
    assert sum(row.became == "mmopt::lora_linear" for row in again.rows) == 3
    here.check(3, FUSED)

    for model in here.both:
        model.set_adapter("default")
    compiled = here.compiled
    got = step(compiled, here.model, classes())
    assert_same_step(got, step(here.untouched, here.untouched, classes()))
    # The state is known, but for the layer that has an adapter since, inactive now.
    assert len(compiled.recompiles) <= 4
    with here.model.disable_adapter(), here.untouched.disable_adapter():
        torch.testing.assert_close(compiled(**classes()).loss, here.untouched(**classes()).loss)
    assert compiled.graph_breaks == ()


# --- models that are compiled already -------------------------------------------------------------


@pytest.mark.parametrize("around", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_optimize_reaches_into_a_compiled_model_and_compile_refuses_it(around):
    """torch.compile's own graphs follow what is attached; a second compiler has no place."""
    given = batch()
    model = adapted(llama())
    if around:
        called = torch.compile(model, backend="eager")
    else:
        model.compile(backend="eager")
        called = model
    before = called(**given).loss
    report = mmopt.optimize(called)
    assert {row.kind for row in report.rows if row.became} >= {"attention", "lora", "loss"}
    output = called(**given)
    torch.testing.assert_close(output.loss, before)
    assert output.logits is None  # the fused loss is at work
    message = "already compiled by torch.compile" if around else r"by its compile\(\) method"
    with pytest.raises(InputError, match=message):
        mmopt.compile(called, given)
    report.undo()
    torch._dynamo.reset()
    assert model.forward(**given).logits is not None


def test_a_model_compiled_inside_of_pefts_mixed_model_is_refused():
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]), mixed=True)
    refuse_compiled(model)
    model.base_model.model.compile(backend="eager")
    with pytest.raises(InputError, match=r"LlamaForCausalLM is already compiled by its compile"):
        refuse_compiled(model)
