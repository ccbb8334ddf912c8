"""Generation on ONNX Runtime: batches, turns, ends, growth, sampling, and what is refused."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from mmopt_export.generation import GREEDY, Generator, Sampling, choose, distribution
from mmopt_export.manifest import CacheMap, Component, record_files
from mmopt_export.providers import get_target
from mmopt_export.quantization import quantize, recipe_for
from mmopt_kernels.errors import InputError, MmoptError
from tiny_artifacts import make_artifact, make_manifest
from tiny_decoders import VOCABULARY, Exported, eager_tokens, traced

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = (9, 1, 14)
TURNS = (3, 5, 1)


@pytest.fixture(scope="module", params=["llama", pytest.param("gemma3", marks=pytest.mark.slow)])
def exported(request: pytest.FixtureRequest) -> Exported:
    """A model without a window and one with windows shorter than the prompts."""
    return traced(request.param)


@pytest.fixture(scope="module")
def llama() -> Exported:
    return traced("llama")


def prompts_of(lengths: tuple[int, ...], seed: int = 0) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(3, VOCABULARY, length).tolist() for length in lengths]


def test_a_ragged_batch_gives_what_each_prompt_gives_alone(exported: Exported) -> None:
    prompts = prompts_of(LENGTHS)
    result = exported.generator().generate(prompts, max_new_tokens=12)
    assert result.tokens == [eager_tokens(exported.model, one, 12) for one in prompts]
    assert result.reasons == ["length"] * 3


def test_an_adapter_is_chosen_where_a_conversation_starts(llama: Exported) -> None:
    generator = llama.generator()
    first = generator.generate([[5, 6]], max_new_tokens=2)
    with pytest.raises(InputError, match="adapter is 'a' and a conversation is given, which keeps"):
        generator.generate([[7]], max_new_tokens=2, conversation=first.conversation, adapter="a")
    with pytest.raises(InputError, match="adapter is 'a', and this was made of sessions alone"):
        generator.start(1, adapter="a")


def test_a_second_turn_goes_on_where_the_first_ended(exported: Exported) -> None:
    """Several new tokens after a past, of different numbers: row by row on the CPU."""
    generator = exported.generator()
    prompts, turns = prompts_of(LENGTHS), prompts_of(TURNS, seed=1)
    first = generator.generate(prompts, max_new_tokens=6)
    # The last token came out and did not go in.
    assert first.conversation.lengths.tolist() == [len(one) + 5 for one in prompts]
    second = generator.generate(turns, max_new_tokens=7, conversation=first.conversation)
    for row, (prompt, turn) in enumerate(zip(prompts, turns, strict=True)):
        whole = prompt + first.tokens[row] + turn
        assert second.tokens[row] == eager_tokens(exported.model, whole, 7)
        assert second.conversation.history[row] == whole + second.tokens[row]


def test_token_by_token_gives_the_same_as_row_by_row(llama: Exported) -> None:
    """What providers do whose buffers cannot be taken apart."""
    prompts, turns = prompts_of(LENGTHS), prompts_of(TURNS, seed=1)
    results = []
    for name in ("_row_by_row", "_token_by_token"):
        generator = llama.generator()
        first = generator.generate(prompts, max_new_tokens=3)
        rows = generator._rows(turns, first.conversation)
        generator._grow(first.conversation, 64)
        results.append(getattr(generator, name)(rows, first.conversation))
        assert first.conversation.lengths.tolist() == [
            len(prompt) + 3 + len(turn) for prompt, turn in zip(prompts, turns, strict=True)
        ]
    np.testing.assert_allclose(results[0], results[1], atol=3e-5)


def test_rows_end_on_their_own_and_keep_their_cache(exported: Exported) -> None:
    generator = exported.generator()
    prompts, turns = prompts_of(LENGTHS), prompts_of(TURNS, seed=1)
    free = generator.generate(prompts, max_new_tokens=10).tokens
    eos = free[0][3]
    expected = [row[: row.index(eos) + 1] if eos in row else row for row in free]
    result = generator.generate(prompts, max_new_tokens=10, eos=[eos])
    assert result.tokens == expected
    assert result.reasons[0] == "eos"
    second = generator.generate(turns, max_new_tokens=5, conversation=result.conversation)
    for row, (prompt, turn) in enumerate(zip(prompts, turns, strict=True)):
        whole = prompt + expected[row] + turn
        assert second.tokens[row] == eager_tokens(exported.model, whole, 5)


def test_buffers_grow_from_one_token(llama: Exported) -> None:
    generator = llama.generator()
    prompts = prompts_of(LENGTHS)
    conversation = generator.start(3, capacity=1)
    result = generator.generate(prompts, max_new_tokens=20, conversation=conversation)
    assert result.tokens == [eager_tokens(llama.model, one, 20) for one in prompts]
    assert conversation.capacity >= max(LENGTHS) + 19


def test_steps_write_into_one_buffer(llama: Exported) -> None:
    """Past and present are the same memory: nothing is copied or made anew from step to step."""
    generator = llama.generator()
    conversation = generator.start(1, capacity=32)
    arrays = dict(conversation._arrays)
    generator.generate(prompts_of((5,)), max_new_tokens=8, conversation=conversation)
    assert all(conversation._arrays[name] is array for name, array in arrays.items())
    for array in arrays.values():
        assert np.all(np.any(array[0, :, :12] != 0, axis=-1))
        assert not np.any(array[0, :, 12:])


def test_buffers_have_the_type_of_the_graph(llama: Exported, tmp_path: Path) -> None:
    """A precision changes it, and the map of the cache is from before."""
    prompts = prompts_of(LENGTHS)
    quantize(llama.file, tmp_path / "model.onnx", recipe_for(get_target("cuda"), "decoder", "fp16"))
    assert llama.cache.dtype == "float32"
    results = []
    for model in (llama.file, tmp_path / "model.onnx"):
        generator = Generator(model, llama.cache, threads=1)
        conversation = generator.start(3)
        results.append(generator.prefill(prompts, conversation))
    assert {array.dtype for array in conversation._arrays.values()} == {np.dtype(np.float16)}
    np.testing.assert_allclose(*results, atol=2e-2)


def counting(path: Path, *, constant: bool = False) -> CacheMap:
    """A decoder in bf16 that ONNX Runtime's CPU provider runs too: each call adds 1 to its cache,
    and the cache's mean is the first of two logits.

    Args:
        constant: whether what the mean is multiplied by for each logit is an input, `first`.
    """
    cache = ("past.key", "past.value", "present.key", "present.value")
    value, shape = onnx.helper.make_tensor_value_info, ["B", 1, "T", 2]
    nodes = []
    for past, present in ((cache[0], cache[2]), (cache[1], cache[3])):
        nodes += [
            onnx.helper.make_node("Cast", [past], [f"{past}.fp32"], to=TensorProto.FLOAT),
            onnx.helper.make_node("Add", [f"{past}.fp32", "one"], [f"{past}.next"]),
            onnx.helper.make_node("Cast", [f"{past}.next"], [present], to=TensorProto.BFLOAT16),
        ]
    nodes += [
        onnx.helper.make_node("ReduceMean", [f"{cache[0]}.next", "axes"], ["mean"], keepdims=0),
        onnx.helper.make_node("Unsqueeze", ["mean", "axes.logits"], ["mean.3d"]),
        onnx.helper.make_node("Mul", ["mean.3d", "first"], ["logits"]),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "counting",
        [
            value("input_ids", TensorProto.INT64, ["B", "S"]),
            value("attention_mask", TensorProto.INT64, ["B", "M"]),
            *(value(name, TensorProto.BFLOAT16, shape) for name in cache[:2]),
            *([value("first", TensorProto.FLOAT, [2])] if constant else []),
        ],
        [
            value("logits", TensorProto.FLOAT, ["B", 1, 2]),
            *(value(name, TensorProto.BFLOAT16, shape) for name in cache[2:]),
        ],
        [
            onnx.numpy_helper.from_array(np.float32(1), "one"),
            onnx.numpy_helper.from_array(np.asarray([1, 2, 3]), "axes"),
            onnx.numpy_helper.from_array(np.asarray([1, 2]), "axes.logits"),
            *([] if constant else [onnx.numpy_helper.from_array(np.float32([1, 0]), "first")]),
        ],
    )
    opsets = [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return CacheMap(layers=(cache,), heads=1, head_size=2, dtype="bfloat16")


def test_a_cache_in_bf16_is_read_and_written_in_place_and_grows(tmp_path: Path) -> None:
    generator = Generator(tmp_path / "model.onnx", counting(tmp_path / "model.onnx"), threads=1)
    conversation = generator.start(2, capacity=2)
    for count in (1, 2):
        assert generator.prefill([[1], [0]], conversation).tolist() == [[count, 0]] * 2
    held = conversation.capacity
    logits = generator.prefill([[1], [0]], conversation)
    # Two rows of `held` places hold 2, those that are new hold 0.
    assert conversation.capacity > held
    assert logits[0, 0] == 1 + 2 * 2 / conversation.capacity


def test_constants_are_inputs_of_every_run(tmp_path: Path) -> None:
    """Those of an adapter too: in steps, and where each row runs by itself."""
    cache = counting(tmp_path / "model.onnx", constant=True)

    def adapters(adapter: str | None, component: str) -> Any:
        assert component == "model"
        return {} if adapter is None else {"first": np.float32([0, 5])}

    generator = Generator(tmp_path / "model.onnx", cache, threads=1, adapters=adapters)
    for adapter, first in ((None, [3, 0]), ("a", [0, 5])):
        given = {"first": np.float32([3, 0])}
        conversation = generator.start(2, capacity=8, constants=given, adapter=adapter)
        for count, prompts in enumerate(([[1], [0]], [[1], [1]], [[1, 0], [0, 1, 1]]), start=1):
            logits = generator.prefill(prompts, conversation)
            assert logits.tolist() == [[first[0] * count, first[1] * count]] * 2
        assert conversation.lengths.tolist() == [4, 5]


def test_a_batch_is_one_run_of_the_graph(llama: Exported) -> None:
    """Rows run by themselves only where several have new tokens after a past."""
    generator = llama.generator()
    session, runs = generator.session, []

    class Counted:
        def __getattr__(self, name: str) -> Any:
            return getattr(session, name)

        def run_with_iobinding(self, binding: Any) -> None:
            runs.append(binding)
            session.run_with_iobinding(binding)

    generator.session = Counted()
    result = generator.generate(prompts_of(LENGTHS), max_new_tokens=5)
    assert len(runs) == 5
    assert len({id(binding) for binding in runs}) == 1
    generator.prefill(prompts_of((0, 2, 3)), result.conversation)
    assert len(runs) == 5 + 3


def test_buffers_double_and_end_with_the_positions(llama: Exported) -> None:
    """Growing copies them: token by token that would be as often as there are tokens."""
    generator = llama.generator()
    conversation = generator.start(1, capacity=8)
    capacities = []
    for length in range(96):
        assert conversation.lengths.tolist() == [length]
        generator.step([5], conversation)
        capacities.append(conversation.capacity)
    assert sorted(set(capacities)) == [9, 18, 36, 72, 97]


def test_tokens_that_are_put_in_follow_the_one_that_came_out_last(llama: Exported) -> None:
    """`prefill` after `generate`: the pending token goes in once; ids may be arrays."""
    import torch

    generator = llama.generator()
    result = generator.generate([np.array([5, 6, 7])], max_new_tokens=3)
    whole = [5, 6, 7, *result.tokens[0]]
    for new in ([9, 4], [8], [11]):
        logits = generator.prefill([np.array(new)], result.conversation)
        whole += new
        with torch.no_grad():
            expected = llama.model(input_ids=torch.tensor([whole])).logits[0, -1]
        np.testing.assert_allclose(logits[0], expected, atol=3e-5)
        assert result.conversation.lengths.tolist() == [len(whole)]
        assert result.conversation.history == [whole]


def test_a_row_without_tokens_is_left_alone_where_others_have_several(llama: Exported) -> None:
    generator = llama.generator()
    conversation = generator.start(3, capacity=32)
    generator.prefill(prompts_of((4, 2, 3)), conversation)
    before = {name: one[1].copy() for name, one in conversation._arrays.items()}
    logits = generator.prefill([[5, 6], [], [7]], conversation)
    assert conversation.lengths.tolist() == [6, 2, 4]
    assert np.any(logits, axis=1).tolist() == [True, False, True]
    for name, held in before.items():
        np.testing.assert_array_equal(conversation._arrays[name][1], held)


@pytest.mark.parametrize("floats", ["float", "float16", "bfloat16"])
def test_caches_are_where_the_session_runs(floats: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer elsewhere would be copied there and back at every step, and not be shared."""
    import onnxruntime

    places: list[str] = []
    bound: dict[str, set[Any]] = {"past": set(), "present": set()}

    class Value:
        @staticmethod
        def ortvalue_from_numpy(array: Any, device: str = "cpu", _: int = 0) -> Any:
            places.append(device)
            return SimpleNamespace(data_ptr=lambda: array.ctypes.data, shape=lambda: array.shape)

    def by_value(name: str, buffer: Any) -> None:
        bound[name.partition(".")[0]].add(buffer.data_ptr())

    def by_address(name: str, device: str, _: int, kind: int, shape: Any, address: int) -> None:
        assert (device, kind, shape) == ("cuda", TensorProto.BFLOAT16, (1, 1, 9, 2))
        bound[name.partition(".")[0]].add(address)

    names = ("past.key", "past.value", "present.key", "present.value")
    nodes = [SimpleNamespace(name=name, type=f"tensor({floats})", shape=[]) for name in names]
    ids = SimpleNamespace(name="input_ids", type="tensor(int64)", shape=[])
    logits = SimpleNamespace(name="logits", type="tensor(float)", shape=["B", 1, "V"])
    binding = SimpleNamespace(
        bind_ortvalue_input=by_value,
        bind_ortvalue_output=by_value,
        bind_input=by_address,
        bind_output=by_address,
    )
    session = SimpleNamespace(
        get_inputs=lambda: [ids, *nodes[:2]],
        get_outputs=lambda: [logits, *nodes[2:]],
        io_binding=lambda: binding,
    )
    monkeypatch.setattr(onnxruntime, "OrtValue", Value)
    cache = CacheMap(layers=(names,), heads=1, head_size=2, dtype=floats)
    generator = Generator(session, cache, provider="CUDAExecutionProvider")
    generator._bound(generator.start(1, capacity=8))
    assert places == ["cuda", "cuda"]
    assert len(bound["past"]) == 2
    assert bound["past"] == bound["present"]


