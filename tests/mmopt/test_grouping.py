"""LoRA layers of one input become one call where nothing tells the difference, and only there."""

import copy
import importlib
import operator

import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from torch._dynamo.backends.debugging import aot_eager
from torch._inductor.pattern_matcher import stable_topological_sort
from transformers import LlamaConfig, LlamaForCausalLM

import mmopt
from mmopt.compilation.grouping import LORA_GROUPS
from mmopt.compilation.store import OLDEST_TORCH
from mmopt.compilation.tracing import Tracing, inductor_options
from mmopt_kernels import lora_linear
from mmopt_kernels.lora_linear import api
from nf4_weights import random_nf4

ONE, GROUP = torch.ops.mmopt.lora_linear, torch.ops.mmopt.lora_linear_group
K, R = 64, 3
SIZES = (8, 4, 6)


@pytest.fixture(autouse=True)
def ops_in_graphs(monkeypatch):
    """As on a GPU: compiled for a CPU a plain call is traced as PyTorch's own ops."""
    monkeypatch.setattr(api, "_traced", lambda *args: False)
    torch._dynamo.reset()


def layers():
    """weight, a, b and bias for each of SIZES; the second has no bias."""
    g = torch.Generator().manual_seed(0)

    def make(*shape):
        return torch.randn(shape, generator=g).requires_grad_()

    return [(make(N, K), make(R, K), make(N, R), make(N) if N != 4 else None) for N in SIZES]


def apply(layer, x, **options):
    weight, a, b, bias = layer
    return lora_linear(x, weight, a, b, bias=bias, **{"scale": 0.5, **options})


def sizes(graph):
    """Of each call in the graph, how many layers it has."""
    found = []
    for node in graph.nodes:
        if node.target in (ONE, ONE.default):
            found.append(1)
        if node.target in (GROUP, GROUP.default):
            found.append(len(node.args[1]))
    return sorted(found)


def compiled(function, seen):
    """Compiled as Inductor would, but op by op; `seen` gets `sizes` before and after."""

    def lower(graph, inputs):
        before = sizes(graph.graph)
        LORA_GROUPS(graph.graph)
        stable_topological_sort(graph.graph)  # as Inductor does after passes
        graph.graph.lint()
        graph.recompile()
        seen.append((before, sizes(graph.graph)))
        return aot_eager(graph, inputs)

    call = torch.compile(function, backend=lower, fullgraph=True, dynamic=True)

    def traced(x):
        with Tracing(infer=False):
            return call(x)

    return traced


def assert_same(function, x, each, expected):
    """Results and gradients as without, and calls of the `expected` sizes."""
    seen = []
    leaves = [x, *(t for layer in each for t in layer if t is not None and t.requires_grad)]
    got, want = compiled(function, seen)(x), function(x)
    torch.testing.assert_close(got, want)
    used = {"allow_unused": True}
    for one, other in zip(
        torch.autograd.grad(got.float().sum(), leaves, **used),
        torch.autograd.grad(want.float().sum(), leaves, **used),
        strict=True,
    ):
        # Inputs' gradients are summed in another order.
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert seen == [expected]


def x_of(*shape):
    return torch.randn(*shape, K, generator=torch.Generator().manual_seed(1)).requires_grad_()


def test_layers_of_one_input_become_one_call():
    each = layers()

    def attend(x):
        q, k, v = (apply(layer, x) for layer in each)
        return q[..., :4].sigmoid() * k + v[..., :4]

    assert_same(attend, x_of(2, 5), each, ([1, 1, 1], [3]))


def test_what_uses_an_early_result_moves_behind_the_group():
    each = layers()

    def late(x):
        gate = torch.tanh(apply(each[0], x)).sum(-1, keepdim=True)
        return gate * apply(each[1], x)

    assert_same(late, x_of(3), each, ([1, 1], [2]))


def test_quantized_and_dense_layers_share_a_group():
    dense = layers()[0]
    packed = random_nf4(6, K)
    quantized = (packed, *layers()[2][1:])

    def mixed(x):
        return apply(dense, x)[..., :6] * apply(quantized, x)

    each = [dense, quantized[1:]]
    assert_same(mixed, x_of(4), each, ([1, 1], [2]))


