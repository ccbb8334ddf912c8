"""Decoders as one graph: every family against eager PyTorch, padding, caches, and refusals."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
import torch

from mmopt_export.caches import new_cache_map, pasts
from mmopt_export.decoder import rotation
from mmopt_export.decoder.lowering import Window, _window
from mmopt_export.decoder.parity import greedy_parity, greedy_reference
from mmopt_export.decoder.part import Extra, cache_map, decoder_part, valid_rows
from mmopt_export.decoder.tracing import _require_io, trace_decoder
from mmopt_export.parts import Part
from mmopt_kernels.errors import InputError, MmoptError
from tiny_decoders import (
    COMMON,
    FAMILIES,
    VOCABULARY,
    WINDOW,
    Exported,
    tiny_decoder,
    tiny_gpt_oss,
    traced,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# fp32 of two runtimes on logits and keys of order 1 to 6: rounding, measured at most 1e-5.
TOLERANCE = 3e-5


def assert_parity(part: Part, session: Any, samples: Any = None) -> None:
    """Every output of every sample against eager, where it means something."""
    for sample in samples or part.sampled():
        values = session.run(list(part.outputs), sample.feeds)
        for name, value in zip(part.outputs, values, strict=True):
            found = sample.rows(name, value)
            expected = sample.rows(name, sample.expected[name])
            assert found.shape == expected.shape, (sample.kind, name)
            np.testing.assert_allclose(
                found, expected, atol=TOLERANCE, rtol=0, err_msg=f"{sample.kind} {name}"
            )


@pytest.mark.parametrize(
    "family",
    [pytest.param(one, marks=() if one in COMMON else pytest.mark.slow) for one in FAMILIES],
)
def test_family_matches_eager(family: str) -> None:
    """Prefill, decode and resume; left, right and no padding; buffers; then 32 greedy tokens."""
    exported = traced(family)
    onnx.checker.check_model(str(exported.file), full_check=True)
    samples = list(exported.part.sampled())
    for optimize in (False, True):
        assert_parity(exported.part, exported.session(optimize=optimize), samples)
    generator = np.random.default_rng(0)
    # Two of them longer than the window of those families that have one.
    prompts = [generator.integers(3, VOCABULARY, n).tolist() for n in (3 * WINDOW, 1, 11)]
    reference = greedy_reference(exported.part, prompts)
    parity = greedy_parity(reference, exported.generator())
    assert parity.steps == 96
    assert parity.differences == ()
    assert parity.max_error < TOLERANCE


@pytest.mark.parametrize("family", ["opt", "bert"])
def test_ids_and_positions_that_are_looked_up_apart_may_be_padded(family: str) -> None:
    """Padding is dropped from both: the memory of one was reused for the other's former length."""
    exported = traced(family)
    samples = [one for one in exported.part.sampled() if one.kind == "resume-padded"]
    assert len(samples) == 1
    for optimize in (False, True):
        assert_parity(exported.part, exported.session(optimize=optimize), samples)


def test_a_graph_has_ort_ops_and_no_leftovers() -> None:
    """What makes it fast: attention that rotates and takes q, k and v as one, and fused norms."""
    nodes = traced("llama").nodes
    assert nodes.count("GroupQueryAttention") == 2
    assert "RotaryEmbedding" not in nodes
    assert nodes.count("Split") == 2  # gate and up
    assert nodes.count("SkipSimplifiedLayerNormalization") == 4
    # Of each layer q, k and v as one, o, gate and up as one, down; and the head.
    assert nodes.count("MatMul") == 2 * 4 + 1
    # The last layer's MLP runs on one token of a row, whatever the prompt.
    last = len(nodes) - nodes[::-1].index("GroupQueryAttention")
    assert nodes[last:].index("GatherElements") < nodes[last:].index("MatMul")
    assert "Transpose" not in nodes
    assert "Gemm" not in nodes
    # Heads are normed before they are transposed, so that nothing is.
    gemma = traced("gemma3").nodes
    assert "Transpose" not in gemma
    # Heads of 24 are not for attention's own rotation; sines are looked up either way.
    assert gemma.count("RotaryEmbedding") == 6
    assert not {"Sin", "Cos"} & {*nodes, *gemma}