def test_streaming_gives_tokens_as_they_come_and_can_stop(llama: Exported) -> None:
    generator = llama.generator()
    prompts = prompts_of((7, 2))
    whole = generator.generate(prompts, max_new_tokens=9).tokens
    called: list[dict[int, int]] = []
    generator.generate(prompts, max_new_tokens=9, on_tokens=called.append)
    assert [[step[row] for step in called] for row in range(2)] == whole
    conversation = generator.start(2)
    stream = generator.stream(prompts, max_new_tokens=9, conversation=conversation)
    steps = [next(stream) for _ in range(4)]
    stream.close()
    assert [[step[row] for step in steps] for row in range(2)] == [one[:4] for one in whole]
    rest = generator.generate([[], []], max_new_tokens=5, conversation=conversation)
    assert rest.tokens == [one[4:] for one in whole]


def test_logits_are_eagers(exported: Exported) -> None:
    import torch

    generator = exported.generator()
    prompts = prompts_of(LENGTHS)
    conversation = generator.start(3)
    found = [generator.prefill(prompts, conversation), generator.step([5, 6, 7], conversation)]
    for logits, added in zip(found, ([], [5, 6, 7]), strict=True):
        for row, prompt in enumerate(prompts):
            ids = torch.tensor([prompt + added[row : row + 1]])
            with torch.no_grad():
                expected = exported.model(input_ids=ids).logits[0, -1]
            np.testing.assert_allclose(logits[row], expected, atol=3e-5)