def test_layers_of_two_inputs_become_two_calls():
    each = layers()

    def cross(x):
        y = x * 2.0
        q, k = apply(each[0], x), apply(each[1], y)
        return apply(each[2], x)[..., :4] * k + apply(each[2], y)[..., :4] * q[..., :4]

    assert_same(cross, x_of(3), each, ([1, 1, 1, 1], [2, 2]))


def test_a_layer_behind_another_stays_alone():
    """k is scaled by what q gives; one call of both would need its own result."""
    each = layers()

    def chained(x):
        q = apply(each[0], x)
        k = apply(each[1], x, scale=q.detach().mean())
        return q[..., :4] * k

    assert_same(chained, x_of(3), each, ([1, 1], [1, 1]))


@torch.library.custom_op("mmopt_tests::grow", mutates_args=("x",))
def grow(x: torch.Tensor) -> None:
    """Writes to x, and its name does not say so."""
    x.add_(1.0)


@pytest.mark.parametrize(
    "write", ["method", "operator", "item", "overload", "packet", "inplace", "out"]
)
def test_an_input_written_to_in_between_is_another(write):
    each = layers()

    def written(x):
        x = x * 1.0
        q = apply(each[0], x)
        if write == "method":
            x.add_(1.0)
        elif write == "operator":
            x += 1.0
        elif write == "item":
            x[..., 0] = 1.0
        elif write == "overload":
            torch.ops.mmopt_tests.grow.default(x)
        elif write == "packet":
            torch.ops.mmopt_tests.grow(x)
        elif write == "inplace":
            torch.nn.functional.leaky_relu(x, inplace=True)
        else:
            torch.add(x, 1.0, out=x)
        return q[..., :4] * apply(each[1], x)

    each[0][0].requires_grad_(False)
    for tensor in each[0][1:]:
        tensor.requires_grad_(False)
    seen = []
    x = x_of(3).detach()
    torch.testing.assert_close(compiled(written, seen)(x), written(x))
    assert seen == [([1, 1], [1, 1])]


@pytest.mark.parametrize("taken", ["s", "all"])
def test_a_layer_of_which_more_than_the_result_is_taken_stays_alone(taken):
    graph = torch.fx.Graph()
    x, *rest = (graph.placeholder(name) for name in ("x", "w", "a", "b"))
    results = []
    for last in (False, True):
        node = graph.call_function(ONE.default, (x, *rest, None, None, None, 1, 0.5, 0.0, "auto"))
        results.append(graph.call_function(operator.getitem, (node, 0)))
        if last:
            s = graph.call_function(operator.getitem, (node, 1)) if taken == "s" else node
            results.append(s)
    graph.output(tuple(results))
    LORA_GROUPS(graph)
    assert sizes(graph) == [1, 1]


def drawn(build):
    """The sizes of the calls in a graph that `build` draws by hand: Dynamo would make few of these.

    All its tensors are [6, 6]. It has to give afterwards what it gave before.
    """
    graph = torch.fx.Graph()
    x, *tensors = (graph.placeholder(name) for name in ("x", "w", "a", "b", "w2", "a2", "b2"))
    graph.output(tuple(build(graph, x, tensors[:3], tensors[3:])))
    g = torch.Generator().manual_seed(0)
    values = [torch.randn(6, 6, generator=g) for _ in range(7)]
    run = torch.fx.GraphModule({"inner": torch.nn.ReLU(inplace=True)}, graph)
    expected = run(*(value.clone() for value in values))
    LORA_GROUPS(run.graph)
    stable_topological_sort(run.graph)
    run.graph.lint()
    run.recompile()
    torch.testing.assert_close(run(*(value.clone() for value in values)), expected)
    groups = [node for node in run.graph.nodes if node.target is GROUP.default]
    assert all(node.args[-1] == "reference" for node in groups), "as asked for"
    return sizes(run.graph)


