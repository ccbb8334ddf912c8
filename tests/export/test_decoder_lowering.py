"""What a decoder is proven to be before it is traced: each refusal, and what is put back."""

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmopt_export.decoder.lowering import (
    Attention,
    Buffers,
    Lowering,
    Survey,
    Window,
    _norm_form,
    _steady_frequencies,
    _window,
    call,
    lowered,
    steady_positions,
    survey,
)
from mmopt_export.decoder.part import decoder_part
from mmopt_kernels.errors import InputError
from tiny_decoders import tiny_decoder

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.tensor([[3, 4, 5], [6, 7, 8]])
POSITIONS = torch.arange(3, 6).expand(2, -1)


def attend(
    lowering: Lowering,
    *,
    key: Tensor | None = None,
    value: Tensor | None = None,
    mask: Any = Window(6),  # noqa: B008 - frozen
    causal: bool = True,
    **arguments: Any,
) -> Tensor:
    """One call of a layer with 4 heads of queries and 2 of keys, all of size 8."""
    pending = torch.ones(2, 2, 3, 8), torch.ones(2, 2, 3, 8) if value is None else value
    lowering.cache.update(*pending, 0)
    module = nn.Identity()
    module.is_causal = causal  # type: ignore[assignment]
    query = torch.ones(2, 4, 3, 8)
    key = pending[0] if key is None else key
    return lowering.attend(module, query, key, pending[1], mask, None, arguments)


def test_what_attention_was_called_with_is_found() -> None:
    lowering = Lowering("X", 96, 1)
    attend(lowering, softcap=5.0, sliding_window=6, position_ids=POSITIONS)
    assert lowering.found.attentions == [
        Attention(layer=0, heads=4, kv_heads=2, head_size=8, scale=8**-0.5, softcap=5.0, window=6)
    ]
    lowering.cache.require_attended()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": torch.ones(2, 2, 3, 8)}, "Identity attends to other keys than it put into"),
        ({"mask": None}, "layer 0 of X attends without a causal mask"),
        ({"causal": False}, "layer 0 of X is not causal"),
        ({"value": torch.ones(2, 2, 3, 4)}, "heads of size 8 for queries and 4 for values"),
        ({"value": torch.ones(2, 1, 3, 8)}, "layer 0 of X has heads of size 8"),
        ({"sliding_window": 5}, "has a window of 5 and a mask of 6"),
        ({"alibi": torch.ones(4)}, "layer 0 of X passes alibi to attention"),
    ],
    ids=["keys", "mask", "causal", "size", "heads", "window", "tensor"],
)
def test_attention_that_the_op_has_no_place_for_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        attend(Lowering("X", 96, 1), **changes)


def test_values_that_were_not_put_into_the_cache_are_refused() -> None:
    lowering = Lowering("X", 96, 1)
    key, value = torch.ones(2, 2, 3, 8), torch.ones(2, 2, 3, 8)
    lowering.cache.update(key, value, 0)
    with pytest.raises(InputError, match="attends to other keys than it put into the cache"):
        lowering.attend(nn.Identity(), torch.ones(2, 4, 3, 8), key, value + 1, Window(6), None, {})


def test_a_trace_that_attends_differently_is_refused() -> None:
    surveyed = Lowering("X", 96, 1)
    attend(surveyed)
    nothing = torch.zeros(0)
    buffers = Buffers([nothing], [nothing], nothing, nothing, nothing)
    traced = Lowering("X", 96, 1, surveyed.found, buffers)
    with pytest.raises(InputError, match="X attends differently in layer 0 when it is traced"):
        attend(traced, softcap=5.0)


def look(model: Any, layers: int = 2) -> Survey:
    return survey(model, {"input_ids": IDS, "position_ids": POSITIONS}, 96, layers)


def test_a_layer_that_did_not_attend_is_refused() -> None:
    with pytest.raises(InputError, match=r"has 3 layers and called .* function for \[0, 1\]"):
        look(tiny_decoder("llama"), layers=3)


def test_a_head_that_runs_twice_is_refused() -> None:
    model = tiny_decoder("llama")
    assert len(look(model).attentions) == 2

    def again(*_: Any) -> None:
        model.lm_head(torch.zeros(2, 3, 32))

    model.register_forward_hook(again)
    with pytest.raises(InputError, match="called its language model head 2 times, expected once"):
        look(model)


def test_layers_of_other_heads_are_refused() -> None:
    """The buffers of all layers have one shape."""
    from transformers.models.llama.modeling_llama import LlamaAttention

    model = tiny_decoder("llama")
    other = tiny_decoder("llama", num_key_value_heads=4).config
    other._attn_implementation = model.config._attn_implementation
    attention = LlamaAttention(other, layer_idx=1).eval()
    attention.config = model.config
    model.model.layers[1].self_attn = attention
    with pytest.raises(InputError, match=r"different key and value heads: \[\(2, 16\), \(4, 16\)"):
        look(model)