def test_logits_are_the_callers_to_keep(llama: Exported) -> None:
    generator = llama.generator()
    conversation = generator.start(1)
    first = generator.prefill([[5, 6]], conversation)
    kept = first.copy()
    second = generator.step([7], conversation)
    np.testing.assert_array_equal(first, kept)
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_row_ends_where_positions_end_and_others_go_on(family: str) -> None:
    """96 positions: 90 tokens in leave 6, and the seventh comes from the last one.

    GPT-2 looks positions up in a table that ends there, whatever a full row's place holds.
    """
    exported = traced(family)
    prompts = prompts_of((90, 5))
    result = exported.generator().generate(prompts, max_new_tokens=30)
    assert result.reasons == ["length", "length"]
    assert result.tokens == [
        eager_tokens(exported.model, prompt, count)
        for prompt, count in zip(prompts, (7, 30), strict=True)
    ]


def test_an_opened_artifact_ends_where_positions_end(llama: Exported, tmp_path: Path) -> None:
    """The limit and the cache are the manifest's."""
    folder = shutil.copytree(llama.folder, tmp_path / "artifact")
    manifest = make_manifest(
        "llama",
        {"model": Component("model.onnx", (), (), "fp32", None)},
        task="text-generation",
        caches={"model": llama.cache},
        max_length=llama.part.limits["total"],
        files=record_files(folder),
    )
    manifest.write(folder)
    result = Generator.open(folder, threads=1).generate([[5] * 90], max_new_tokens=30)
    assert result.tokens == [eager_tokens(llama.model, [5] * 90, 7)]
    assert result.reasons == ["length"]


