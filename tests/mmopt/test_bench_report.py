"""`mmopt bench report`: the page, the Markdown summary, JUnit XML and the terminal."""

import html
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import typer
from markdown_it import MarkdownIt
from typer.testing import CliRunner

from bench_results import (
    CONDITIONS,
    MACHINE,
    SELF_TEST,
    bench_run,
    contest,
    figure,
    gate,
    save,
    suite,
)
from mmopt.cli.bench import bench_app
from mmopt.cli.output import stdout
from mmopt.measure.report.build import report
from mmopt.measure.report.charts import Share, history, shares
from mmopt.measure.report.markdown import MOST_BYTES, markdown_report
from mmopt.measure.statistics import Interval
from mmopt.measure.stored import read_result
from mmopt_kernels.errors import InputError

app = typer.Typer()
app.add_typer(bench_app, name="bench")

# Names that break what is put together carelessly.
HOSTILE = [
    "bench/b.py::bench_x[<script>alert(1)</script>]",
    "bench/b.py::bench_x[a|b`c``d\\|e\\]",
    "bench/b.py::bench_x[*bold* _it_ [link](http://evil.example)]",
    "bench/b.py::bench_x[\"quoted\" & 'single' &amp;]",
    "bench/b.py::bench_x[日本語 ✓ @someone #12]",
    "bench/b.py::bench_x[</details></td></svg>]",
]


def _run(*arguments: object) -> tuple[int, str]:
    # Not COLUMNS: rich reads it once, when the console is made.
    before, stdout.width = stdout.width, 140
    try:
        ran = CliRunner().invoke(app, ["bench", "report", *map(str, arguments)])
    finally:
        stdout.width = before
    return ran.exit_code, ran.stdout