def test_rotations_whose_tables_are_large_beside_the_weights_are_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rotation, "_SMALL", 0)
    exported = Exported(tiny_decoder("llama", num_hidden_layers=1), tmp_path)
    assert exported.nodes.count("RotaryEmbedding") == 2
    assert "Cos" in exported.nodes
    assert_parity(exported.part, exported.session())


@pytest.mark.parametrize("family", ["llama", "phi3-longrope"])
def test_tables_are_pytorchs_to_the_last_bit(family: str) -> None:
    """Longrope multiplies its cosines by a factor behind them."""
    exported = traced(family)
    rotary = exported.model.model.rotary_emb
    stored = {one.name: one for one in onnx.load(exported.file).graph.initializer}
    found = [onnx.numpy_helper.to_array(stored[f"rotary.0.{name}"]) for name in ("cos", "sin")]
    # The last row, behind every position, is for tokens that are thrown away.
    positions, width = len(found[0]) - 1, found[0].shape[1]
    with torch.no_grad():
        made = rotary(torch.empty(1, dtype=torch.float32), torch.arange(positions)[None])
    for table, expected in zip(found, made, strict=True):
        np.testing.assert_array_equal(table[:-1], expected[0, :, :width].numpy())


def test_a_row_that_is_done_at_the_last_position_does_not_stop_the_others() -> None:
    """What it writes behind its cache is turned by a position that the model has not."""
    exported = traced("llama")
    limit = exported.part.limits["total"]
    generator = exported.generator()
    conversation = generator.start(2)
    generator.prefill([[5] * limit, [8, 9]], conversation)
    logits = generator.step([None, 10], conversation)
    with torch.no_grad():
        expected = exported.model(input_ids=torch.tensor([[8, 9, 10]])).logits[0, -1]
    np.testing.assert_allclose(logits[1], expected, atol=TOLERANCE, rtol=0)


def test_norms_too_wide_to_fold_are_fused(tmp_path: Path) -> None:
    """Gemma's `1 + weight` stays a node in a wide model, and must stand before the fused norm."""
    changes = {"hidden_size": 2304, "num_hidden_layers": 1, "layer_types": ["full_attention"]}
    exported = Exported(tiny_decoder("gemma2", **changes), tmp_path)
    assert exported.nodes.count("SkipSimplifiedLayerNormalization") == 2
    samples = list(exported.part.sampled())
    scale = max(np.abs(one.expected["present.0.key"]).max() for one in samples)
    names = ["logits", "present.0.key"]
    for sample in samples:
        for name, value in zip(names, exported.session().run(names, sample.feeds), strict=True):
            found, expected = sample.rows(name, value), sample.rows(name, sample.expected[name])
            np.testing.assert_allclose(found, expected, atol=TOLERANCE * scale, rtol=0)


def test_longrope_ends_where_its_frequencies_change() -> None:
    """Behind 64 of its 96 positions every token is turned anew, which a cache cannot follow."""
    assert decoder_part(tiny_decoder("phi3-longrope")).limits == {"total": 64}
    assert decoder_part(tiny_decoder("dynamic-rope")).limits == {"total": 96}


