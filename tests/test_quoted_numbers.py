"""Every measured number in README.md and docs/ equals a committed result.

How a number is quoted: directly above the paragraph, list, table or code block that states it
stands a comment, which a reader of the page does not see:

    <!-- measured: bench/results/demo-2026-11-24.json
    {train.test_accuracy:.1%} on {train.test_examples} texts, {seconds / 60:.0f} minutes -->
    Accuracy is 64.1% on 1200 texts, after 5 minutes.

The braces hold what Python's format would: an expression over the file (keys are attributes, or
`["with a space"]`; a list is searched with `measurements(backend="ort", batch=8)`) and how it is
rounded. What stands between the braces is for whoever reads the comment. *All* numbers of the block
must come out of its comments, in order, the conditions as well as the results. Several comments may
stand above one block. Units and words are the author's.

Outside such blocks no number may look measured: have a unit, a percent sign or a decimal point, be
"98 of 100", or stand in a table under a heading such as ms. What looks measured and is not (a
setting, a minimum version) is in ALLOWED, word for word, with the reason. Numbers written as words
("twice as fast") are not found.
"""

import ast
import json
import math
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

# Counted, not timed; `mmopt bench exact` holds it.
COUNTED = "bench/baselines/exact.json"

SETTING = "a setting or a promise of the gate, not a measurement"
BEFORE = "seen once, before results were kept; the page says that its numbers are no benchmark"
VERSION = "the oldest version supported"

# Page, words on it (a line break counts as a space), reason.
ALLOWED: list[tuple[str, str, str]] = [
    ("README.md", "Python 3.11 or newer", VERSION),
    ("README.md", "`python3` is older than 3.11", VERSION),
    ("README.md", "| Python | 3.11 |", VERSION),
    ("README.md", "| torch | 2.11 |", VERSION),
    ("README.md", "torch must be 2.13", VERSION),
    ("README.md", "| transformers | 5.24 |", VERSION),
    ("README.md", "| peft | 0.20 |", VERSION),
    ("README.md", "| accelerate | 1.15 |", VERSION),
    ("README.md", "| onnx | 1.21 |", VERSION),
    ("README.md", "| onnxruntime or onnxruntime-gpu | 1.30 |", VERSION),
    ("README.md", "| triton | 3.6, Linux |", VERSION),
    ("README.md", "| bitsandbytes | 0.50 |", VERSION),
    ("README.md", "Apache-2.0", "the name of the license"),
    ("README.md", "a cosine of at least 0.99 to PyTorch's", "what demo/run.py demands"),
    ("docs/ci-gate.md", "called REGRESSED in at most 1% of runs", SETTING),
    ("docs/ci-gate.md", "passes in at most 1% of runs", SETTING),
    ("docs/ci-gate.md", "in slices of 5 ms", SETTING),
    ("docs/ci-gate.md", "the highest and lowest 20% of the pairs", SETTING),
    ("docs/ci-gate.md", "does 3% more work", SETTING),
    ("docs/ci-gate.md", 'margin = "3%"', SETTING),
    ("docs/ci-gate.md", '"*bench_train*" = "10%"', SETTING),
    ("docs/ci-gate.md", 'alpha = "1%"', SETTING),
    ("docs/ci-gate.md", 'beta = "1%"', SETTING),
    ("docs/ci-gate.md", "margin: 3%", SETTING),
    ("docs/lab-notes.md", "batch 8 of 32 tokens, 2 threads", BEFORE),
    ("docs/lab-notes.md", "25.8 ms with the op against 23.5 ms for `torch.compile` alone", BEFORE),
    ("docs/lab-notes.md", "24.2 against 24.4 since", BEFORE),
    ("docs/lab-notes.md", "attention, 3 to 4% in the same measurement", BEFORE),
    ("docs/lab-notes.md", "a cosine of 0.989 to fp32's instead of 0.998", BEFORE),
    ("docs/lab-notes.md", "the worst of 1,200 sentences 0.23", BEFORE),
    ("docs/lab-notes.md", "from 58.7 to 23.0 MB for a cosine of 0.9976 instead of 0.9978", BEFORE),
    ("docs/lab-notes.md", "accuracy 63.7 and 63.5% (fp32 63.9)", BEFORE),
    ("docs/lab-notes.md", "(cosine 0.9976)", BEFORE),
    ("docs/lab-notes.md", "spills 136 bytes at that width", "what ptxas says, without a clock"),
    ("docs/lab-notes.md", "from 116 to 440 bytes a thread", "what ptxas says, without a clock"),
    ("docs/lab-notes.md", "ten light benchmarks, slices of 5 ms", SETTING),
    ("docs/lab-notes.md", "without the highest and lowest 20% is", SETTING),
]