class _Page(HTMLParser):
    """Checks that a page's elements nest, and collects its texts, attributes and identifiers."""

    VOID = ("meta", "wbr", "br", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.tags: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        """All that is read, in order."""
        return " ".join("".join(self.texts).split())


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """A gate, three runs of a model over time, and a suite."""
    return [
        save(tmp_path / "gate.json", gate(self_test=SELF_TEST)),
        *(
            save(
                tmp_path / f"run{day}.json",
                bench_run(created=f"2026-11-{day}T12:00:00+00:00", scale=1 + day / 100, seed=day),
            )
            for day in (22, 20, 21)
        ),
        save(tmp_path / "suite.json", suite()),
    ]


def _html(files: list[Path], tmp_path: Path) -> tuple[str, _Page]:
    path = tmp_path / "out.html"
    report(files, html=path)
    text = path.read_text(encoding="utf-8")
    return text, _Page(text)


def test_the_page_stands_alone(files: list[Path], tmp_path: Path) -> None:
    text, page = _html(files, tmp_path)
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(page.tags)
    assert not re.search(r"https?:|url\(|@import|javascript:", text)
    fetching = [value for name, value in page.attributes if name in ("src", "href", "action")]
    assert all(value.startswith("#") for value in fetching)
    assert "default-src 'none'" in text
    assert not [name for name, _ in page.attributes if name.startswith("on")]


def test_links_of_the_contents_lead_to_sections(files: list[Path], tmp_path: Path) -> None:
    _, page = _html(files, tmp_path)
    identifiers = [value for name, value in page.attributes if name == "id"]
    links = [value[1:] for name, value in page.attributes if name == "href"]
    assert len(identifiers) == len(set(identifiers))
    assert links == [*identifiers, "machines"]  # the last from the note on warnings
    assert {"gate", "latency", "throughput", "memory", "figures", "history", "machines"} == {
        *identifiers
    }


def test_the_page_shows_each_verdict_with_its_interval_and_margin(
    files: list[Path], tmp_path: Path
) -> None:
    text, page = _html(files, tmp_path)
    for entry in gate()["benchmarks"]:
        assert f"{entry['name']}" in page.text
        assert entry["verdict"] in page.text
    spoken = [value for name, value in page.attributes if name == "aria-label"]
    assert "+4.1%, 95% interval +3.5% to +4.7%, margin 3%" in spoken
    colours = re.findall(r'class="v-(\w+)"><div class="head">.*?<span class="verdict">(\w+)<', text)
    assert {word: colour for colour, word in colours} == {
        "REGRESSED": "bad",
        "MISSING": "bad",
        "FAILED": "bad",
        "INCONCLUSIVE": "warn",
        "IMPROVED": "good",
        "NEW": "info",
        "PASSED": "good",
    }
    assert '<div class="lead v-bad"><p class="word">REGRESSED</p>' in text
    assert page.text.index("REGRESSED") < page.text.index("INCONCLUSIVE")
    assert "4,096 bytes" in page.text
    assert "renamed to bench_new?" in page.text


def test_self_test_rates_are_shown_or_said_to_be_missing(tmp_path: Path) -> None:
    known = save(tmp_path / "a.json", gate(self_test=SELF_TEST))
    unknown = save(tmp_path / "b.json", gate())
    outputs = {}
    for path in (known, unknown):
        _, page = _html([path], tmp_path)
        markdown = markdown_report([read_result(path)])
        _, shown = _run(path)
        outputs[path] = [page.text, html.unescape(markdown), " ".join(shown.split())]
    for text in outputs[known]:
        assert "1 false alarm in 200 suites of equal revisions (0.5%)" in text
        assert "98 of 100 slowdowns by 3% found (98.0%)" in text
        assert "on the same trials: 150 false alarms in 200 suites" in text
        assert "not measured on this machine" not in text
    for text in outputs[unknown]:
        assert "not measured on this machine" in text


def test_one_machine_makes_a_history_in_order_of_time(files: list[Path], tmp_path: Path) -> None:
    text, _ = _html(files, tmp_path)
    past = text[text.index('id="history"') :]
    spoken = re.findall(r'aria-label="(2026[^"]*)"', past)
    assert len(spoken) == 8  # four backends at two batches; the suite has one file only
    for one in spoken:
        assert re.findall(r"2026-11-(\d\d) 12:00 ", one) == ["20", "21", "22"]


def test_different_machines_are_never_joined(tmp_path: Path) -> None:
    files = [
        save(
            tmp_path / f"{index}.json",
            bench_run(machine={**MACHINE, "torch": version}, seed=index),
        )
        for index, version in enumerate(("2.13.0", "2.14.0"))
    ]
    files.append(save(tmp_path / "plain.json", suite(ours=False)))
    files.append(save(tmp_path / "plain2.json", suite(ours=False, seed=3)))
    text, page = _html(files, tmp_path)
    assert 'id="history"' not in text
    assert "4 machines or sets of versions, between which nothing is compared" in page.text
    assert "Machine 4: Latency" in page.text
    assert "Differs from machine 1 in torch." in page.text
    assert "does not say what it ran on" in page.text


def test_older_runs_leave_their_memory_to_the_page(tmp_path: Path) -> None:
    """The newest file did not measure memory: the newest that did is shown."""
    old = bench_run(created="2026-11-20T12:00:00+00:00")
    new = bench_run(created="2026-11-21T12:00:00+00:00", seed=1)
    for entry in new["measurements"]:
        entry["memory"] = None
    paths = [save(tmp_path / "old.json", old), save(tmp_path / "new.json", new)]
    _, page = _html(paths, tmp_path)
    assert "Peak of a fresh process (VmHWM) · batch 8, 16 tokens" in page.text
    assert "400 MB" in page.text


def test_throughput_is_drawn_where_there_are_several_batches(tmp_path: Path) -> None:
    one = save(tmp_path / "one.json", bench_run(batches=(8,)))
    several = save(tmp_path / "several.json", bench_run(batches=(1, 2, 8)))
    assert 'id="throughput"' not in _html([one], tmp_path)[0]
    text, page = _html([several], tmp_path)
    drawn = text[text.index('id="throughput"') : text.index('id="memory"')]
    assert drawn.count('<line class="line"') == 4 * (2 + 1)  # two pieces and a key for each
    found = read_result(several).series[-1]
    assert f"{found.throughput:,.0f} at batch 8" in drawn
    assert "eager · tiny" in page.text


def test_warnings_and_conditions_are_shown(files: list[Path], tmp_path: Path) -> None:
    _, page = _html(files, tmp_path)
    assert page.text.count(f"run20.json: {CONDITIONS['warnings'][0]}") == 1
    assert "In 4 of 5 files the machine gave cause to doubt the times" in page.text
    assert "cause to doubt" not in _html(files[-1:], tmp_path)[1].text
    assert "Example CPU @ 2.0 GHz, 2 cores, 2 threads, torch 2.13.0+cpu" in page.text
    assert "conditions were not recorded" in page.text  # of the suite


def test_many_passed_benchmarks_are_folded_away(tmp_path: Path) -> None:
    passed = [contest(f"b.py::bench_{i}", "PASSED", 0.0) for i in range(30)]
    slow = [contest("b.py::bench_slow", "REGRESSED", 0.05)]
    path = save(tmp_path / "gate.json", gate(benchmarks=passed + slow, figures=[]))
    text, _ = _html([path], tmp_path)
    folded = text.index("<summary>30 passed</summary>")
    assert text.index("bench_<wbr/>slow") < folded < text.index("bench_<wbr/>29")
    assert text[folded - 9 : folded] == "<details>"  # closed


def _hostile_gate(tmp_path: Path) -> Path:
    entries = [
        contest(name, "REGRESSED", 0.05, note=f"`{name}` fails | because *so* @me")
        for name in HOSTILE
    ]
    figures = [figure(f"{name}::bytes", "MISSING", 5, None) for name in HOSTILE]
    document = gate(benchmarks=entries, figures=figures, notes=HOSTILE)
    document["head"]["ref"] = "feature/`|<b>"
    return save(tmp_path / "gate <b>.json", document)


def test_names_are_text_in_the_page_whatever_they_hold(tmp_path: Path) -> None:
    timed = suite(names=tuple(name.partition("::")[2] for name in HOSTILE))
    for entry, name in zip(timed["benchmarks"], HOSTILE, strict=True):
        entry["fullname"], entry["group"] = name, f"<i>{name}"
    paths = [_hostile_gate(tmp_path), save(tmp_path / "suite.json", timed)]
    _, page = _html(paths, tmp_path)
    assert not {"script", "b", "i", "em", "strong", "img"} & set(page.tags)
    links = [value for name, value in page.attributes if name == "href"]
    assert all(link.startswith("#") for link in links)
    for name in HOSTILE:
        assert " ".join(name.split()) in page.text
    assert "feature/`|<b>" in page.text


def _markdown(text: str) -> _Page:
    """Rendered as GitHub does: CommonMark with tables, HTML left in."""
    return _Page(MarkdownIt("commonmark", {"html": True}).enable("table").render(text))


def test_names_are_text_in_markdown_whatever_they_hold(tmp_path: Path) -> None:
    text = markdown_report([read_result(_hostile_gate(tmp_path))])
    page = _markdown(text)
    for name in HOSTILE:
        assert page.text.count(" ".join(name.split())) >= 3, name  # row, figure and note
    assert not {"script", "b", "em", "strong", "a", "img"} & set(page.tags)
    columns = 7, 3  # what no row fills, the figures' head and change, is left out
    assert page.tags.count("th") == sum(columns)
    assert page.tags.count("td") == len(HOSTILE) * sum(columns)
    assert "@me" not in page.text  # nobody is mentioned
    assert "feature/`|<b>" in page.text


def test_markdown_begins_with_the_verdict_and_folds_what_passed(files: list[Path]) -> None:
    text = markdown_report([read_result(path) for path in files])
    assert text.startswith("## REGRESSED\n")
    page = _markdown(text)
    shown, folded = page.text.split("1 benchmark passed")
    assert "bench_forward[peft]" in shown
    assert "bench_forward[mmopt]" not in shown
    assert "bench_forward[mmopt]" in folded
    assert text.count("<details>") == text.count("</details>")
    assert "Example CPU" in folded
    assert "Self-test on this machine" in shown


def test_markdown_stays_below_githubs_limit_and_counts_what_it_left_out(tmp_path: Path) -> None:
    entries = [
        contest(f"bench/測.py::bench_{i}[{'x' * 400}|]", "REGRESSED", 0.05) for i in range(500)
    ]
    path = save(tmp_path / "gate.json", gate(benchmarks=entries, self_test=SELF_TEST))
    more = save(tmp_path / "run.json", bench_run(batches=tuple(range(1, 200))))
    text = markdown_report([read_result(path), read_result(more)])
    assert len(text.encode()) <= MOST_BYTES < 65_536
    left_out = re.findall(r"^(\d+) more did not fit here", text, re.MULTILINE)
    assert left_out
    rows = len(re.findall(r"^\|.*REGRESSED", text, re.MULTILINE)) - 1  # one is a figure
    assert rows + int(left_out[0]) == 500
    assert "Self-test on this machine" in text
    assert "Machine: Example CPU" in text
    assert text.count("<details>") == text.count("</details>")


def test_every_verdict_of_several_gates_comes_first(tmp_path: Path) -> None:
    many = [contest(f"b.py::bench_{i}", "INCONCLUSIVE", 0.02) for i in range(2000)]
    first = save(tmp_path / "first.json", gate("INCONCLUSIVE", benchmarks=many, figures=[]))
    second = save(tmp_path / "second.json", gate())
    text = markdown_report([read_result(first), read_result(second)])
    assert text.index("## INCONCLUSIVE in `first.json`") < text.index("## REGRESSED in `second.js")
    assert text.index("## REGRESSED in `second.json`") < text.index("| --- |")


# What the schemas of Jenkins, Maven Surefire and pytest have in common.
_SHAPE: dict[str, tuple[set[str], set[str], list[str]]] = {
    "testsuites": ({"name"}, {"tests", "failures", "errors", "skipped", "time"}, ["testsuite"]),
    "testsuite": (
        {"name", "tests", "failures", "errors", "skipped", "time", "timestamp"},
        set(),
        ["properties", "testcase", "system-out"],
    ),
    "properties": (set(), set(), ["property"]),
    "property": ({"name", "value"}, set(), []),
    "testcase": ({"name", "classname", "time"}, set(), ["failure", "error", "system-out"]),
    "failure": ({"message", "type"}, set(), []),
    "error": ({"message", "type"}, set(), []),
    "system-out": (set(), set(), []),
}


def _check_junit(element: ElementTree.Element) -> None:
    required, optional, children = _SHAPE[element.tag]
    assert required <= set(element.keys()) <= required | optional
    order = [children.index(child.tag) for child in element]
    assert order == sorted(order)
    for child in element:
        _check_junit(child)


def _junit(files: list[Path], tmp_path: Path) -> ElementTree.Element:
    path = tmp_path / "out.xml"
    report(files, junit=path)
    root = ElementTree.fromstring(path.read_bytes())
    _check_junit(root)
    for suite_element in root:
        cases = suite_element.findall("testcase")
        assert int(suite_element.get("tests", "")) == len(cases)
        for key, tag in (("failures", "failure"), ("errors", "error")):
            counted = sum(case.find(tag) is not None for case in cases)
            assert int(suite_element.get(key, "")) == counted
        names = [(case.get("classname"), case.get("name")) for case in cases]
        assert len(names) == len(set(names))
    for key in ("tests", "failures", "errors"):
        assert int(root.get(key, "")) == sum(int(one.get(key, "")) for one in root)
    return root


def test_junit_has_the_common_shape_and_an_outcome_for_each_verdict(
    files: list[Path], tmp_path: Path
) -> None:
    root = _junit(files, tmp_path)
    assert [suite_element.get("name") for suite_element in root] == [str(path) for path in files]
    outcomes: dict[str, str] = {}
    for case in root[0].findall("testcase"):
        outcomes[case.get("name", "")] = case[0].tag
    assert outcomes == {
        "bench_forward[mmopt]": "system-out",
        "bench_forward[peft]": "failure",
        "bench_backward": "system-out",
        "bench_load": "error",  # not decided is no pass
        "bench_old": "failure",
        "bench_new": "system-out",
        "bench_broken": "failure",
        "exact_export::artifact bytes": "failure",
        "exact_graph::graph breaks": "system-out",
    }
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", root[0].get("timestamp", ""))


def test_junit_of_results_without_a_gate_fails_nothing(tmp_path: Path) -> None:
    path = save(tmp_path / "suite.json", suite())
    root = _junit([path], tmp_path)
    assert (root.get("failures"), root.get("errors")) == ("0", "0")
    case = root[0].findall("testcase")[0]
    assert case.get("classname") == "bench.bench_op"
    assert float(case.get("time", "")) == pytest.approx(
        read_result(path).series[0].median, abs=1e-9
    )


def test_junit_names_survive_whatever_they_hold(tmp_path: Path) -> None:
    document = gate(
        benchmarks=[contest(f"b.py::x[{c!r}{c}]", "PASSED", 0.0) for c in "\x00\x1b\ufffe"]
    )
    root = _junit([save(tmp_path / "g.json", document), _hostile_gate(tmp_path)], tmp_path)
    names = [case.get("name") for case in root[1].findall("testcase")]
    assert names[: len(HOSTILE)] == [name.partition("::")[2] for name in HOSTILE]


def test_junit_carries_a_verdict_that_no_benchmark_carries(tmp_path: Path) -> None:
    """Only new benchmarks: each may pass, and the suite is not decided."""
    document = gate(
        "INCONCLUSIVE", benchmarks=[contest("b.py::bench_new", "NEW", None)], figures=[]
    )
    root = _junit([save(tmp_path / "g.json", document)], tmp_path)
    assert root.get("errors") == "1"


def test_the_terminal_names_what_did_not_pass(files: list[Path]) -> None:
    code, shown = _run(*files)
    assert code == 0
    assert "REGRESSED: 7 benchmarks: 1 regressed" in shown
    assert "bench_forward[peft]" in shown
    assert re.search(r"exact_export::artifact bytes .* \+4 \(\+0\.10%\) .* REGRESSED", shown)
    assert "eager · tiny 1x16" in shown
    assert "Warning: the hypervisor took 3.1% of the CPU time (steal)" in shown


def test_a_regressed_gate_is_reported_with_exit_0(tmp_path: Path) -> None:
    """To report is not to judge: `mmopt bench gate` has exited 1 already."""
    assert _run(save(tmp_path / "gate.json", gate()))[0] == 0


def test_json_holds_files_machines_and_what_was_written(files: list[Path], tmp_path: Path) -> None:
    out = {form: tmp_path / f"out.{form}" for form in ("html", "markdown", "junit")}
    options = [part for form, path in out.items() for part in (f"--{form}", path)]
    code, shown = _run(*files, *options, "--json")
    assert code == 0
    document = json.loads(shown)
    assert [one["path"] for one in document["files"]] == [str(path) for path in files]
    assert [one["machine"] for one in document["files"]] == [1] * 5
    assert document["files"][0]["verdict"] == "REGRESSED"
    assert document["files"][-1]["figures"] == {"bench/bench_op.py::exact_op::bytes": 2048}
    assert document["written"] == {form: str(path) for form, path in out.items()}
    assert all(path.stat().st_size for path in out.values())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no.json"], "no.json does not exist"),
        (["a.json", "a.json"], "a.json was given twice"),
        (["a.json", "cut.json"], "cut.json is no whole JSON document"),
        (["a.json", "--html", "."], "--html . is a folder, expected a file. Pass report.html"),
        (["a.json", "--junit", "no/such/r.xml"], "--junit no/such/r.xml: the folder no/such does"),
        (["a.json", "--html", "a.json"], "--html a.json is one of the results"),
        (["a.json", "--html", "x", "--markdown", "x"], "--markdown x is what --html writes as"),
        (["a.json", "bad.json", "--html", "r.html"], "bad.json: the verdict is PASSED, but"),
    ],
)
def test_bad_input_exits_2_and_writes_nothing(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "a.json", suite())
    (tmp_path / "cut.json").write_text(json.dumps(suite())[:-20])
    save(tmp_path / "bad.json", {**gate(), "verdict": "PASSED"})
    before = sorted(tmp_path.iterdir())
    code, shown = _run(*arguments, "--json")
    assert code == 2
    assert said in json.loads(shown)["error"]["message"]
    assert sorted(tmp_path.iterdir()) == before