def test_the_oracle_agrees_with_a_padded_batch_of_transformers() -> None:
    """`EagerDecoder` takes rows apart; transformers with its own padding mask gives the same."""
    model = tiny_decoder("qwen3")
    part = decoder_part(model)
    cache = cache_map(part)
    lengths = (7, 3, 12)
    mask = torch.tensor([[0] * (12 - n) + [1] * n for n in lengths])
    ids = torch.randint(3, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(1))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -1:]
    empty = {past: torch.zeros(3, cache.heads, 0, cache.head_size) for past in pasts(cache)}
    found = part.module(input_ids=ids, attention_mask=mask, **empty)["logits"]
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_fp32_is_as_near_to_fp64_as_eager_fp32_is() -> None:
    """The graph adds no error of its own: against fp64 it is as good as PyTorch's fp32."""
    exported = traced("llama")
    double = tiny_decoder("llama").double()
    ids = torch.randint(3, VOCABULARY, (2, 19), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        exact = double(input_ids=ids).logits[:, -1].numpy()
        single = exported.model(input_ids=ids).logits[:, -1].numpy()
    generator = exported.generator()
    found = generator.prefill(ids.tolist(), generator.start(2))
    assert np.abs(found - exact).max() < 4 * max(np.abs(single - exact).max(), 1e-6)


def test_logits_are_compared_of_every_row_that_has_a_new_token() -> None:
    """Wherever it stands: behind it a row may be padded."""
    cache = new_cache_map(layers=1, heads=2, head_size=8)
    feeds = {
        "input_ids": np.zeros((3, 2), np.int64),
        "attention_mask": np.array([[1, 1, 1, 0], [1, 1, 0, 1], [1, 1, 0, 0]]),
        "past_key_values.0.key": np.zeros((3, 2, 2, 8), np.float32),
    }
    valid = valid_rows(cache, feeds)
    assert valid["logits"].tolist() == [True, True, False]
    # As long as the longest row, where the past has less room.
    wanted = [[True, True, True], [True, True, True], [True, True, False]]
    assert valid["present.0.value"][:, 1].tolist() == wanted


@pytest.mark.parametrize("positions", [3, 4, 9])
def test_samples_of_a_model_with_few_positions_end_where_they_do(positions: int) -> None:
    part = decoder_part(tiny_decoder("gpt2", max_position_embeddings=positions))
    assert part.limits == {"total": positions}
    longest = 0
    for _, feeds, *_ in part.samples():
        longest = max(longest, int(feeds["attention_mask"].sum(axis=1).max()))
        assert np.isfinite(part.expect(feeds)["logits"]).all()
    assert longest == positions


def test_a_graph_says_nothing_of_the_machine_that_traced_it() -> None:
    """The tracer notes files, lines and stacks at every node."""
    model = onnx.load(traced("llama").file, load_external_data=False)
    assert not model.metadata_props
    for one in (model.graph, *model.graph.node, *model.graph.value_info, *model.graph.input):
        assert not one.metadata_props
        assert not one.doc_string


def test_what_a_buffer_becomes_has_a_dimension_of_its_own() -> None:
    """Under the symbol of the past ONNX Runtime could give a grown one the past's memory."""
    session = traced("llama").session()
    shapes = {one.name: one.shape for one in (*session.get_inputs(), *session.get_outputs())}
    assert shapes["past_key_values.0.key"] == ["batch", 2, "capacity", 16]
    for name in ("present.0.key", "present.1.value"):
        assert shapes[name] == ["batch", 2, "present", 16]


def test_unshared_buffers_grow() -> None:
    """A caller that binds nothing: empty pasts at first, then each present as the next past."""
    exported = traced("llama")
    session = exported.session()
    outputs = list(exported.part.outputs)
    names = pasts(exported.cache)
    buffers = dict.fromkeys(names, np.zeros((2, 2, 0, 16), dtype=np.float32))
    mask = np.array([[1, 1, 1, 1], [0, 0, 1, 1]])
    ids = np.array([[5, 6, 7, 8], [0, 0, 9, 10]])
    rows: list[list[int]] = [[5, 6, 7, 8], [9, 10]]
    for step in range(4):
        logits, *presents = session.run(
            outputs, {"input_ids": ids, "attention_mask": mask, **buffers}
        )
        assert all(one.shape == (2, 2, 4 + step, 16) for one in presents)
        for row, tokens in enumerate(rows):
            with torch.no_grad():
                expected = exported.model(input_ids=torch.tensor([tokens])).logits[0, -1]
            np.testing.assert_allclose(logits[row, 0], expected, atol=TOLERANCE, rtol=0)
        buffers = dict(zip(names, presents, strict=True))
        ids = logits.argmax(-1)
        mask = np.concatenate((mask, np.ones_like(ids)), axis=1)
        for tokens, token in zip(rows, ids[:, 0].tolist(), strict=True):
            tokens.append(token)


def test_a_row_without_new_tokens_keeps_its_cache() -> None:
    """A row that is done while others go on, and one of nothing but padding."""
    exported = traced("llama")
    generator = exported.generator()
    conversation = generator.start(2, capacity=16)
    generator.prefill([[5, 6, 7], [8, 9]], conversation)
    before = {name: one[1, :, :2].copy() for name, one in conversation._arrays.items()}
    logits = generator.step([11, None], conversation)
    assert conversation.lengths.tolist() == [4, 2]
    assert np.any(logits[0])
    assert not np.any(logits[1])
    for name, held in before.items():
        np.testing.assert_array_equal(conversation._arrays[name][1, :, :2], held)


def test_rows_that_differ_in_past_and_several_new_tokens_are_refused() -> None:
    """ONNX Runtime cannot do it on the CPU; the graph must not look like a first prompt to it.

    Row 0 has 2 tokens and one new, row 1 has none and three new: the longest row is as long as
    the new tokens are, which is how the kernel knows a first prompt.
    """
    exported = traced("llama")
    feeds = dict.fromkeys(pasts(exported.cache), np.zeros((2, 2, 8, 16), dtype=np.float32))
    feeds["input_ids"] = np.array([[5, 0, 0], [6, 7, 8]])
    feeds["attention_mask"] = np.array([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]])
    with pytest.raises(Exception, match="batch_size"):
        exported.session().run(list(exported.part.outputs), feeds)


