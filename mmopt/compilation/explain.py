"""What to do about a graph break or a recompile: the line, where the model calls it, a remedy.

The patterns are held against PyTorch's own texts: `torch/_dynamo/graph_break_registry.json` for
breaks, and for recompiles what `torch._dynamo.guards` writes about a guard that failed.
"""

import linecache
import re
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from traceback import FrameSummary
from typing import Any

import torch

from mmopt.compilation.model import GraphBreak, Recompile

BREAK_REMEDIES: tuple[tuple[str, str], ...] = (
    (
        r"nothing was compiled",
        "Dynamo is switched off, or reached its limit of compilations in this process: unset "
        "TORCHDYNAMO_DISABLE, compile in a fresh process, or call torch._dynamo.reset() before.",
    ),
    (
        r"Tensor\.item\(\)|Tensor\.tolist\(\)|_local_scalar_dense|Data dependent operator",
        "A tensor's value becomes a Python number here (.item(), .tolist(), int(), float(), "
        "bool()): keep it a tensor, or compute it before the model is called and pass it in.",
    ),
    (
        r"generic_jump|Data-dependent branching",
        "Python branches on a tensor's values here: write the choice with torch.where, or decide "
        "it before the model is called.",
    ),
    (
        r"Data-dependent assertion|assert with non-string message",
        "An assertion reads a tensor's values: check the data before the model is called, or use "
        "torch._assert_async.",
    ),
    (
        r"builtin operator `print`|logging\.Logger|builtin `_warnings\.warn`|debugging function",
        "A message is printed or logged here: remove it from the forward, or add the function to "
        "torch._dynamo.config.ignore_logging_functions.",
    ),
    (
        r"torch\.Generator|manual_seed|stateful RNG|[Rr]andom\.Random|`Random\.|Tensor\.random_"
        r"|numpy\.random|RandomState",
        "Random numbers come from a generator that a graph cannot hold: draw them with torch's own "
        "ops from its default generator, and seed it before the model is called.",
    ),
    (
        r"Dynamic shape operator|data-dependent output shape",
        "The number of results depends on a tensor's values (nonzero, a boolean index, "
        "masked_select, unique, one_hot): keep the shape and mask the values, with torch.where or "
        "a product.",
    ),
    (
        r"Dynamic slicing with Tensor arguments|Indexing (list|torch\.Size) with non-scalar tensor",
        "A tensor's value is the end of a slice or an index of a list: compute it as a Python "
        "number before the model is called, or select with a mask.",
    ),
    (
        r"numpy|ndarray",
        "NumPy computes here: use the torch function of the same name, or compute it before the "
        "model is called.",
    ),
    (
        r"\b[Hh]ooks?\b|RemovableHandle|register_hook",
        "A hook is made or run within the graph: register hooks on modules before compiling, or "
        "use a torch.autograd.Function.",
    ),
    (
        r"torch\.compiler\.disable|torch\._dynamo\.graph_break\(\)|torch\._dynamo\.skip_frame"
        r"|ComptimeContext",
        "The code asks for this break (torch.compiler.disable, graph_break): remove that, or move "
        "the call out of the forward.",
    ),
    (
        r"torch\.autograd\.grad|autograd\.grad|Tensor\.backward\(\)|backward\(\)|requires_grad_?\b",
        "Gradients are taken or switched on within the model: do that around its call.",
    ),
    (
        r"trace generator|generator",
        "A Python generator is created or leaves the graph here: build a list instead.",
    ),
    (
        r"copy\.deepcopy",
        "Something is deep-copied in the forward: copy it once, before the model is called.",
    ),
    (
        r"sparse|NestedTensor|nested_tensor",
        "A sparse or nested tensor cannot be in the graph: use a dense one with a mask.",
    ),
    (
        r"RNN, GRU, or LSTM",
        "Dynamo leaves torch's recurrent layers out: set torch._dynamo.config.allow_rnn = True.",
    ),
    (
        r"recompile limit",
        "The same code was compiled too often: see why under recompiles, and change that first.",
    ),
    (
        r"context manager|GenericContextWrappingVariable|record_function|torch\.profiler",
        "A `with` block that Dynamo cannot hold is open here: put it around the model's call.",
    ),
    (
        r"fake tensors?|Fake tensor|FakeTensor|meta kernel",
        "An operator cannot tell its output's shape without running: register one with "
        "torch.library.register_fake, or use another operator.",
    ),
    (
        r"Observed exception|Exception|exception",
        "An exception is raised or caught in a way that Dynamo cannot follow: test the condition "
        "instead of trying.",
    ),
    (
        r"marked as skipped|builtin|Unsupported (method|function) call|C/C\+\+|Missing bytecode",
        "Dynamo cannot look into this Python or C function: call it before the model is called and "
        "pass in the result, or make it an op with torch.library.custom_op.",
    ),
)
"""Patterns of what Dynamo says about a break, and the usual remedy; the first that fits counts."""