def test_outputs_replace_what_was_there_and_leave_nothing_beside(tmp_path: Path) -> None:
    path = save(tmp_path / "a.json", suite())
    out = tmp_path / "r.html"
    out.write_text("old")
    report([path], html=out)
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert sorted(tmp_path.iterdir()) == [path, out]


def test_one_wild_benchmark_does_not_hide_the_others() -> None:
    rows = [
        Share("slow", "REGRESSED", "bad", 0.04, Interval(0.03, 0.05), 0.03, ""),
        Share("wild", "REGRESSED", "bad", 9.0, Interval(8.0, 10.0), 0.03, ""),
    ]
    drawn = shares(rows, faster="faster", slower="slower")
    ElementTree.fromstring(f"<x>{drawn}</x>")
    edges = [float(at) for at in re.findall(r'class="limit" x1="([\d.]+)%', drawn)]
    assert edges[0] == edges[1] > 20  # one scale, with room below the margin
    assert "beyond →" in drawn
    positions = [float(at) for at in re.findall(r'(?:cx|x|x1|width)="(-?[\d.]+)%"', drawn)]
    assert all(0 <= at <= 100 for at in positions)


def test_scatter_does_not_look_like_news_in_a_history() -> None:
    """A change by 0.1% stays within a tenth of the drawing's height."""
    points = [
        (f"2026-11-2{i}", 1e-3 * (1 + 0.001 * (i % 2)), Interval(1e-3, 1.001e-3)) for i in range(4)
    ]
    drawn = history("bench_x", points)
    heights = [float(at) for at in re.findall(r'cy="([\d.]+)"', drawn)]
    assert max(heights) - min(heights) < 6.4
    assert 20 < min(heights) < 44