def one(graph, x, layer, *, bias=None, index=None, scale=0.5, impl="reference"):
    node = graph.call_function(ONE.default, (x, *layer, bias, index, None, 1, scale, 0.0, impl))
    return graph.call_function(operator.getitem, (node, 0))


def group(graph, x, *layers, biases=(), biased=None):
    """The results of layers that are one call already."""
    weights, a, b = zip(*layers, strict=True)
    flags = [False] * len(layers) if biased is None else biased
    arguments = (x, [*weights], [], [*a], [*b], [*biases], None, None, flags, 1, 0.5, 0.0)
    node = graph.call_function(GROUP.default, (*arguments, [""] * len(layers), "reference"))
    return graph.call_function(operator.getitem, (node, 0))


@pytest.mark.parametrize(
    "options", [{"scale": 1.0}, {"impl": "auto"}, {"index": 0}, {"keyword": True}], ids=str
)
def test_layers_that_run_or_are_written_in_another_way_stay_apart(options):
    def build(graph, x, first, second):
        if "keyword" in options:
            arguments = (x, *second, None, None, None, 1, 0.5, 0.0)
            node = graph.call_function(ONE.default, arguments, {"impl": "reference"})
            return one(graph, x, first), graph.call_function(operator.getitem, (node, 0))
        if "index" in options:
            zeros = graph.call_function(torch.zeros, (6,), {"dtype": torch.int32})
            return one(graph, x, first), one(graph, x, second, index=zeros)
        return one(graph, x, first), one(graph, x, second, **options)

    assert drawn(build) == [1, 1]


@pytest.mark.parametrize(
    "nodes",
    [
        [("to", (torch.float64,), {}), ("to", (torch.float32,), {})],
        [("to", (), {"dtype": torch.float64}), ("to", (), {"dtype": torch.float32})],
        [("mul", (2.0,), {}), ("add", (2.0,), {})],
    ],
    ids=["dtype", "keyword", "no cast"],
)
def test_only_like_casts_make_one_input(nodes):
    """Two casts of x to one dtype are one input; two other calls on it are not."""

    def build(graph, x, *layers):
        results = []
        for (name, args, kwargs), layer in zip(nodes, layers, strict=True):
            given = [graph.call_method(name, (t, *args), kwargs) for t in (x, *layer)]
            results.append(one(graph, given[0], given[1:]))
        return results

    assert drawn(build) == [1, 1]


@pytest.mark.parametrize("between", [False, True], ids=["result", "of result"])
@pytest.mark.parametrize("part", ["weight", "a", "b", "bias"])
def test_a_layer_made_of_what_another_gives_stays_alone(part, between):
    def build(graph, x, first, second):
        y = one(graph, x, first)
        made = graph.call_function(operator.neg, (y,)) if between else y
        if part == "bias":
            bias = graph.call_function(operator.getitem, (made, 0))
            return y, one(graph, x, second, bias=bias)
        layer = list(second)
        layer[["weight", "a", "b"].index(part)] = made
        return y, one(graph, x, layer)

    assert drawn(build) == [1, 1]


@pytest.mark.parametrize("kind", ["module", "enter autocast", "higher order"])
def test_nothing_is_joined_across_what_might_change_an_input(kind):
    def build(graph, x, first, second):
        y = one(graph, x, first)
        if kind == "module":
            graph.call_module("inner", (x,))
        elif kind == "enter autocast":
            arguments = ("cpu", torch.bfloat16, False, None)
            entered = graph.call_function(torch.amp.autocast_mode._enter_autocast, arguments)
            inside = one(graph, x, second)
            graph.call_function(torch.amp.autocast_mode._exit_autocast, (entered,))
            return y, inside
        else:
            graph.call_function(torch.ops.higher_order.print, ("", {}))
        return y, one(graph, x, second)

    assert drawn(build) == [1, 1]


@pytest.mark.parametrize("name", ["and_", "__and__"])
def test_a_name_that_only_looks_like_a_write_parts_nothing(name):
    def build(graph, x, first, second):
        y = one(graph, x, first)
        seen = graph.call_function(operator.gt, (x, 0.0))
        if name == "and_":
            both = graph.call_function(operator.and_, (seen, seen))
        else:
            both = graph.call_method(name, (seen, seen))
        return y, both, one(graph, x, second)

    assert drawn(build) == [2]


