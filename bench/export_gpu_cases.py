"""Exported models on a GPU beside torch.compile: cases and peers.

Weights are random: a machine with a GPU may have no network, and time does not depend on them. On
the CPU the same in fp32, to see that peers agree.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from export_peers import save_llama
from gpu_peers import Unavailable
from torch import Tensor
from torch.nn.functional import cosine_similarity

import mmopt_export
from mmopt_export.generation import Generator
from mmopt_export.manifest import read_manifest
from mmopt_export.runtime import MODEL, open_session
from mmopt_kernels.errors import one_line


@dataclass(frozen=True)
class Case:
    """What a call does, on rows of `length` ids without padding.

    Attributes:
        action: `embed`, `prefill` or `decode`; a decoder's caches have room for `new` more tokens.
        changes: to the model's config.
    """

    action: str
    batch: int
    length: int
    new: int = 0
    changes: tuple[tuple[str, int], ...] = field(default=(), repr=False)

    @property
    def name(self) -> str:
        return f"{self.action}-{self.batch}x{self.length}"

    @property
    def steps(self) -> int:
        """Into which a call's time is divided: one for each token that every row gets."""
        return self.new if self.action == "decode" else 1

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch * (1 if self.action == "decode" else self.length)


ENCODER_CASES = tuple(Case("embed", *shape) for shape in ((1, 16), (8, 128), (32, 64), (32, 512)))
DECODER_CASES = tuple(
    Case(action, batch, 512, 32) for action in ("prefill", "decode") for batch in (1, 8)
)
CASES = (*ENCODER_CASES, *DECODER_CASES)

# By device, which is also the export's target: its precision, and what that is in torch.
PRECISIONS = {"cuda": ("fp16", torch.float16), "cpu": ("fp32", torch.float32)}

# Least cosine with eager: of embeddings, and of logits, which are near ties in a random model.
AGREES = {"embed": 0.999, "prefill": 0.99, "decode": 0.99}

# ---------------------------------------------------------------- models


def save_minilm(folder: Path, **changes: int) -> None:
    """A BERT of all-MiniLM-L6-v2's sizes with random weights and a small tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 30522,
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    }
    # Wider than 0.02: embeddings then depend on what is read.
    BertModel(BertConfig(**sizes | changes, initializer_range=0.05)).save_pretrained(folder)
    words = {"[PAD]": 0, "[UNK]": 1} | {f"w{index}": index for index in range(2, 64)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)


@functools.cache
def scratch() -> tempfile.TemporaryDirectory[str]:
    """Where models and artifacts are; removed with the process."""
    return tempfile.TemporaryDirectory(prefix="mmopt-export-gpu-")


@functools.cache
def saved(encoder: bool, changes: tuple[tuple[str, int], ...]) -> Path:
    """The folder of the model, made once."""
    folder = Path(tempfile.mkdtemp(dir=scratch().name)) / "model"
    (save_minilm if encoder else save_llama)(folder, **dict(changes))
    return folder


def checkpoint(case: Case) -> Path:
    """The folder of the case's model."""
    return saved(case.action == "embed", case.changes)


@functools.cache
def exported(model: Path, device: str) -> mmopt_export.ExportReport:
    """Our artifact of a model, made once.

    Drift is accepted: with random weights fp16 rounds more away than an artifact may, in torch as
    well (a cosine of 0.99997 with fp32 in the Llama, ours 0.99999). `runnable` holds peers against
    each other.
    """
    precision, _ = PRECISIONS[device]
    folder = model.with_name(f"artifact-{device}")
    return mmopt_export.export(
        str(model), folder, target=device, precision=precision, allow_drift=True
    )


def artifact_of(case: Case, device: str) -> Path:
    """Our artifact, all of it on the device.

    Raises:
        Unavailable: some of it is not.
    """
    report = exported(checkpoint(case), device)
    if report.exit_code:
        lines = [line for placement in report.placement for line in placement.lines()]
        raise Unavailable(f"the artifact is {report.status}: {'; '.join(lines)}")
    return report.path


def loaded(case: Case, device: str) -> Any:
    """The model in torch."""
    import transformers

    _, dtype = PRECISIONS[device]
    auto = transformers.AutoModel if case.action == "embed" else transformers.AutoModelForCausalLM
    model = auto.from_pretrained(checkpoint(case), dtype=dtype, attn_implementation="sdpa")
    return model.to(device).eval()