_NUMBER = r"-?\d+(\.\d+)?(e-?\d+)?\b"

RECOMPILE_REMEDIES: tuple[tuple[str, str], ...] = (
    (
        r"2 <= \S*size\(\)|size\(\)\[\d+\] == 1\b|expected 1, actual|actual 1\b(?!\.)"
        r"|0/1 specialization",
        "A size was 1 in one call and more in another; a compiler takes 1 as fixed. Keep it at 2 "
        "or more (a last batch of one row: drop it or join it), or accept two graphs.",
    ),
    (
        r"(size|stride|rank) mismatch|\.size\(\)|\.stride\(\)",
        "A size changed that the first graph takes as fixed or bounds: compile with dynamic=True "
        "and a batch as large as the usual one, or pad to few lengths.",
    ),
    (
        r"lora_|adapter|_hf_peft|peft",
        "An adapter was added, switched, scaled or turned off: bring all adapters on before the "
        "model is compiled. To change one for another without a recompile, call PEFT's "
        "prepare_model_for_compiled_hotswap first.",
    ),
    (
        r"\.training ==",
        "The model changed between train() and eval(): they are two graphs. Compile once for each.",
    ),
    (
        r"GLOBAL_STATE changed",
        "What torch was told changed between the calls (gradients on or off, autocast, number of "
        "threads, deterministic algorithms): make the calls under the same settings.",
    ),
    (
        r"dtype mismatch|device mismatch|requires_grad mismatch|dispatch key|type mismatch",
        "A tensor came with another dtype, device or requires_grad: make inputs and weights alike "
        "in every call.",
    ),
    (
        r"kwargs|^\d+/\d+: \w+ (is|is not|==) ",
        "The call had other arguments than before: pass the same ones in every call, and None "
        "always or never.",
    ),
    (
        r"integer attributes|float attributes|(==|is) (True|False|None)\b|== " + _NUMBER,
        "A number or a flag that a module keeps changed; they are constants in a graph. Set it "
        "before compiling, or keep it in a tensor.",
    ),
    (
        r"len\(|not contain|__contains__|type\(|___check_(obj_id|type_id)|hasattr",
        "A module, a list or an entry was added or replaced: finish changing the model before it "
        "is compiled.",
    ),
)
"""Patterns of what Dynamo says about a guard that failed; the first that fits counts."""

_LIMIT = (
    "Dynamo's limit of compilations is reached and calls run eagerly from here on: remove what "
    "changes, or raise torch._dynamo.config.recompile_limit."
)

# What Dynamo hints where it has nothing to say.
_EMPTY_HINT = re.compile(
    r"may be possible to write Dynamo tracing rules|[Pp]lease (report|file) an issue|dynamo bug"
    r"|Dynamo bug|graph break is fundamental|may be difficult to debug|double check that your code"
)

_DIRECTORIES = (
    str(Path(torch.__file__).parent) + "/",
    sysconfig.get_paths()["stdlib"] + "/",
)
_PACKAGES = (sysconfig.get_paths()["purelib"] + "/", sysconfig.get_paths()["platlib"] + "/")