def test_the_cuda_graph_reads_no_length_on_the_host(tmp_path: Path) -> None:
    """Its lengths come from shapes, which are on the host anyway; results are the same."""
    exported = Exported(tiny_decoder("llama", num_hidden_layers=1), tmp_path, target="cuda")
    assert "ReduceMax" not in exported.nodes
    samples = [one for one in exported.part.sampled() if one.kind != "resume-padded"]
    assert_parity(exported.part, exported.session(), samples)


def test_the_portable_graph_keeps_to_what_every_runtime_fuses(tmp_path: Path) -> None:
    """No fused norm; attention and rotation have no standard op of this opset."""
    exported = Exported(tiny_decoder("llama", num_hidden_layers=1), tmp_path, target="portable")
    assert "SkipSimplifiedLayerNormalization" not in exported.nodes
    assert_parity(exported.part, exported.session())


@pytest.mark.slow
def test_embeddings_instead_of_ids(tmp_path: Path) -> None:
    """What a vision-language model's decoder takes."""
    model = tiny_decoder("gemma3")
    exported = Exported(model, tmp_path, embeds=True)
    assert "inputs_embeds" in exported.part.inputs
    assert_parity(exported.part, exported.session())

    def embed(ids: Any) -> Any:
        with torch.no_grad():
            return model.get_input_embeddings()(torch.from_numpy(ids)).numpy()

    generator = exported.generator(embed=embed)
    prompts = [[5, 6, 7, 8, 9, 10, 11, 12], [13]]
    by_ids = generator.generate(prompts, max_new_tokens=6).tokens
    given = [embed(np.array([prompt]))[0] for prompt in prompts]
    assert generator.generate(given, max_new_tokens=6).tokens == by_ids
    reference = greedy_reference(decoder_part(model), prompts, steps=6)
    assert by_ids == reference.tokens.tolist()


def test_an_extra_input_reaches_the_modules_that_ask_for_it(tmp_path: Path) -> None:
    """How adapters become graph inputs: a wrapped Linear reads what is bound around the trace."""
    model = tiny_decoder("llama", num_hidden_layers=1)
    bound: dict[str, torch.Tensor] = {}

    class Scaled(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            low = x @ bound["a"].transpose(0, 1)
            return self.inner(x) + low @ bound["b"].transpose(0, 1)

    @contextmanager
    def bind(inputs: Any) -> Iterator[None]:
        bound.update(inputs)
        yield
        bound.clear()

    model.model.layers[0].mlp.down_proj = Scaled(model.model.layers[0].mlp.down_proj)
    generator = torch.Generator().manual_seed(0)
    extra = Extra(
        inputs={
            "a": torch.randn(3, 56, generator=generator),
            "b": torch.randn(32, 3, generator=generator),
        },
        axes={"a": {0: "rank"}, "b": {1: "rank"}},
        bind=bind,
    )
    exported = Exported(model, tmp_path, extra=extra)
    assert [value.name for value in exported.session().get_inputs()][-2:] == ["a", "b"]
    assert_parity(exported.part, exported.session())
    # Rank 0 is the model without it.
    feeds = dict(next(iter(exported.part.sampled())).feeds)
    feeds |= {"a": np.zeros((0, 56), np.float32), "b": np.zeros((32, 0), np.float32)}
    found = exported.session().run(["logits"], feeds)[0]
    model.model.layers[0].mlp.down_proj = model.model.layers[0].mlp.down_proj.inner
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(feeds["input_ids"])).logits[:, -1:]
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)