def test_an_artifact_of_another_kind_is_not_opened(tmp_path: Path) -> None:
    message = "is for text-classification, expected a decoder alone.*TextGenerator"
    with pytest.raises(InputError, match=message):
        Generator.open(make_artifact(tmp_path))


def test_a_failed_step_without_a_limit_names_the_limit(llama: Exported) -> None:
    generator = llama.generator(max_length=None)
    with pytest.raises(MmoptError, match=r"a row has 98 tokens: .*No max_length was given"):
        generator.generate([[5] * 90], max_new_tokens=30)


# -------------------------------------------------------------------- sampling


class _EvenDraw:
    """Stands for a generator of random numbers that gives one."""

    def __init__(self, number: float) -> None:
        self._number = number

    def random(self) -> float:
        return self._number

    @classmethod
    def of(cls, count: int) -> "list[_EvenDraw]":
        """Numbers from 0 to 1 as far from each other."""
        return [cls((index + 0.5) / count) for index in range(count)]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7),
        Sampling(top_k=5),
        Sampling(top_k=VOCABULARY + 1),
        Sampling(top_p=0.8),
        Sampling(top_p=0.05),
        Sampling(temperature=1.3, top_k=20, top_p=0.6),
        Sampling(repetition_penalty=1.4),
        Sampling(temperature=0.5, repetition_penalty=0.8, top_k=7, top_p=0.9),
    ],
    ids=str,
)
def test_the_distribution_is_transformers(sampling: Sampling) -> None:
    """The same scores through transformers' own processors, in `generate`'s order."""
    import torch
    from transformers import (
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = (np.random.default_rng(3).standard_normal(VOCABULARY) * 3).astype(np.float32)
    history = [4, 9, 9, 30]
    processors: Any = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    scores = processors(torch.tensor([history]), torch.from_numpy(logits)[None].double())
    expected = scores.softmax(-1)[0].numpy()
    # Of even draws each token comes as often as it is likely, but for one at its edge.
    drawn = [choose(logits, sampling, history, one) for one in _EvenDraw.of(2000)]
    counts = np.bincount(drawn, minlength=VOCABULARY) / len(drawn)
    assert set(np.flatnonzero(counts)) <= set(np.flatnonzero(expected))
    np.testing.assert_allclose(counts, expected, atol=1 / 2000)
    if sampling.repetition_penalty == 1:
        found = distribution(logits.astype(np.float64), sampling)
        np.testing.assert_allclose(found, expected, atol=1e-9)


def test_a_seed_gives_the_same_again_and_rows_do_not_depend_on_each_other(llama: Exported) -> None:
    generator = llama.generator()
    prompts = prompts_of(LENGTHS)
    sampling = Sampling(temperature=1.2, top_k=30, top_p=0.95, repetition_penalty=1.1, seed=7)
    first = generator.generate(prompts, max_new_tokens=10, sampling=sampling).tokens
    assert generator.generate(prompts, max_new_tokens=10, sampling=sampling).tokens == first
    alone = generator.generate(prompts[:1], max_new_tokens=10, sampling=sampling).tokens
    assert alone == first[:1]
    other = Sampling(temperature=1.2, top_k=30, top_p=0.95, repetition_penalty=1.1, seed=8)
    assert generator.generate(prompts, max_new_tokens=10, sampling=other).tokens != first


def test_rows_of_one_prompt_draw_their_own(llama: Exported) -> None:
    sampling = Sampling(temperature=1.5, seed=3)
    rows = llama.generator().generate([[5, 6]] * 4, max_new_tokens=12, sampling=sampling).tokens
    assert len(set(map(tuple, rows))) == 4


def test_a_draw_at_the_edge_of_a_token_takes_the_next_and_the_last_one_ends() -> None:
    """Sums of probabilities may end below the largest draw."""
    even = np.zeros(4, dtype=np.float32)
    for drawn, token in ((0.0, 0), (0.25, 1), (0.75, 3)):
        assert choose(even, Sampling(), [], _EvenDraw(drawn)) == token  # type: ignore[arg-type]
    largest = np.nextafter(1.0, 0.0)
    tenths = np.zeros(10, dtype=np.float32)
    assert np.cumsum(distribution(tenths.astype(np.float64), Sampling()))[-1] <= largest
    assert choose(tenths, Sampling(), [], _EvenDraw(largest)) == 9  # type: ignore[arg-type]


def test_large_scores_have_a_distribution() -> None:
    """Their exponentials alone are infinite."""
    found = distribution(np.array([900.0, 890.0, -900.0]), Sampling(temperature=0.01))
    np.testing.assert_array_equal(found, [1, 0, 0])


def test_greedy_takes_the_first_of_equal_logits() -> None:
    assert choose(np.array([1, 5, 5, 0], dtype=np.float32), GREEDY, []) == 1


def test_a_penalty_counts_for_greedy_too() -> None:
    """Positive logits shrink, negative ones grow more negative."""
    logits = np.array([1.0, 2.0, 1.9], dtype=np.float32)
    assert choose(logits, Sampling(temperature=0, repetition_penalty=1.2), [1, 1]) == 2
    assert choose(-logits, Sampling(temperature=0, repetition_penalty=3.0), [0]) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -1.0}, r"temperature is -1.0, expected 0 or more"),
        ({"temperature": float("nan")}, r"temperature is nan"),
        ({"temperature": float("inf")}, r"temperature is inf"),
        ({"top_k": -1}, r"top_k is -1"),
        ({"top_p": 0.0}, r"top_p is 0.0, expected above 0 and at most 1"),
        ({"top_p": 1.5}, r"top_p is 1.5"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty is 0.0"),
        ({"repetition_penalty": float("inf")}, r"repetition_penalty is inf"),
        ({"seed": -3}, r"seed is -3"),
    ],
    ids=str,
)
def test_sampling_out_of_range_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sampling(**changes)