NUMBER = re.compile(
    r"(?<![\w.])(?:(?<![\w.)%])[-\u2212+])?"  # a sign, but not the dash of 3-4%
    r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)*(?:e[+-]?\d+)?%?"
)
UNIT = re.compile(
    r"\s?-?(?:[nµμum]?s|sec|secs|seconds?|minutes?|min|hours?|h|[kKMGT]i?B|bytes|%|percent|points?"
    r"|[x\u00d7]|times|fold|[kKMGT]?FLOPS?|[\w]+/s|fps|per\s+second|percentage)(?![\w/])"
)  # fmt: skip
DECIMAL = re.compile(r"[-\u2212+]?[\d,]+(?:\.\d+(?:e[+-]?\d+)?|e[+-]?\d+)")  # not 1.2.3
OUT_OF = re.compile(r"\s+of\s+(?:the\s+|all\s+)?\d")
METRIC = re.compile(
    r"\b(?:[nµμum]?s|seconds?|[kKMGT]i?B|bytes|\w+/s|p\d\d|median|mean|latency|throughput|memory"
    r"|accuracy|cosine|max abs|error|speed-?up|slowdown|ratio|rate|alarms?|power|found)\b|%",
    re.IGNORECASE,
)
ELSEWHERE = re.compile(r"https?://\S+|arXiv:[\d.]+|bench/results/[\w.-]+")
CODE = re.compile(r"`[^`\n]*`")
COMMENT = re.compile(r"<!--\s*measured:\s*(\S+)(.*)-->\s*\Z", re.DOTALL)
FUNCTIONS = {
    "abs": abs, "exp": math.exp, "len": len, "list": list, "max": max, "median": statistics.median,
    "min": min, "round": round, "sum": sum, "zip": zip,
}  # fmt: skip


@dataclass
class Block:
    """A paragraph, list, table or fenced code block, and the comments directly above it."""

    line: int
    lines: list[str] = field(default_factory=list)
    comments: list[str] = field(default_factory=list)
    fenced: bool = False

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