def test_attention_sinks(tmp_path: Path) -> None:
    """GPT-OSS adds a learnt logit to each head's softmax; the op has an input for it."""
    exported = Exported(tiny_gpt_oss(), tmp_path)
    assert_parity(exported.part, exported.session())


@pytest.mark.slow
def test_two_exports_are_byte_identical(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        Exported(tiny_decoder("qwen3"), tmp_path / folder)
    for name in ("model.onnx", "model.onnx.data"):
        one, two = (tmp_path / folder / name for folder in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


def test_weights_are_the_models_own_memory_under_its_names() -> None:
    """No copy is made before the file is written, and a tied head stays one weight."""
    model = tiny_decoder("llama-tied", num_hidden_layers=1)
    graph = trace_decoder(decoder_part(model), "cpu").graph
    state = model.state_dict()
    weights = {name: value for name, value in graph.initializers.items() if name.endswith("weight")}
    assert "lm_head.weight" not in weights
    assert not {one for one in weights if "+" not in one} - state.keys()
    embedding = weights["model.embed_tokens.weight"].const_value
    assert embedding is not None
    assert np.shares_memory(embedding.numpy(), state["model.embed_tokens.weight"].numpy())
    packed = weights.pop("model.layers.0.self_attn.q_proj+k_proj+v_proj.weight").const_value
    assert isinstance(packed, onnx_ir.LazyTensor)
    columns = [state[f"model.layers.0.self_attn.{one}_proj.weight"].numpy().T for one in "qkv"]
    np.testing.assert_array_equal(packed.numpy(), np.concatenate(columns, axis=1))
    turned = weights["model.layers.0.mlp.down_proj.weight"].const_value
    assert isinstance(turned, onnx_ir.LazyTensor)
    expected = state["model.layers.0.mlp.down_proj.weight"].numpy().T
    np.testing.assert_array_equal(turned.numpy(), expected)


def test_the_model_is_left_as_it_was() -> None:
    """Nothing that was replaced for the trace stays replaced, whether it succeeds or fails."""
    ids = torch.tensor([[5, 6, 7]])
    fresh, exported = tiny_decoder("llama"), traced("llama").model
    with torch.no_grad():
        before = fresh(input_ids=ids).logits
    implementation = fresh.config._attn_implementation
    fresh.model.layers[0].self_attn.is_causal = False
    with pytest.raises(InputError, match="not causal"):
        decoder_part(fresh)
    fresh.model.layers[0].self_attn.is_causal = True
    for model in (fresh, exported):
        assert model.config._attn_implementation == implementation
        assert not any("forward" in vars(module) for module in model.modules())
        assert not model.lm_head._forward_pre_hooks
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=ids).logits, before, atol=0, rtol=0)


# -------------------------------------------------------------------- refusals


def _bloom() -> Any:
    from transformers import BloomConfig, BloomForCausalLM

    return BloomForCausalLM(BloomConfig(vocab_size=31, hidden_size=16, n_layer=2, n_head=2))


def _bidirectional_gemma() -> Any:
    model = tiny_decoder("gemma3")
    model.config.use_bidirectional_attention = True
    return model


def _chunked_llama4() -> Any:
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    config = Llama4TextConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        intermediate_size_mlp=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        attention_chunk_size=4,
        moe_layers=[],
        max_position_embeddings=64,
        pad_token_id=0,
    )
    return Llama4ForCausalLM(config)


def _latent_attention() -> Any:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=1,
        max_position_embeddings=64,
    )
    return DeepseekV3ForCausalLM(config)