# -------------------------------------------------------------------- refusals


def test_bad_prompts_are_refused_and_leave_the_conversation_as_it_was(llama: Exported) -> None:
    generator = llama.generator()
    conversation = generator.start(2)
    for prompts, message in (
        ([[5]], "1 prompts for a conversation of 2 rows"),
        ([[5], [VOCABULARY]], "prompt 1 has ids from 61 to 61, expected 0 to 60"),
        ([[-1], [5]], "prompt 0 has ids from -1"),
        ([[], []], "every prompt is empty"),
        ([[5], [6] * 97], "a row would have 97 tokens, and the model has 96 positions"),
        ([[5], np.zeros((2, 32), np.float32)], r"prompt 1 has the shape \(2, 32\)"),
    ):
        with pytest.raises(InputError, match=message):
            generator.prefill(prompts, conversation)  # type: ignore[arg-type]
        assert conversation.lengths.tolist() == [0, 0]
        assert conversation.history == [[], []]
    with pytest.raises(InputError, match="max_new_tokens is 0"):
        generator.generate([[5], [6]], max_new_tokens=0)
    for batch, capacity in ((0, 1), (1, 0)):
        message = f"batch is {batch} and capacity {capacity}, expected at least 1 each"
        with pytest.raises(InputError, match=message):
            generator.start(batch, capacity=capacity)


def test_a_cache_of_another_graph_is_refused(llama: Exported) -> None:
    names = (
        "past_key_values.9.key",
        "past_key_values.9.value",
        "present.9.key",
        "present.9.value",
    )
    cache = CacheMap(layers=(names,), heads=2, head_size=8, dtype="float32")
    with pytest.raises(InputError, match=r"no past_key_values\.9\.key"):
        Generator(llama.session(), cache)


def test_an_empty_row_beside_others_is_left_alone(llama: Exported) -> None:
    generator = llama.generator()
    prompts = prompts_of((6, 3))
    conversation = generator.start(2)
    result = generator.generate([prompts[0], []], max_new_tokens=4, conversation=conversation)
    assert result.tokens == [eager_tokens(llama.model, prompts[0], 4), []]
    later = generator.generate([[], prompts[1]], max_new_tokens=4, conversation=conversation)
    assert later.tokens[1] == eager_tokens(llama.model, prompts[1], 4)


def test_generation_imports_without_torch_and_transformers(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'onnx', 'mmopt'):\n"
        "    sys.modules[name] = None\n"
        "import mmopt_export.generation\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