def ids_of(case: Case) -> Tensor:
    """Random ids `[batch, length]`, the same for every peer."""
    vocabulary = dict(case.changes).get("vocab_size", 30000)  # both have more
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, vocabulary, (case.batch, case.length), generator=generator)


def wait(device: str) -> None:
    """Until the device has done its work, whichever library's it is."""
    if device == "cuda":
        torch.cuda.synchronize()


# ---------------------------------------------------------------- encoders


@dataclass(frozen=True)
class Peer:
    """What is timed, and what is held against eager: embeddings or logits `[N, *]`."""

    call: Callable[[], Any]
    check: Callable[[], Tensor]


Build = Callable[[Case, str], Peer]
"""Of a case and a device; raises Unavailable."""


def mmopt_encoder(case: Case, device: str) -> Peer:
    """Inputs and output are torch's memory on the device: nothing is copied."""
    artifact = artifact_of(case, device)
    manifest = read_manifest(artifact)
    session = open_session(artifact / manifest.components[MODEL].file, provider=manifest.provider)
    ids = ids_of(case).to(device)
    feeds = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
    }
    binding = session.io_binding()
    for spec in manifest.inputs:
        feed = feeds[spec.name]
        binding.bind_input(spec.name, device, 0, np.int64, tuple(feed.shape), feed.data_ptr())
    (spec,) = manifest.outputs
    shape = (case.batch, *spec.shape[1:])
    found = torch.empty(shape, dtype=getattr(torch, spec.dtype), device=device)
    binding.bind_output(spec.name, device, 0, np.dtype(spec.dtype), shape, found.data_ptr())
    wait(device)  # ONNX Runtime has a stream of its own

    def call() -> Tensor:
        assert feeds  # the binding has addresses alone
        session.run_with_iobinding(binding)
        return found

    return Peer(call, call)


def torch_encoder(case: Case, device: str, *, mode: str | None) -> Peer:
    """transformers without a mask, with which SDPA takes its fastest kernels.

    Args:
        mode: of torch.compile; None is eager.
    """
    model, ids = loaded(case, device), ids_of(case).to(device)

    def embed(ids: Tensor) -> Tensor:
        return model(input_ids=ids).last_hidden_state.mean(dim=1)

    if mode is not None:
        embed = torch.compile(embed, mode=mode, dynamic=False)
    without_grad = torch.inference_mode if mode is None else torch.no_grad

    @without_grad()
    def call() -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return embed(ids)

    return Peer(call, call)


ENCODER_PEERS: dict[str, Build] = {
    "mmopt": mmopt_encoder,
    "eager": functools.partial(torch_encoder, mode=None),
    "compiled": functools.partial(torch_encoder, mode="default"),
    "compiled-graphs": functools.partial(torch_encoder, mode="reduce-overhead"),
}

# ---------------------------------------------------------------- decoders


class MmoptDecoder:
    """Our generator on our artifact: logits come to the host, where tokens are chosen."""

    def __init__(self, case: Case, device: str) -> None:
        artifact = artifact_of(case, device)
        manifest = read_manifest(artifact)
        ((name, cache),) = manifest.caches.items()
        self._generator = Generator(
            artifact / manifest.components[name].file,
            cache,
            provider=manifest.provider,
            max_length=manifest.max_length,
        )
        self._case, self._prompts = case, ids_of(case).tolist()
        self._state = self._generator.start(case.batch, capacity=case.length + case.new + 1)

    def prefill(self) -> list[dict[int, int]]:
        """Each row's first new token."""
        return self._generate(0, self._prompts, 1)

    def decode(self) -> list[dict[int, int]]:
        """`new` tokens of each row, after the prompt and one more token."""
        first = [prompt[:1] for prompt in self._prompts]
        return self._generate(self._case.length, first, self._case.new)

    def logits(self) -> Tensor:
        """After the prompt, and after one more token."""
        self._rewind(0)
        after = [
            self._generator.prefill(self._prompts, self._state),
            self._generator.step([prompt[0] for prompt in self._prompts], self._state),
        ]
        return torch.from_numpy(np.concatenate(after))

    def _generate(self, start: int, tokens: Sequence[list[int]], new: int) -> list[dict[int, int]]:
        self._rewind(start)
        stream = self._generator.stream(tokens, max_new_tokens=new, conversation=self._state)
        return list(stream)

    def _rewind(self, length: int) -> None:
        # What lies behind a row's length is overwritten.
        self._state.lengths[:] = length
        self._state.pending = [[] for _ in self._prompts]
        self._state.history = [[] for _ in self._prompts]