def test_layers_before_a_write_are_still_one_call():
    def build(graph, x, first, second):
        results = [one(graph, x, first), one(graph, x, second)]
        graph.call_method("add_", (x, 1.0))
        return *results, one(graph, x, first)

    assert drawn(build) == [1, 2]


def test_a_group_and_a_layer_become_one_call_with_each_result_where_it_belongs():
    def build(graph, x, first, second):
        bias = graph.call_function(operator.getitem, (x, 0))
        pair = group(graph, x, first, second, biases=[bias], biased=[False, True])
        later = [graph.call_function(operator.getitem, (pair, i)) for i in (1, 0)]
        return *later, one(graph, x, [second[0], first[1], first[2]])

    assert drawn(build) == [3]


def test_a_group_whose_results_are_taken_as_a_list_stays_as_it_is():
    def build(graph, x, first, second):
        pair = group(graph, x, first, second)
        return graph.call_function(torch.stack, (pair,)), one(graph, x, first)

    assert drawn(build) == [1, 2]


def test_layers_with_dropout_keep_masks_of_their_own():
    each = layers()
    seen = []

    def dropped(x):
        return apply(each[0], x, dropout_p=0.5)[..., :4] * apply(each[1], x, dropout_p=0.5)

    compiled(dropped, seen)(x_of(3))
    assert seen == [([1, 1], [1, 1])]


def test_casts_of_autocast_are_one_input():
    each = layers()

    def attend(x):
        q, k, v = (apply(layer, x) for layer in each)
        return q[..., :4] * k + v[..., :4]

    seen = []
    with torch.autocast("cpu", torch.bfloat16):
        got, want = compiled(attend, seen)(x_of(3)), attend(x_of(3))
    torch.testing.assert_close(got, want)
    assert seen == [([1, 1, 1], [3])]


def test_layers_in_and_out_of_autocast_stay_apart():
    each = layers()

    def half(x):
        with torch.autocast("cpu", torch.bfloat16):
            q = apply(each[0], x)
        return q.float()[..., :4] * apply(each[1], x)

    assert_same(half, x_of(3), each, ([1, 1], [1, 1]))


def test_a_pass_of_the_users_own_stays_the_only_one():
    assert inductor_options() == {"pre_grad_custom_pass": LORA_GROUPS}
    with torch._inductor.config.patch(pre_grad_custom_pass=lambda graph: None):
        assert inductor_options() == {}
    assert inductor_options() == {"pre_grad_custom_pass": LORA_GROUPS}


def tiny_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48,
    )  # fmt: skip
    model = get_peft_model(
        LlamaForCausalLM(config), LoraConfig(r=4, target_modules="all-linear")
    ).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_llama_trains_as_eager_with_its_layers_in_groups(
    checkpointing, tmp_path, monkeypatch
):
    """q, k and v, gate and up, of both layers; checkpointed, each in a graph within the graph."""
    grouping = importlib.import_module("mmopt.compilation.grouping")
    merged, merge = [], grouping._merge
    monkeypatch.setattr(
        grouping, "_merge", lambda graph, calls: merged.append(len(calls)) or merge(graph, calls)
    )
    model = tiny_llama()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    eager = copy.deepcopy(model)
    mmopt.optimize(model)
    batches = [{"input_ids": ids, "labels": ids} for ids in map(ids_of, (9, 14, 3))]
    step = mmopt.compile(model, batches[0])
    assert merged == [3, 2, 3, 2]
    for batch in batches:
        losses = [call(**batch).loss for call in (step, eager)]
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(*losses)
        for one, other in zip(model.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-4)
        model.zero_grad()
        eager.zero_grad()
    assert step.recompiles == ()
    if not checkpointing and Version(torch.__version__) >= OLDEST_TORCH:
        step.save(tmp_path / "store", batches[0])
        assert merged == [3, 2, 3, 2] * 2


def ids_of(length):
    return torch.randint(99, (2, length), generator=torch.Generator().manual_seed(length))