@pytest.mark.parametrize("positions", [1, 2])
def test_a_model_without_positions_for_its_samples_is_refused(positions: int) -> None:
    with pytest.raises(InputError, match=f"has {positions} positions, expected at least 3"):
        decoder_part(tiny_decoder("llama", max_position_embeddings=positions))


def test_a_model_that_takes_no_positions_is_refused() -> None:
    class Bare(nn.Module):
        def forward(self, input_ids: Tensor) -> Tensor:
            return input_ids

    lowering = Lowering("Bare", 96, 1)
    with pytest.raises(InputError, match="Bare takes no position_ids"):
        call(Bare(), lowering.cache, {"input_ids": IDS})


def test_a_layer_that_fills_the_cache_and_attends_elsewhere_is_refused() -> None:
    """The last one: no further layer would notice."""
    model = tiny_decoder("llama")
    lowering = Lowering("X", 96, 2)
    with (
        pytest.raises(InputError, match="layer 1 fills the cache and does not call transformers'"),
        lowered(model, lowering),
    ):
        lowering.cache.update(torch.ones(1), torch.ones(1), 1)


class OtherNorm(nn.Module):
    """RMSNorm with the square of its weight."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight**2


@pytest.mark.parametrize("kind", ["plain", "1 + weight", "other", "vague"])
def test_a_norm_is_written_as_its_own_code_computes_it(kind: str) -> None:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    kinds: dict[str, Any] = {"plain": LlamaRMSNorm, "1 + weight": GemmaRMSNorm}
    norm = kinds.get(kind, OtherNorm)(8)
    generator = torch.Generator().manual_seed(0)
    norm.weight.data = torch.randn(8, generator=generator)
    if kind == "vague":
        norm = LlamaRMSNorm(8)
        norm.variance_epsilon = None
    forms = _norm_form(norm)
    if kind in kinds:
        (form,) = forms
        x = torch.randn(2, 3, 8, generator=generator)
        torch.testing.assert_close(form(x), norm(x))
        norm.weight.data *= 2
        torch.testing.assert_close(form(x), norm(x))
    else:
        assert forms == []


class Rotary(nn.Module):
    """As transformers': a wrapper chooses frequencies before the module's own code runs."""

    def __init__(self, rope_type: Any) -> None:
        super().__init__()
        self.rope_type = rope_type

    @staticmethod
    def chosen(forward: Any) -> Any:
        @functools.wraps(forward)
        def wrapper(self: Any) -> str:
            return "chosen anew, " + str(forward(self))

        return wrapper

    def forward(self) -> str:
        return "kept"


Rotary.forward = Rotary.chosen(Rotary.forward)  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("kind", "steady"),
    [
        ("longrope", True),
        ("dynamic", True),
        ({"full_attention": "dynamic", "sliding_attention": "default"}, True),
        ({"full_attention": "longrope"}, True),
        ("default", False),
        ("yarn", False),
    ],
    ids=str,
)
def test_frequencies_are_not_chosen_anew_while_a_decoder_runs(kind: Any, steady: bool) -> None:
    rotary = Rotary(kind)
    with _steady_frequencies(nn.ModuleList([rotary])):
        assert rotary() == ("kept" if steady else "chosen anew, kept")
    assert rotary() == "chosen anew, kept"
    assert "forward" not in vars(rotary)


@pytest.mark.parametrize(
    ("parameters", "wanted"),
    [
        ({"rope_type": "longrope", "original_max_position_embeddings": 16}, 16),
        ({"rope_type": "longrope"}, 24),
        ({"rope_type": "yarn", "original_max_position_embeddings": 16}, 64),
        (
            {
                "full_attention": {
                    "rope_type": "longrope",
                    "original_max_position_embeddings": 16,
                },
                "sliding_attention": {"rope_type": "default"},
            },
            16,
        ),
        (None, 64),
    ],
    ids=["longrope", "of the config", "yarn", "nested", "none"],
)
def test_positions_end_where_frequencies_change(parameters: Any, wanted: int) -> None:
    config = SimpleNamespace(
        max_position_embeddings=64,
        original_max_position_embeddings=24,
        rope_parameters=parameters,
    )
    assert steady_positions(config) == wanted
    assert steady_positions(SimpleNamespace()) == 0


@pytest.mark.parametrize("prefix", [2, 5, 40])
def test_a_prefix_that_sees_itself_both_ways_is_refused(prefix: int) -> None:
    """Behind it the mask is causal, the last row included."""

    def mask(_: Any, __: Any, q: Any, k: Any) -> Any:
        return (k <= q) | ((q < prefix) & (k < prefix))

    with pytest.raises(InputError, match="neither causal nor a causal window"):
        _window(mask, 512, "X")


@pytest.mark.parametrize("chunk", [5, 128, 312])
def test_chunks_are_refused(chunk: int) -> None:
    """Their last row looks like that of a window; the longest begins behind the usual probes."""

    def mask(_: Any, __: Any, q: Any, k: Any) -> Any:
        return (k <= q) & (k // chunk == q // chunk)

    with pytest.raises(InputError, match="neither causal nor a causal window"):
        _window(mask, 512, "X")