@dataclass(frozen=True)
class Place:
    """A line of code.

    Attributes:
        file, line: where.
        function: the function that it is in.
        source: the line itself, without indentation; empty where the file cannot be read.
    """

    file: str
    line: int
    function: str
    source: str

    def __str__(self) -> str:
        within = f" in {self.function}" if self.function else ""
        return f"{self.file}:{self.line}{within}: {self.source}"


@dataclass(frozen=True)
class Explanation:
    """A graph break or a recompile, explained.

    Attributes:
        source: the line where it happens, or whose value failed the guard.
        in_model: the innermost line outside torch and Python's library that led there; None where
            it is the same or not known.
        remedy: what usually helps.
    """

    source: Place
    in_model: Place | None
    remedy: str

    def to_dict(self) -> dict[str, Any]:
        """The explanation as JSON values."""
        return {
            "source": vars(self.source),
            "in_model": None if self.in_model is None else vars(self.in_model),
            "remedy": self.remedy,
        }

    def lines(self) -> list[str]:
        """The explanation for a terminal."""
        called = [] if self.in_model is None else [f"called at {self.in_model}"]
        return [str(self.source), *called, f"remedy: {self.remedy}"]


def explain(place: GraphBreak | Recompile) -> Explanation:
    """Find the line, the model's call to it, and the usual remedy."""
    if isinstance(place, GraphBreak):
        stack = [_place(frame) for frame in place.stack]
        # Hints and debugging context name things that are not the cause.
        said = re.sub(r"^ *(Hint|Developer debug context): .*$", "", place.detail, flags=re.M)
        remedy = _first(BREAK_REMEDIES, f"{place.reason}\n{said}") or _hint(place.detail)
        remedy = remedy or (
            "No usual remedy is known for this reason. Run again with TORCH_LOGS=graph_breaks for "
            "all that Dynamo says about it."
        )
    else:
        # The newest graph's guard comes first: it is the one that nearly fitted.
        newest = place.details[0] if place.details else place.reason
        stack = _stack_in(newest)
        remedy = _first(RECOMPILE_REMEDIES, newest.partition("User stack trace:")[0]) or (
            "No usual remedy is known for this guard. Run again with TORCH_LOGS=recompiles for "
            "every guard that failed."
        )
        if place.limit:
            remedy = f"{remedy} {_LIMIT}"
    source = (
        stack[-1] if stack else Place(place.file, place.line, "", _line(place.file, place.line))
    )
    in_model = next((one for one in reversed(stack) if _is_model_code(one.file)), None)
    return Explanation(source, None if in_model == source else in_model, remedy)


def _first(remedies: Iterable[tuple[str, str]], text: str) -> str | None:
    return next((remedy for pattern, remedy in remedies if re.search(pattern, text)), None)


def _hint(detail: str) -> str | None:
    """The first hint of Dynamo's own that says something."""
    hints = re.findall(r"^ *Hint: (.+)$", detail, re.MULTILINE)
    useful = next((hint for hint in hints if not _EMPTY_HINT.search(hint)), None)
    return None if useful is None else f"Dynamo's hint: {useful.strip()}"


def _stack_in(detail: str) -> list[Place]:
    """The stack that Dynamo adds to a guard, the outermost call first."""
    frames = re.findall(r'^ *File "(.+)", line (\d+), in (.+)$', detail, re.MULTILINE)
    return [Place(file, int(line), name, _line(file, int(line))) for file, line, name in frames]


def _place(frame: FrameSummary) -> Place:
    return Place(
        frame.filename, frame.lineno or 0, frame.name, _line(frame.filename, frame.lineno or 0)
    )


def _line(file: str, line: int) -> str:
    return linecache.getline(file, line).strip()


def _is_model_code(file: str) -> bool:
    """Whether a file is neither torch's nor Python's own."""
    torch_folder, stdlib = _DIRECTORIES
    if file.startswith(torch_folder):
        return False
    return file.startswith(_PACKAGES) or not file.startswith(stdlib)
