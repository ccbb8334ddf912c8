"""The cases of bench_training_step.py, for the CPU and the GPU, and the peers that run them.

A case is a model of random weights with a LoRA adapter of rank 16, and a batch. A step is forward,
loss and backward; the optimizer is left out, and nothing is checkpointed. Peers share the weights.
tests/test_step_cases.py holds that they compute the same.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import importlib.util
import itertools
import operator
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gpu_peers import Unavailable
from torch import Tensor, nn

import mmopt
from mmopt.measure.memory import peak_tensor_bytes
from mmopt.measure.timing import Timing, read_clock, time_variants

RANK = 16
# Below are the special tokens of every vocabulary here.
FIRST_TOKEN = 8
IGNORED = -100

NAME = operator.attrgetter("name")


@dataclass(frozen=True)
class Case:
    """One model, one batch.

    Attributes:
        model: of `MODELS`.
        rows: sequences in the batch; of a CLIP, pictures, each with its caption.
        length: tokens of a sequence. Captions are padded, the last one to half.
        documents: packed in each sequence, each half as long as the one before. A document of a
            model that sees begins with a picture, and has another after each `PICTURE_EVERY`
            pictures' worth of tokens.
        base: `dense`, or `nf4` for the layers that have an adapter.
        dtype: of the frozen weights. Adapters are float32, as PEFT keeps them.
    """

    name: str
    model: str
    rows: int
    length: int
    documents: int = 1
    base: str = "dense"
    dtype: torch.dtype = torch.bfloat16

    @property
    def family(self) -> str:
        return self.model.partition("-")[0]


LLAMA_CPU = Case("llama-124m", "llama-124m", 2, 256, dtype=torch.float32)
CLIP_CPU = Case("clip-b32", "clip-b32", 8, 77, dtype=torch.float32)
CPU = (LLAMA_CPU, CLIP_CPU)

# Some 8k tokens, or as many as leave PEFT's eager step room on 80 GB: of the Gemma, one row of 4096
# with 5 pictures.
GPU = (
    Case("llama-1b-packed", "llama-1b", 2, 4096, documents=4),
    Case("llama-1b-packed-nf4", "llama-1b", 2, 4096, documents=4, base="nf4"),
    Case("gemma3-4b-packed", "gemma3-4b", 1, 4096, documents=4),
    Case("gemma3-4b-packed-nf4", "gemma3-4b", 1, 4096, documents=4, base="nf4"),
    Case("clip-l14", "clip-l14", 64, 77),
    Case("clip-l14-nf4", "clip-l14", 64, 77, base="nf4"),
)
GPU_SLOW = (
    Case("llama-1b", "llama-1b", 8, 1024),
    Case("gemma3-4b", "gemma3-4b", 4, 1024),
)


def tiny(case: Case) -> Case:
    """The case on a model of one or two narrow layers, with as many documents and fewer tokens.

    Every layer reads a multiple of 64 features: bitsandbytes 0.50.2 dequantizes NF4 on a CPU wrong
    where a row is no whole number of blocks.
    """
    length = {"llama": 48, "gemma3": 96, "clip": 11}[case.family]
    rows = 2 if case.family == "gemma3" else min(case.rows, 3)
    # float32, so that what differs between peers is more than rounding.
    return replace(case, model=f"{case.family}-tiny", rows=rows, length=length, dtype=torch.float32)


# --- models ---------------------------------------------------------------------------------------

Settings = dict[str, Any]

# As in Llama-3.2-1B's config.json, and of the 124M model that the project measures elsewhere.
LLAMA: dict[str, Settings] = {
    "llama-124m": {
        "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2560,
        "num_hidden_layers": 12, "num_attention_heads": 12,
    },
    "llama-1b": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "llama-tiny": {
        "vocab_size": 99, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    },
}  # fmt: skip

# Gemma-3-4b's: text, vision (SigLIP So400m at 896 pixels), and tokens a picture.
GEMMA3: dict[str, tuple[Settings, Settings, int]] = {
    "gemma3-4b": (
        {
            "vocab_size": 262208, "hidden_size": 2560, "intermediate_size": 10240,
            "num_hidden_layers": 34, "num_attention_heads": 8, "num_key_value_heads": 4,
            "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 1024,
        },
        {
            "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
            "num_attention_heads": 16, "image_size": 896, "patch_size": 14,
        },
        256,
    ),
    "gemma3-tiny": (
        {
            "vocab_size": 99, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
            "query_pre_attn_scalar": 16, "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        {
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
            "num_attention_heads": 4, "image_size": 16, "patch_size": 4,
        },
        4,
    ),
}  # fmt: skip
# What Gemma 3 puts around and in place of a picture: low ids, so that every vocabulary has them.
BOS, IMAGE_BEGINS, IMAGE, IMAGE_ENDS = 2, 3, 4, 5
PICTURE_EVERY = 4

# Text and vision of the two CLIPs, and the size of what they are projected to.
CLIP: dict[str, tuple[Settings, Settings, int]] = {
    "clip-b32": (
        {
            "vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048,
            "num_hidden_layers": 12, "num_attention_heads": 8, "max_position_embeddings": 77,
            "eos_token_id": 49407,
        },
        {
            "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
            "num_attention_heads": 12, "image_size": 224, "patch_size": 32,
        },
        512,
    ),
    "clip-l14": (
        {
            "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072,
            "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 77,
            "eos_token_id": 49407,
        },
        {
            "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
            "num_attention_heads": 16, "image_size": 224, "patch_size": 14,
        },
        768,
    ),
    "clip-tiny": (
        {
            "vocab_size": 99, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
            "num_attention_heads": 4, "max_position_embeddings": 16, "eos_token_id": 98,
        },
        {
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
            "num_attention_heads": 4, "image_size": 16, "patch_size": 4,
        },
        16,
    ),
}  # fmt: skip

# The linear layers of the decoder, or of both towers. Gemma's vision tower is frozen, and so is
# every output layer.
TARGETS = {
    "llama": r".*\.(q|k|v|o|gate|up|down)_proj",
    "gemma3": r".*language_model.*\.(q|k|v|o|gate|up|down)_proj",
    "clip": r".*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)",
}


def base_model(case: Case) -> Any:
    """The transformers model of a case without its adapter: on the CPU, in float32."""
    from transformers import (
        CLIPConfig,
        CLIPModel,
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        LlamaConfig,
        LlamaForCausalLM,
    )

    if case.family == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                **LLAMA[case.model],
                max_position_embeddings=case.length,
                tie_word_embeddings=True,
                use_cache=False,
            )
        )
    if case.family == "gemma3":
        text, vision, tokens = GEMMA3[case.model]
        text = {**text, "max_position_embeddings": case.length, "use_cache": False}
        return Gemma3ForConditionalGeneration(
            Gemma3Config(
                text_config=text,
                vision_config={**vision, "vision_use_head": False},
                mm_tokens_per_image=tokens,
                image_token_id=IMAGE,
                boi_token_id=IMAGE_BEGINS,
                eoi_token_id=IMAGE_ENDS,
            )
        )
    text, vision, projection = CLIP[case.model]
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection))


def drawn(case: Case, device: torch.device | str) -> Any:
    """The base model, its weights drawn on the device: another kind draws others."""
    torch.manual_seed(0)
    with torch.device(device):
        return base_model(case).to(case.dtype)


def adapted_model(case: Case, device: str = "cpu") -> Any:
    """The model of a case with an adapter whose B is not zero, in training mode.

    Raises:
        Unavailable: an NF4 base without bitsandbytes.
    """
    from peft import LoraConfig, get_peft_model

    base = drawn(case, device)
    if case.base == "nf4":
        quantize(base, TARGETS[case.family])
    model = get_peft_model(
        base, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS[case.family])
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:  # as after some training
                parameter.normal_(std=0.02)
    return model.to(device).train()


def quantize(model: Any, targets: str) -> None:
    """Put bitsandbytes' NF4 layers, double quantization and all, in place of linear layers.

    Raises:
        Unavailable: bitsandbytes is not installed.
    """
    import re

    if importlib.util.find_spec("bitsandbytes") is None:
        raise Unavailable("bitsandbytes is not installed")
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or not re.fullmatch(targets, name):
            continue
        weight, bias = module.weight, module.bias
        made = bnb.nn.Linear4bit(
            module.in_features, module.out_features, bias is not None,
            compute_dtype=weight.dtype, compress_statistics=True, quant_type="nf4", device="meta",
        )  # fmt: skip
        made.weight = bnb.nn.Params4bit(
            weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4",
            module=made,
        )  # fmt: skip
        made.bias = bias
        parent, _, last = name.rpartition(".")
        # Quantizes: a Params4bit is on a device once it is moved there.
        setattr(model.get_submodule(parent), last, made.to(weight.device))
    model.is_loaded_in_4bit = True  # where PEFT looks


def twin(model: nn.Module) -> Any:
    """A copy with modules and configs of its own, and the same parameters and buffers."""
    shared: list[Any] = [*model.parameters(), *model.buffers()]
    shared += [x.quant_state for x in shared if getattr(x, "quant_state", None) is not None]
    return copy.deepcopy(model, {id(x): x for x in shared})


def weight_bytes(model: nn.Module) -> int:
    """Of parameters and buffers, NF4's scales not counted: 2% of such a base."""
    return sum(x.numel() * x.element_size() for x in [*model.parameters(), *model.buffers()])