class Keys:
    """A JSON object or list, read with Python's own syntax: `a.b["c d"][0]`, `list(key=value)`."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __getattr__(self, key: str) -> Any:
        return self[key]

    def __getitem__(self, key: str | int | slice) -> Any:
        return _wrap(self._value[key])

    def __len__(self) -> int:
        return len(self._value)

    def __iter__(self) -> Iterator[Any]:
        return map(_wrap, self._value)

    def __call__(self, **wanted: Any) -> Any:
        (one,) = [row for row in self._value if all(row[k] == v for k, v in wanted.items())]
        return _wrap(one)


def _wrap(value: Any) -> Any:
    return Keys(value) if isinstance(value, dict | list) else value


def blocks(text: str) -> Iterator[Block]:
    """The page in pieces; a comment of ours belongs to the block that starts on the next line."""
    current = Block(1)
    lines = iter(enumerate(text.splitlines(), 1))
    for number, line in lines:
        if line.startswith("<!--"):
            if current.lines:
                yield current
                current = Block(number)
            comment = line
            while "-->" not in comment:
                comment += "\n" + next(lines)[1]
            if "measured:" in comment:
                current.comments.append(comment)
        elif re.match(r"\s*(```|~~~)", line):
            if current.lines:
                yield current
                current = Block(number)
            current.line, current.fenced = number, True
            fence = line.strip()[:3]
            for _, line in lines:
                if line.strip().startswith(fence):
                    break
                current.lines.append(line)
            yield current
            current = Block(number)
        elif line.strip():
            if not current.lines:
                current.line = number
            current.lines.append(line)
        elif current.lines or current.comments:
            yield current
            current = Block(number)
    if current.lines or current.comments:
        yield current


def rendered(comment: str, root: Path) -> list[tuple[str, str]]:
    """The numbers that a comment yields, in order, each with its braces, or ValueError."""
    found = COMMENT.match(comment)
    if found is None:
        raise ValueError("the comment is not of the form <!-- measured: FILE {..} {..} -->")
    name, body = found.groups()
    file = root / name
    kept = name == COUNTED or name.startswith("bench/results/")
    if not kept or not file.resolve().is_relative_to(root / "bench"):
        raise ValueError(f"{name} is not under bench/results/")
    if not file.is_file():
        raise ValueError(f"{name} does not exist")
    result = json.loads(file.read_text(encoding="utf-8"))
    values: list[tuple[str, str]] = []
    for braces in re.findall(r"\{([^{}]+)\}", body):
        # A colon inside quotes or brackets is no start of a format.
        expression, style = re.fullmatch(r"(.*?)(?::([^:\"\])]*))?", braces, re.DOTALL).groups("")
        tree = ast.parse(expression.strip(), name, "eval")
        if not {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} & set(result):
            raise ValueError(f"{{{braces}}} takes nothing from {name}")
        names = {**FUNCTIONS, **{key: _wrap(value) for key, value in result.items()}}
        names["__builtins__"] = {}
        try:
            value = format(eval(compile(tree, name, "eval"), names), style)
        except (ArithmeticError, LookupError, NameError, TypeError, ValueError) as error:
            raise ValueError(f"{{{braces}}} in {name}: {error!r}") from error
        numbers = NUMBER.findall(value)
        if not numbers:
            raise ValueError(f"{{{braces}}} in {name} is {value!r}, which has no number")
        values += [(number, braces) for number in numbers]
    if not values:
        raise ValueError("the comment has no {expression}")
    return values


def problems(page: str, text: str, root: Path, allowed: list[tuple[str, str, str]]) -> list[str]:
    """What is wrong with a page: one line each, with page and line number."""
    said: list[str] = []
    for block in blocks(text):
        if block.comments:
            said += _differences(page, block, root)
        else:
            said += _uncovered(page, block, [words for at, words, _ in allowed if at == page])
    return said


def _differences(page: str, block: Block, root: Path) -> list[str]:
    """A block with comments: its numbers, all of them, are those of the comments."""
    where = f"{page}:{block.line}"
    if not block.lines:
        return [f"{where}: the comment stands above nothing; put it directly above the block"]
    try:
        expected = [value for comment in block.comments for value in rendered(comment, root)]
    except (ValueError, SyntaxError) as error:
        return [f"{where}: {error}"]
    text = _without(ELSEWHERE, block.text)
    stated = [(match.group(), match.start()) for match in NUMBER.finditer(text)]
    for (number, start), (value, braces) in zip(stated, expected, strict=False):
        if number != value:
            line = block.line + text[:start].count("\n") + block.fenced
            return [f"{page}:{line}: the page says {number} and the result {value}, {{{braces}}}"]
    if len(stated) != len(expected):
        return [
            f"{where}: the page has the numbers {[number for number, _ in stated]} and the comment "
            f"yields {[value for value, _ in expected]}"
        ]
    return []


def _uncovered(page: str, block: Block, allowed: list[str]) -> list[str]:
    """A block without comments: none of its numbers looks measured, except where allowed."""
    text = _without(ELSEWHERE, block.text)
    for words in allowed:
        text = _without(_words(words), text)
    prose = "" if block.fenced else _without(CODE, text)
    columns = _metric_columns(block.lines)
    said = []
    for match in NUMBER.finditer(text):
        number, start, end = match.group(), match.start(), match.end()
        row = text[text.rfind("\n", 0, start) + 1 : start]
        if (
            number.endswith("%")
            or UNIT.match(text, end)
            or OUT_OF.match(text, end)
            or (row.startswith("|") and row.count("|") in columns)
            or (prose[start:end] == number and DECIMAL.fullmatch(number))
        ):
            line = block.line + text[:start].count("\n") + block.fenced
            shown = " ".join(text[start : end + 14].split())
            said.append(f"{page}:{line}: {shown!r} looks measured and names no result")
    return said


def _metric_columns(lines: list[str]) -> set[int]:
    """Of a table, the columns (from 1) whose heading is a unit or a metric."""
    if len(lines) < 2 or not lines[0].startswith("|") or not re.match(r"\|[\s:|-]+$", lines[1]):
        return set()
    return {at for at, heading in enumerate(lines[0].split("|")) if METRIC.search(heading)}


def _without(pattern: re.Pattern[str], text: str) -> str:
    """The text with what matches blanked, so that every place stays where it was."""
    return pattern.sub(lambda match: re.sub(r"[^\n]", " ", match.group()), text)


def _words(words: str) -> re.Pattern[str]:
    return re.compile(r"\s+".join(map(re.escape, words.split())))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_measured_number_on_the_page_equals_a_committed_result(page: Path) -> None:
    name = page.relative_to(ROOT).as_posix()
    said = problems(name, page.read_text(encoding="utf-8"), ROOT, ALLOWED)
    help = "The docstring of this file says how a number names its result."
    assert not said, "\n".join(["", *said, help])


def test_nothing_is_allowed_in_vain() -> None:
    """Each exception has a reason, its words are on the page, and something there needs them."""
    pages = {name: (ROOT / name).read_text(encoding="utf-8") for name, _, _ in ALLOWED}
    accepted = {name: len(problems(name, text, ROOT, ALLOWED)) for name, text in pages.items()}
    for entry in ALLOWED:
        name, words, reason = entry
        assert reason
        assert _words(words).search(pages[name]), f"{name} no longer says {words!r}"
        others = [other for other in ALLOWED if other != entry]
        needed = len(problems(name, pages[name], ROOT, others)) > accepted[name]
        assert needed, f"{words!r} of {name} needs no exception: take it out of ALLOWED"


# The checker itself, on pages made here


RESULT = {
    "speed": 0.01234,
    "sizes": [{"of": "a", "bytes": 1_500_000}, {"of": "b", "bytes": 2_000_000}],
    "false alarms": 1,
    "trials": 1200,
    "notes": {"a:b": 7},
    "torch": "2.13.0+cpu",
    "missing": None,
}
ABOVE = "<!-- measured: bench/results/x.json {speed * 1e3:.1f} of {trials} -->\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "bench" / "results" / "x.json").write_text(json.dumps(RESULT))
    (tmp_path / "x.json").write_text(json.dumps(RESULT))
    return tmp_path


@pytest.mark.parametrize(
    "page",
    [
        ABOVE + "It takes 12.3 ms in 1200 trials, says `bench/results/x.json`.",
        "# A page\n\nText.\n" + ABOVE + "It takes 12.3 ms,\nin 1200 trials.\n\nMore text, 3 pages.",
        ABOVE + "| ms | trials |\n|---|---|\n| 12.3 | 1200 |",
        ABOVE + "```text\nspeed 12.3 ms\n\ntrials 1200\n```\n",
        ABOVE
        + "<!-- measured: bench/results/x.json\n{torch} -->\n12.3 ms, 1200 times, torch 2.13.0+cpu",
        '<!-- measured: bench/results/x.json {sizes(of="b").bytes / 1e6:.1f} and\n'
        "{sizes[0].bytes / sizes[1].bytes:.0%}, {trials:,} {-speed:.1e} {len(sizes)} -->\n"
        "2.0 MB, 75% of the other, 1,200 times; -1.2e-02 for 2 of them.",
        '<!-- measured: bench/results/x.json {notes["a:b"]} {max(one.bytes for one in sizes[:1])}\n'
        '{notes["a:b"]:.1f} {notes["a:b"]:>8,} -->\n7, 1500000, 7.0 and 7',
    ],
)
def test_numbers_that_equal_the_result_are_accepted(root: Path, page: str) -> None:
    assert problems("page.md", page, root, []) == []


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("It takes 12.4 ms in 1200 trials.", "page.md:2: the page says 12.4 and the result 12.3"),
        ("It takes 12.3 ms\nin 1199 trials.", "page.md:3: the page says 1199 and the result 1200"),
        ("It takes 12.30 ms in 1200 trials.", "the page says 12.30 and the result 12.3"),
        ("It takes 12.3% in 1200 trials.", "the page says 12.3% and the result 12.3"),
        ("It takes -12.3 ms in 1200 trials.", "the page says -12.3 and the result 12.3"),
        ("1200 trials took 12.3 ms.", "the page says 1200 and the result 12.3"),
        ("It takes 12.3 ms in 1200 trials, 9 in vain.", "the page has the numbers"),
        ("It takes 12.3 ms.", "the page has the numbers"),
        ("It takes `12.3` ms in `1201` trials.", "the page says 1201"),
        ("```\n12.3 ms\n1201\n```", "page.md:4: the page says 1201"),
        ("\nIt takes 12.3 ms in 1200 trials.", "stands above nothing"),
        ("", "stands above nothing"),
    ],
)
def test_a_number_that_differs_from_the_result_is_named(
    root: Path, page: str, message: str
) -> None:
    (said, *_) = problems("page.md", ABOVE + page, root, [])
    assert message in said


@pytest.mark.parametrize(
    ("comment", "message"),
    [
        ("bench/results/y.json {speed:.1f}", "bench/results/y.json does not exist"),
        ("x.json {speed:.1f}", "x.json is not under bench/results/"),
        ("bench/results/../../x.json {speed:.1f}", "is not under bench/results/"),
        ("bench/results/x.json", "has no {expression}"),
        ("bench/results/x.json {12}", "{12} takes nothing from bench/results/x.json"),
        ("bench/results/x.json {speeed}", "takes nothing from"),
        ("bench/results/x.json {sizes[0].bites}", "KeyError"),
        ("bench/results/x.json {sizes(of='c').bytes}", "not enough values"),
        ("bench/results/x.json {missing:.1f}", "TypeError"),
        ("bench/results/x.json {sizes[0].of}", "has no number"),
        ("bench/results/x.json {speed * }", "invalid syntax"),
        ("bench/results/x.json {open(str(speed))}", "NameError"),
    ],
)
def test_a_comment_that_yields_no_number_is_an_error(
    root: Path, comment: str, message: str
) -> None:
    (said,) = problems("page.md", f"<!-- measured: {comment} -->\nIt takes 12 s.", root, [])
    assert said.startswith("page.md:2: ")
    assert message in said


@pytest.mark.parametrize(
    "text",
    [
        "takes 12 ms", "takes 12ms", "3 µs", "300 s", "two: 40 MB", "8 GiB", "a 12 % gain", "12%",
        "3x faster", "3 \u00d7 faster", "10 times as fast", "a 3-fold gain", "266 texts/s",
        "15 TFLOPS", "loses 2 points", "a cosine of 0.99", "9e-06", "an error of 1.5e-3", "-0.3",
        "98 of 100", "996 of the 1,000", "a 5-minute run", "`12 ms` it says", "> quoted: 12 ms",
        "- a list: 12 ms", "```\nran in 12 s\n```", "| x | p50 ms |\n|---|---|\n| a | 12 |",
        "| x | texts/s |\n|---|---:|\n| 8 | 266 |", "| x | accuracy |\n|---|---|\n| a | 64 |",
        "<!-- a comment -->\ntakes 12 ms", "<!-- measure: x.json {speed} -->\ntakes 12 ms",
    ],
)  # fmt: skip
def test_a_number_that_looks_measured_needs_a_result(root: Path, text: str) -> None:
    (said,) = problems("page.md", f"First.\n\n{text}\n", root, [])
    assert "looks measured" in said


@pytest.mark.parametrize(
    "text",
    [
        "Python 3 on 2 cores, batch 8 of tokens", "version 0.1.0 or 2.13.0", "`0.5` in code",
        "sm_90 and p99", "see https://example.org/1.5/3%20ms", "arXiv:2106.09685", "exit code 2",
        "the int8 of fp32", "```\nx = 0.5\n```", "| x | code |\n|---|---|\n| a | 12 |",
        "<!-- 12 ms -->", "in 2026-11-24.json", "bench/results/x-12.5.json",
    ],
)  # fmt: skip
def test_other_numbers_need_none(root: Path, text: str) -> None:
    assert problems("page.md", f"First.\n\n{text}\n", root, []) == []


def test_what_is_allowed_is_allowed_word_for_word_on_its_page_only(root: Path) -> None:
    allowed = [("page.md", "slices of 5 ms", "a setting")]
    assert problems("page.md", "In slices of\n5 ms.", root, allowed) == []
    assert problems("page.md", "In slices of 6 ms.", root, allowed) != []
    assert problems("page.md", "In slices of 5 ms, and 5 ms.", root, allowed) != []
    assert problems("other.md", "In slices of 5 ms.", root, allowed) != []