class TorchDecoder:
    """transformers; tokens are chosen on the device, and come to the host at the end of a call.

    Compiled, with a static cache: in CUDA graphs for decoding, as transformers' documentation has
    it, without them for a prefill.
    """

    def __init__(self, case: Case, device: str, *, compiled: bool) -> None:
        from transformers import DynamicCache, StaticCache

        model, self._ids = loaded(case, device), ids_of(case).to(device)
        self._new, self._held = case.new, 0
        self._cache: Any = DynamicCache(config=model.config)
        self._forwards = {"prefill": model.forward, "decode": model.forward}
        self._without_grad = torch.no_grad if compiled else torch.inference_mode
        if compiled:
            self._cache = StaticCache(config=model.config, max_cache_len=case.length + case.new)
            self._take(self._ids)  # a static cache is allocated outside of what is compiled
            mode = "reduce-overhead" if case.action == "decode" else "default"
            self._forwards[case.action] = torch.compile(
                model.forward, mode=mode, fullgraph=True, dynamic=False
            )

    def prefill(self) -> list[int]:
        """Each row's first new token."""
        self._rewind(0)
        return self._take(self._ids).argmax(-1).tolist()

    def decode(self) -> list[list[int]]:
        """`new` tokens of each row, after the prompt and one more token."""
        self._rewind(self._ids.shape[1])
        token, tokens = self._ids[:, :1], []
        for _ in range(self._new):
            token = self._take(token).argmax(-1, keepdim=True)
            tokens.append(token)
        return torch.cat(tokens, dim=1).tolist()

    def logits(self) -> Tensor:
        """After the prompt, and after one more token."""
        self._rewind(0)
        return torch.cat([self._take(self._ids).cpu(), self._take(self._ids[:, :1]).cpu()])

    def _take(self, tokens: Tensor) -> Tensor:
        """Logits `[batch, V]` after new tokens."""
        torch.compiler.cudagraph_mark_step_begin()
        forward = self._forwards["decode" if self._held else "prefill"]
        with self._without_grad():
            found = forward(input_ids=tokens, cache=self._cache, use_cache=True, logits_to_keep=1)
        self._held += tokens.shape[1]
        return found.logits[:, -1]

    def _rewind(self, length: int) -> None:
        with self._without_grad():
            self._cache.crop(length - self._held)
        self._held = length


def decoder(case: Case, device: str, *, make: Callable[..., Any]) -> Peer:
    """A decoder's call, with the prompt in its cache once it was checked."""
    made = make(case, device)
    return Peer(getattr(made, case.action), made.logits)


DECODER_PEERS: dict[str, Build] = {
    "mmopt": functools.partial(decoder, make=MmoptDecoder),
    "eager": functools.partial(decoder, make=functools.partial(TorchDecoder, compiled=False)),
    "compiled": functools.partial(decoder, make=functools.partial(TorchDecoder, compiled=True)),
}

# ---------------------------------------------------------------- what is timed

PEERS = {"embed": ENCODER_PEERS, "prefill": DECODER_PEERS, "decode": DECODER_PEERS}
"""By action."""


@functools.lru_cache(maxsize=1)
def expected(case: Case, device: str) -> Tensor:
    """What eager computes."""
    return PEERS[case.action]["eager"](case, device).check().cpu().double()


def runnable(case: Case, build: Build, device: str) -> Callable[[], Any]:
    """What to time: a call that has run before, is over when it returns, and agrees with eager.

    Raises:
        Unavailable: the peer cannot run this case here, in its own words, or does not agree.
    """
    try:
        peer = build(case, device)
        got = peer.check()
        wait(device)
        cosine = cosine_similarity(got.cpu().double(), expected(case, device)).min().item()
        for _ in range(2):  # after the check: CUDA graphs are recorded, then replayed
            peer.call()
        wait(device)
    except Unavailable:
        raise
    except Exception as error:  # compilers and runtimes raise what they like
        raise Unavailable(f"{type(error).__name__}: {one_line(error)}") from error
    if not cosine > AGREES[case.action]:
        raise Unavailable(
            f"its least cosine with eager is {cosine:.5f}, expected above {AGREES[case.action]}"
        )

    def call() -> Any:
        found = peer.call()
        wait(device)
        return found

    return call