# --- batches --------------------------------------------------------------------------------------


def batch(case: Case, device: str = "cpu") -> dict[str, Any]:
    """Random, and the same for every peer."""
    generator = torch.Generator().manual_seed(0)
    made = {"llama": _texts, "gemma3": _texts_with_pictures, "clip": _captions}[case.family](
        case, generator
    )
    return {
        name: value.to(device, case.dtype if value.is_floating_point() else None)
        if isinstance(value, Tensor)
        else value
        for name, value in made.items()
    }


def edges(case: Case) -> list[int]:
    """0, then where each document of a row ends: at 1/2, 3/4, ... and at the end."""
    found = [0]
    for _ in range(case.documents - 1):
        found.append(found[-1] + (case.length - found[-1]) // 2)
    return [*found, case.length]


def pictures(case: Case) -> list[int]:
    """Where the tokens of each picture begin in a row; two tokens after the document does."""
    tokens = GEMMA3[case.model][2]
    return [
        at + 2
        for begin, end in itertools.pairwise(edges(case))
        for at in range(begin, end - tokens - 3, PICTURE_EVERY * tokens)
    ]


def _tokens(case: Case, vocabulary: int, generator: torch.Generator) -> Tensor:
    shape = (case.rows, case.length)
    return torch.randint(FIRST_TOKEN, vocabulary, shape, generator=generator)


def _packed(case: Case, ids: Tensor) -> dict[str, Any]:
    """Labels, and positions that tell where documents begin: transformers takes no mask for it."""
    if case.documents == 1:
        return {"input_ids": ids, "labels": ids.clone()}
    labels, positions = ids.clone(), torch.empty_like(ids)
    for begin, end in itertools.pairwise(edges(case)):
        positions[:, begin:end] = torch.arange(end - begin)
        labels[:, begin] = IGNORED  # no document foretells the next
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def _texts(case: Case, generator: torch.Generator) -> dict[str, Any]:
    return _packed(case, _tokens(case, LLAMA[case.model]["vocab_size"], generator))


def _texts_with_pictures(case: Case, generator: torch.Generator) -> dict[str, Any]:
    text, vision, tokens = GEMMA3[case.model]
    ids = _tokens(case, text["vocab_size"], generator)
    for begin in edges(case)[:-1]:
        ids[:, begin] = BOS
    begins = pictures(case)
    for begin in begins:
        ids[:, begin - 1] = IMAGE_BEGINS
        ids[:, begin : begin + tokens] = IMAGE
        ids[:, begin + tokens] = IMAGE_ENDS
    made = _packed(case, ids)
    is_image = ids == IMAGE
    made["labels"] = made["labels"].masked_fill(is_image, IGNORED)
    size = vision["image_size"]
    pixels = torch.randn(case.rows * len(begins), 3, size, size, generator=generator)
    return {**made, "token_type_ids": is_image.long(), "pixel_values": pixels}


def _captions(case: Case, generator: torch.Generator) -> dict[str, Any]:
    text, vision, _ = CLIP[case.model]
    # The last id ends a caption, and CLIP reads what it finds there; the others do not have it.
    ids = _tokens(case, text["eos_token_id"], generator)
    keep = torch.ones_like(ids)
    for row, n in enumerate(torch.linspace(case.length, case.length // 2, case.rows).int()):
        ids[row, n - 1 :] = text["eos_token_id"]
        keep[row, n:] = 0
    size = vision["image_size"]
    pixels = torch.randn(case.rows, 3, size, size, generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": keep,
        "pixel_values": pixels,
        "return_loss": True,
    }


def work(case: Case) -> dict[str, int]:
    """What a step handles, padding among it: tokens, and pictures where there are any."""
    found = {"tokens": case.rows * case.length}
    if case.family == "gemma3":
        found["images"] = case.rows * len(pictures(case))
    if case.family == "clip":
        found["images"] = case.rows
    return found


# --- peers ----------------------------------------------------------------------------------------

Build = Callable[[Case, Any], Any]
"""Of a case and a twin of its model, what is called with the batch; or raises Unavailable."""


def peft(_case: Case, model: Any) -> Any:
    return model


def peft_compiled(_case: Case, model: Any) -> Any:
    return torch.compile(model)


def peft_compiled_flex(case: Case, model: Any) -> Any:
    """With FlexAttention, whose block masks skip what other documents and pictures hide."""
    if case.family == "clip":
        raise Unavailable("nothing to skip: CLIP's masks are no blocks")
    # Of the text: what a picture's patches see has no mask.
    chosen = {"text_config": "flex_attention"} if case.family == "gemma3" else "flex_attention"
    model.get_base_model().set_attn_implementation(chosen)
    return torch.compile(model)


def attached(_case: Case, model: Any) -> Any:
    mmopt.optimize(model)
    return torch.compile(model)


def liger(case: Case, model: Any) -> Any:
    """Liger's kernels in PEFT's model, eager, as its documentation has it for a model at hand."""
    if importlib.util.find_spec("liger_kernel") is None:
        raise Unavailable("liger-kernel is not installed")
    from liger_kernel import transformers as of_liger

    apply = {
        "llama": of_liger.apply_liger_kernel_to_llama,
        "gemma3": of_liger.apply_liger_kernel_to_gemma3,
    }.get(case.family)
    if apply is None:
        raise Unavailable(f"liger-kernel has no {case.family}")
    apply(model=model.get_base_model())
    return model


def unsloth(case: Case, model: Any) -> Any:
    """Unsloth's model of the same weights: it loads from a folder, and adds its own adapter."""
    if importlib.util.find_spec("unsloth") is None:
        raise Unavailable("unsloth is not installed")
    if case.family != "llama":
        raise Unavailable("only the Llama cases are written for unsloth")
    from unsloth import FastLanguageModel

    with tempfile.TemporaryDirectory() as folder:
        save_for_unsloth(case, Path(folder), next(model.parameters()).device)
        made, _ = FastLanguageModel.from_pretrained(
            folder, max_seq_length=case.length, dtype=case.dtype, load_in_4bit=case.base == "nf4"
        )
    made = FastLanguageModel.get_peft_model(
        made,
        r=RANK,
        lora_alpha=2 * RANK,
        lora_dropout=0,
        bias="none",
        target_modules=[f"{one}_proj" for one in ("q", "k", "v", "o", "gate", "up", "down")],
        use_gradient_checkpointing=False,  # as all others here
    )
    adapter = {name: x for name, x in model.state_dict().items() if ".lora_" in name}
    made.load_state_dict(adapter, strict=False)
    return made.train()


def save_for_unsloth(case: Case, folder: Path, device: torch.device) -> None:
    """The base's weights before they were quantized, and some tokenizer, which it asks for."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    drawn(case, device).save_pretrained(folder)
    words = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", "<pad>"])}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    ).save_pretrained(folder)


CPU_PEERS: dict[str, Build] = {"peft": peft, "peft-compiled": peft_compiled, "mmopt": attached}
GPU_PEERS: dict[str, Build] = {
    **CPU_PEERS,
    "peft-compiled-flex": peft_compiled_flex,
    "liger": liger,
    "unsloth": unsloth,
}
# These change functions and classes of transformers for everyone in their process.
ALONE = ("liger", "unsloth")


# --- measuring ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """One peer on one case.

    Attributes:
        first_step: seconds from the model to its first gradients: attaching, compiling, running;
            of Liger and Unsloth also their import, of Unsloth the way of the weights over the disk.
        peak_bytes: the most that torch's allocator held in a later step, beyond weights and inputs.
        weight_bytes: of the frozen weights and the adapters.
        loss: of the step.
        norms: of the gradient of each factor of the adapter, in the order of their names.
    """

    timing: Timing
    first_step: float
    peak_bytes: int
    weight_bytes: int
    loss: float
    norms: list[float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Measured:
        return cls(**{**values, "timing": Timing(**values["timing"])})


Found = dict[str, "Measured | str"]
"""By peer, what was measured, or why it was not; `failed: ` where the peer broke down."""


def step(run: Any, model: Any, inputs: dict[str, Any]) -> Callable[[], Tensor]:
    """Forward, loss and backward; the gradients are dropped, and the loss is what it returns."""

    def call() -> Tensor:
        loss: Tensor = run(**inputs).loss
        loss.backward()  # type: ignore[no-untyped-call]
        model.zero_grad(set_to_none=True)
        return loss.detach()

    return call


def gradient_norms(run: Any, model: Any, inputs: dict[str, Any]) -> list[float]:
    """Of the adapter's factors. By name, because a peer may have another model."""
    factors = dict(sorted(x for x in model.named_parameters() if x[1].requires_grad))
    loss = run(**inputs).loss
    found = torch.autograd.grad(loss, list(factors.values()), allow_unused=True)
    return [0.0 if x is None else float(x.float().norm()) for x in found]


def measure(
    case: Case,
    peers: Mapping[str, Build],
    *,
    device: str,
    rounds: int,
    starts: Callable[[str], None] = lambda _peer: None,
) -> Found:
    """Time every peer against the others, one step of each per round.

    Args:
        rounds: 0 runs each peer's steps and times none.
        starts: told whose first step is next.
    """
    found: Found = {}
    calls: dict[str, Callable[[], Tensor]] = {}
    figures: dict[str, tuple[float, int, int, float, list[float]]] = {}
    try:
        plain = adapted_model(case, device)
    except Unavailable as reason:
        return dict.fromkeys(peers, str(reason))
    weights, inputs = weight_bytes(plain), batch(case, device)
    if device == "cuda":
        warm_up(device)
    torch._dynamo.reset()
    for peer, build in peers.items():
        starts(peer)
        try:
            with _compiling_anew(device):
                began = read_clock()
                model = twin(plain)
                run = build(case, model)
                model = run if peer == "unsloth" else model
                call = step(run, model, inputs)
                loss = float(call())
                first = read_clock() - began
            peak = peak_bytes(call, device)
            figures[peer] = (first, peak, weights, loss, gradient_norms(run, model, inputs))
            calls[peer] = call
        except Unavailable as reason:
            found[peer] = str(reason)
        except Exception as error:  # noqa: BLE001 - one peer's failure is one line
            found[peer] = failure(error)
        # What is left of a peer that ran out of memory must not be missing from the next.
        model = run = call = None  # type: ignore[assignment]
        gc.collect()
        if device == "cuda":
            torch.cuda.synchronize()  # raises where the peer broke CUDA for this process
            torch.cuda.empty_cache()
    if calls and rounds:
        timings = time_variants(calls, rounds=rounds, timer=_timer(device))
    else:
        timings = {peer: Timing([], 1, 0.0, False) for peer in calls}
    return found | {peer: Measured(timings[peer], *figures[peer]) for peer in calls}


def failure(error: BaseException) -> str:
    """One line."""
    lines = str(error).strip().splitlines() or [""]
    return f"failed: {type(error).__name__}: {lines[0][:200]}"


def disagreement(found: Found, peer: str, *, relative: float) -> str | None:
    """How a peer's step is another than PEFT's, or None; also None where PEFT's is not known."""
    one, other = found[peer], found.get("peft")
    if not isinstance(one, Measured) or not isinstance(other, Measured):
        return None
    if not abs(one.loss - other.loss) <= relative * abs(other.loss):
        return f"failed: its loss is {one.loss}, PEFT's is {other.loss}"
    if len(one.norms) != len(other.norms):
        return f"failed: it trains {len(one.norms)} tensors, PEFT trains {len(other.norms)}"
    norms = torch.tensor([one.norms, other.norms], dtype=torch.float64)
    error = float((norms[0] - norms[1]).norm() / norms[1].norm())
    if not error <= 10 * relative:
        return f"failed: the norms of its gradients differ from PEFT's by {error:.1e} of them"
    return None


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """The most that torch's allocator held in a call, beyond what was there before."""
    if device != "cuda":
        return peak_tensor_bytes(call)
    from gpu_peers import peak_allocated

    call()  # kernels are loaded, and gradients that the first step left are gone
    return peak_allocated(call)


def _timer(device: str) -> Any:
    if device != "cuda":
        return None
    from mmopt.measure.gpu_timing import gpu_timer

    # Launches are part of a step, and a step of bitsandbytes or Liger is no CUDA graph.
    return gpu_timer("host-inclusive")


@contextlib.contextmanager
def _compiling_anew(device: str) -> Iterator[None]:
    """On a GPU, what is compiled inside was compiled by nobody before.

    On a CPU, where it takes minutes and is not what is asked, Inductor's cache stays.
    """
    if device != "cuda":
        yield
        return
    from torch._inductor.utils import fresh_cache

    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        fresh_cache(dir=folder, delete=False),
    ):
        yield


@functools.cache
def warm_up(device: str) -> None:
    """What the first user of a process would pay for all: libraries, and Inductor's import."""
    x = torch.ones(64, 64, device=device, requires_grad=True)
    torch.compile(lambda x: (x @ x).relu().sum())(x).backward()
    read_clock()