def test_no_file_is_refused() -> None:
    with pytest.raises(InputError, match="No result was given"):
        report([])


def _in_chromium(page: str, width: int, folder: Path) -> dict[str, Any]:
    """Sizes of the page in a window `width` pixels wide.

    Chromium makes no window below 500 pixels: the page is put into a frame of that width.
    """
    script = (
        "frame.onload = () => { const page = frame.contentDocument; const root = "
        "page.scrollingElement; const wide = [...page.querySelectorAll('main *')].filter(one => "
        "!one.closest('.scroll > *') && one.getBoundingClientRect().right > root.clientWidth + 1)"
        ".map(one => one.outerHTML.slice(0, 120)); found.textContent = JSON.stringify({scroll: "
        "root.scrollWidth, client: root.clientWidth, height: root.scrollHeight, wide}) }"
    )
    outer = folder / f"frame{width}.html"
    outer.write_text(
        f'<!doctype html><meta charset="utf-8"><iframe id="frame" style="border:0;width:{width}px;'
        f'height:800px" srcdoc="{html.escape(page)}"></iframe><pre id="found"></pre>'
        f"<script>{script}</script>",
        encoding="utf-8",
    )
    ran = subprocess.run(
        [
            "chromium",
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            f"--user-data-dir={folder / 'profile'}",
            "--hide-scrollbars",  # a phone's lie over the page
            "--virtual-time-budget=5000",
            "--dump-dom",
            f"file://{outer}",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = re.search(r'<pre id="found">(.*?)</pre>', ran.stdout, re.DOTALL)
    assert found is not None
    sizes: dict[str, Any] = json.loads(html.unescape(found[1]))
    return sizes


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
@pytest.mark.parametrize("width", [390, 1000])
def test_the_page_fits_its_window_without_scrolling_sideways(
    width: int, files: list[Path], tmp_path: Path
) -> None:
    wide = contest("bench/" + "very_long_folder/" * 6 + f"b.py::bench_{'x' * 150}", "PASSED", 0.0)
    unbroken = figure("b.py::exact_" + "x" * 150, "REGRESSED", 10**15, 10**16)
    document = gate(benchmarks=[wide], figures=[unbroken], notes=["word" * 60])
    text, _ = _html([*files, save(tmp_path / "wide.json", document)], tmp_path)
    # Folded parts count as well.
    sizes = _in_chromium(text.replace("<details>", "<details open>"), width, tmp_path)
    assert sizes["client"] == width
    assert sizes["scroll"] <= width, sizes["wide"]
    assert sizes["wide"] == []
    assert sizes["height"] > 2000  # it was rendered


def test_every_text_colour_has_contrast_in_light_and_dark(
    files: list[Path], tmp_path: Path
) -> None:
    """WCAG 2.2, 1.4.3: 4.5 to 1 between text and what is behind it."""

    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * one for one in colour[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    text, _ = _html(files, tmp_path)
    schemes = re.findall(r":root\{(--[^}]*)\}", text)
    assert len(schemes) == 2
    for scheme in schemes:
        colours = dict(re.findall(r"--(\w+):(#[0-9a-f]+)", scheme))
        behind = luminance(colours.pop("bg"))
        assert {"ink", "soft", "good", "warn", "bad", "info", "c0", "c3"} <= set(colours)
        for name in set(colours) - {"line", "faint"}:
            one, other = sorted((luminance(colours[name]), behind))
            assert (other + 0.05) / (one + 0.05) >= 4.5, name


def test_comparing_and_reporting_import_no_torch() -> None:
    code = (
        "import sys, mmopt.measure.compare, mmopt.measure.report.build, "
        "mmopt.measure.report.compare_page; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