def _mamba() -> Any:
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(
        MambaConfig(vocab_size=31, hidden_size=16, num_hidden_layers=1, state_size=4)
    )


def _roberta() -> Any:
    from transformers import RobertaConfig, RobertaForCausalLM

    config = RobertaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        is_decoder=True,
    )
    return RobertaForCausalLM(config)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        pytest.param(_bloom, "BloomForCausalLM", id="alibi"),
        pytest.param(_bidirectional_gemma, "neither causal nor a causal window", id="both-ways"),
        pytest.param(_chunked_llama4, "neither causal nor a causal window", id="chunks"),
        pytest.param(_latent_attention, "other keys than it put into the cache", id="latent"),
        pytest.param(_mamba, "MambaForCausalLM", id="state-space"),
        pytest.param(_roberta, "does not count its positions from 0", id="offset"),
    ],
)
def test_what_the_graph_cannot_express_is_refused_by_name(
    make: Callable[[], Any], reason: str
) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        decoder_part(make().eval())
    assert "cannot export this decoder" in str(caught.value)


def test_a_part_of_another_kind_is_refused() -> None:
    part = Part("text", torch.nn.Identity(), {}, {}, (), samples=list)
    with pytest.raises(InputError, match="no decoder"):
        trace_decoder(part, "cpu")
    with pytest.raises(InputError, match="no decoder"):
        cache_map(part)


def test_a_failed_trace_names_the_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    part = decoder_part(tiny_decoder("llama"))

    def fail(*_: Any, **__: Any) -> None:
        raise torch.onnx.errors.OnnxExporterError("no such op")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(MmoptError, match=r"LlamaForCausalLM could not be traced: no such op"):
        trace_decoder(part, "cpu")


def test_a_refusal_while_a_decoder_is_traced_stays_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is bad input, which exits 2, and says more than that the trace failed."""
    part = decoder_part(tiny_decoder("llama"))

    def refuse(*_: Any, **__: Any) -> None:
        raise InputError("a refusal")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    with pytest.raises(InputError, match=r"^a refusal$"):
        trace_decoder(part, "cpu")


def test_a_graph_that_lost_an_input_is_no_trace_of_its_part() -> None:
    def graph(used: bool) -> Any:
        x, y = (onnx_ir.val(n, onnx_ir.DataType.FLOAT, onnx_ir.Shape([3])) for n in "xy")
        node = onnx_ir.node("Add", [x, y if used else x])
        node.outputs[0].name = "z"
        return onnx_ir.Model(
            onnx_ir.Graph([x, y], node.outputs, nodes=[node], opset_imports={"": 20}), ir_version=10
        )

    part: Any = SimpleNamespace(name="decoder", inputs={"x": 0, "y": 0}, outputs=("z",))
    _require_io(graph(True), part)
    with pytest.raises(MmoptError, match="the graph of decoder lost the input y; it would be ign"):
        _require_io(graph(False), part)
    for changes in ({"inputs": {"y": 0, "x": 0}}, {"outputs": ("logits",)}):
        other: Any = SimpleNamespace(**(vars(part) | changes))
        with pytest.raises(MmoptError, match=r"the graph of decoder has .*, expected "):
            _require_io(graph(True), other)


# -------------------------------------------------------------------- masks


@pytest.mark.parametrize("size", [1, 2, 6, 40, 511])
def test_a_window_is_read_off_the_mask(size: int) -> None:
    from transformers.masking_utils import sliding_window_causal_mask_function

    assert _window(sliding_window_causal_mask_function(size), 512, "X") == Window(size)


def test_a_window_as_long_as_the_model_is_none() -> None:
    from transformers.masking_utils import sliding_window_causal_mask_function

    assert _window(sliding_window_causal_mask_function(512), 512, "X") == Window(None)


def test_a_mask_with_a_hole_is_refused() -> None:
    """Causal but for one key, as a block or a prefix would be."""
    for hole in (0, 3, 200):

        def mask(_: Any, __: Any, q: Any, k: Any, hole: int = hole) -> Any:
            return (k <= q) & (k != hole)

        with pytest.raises(InputError, match="neither causal"):
            _window(mask, 512, "X")
