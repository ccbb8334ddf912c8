"""pytest-benchmark suites: exact figures, `mmopt bench run SUITE`, `mmopt bench exact`."""

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from mmopt.cli.bench import bench_app
from mmopt.measure.stored import read_result
from mmopt.measure.suites import exact
from mmopt.measure.suites.collection import PYTEST_OPTIONS, is_suite, pytest_environment
from mmopt.measure.suites.exact import exact_gate, update_baseline
from mmopt.measure.suites.figures import Figure, compare_figures, read_figures, write_figures
from mmopt.measure.suites.plugin import Figures
from mmopt.measure.suites.process import measure_figures, run_pytest, telling_lines
from mmopt.measure.suites.run import SHORTEST_ROUND_SECONDS, SuiteReport, run_suites
from mmopt_kernels.errors import InputError, MmoptError

app = typer.Typer()
app.add_typer(bench_app, name="bench")

SUITE = """
import pytest

@pytest.mark.parametrize("size", [10, 1000])
def bench_sum(benchmark, size):
    benchmark.group = "sums"
    benchmark(sum, range(size))

def bench_slow(benchmark):
    import time
    benchmark.pedantic(time.sleep, args=(0.001,), rounds=3)

@pytest.mark.parametrize("precision", ["fp32", "int8"])
def exact_bytes(figures, precision):
    figures.record("artifact bytes", {"fp32": 400, "int8": 100}[precision], unit="bytes")
    figures.record("layers", 3, better="higher")

def test_plain():
    raise RuntimeError("no benchmark: never run")
"""


def make_suite(root: Path) -> Path:
    """A suite called `bench` in `root`, which is a project of its own."""
    (root / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    folder = root / "bench"
    folder.mkdir()
    (folder / "bench_it.py").write_text(SUITE)
    return folder


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The suite's folder; its project is the current folder."""
    monkeypatch.chdir(tmp_path)
    return make_suite(tmp_path)


def bench(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", *arguments])


def pytest_here(*arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest in the current folder, as a user with our options would call it."""
    command = [sys.executable, "-m", "pytest", *PYTEST_OPTIONS, "-q", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=pytest_environment()
    )


# --- recording figures ---------------------------------------------------------------------------


def kept() -> tuple[dict[str, Figure], Figures]:
    seen: dict[str, Figure] = {}
    return seen, Figures(seen.__setitem__)


def test_figures_are_kept_as_they_were_recorded() -> None:
    seen, figures = kept()
    figures.record("bytes", 2**40, unit="bytes")
    figures.record("layers", np.int64(3), better="higher")
    assert seen == {
        "bytes": Figure(2**40, "bytes", "lower"),
        "layers": Figure(3, "", "higher"),
    }
    assert type(seen["layers"].value) is int


@pytest.mark.parametrize("value", [True, 1.0, float("nan"), "3", None, np.float32(2), Decimal(2)])
def test_only_whole_numbers_are_exact(value: Any) -> None:
    seen, figures = kept()
    with pytest.raises(InputError, match=r"count is .*, expected a whole number"):
        figures.record("count", value)
    assert seen == {}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: f.record("", 1), "the name is ''"),
        (lambda f: f.record("two\nlines", 1), "expected one line"),
        (lambda f: f.record("n", 1, better="smaller"), "one of lower, higher"),
        (lambda f: f.record("n", 1, unit=None), "the unit None"),
        (lambda f: (f.record("n", 1), f.record("n", 1)), "n was recorded before in this test"),
    ],
)
def test_a_record_that_means_nothing_is_refused(
    call: Callable[[Figures], Any], message: str
) -> None:
    _, figures = kept()
    with pytest.raises(InputError, match=message):
        call(figures)


def test_the_plugin_writes_every_figure_and_runs_nothing_else(suite: Path) -> None:
    ran = pytest_here("bench", "--mmopt-figures=figures.json")
    assert ran.returncode == 0, ran.stdout  # test_plain would have failed
    assert json.loads(Path("figures.json").read_text()) == {
        "schema": 1,
        "figures": {
            f"bench/bench_it.py::exact_bytes[{precision}]::{name}": {
                "value": value,
                "unit": unit,
                "better": better,
            }
            for precision, size in (("fp32", 400), ("int8", 100))
            for name, value, unit, better in (
                ("artifact bytes", size, "bytes", "lower"),
                ("layers", 3, "", "higher"),
            )
        },
    }


def test_a_benchmark_with_figures_is_called_once_and_untimed(suite: Path) -> None:
    (suite / "bench_it.py").write_text(
        "calls = []\n"
        "def bench_both(benchmark, figures):\n"
        "    benchmark(calls.append, 1)\n"
        "    figures.record('calls', len(calls))\n"
    )
    # Whatever a project's own options say of benchmarks.
    for option in ("--benchmark-only", "--benchmark-skip", "--benchmark-enable"):
        ran = pytest_here("bench", option, "--mmopt-figures=figures.json")
        assert ran.returncode == 0, ran.stdout
        figures = read_figures(Path("figures.json"))
        assert figures == {"bench/bench_it.py::bench_both::calls": Figure(1)}


def test_figures_are_the_same_from_several_processes(suite: Path) -> None:
    assert pytest_here("bench", "--mmopt-figures=one.json").returncode == 0
    assert pytest_here("bench", "--mmopt-figures=two.json", "-n2").returncode == 0
    assert Path("one.json").read_bytes() == Path("two.json").read_bytes()


@pytest.mark.parametrize(
    "fault",
    [
        "def exact_bad(figures): raise ValueError('no')",
        "def exact_dies(figures):\n    import os; os._exit(0)",
        "import no_such_module",
        "def exact_twice(figures):\n    figures.record('n', 1); figures.record('n', 1)",
        "import pytest\n@pytest.fixture\ndef f():\n    yield\n    1 / 0\n"
        "def exact_torn(f, figures): figures.record('n', 1)",
    ],
)
def test_without_every_test_passing_there_is_no_file(suite: Path, fault: str) -> None:
    Path("figures.json").write_text("of an earlier run")
    (suite / "bench_other.py").write_text(fault)
    ran = pytest_here("bench", "--mmopt-figures=figures.json")
    # A process that ends itself can claim success; the file tells.
    assert ran.returncode != 0 or "os._exit" in fault
    assert sorted(path.name for path in Path().iterdir() if "figures" in path.name) == []


def test_a_skipped_test_records_nothing(suite: Path) -> None:
    (suite / "bench_it.py").write_text(
        "import pytest\n"
        "def exact_skipped(figures):\n    figures.record('n', 1)\n    pytest.skip('not here')\n"
        "def exact_run(figures): figures.record('n', 2)\n"
    )
    assert pytest_here("bench", "--mmopt-figures=figures.json").returncode == 0
    assert read_figures(Path("figures.json")) == {"bench/bench_it.py::exact_run::n": Figure(2)}


def test_without_tests_that_record_there_is_a_file_without_figures(suite: Path) -> None:
    ran = pytest_here("bench", "--mmopt-figures=figures.json", "-k", "sum")
    assert ran.returncode == pytest.ExitCode.NO_TESTS_COLLECTED
    assert read_figures(Path("figures.json")) == {}


def test_a_place_that_cannot_be_written_is_refused_before_any_test_runs(suite: Path) -> None:
    for place in ("no/such/figures.json", "bench", "/dev/full"):
        ran = pytest_here("bench", f"--mmopt-figures={place}")
        assert ran.returncode == pytest.ExitCode.USAGE_ERROR
        assert f"--mmopt-figures={place}: expected a file in a folder that exists" in ran.stderr
    assert Path("/dev/full").exists()


def test_the_plugin_and_the_exact_gate_import_no_torch() -> None:
    code = (
        "import sys, mmopt.measure.suites.plugin, mmopt.measure.suites.exact, "
        "mmopt.measure.suites.collection\nprint('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


# --- comparing figures ---------------------------------------------------------------------------


def test_each_figure_gets_the_verdict_of_its_direction() -> None:
    base = {
        "same": Figure(5),
        "more": Figure(5),
        "less": Figure(5),
        "more is better": Figure(5, better="higher"),
        "less is worse": Figure(5, better="higher"),
        "gone": Figure(5, "bytes"),
    }
    head = {
        "same": Figure(5),
        "more": Figure(6),
        "less": Figure(4),
        "more is better": Figure(6, better="higher"),
        "less is worse": Figure(4, better="higher"),
        "new": Figure(0),
    }
    verdicts = {one.name: (one.verdict, one.base, one.head) for one in compare_figures(base, head)}
    assert verdicts == {
        "same": ("PASSED", 5, 5),
        "more": ("REGRESSED", 5, 6),
        "less": ("IMPROVED", 5, 4),
        "more is better": ("IMPROVED", 5, 6),
        "less is worse": ("REGRESSED", 5, 4),
        "gone": ("MISSING", 5, None),
        "new": ("NEW", None, 0),
    }
    names = [one.name for one in compare_figures(base, head)]
    assert names == sorted(names)


@pytest.mark.parametrize("turned", [Figure(9, better="higher"), Figure(9, unit="kB")])
def test_a_regression_cannot_hide_behind_another_direction_or_unit(turned: Figure) -> None:
    verdicts = compare_figures({"n": Figure(5)}, {"n": turned})
    assert [(one.verdict, one.base, one.head) for one in verdicts] == [
        ("MISSING", 5, None),
        ("NEW", None, 9),
    ]


def test_figures_survive_being_written_and_read(tmp_path: Path) -> None:
    figures = {"b::n": Figure(2**60, "bytes"), "a::n": Figure(-1, better="higher")}
    write_figures(tmp_path / "f.json", figures)
    assert read_figures(tmp_path / "f.json") == figures
    assert list(json.loads((tmp_path / "f.json").read_text())["figures"]) == ["a::n", "b::n"]
    assert [path.name for path in tmp_path.iterdir()] == ["f.json"]


GOOD = {"schema": 1, "figures": {"a::n": {"value": 1, "unit": "", "better": "lower"}}}


def spoiled(**changes: Any) -> str:
    return json.dumps({**GOOD, "figures": {"a::n": {**GOOD["figures"]["a::n"], **changes}}})  # type: ignore[index]


CORRUPT = {
    "empty": ("", "cannot be read as JSON"),
    "cut": (json.dumps(GOOD)[:-9], "cannot be read as JSON"),
    "deep": ("[" * 100_000, "cannot be read as JSON"),
    "binary": (b"\xff\xfe\x00", "cannot be read as JSON"),
    "list": ("[]", "no object of figures"),
    "figures missing": ('{"schema": 1}', "no object of figures"),
    "other schema": (json.dumps({**GOOD, "schema": 2}), "schema 2, expected 1"),
    "float": (spoiled(value=1.5), "figure 'a::n' has the value 1.5"),
    "bool": (spoiled(value=True), "figure 'a::n' has the value True"),
    "no value": (spoiled(value=None), "figure 'a::n' has the value None"),
    "direction": (spoiled(better="less"), "better 'less'"),
    "no object": ('{"schema": 1, "figures": {"a::n": 3}}', "figure 'a::n' is 3"),
}


@pytest.mark.parametrize("kind", CORRUPT)
def test_a_corrupt_file_of_figures_is_named_with_its_fault(tmp_path: Path, kind: str) -> None:
    text, message = CORRUPT[kind]
    path = tmp_path / "f.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=message) as raised:
        read_figures(path)
    assert str(raised.value).startswith(str(path))


# --- mmopt bench exact ---------------------------------------------------------------------------


def test_recorded_figures_pass_and_a_change_for_the_worse_fails_by_name(suite: Path) -> None:
    recorded = bench("exact", "bench", "--baseline", "exact.json", "--update")
    assert recorded.exit_code == 0, recorded.output
    assert "exact.json now records 4 exact figures" in recorded.output
    passed = bench("exact", "bench", "--baseline", "exact.json")
    assert passed.exit_code == 0, passed.output
    assert "PASSED: all 4 exact figures are as in exact.json" in passed.output

    (suite / "bench_it.py").write_text(
        SUITE.replace('"fp32": 400, "int8": 100', '"fp32": 401, "int8": 99').replace(
            '"layers", 3', '"layers", 3 if precision == "fp32" else 2'
        )
    )
    failed = bench("exact", "bench", "--baseline", "exact.json", "--json")
    assert failed.exit_code == 1, failed.output
    document = json.loads(failed.stdout)
    assert (document["verdict"], document["exit_code"]) == ("REGRESSED", 1)
    assert {one["name"].partition("::")[2]: one["verdict"] for one in document["figures"]} == {
        "exact_bytes[fp32]::artifact bytes": "REGRESSED",
        "exact_bytes[fp32]::layers": "PASSED",
        "exact_bytes[int8]::artifact bytes": "IMPROVED",
        "exact_bytes[int8]::layers": "REGRESSED",
    }
    assert document["notes"] == []


def test_a_renamed_figure_is_missing_and_new_and_both_fail(suite: Path) -> None:
    update_baseline(["bench"], Path("exact.json"))
    (suite / "bench_it.py").write_text(SUITE.replace('"layers"', '"depth"'))
    report = exact_gate(["bench"], Path("exact.json"))
    assert report.exit_code == 1
    assert [(one.name.rpartition("::")[2], one.verdict) for one in report.failures] == [
        ("depth", "NEW"),
        ("layers", "MISSING"),
        ("depth", "NEW"),
        ("layers", "MISSING"),
    ]
    failed = bench("exact", "bench", "--baseline", "exact.json")
    assert "MISSING" in failed.output
    assert "--update" in failed.output


def test_a_figure_that_no_longer_exists_at_all_still_fails(suite: Path) -> None:
    update_baseline(["bench"], Path("exact.json"))
    (suite / "bench_it.py").write_text("def bench_it(benchmark): benchmark(len, '')\n")
    with pytest.raises(InputError, match="no exact figure was recorded"):
        exact_gate(["bench"], Path("exact.json"))


def test_better_figures_pass_and_are_told(suite: Path) -> None:
    update_baseline(["bench"], Path("exact.json"))
    (suite / "bench_it.py").write_text(SUITE.replace("400", "399"))
    improved = bench("exact", "bench", "--baseline", "exact.json")
    assert improved.exit_code == 0
    assert "IMPROVED: 1 of 4 exact figures are better" in improved.output
    assert "399 bytes" in improved.output


@pytest.mark.parametrize("kind", [*CORRUPT, "nothing recorded"])
def test_a_corrupt_baseline_exits_2_before_anything_runs(suite: Path, kind: str) -> None:
    text = CORRUPT[kind][0] if kind in CORRUPT else '{"schema": 1, "figures": {}}'
    Path("exact.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    (suite / "bench_it.py").write_text("raise RuntimeError('was run')")
    refused = bench("exact", "bench", "--baseline", "exact.json", "--json")
    assert refused.exit_code == 2, refused.output
    assert json.loads(refused.stdout)["error"]["message"].startswith("exact.json")


def test_a_missing_baseline_says_how_to_record_one(suite: Path) -> None:
    refused = bench("exact", "bench", "--baseline", "exact.json")
    assert refused.exit_code == 2
    assert "exact.json does not exist" in refused.stderr
    assert "--update" in refused.stderr


def test_an_update_that_fails_leaves_the_baseline_as_it_was(suite: Path) -> None:
    update_baseline(["bench"], Path("exact.json"))
    before = Path("exact.json").read_bytes()
    (suite / "bench_it.py").write_text(SUITE + "def exact_bad(figures): raise ValueError('no')")
    failed = bench("exact", "bench", "--baseline", "exact.json", "--update")
    assert failed.exit_code == 3
    assert "FAILED bench/bench_it.py::exact_bad - ValueError: no" in failed.stderr
    assert Path("exact.json").read_bytes() == before


def test_an_update_over_a_corrupt_file_says_what_is_lost(suite: Path) -> None:
    Path("exact.json").write_text("{")
    report = update_baseline(["bench"], Path("exact.json"))
    assert report.exit_code == 0
    assert len(report.notes) == 1
    assert "exact.json cannot be read as JSON" in report.notes[0]
    assert len(read_figures(Path("exact.json"))) == 4


def test_other_library_versions_are_named_beside_the_verdict(
    suite: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update_baseline(["bench"], Path("exact.json"))
    here = exact.library_versions()
    monkeypatch.setattr(exact, "library_versions", lambda: {**here, "onnx": "99.0"})
    report = exact_gate(["bench"], Path("exact.json"))
    assert report.exit_code == 0
    assert report.notes == (
        f"The baseline was recorded with onnx {here['onnx']} (here 99.0): a figure may differ for "
        "that reason alone.",
    )


# --- telling suites from models ------------------------------------------------------------------


def test_suites_are_told_from_checkpoints_and_artifacts(tmp_path: Path) -> None:
    def folder(name: str, *files: str) -> str:
        for file in files:
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        (tmp_path / name).mkdir(exist_ok=True)
        return str(tmp_path / name)

    assert is_suite(folder("flat", "bench_a.py"))
    assert is_suite(folder("nested", "ops/bench_a.py"))
    assert is_suite(folder("flat") + "/bench_a.py::bench_x[1]")
    assert is_suite("no/such/bench_a.py")
    assert not is_suite(folder("checkpoint", "config.json", "model.safetensors", "modeling.py"))
    assert not is_suite(folder("artifact", "mmopt.json", "model.onnx"))
    assert not is_suite(folder("adapter", "adapter_config.json", "bench_a.py"))
    assert not is_suite(folder("empty"))
    assert not is_suite("no/such/folder")
    assert not is_suite("sentence-transformers/all-MiniLM-L6-v2")


# --- mmopt bench run SUITE -----------------------------------------------------------------------

# What pytest-benchmark would take a second for.
SHORT = ("--", "--benchmark-max-time=0.01")


@dataclass(frozen=True)
class Ran:
    """One call of `mmopt bench run bench -o result.json`."""

    output: str
    result: Path


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """The suite, run and stored once."""
    root = tmp_path_factory.mktemp("ran")
    make_suite(root)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(root)
        called = bench("run", "bench", "-o", "result.json", *SHORT)
        assert called.exit_code == 0, called.output
        assert not Path(".benchmarks").exists()
    return Ran(called.output, root / "result.json")


def test_a_suite_is_stored_with_samples_fingerprint_conditions_and_figures(ran: Ran) -> None:
    document = json.loads(ran.result.read_text())
    timed = {entry["fullname"]: entry for entry in document["benchmarks"]}
    assert list(timed) == [
        "bench/bench_it.py::bench_sum[10]",
        "bench/bench_it.py::bench_sum[1000]",
        "bench/bench_it.py::bench_slow",
    ]
    for entry in timed.values():
        assert len(entry["stats"]["data"]) == entry["stats"]["rounds"] > 0
    # Calls that are shorter than the clock allows are repeated within a round.
    quick = timed["bench/bench_it.py::bench_sum[10]"]["stats"]
    assert quick["iterations"] * quick["median"] > SHORTEST_ROUND_SECONDS / 2
    ours = document["mmopt"]
    assert ours["schema"] == 1
    assert ours["fingerprint"]["cores"] == len(os.sched_getaffinity(0))
    assert ours["conditions"]["seconds"] > 0
    assert ours["figures"]["bench/bench_it.py::exact_bytes[int8]::artifact bytes"] == {
        "value": 100,
        "unit": "bytes",
        "better": "lower",
    }
    for shown in ("bench_sum[10]", "sums", "median", "95% CI", "rounds", "100 bytes"):
        assert shown in ran.output

    stored = read_result(ran.result)
    assert [series.name for series in stored.series] == list(timed)
    assert stored.fingerprint == ours["fingerprint"]
    assert len(stored.figures) == 4


def test_pytest_benchmark_compares_stored_suites(ran: Ran, tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_bytes(ran.result.read_bytes())
    command = [str(Path(sys.executable).with_name("pytest-benchmark")), "compare"]
    compared = subprocess.run(
        [*command, "a.json", "b.json", "--csv=c.csv"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert compared.returncode == 0, compared.stderr
    lines = (tmp_path / "c.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * 3
    assert sum("bench_sum[1000]" in line for line in lines) == 2


def test_json_prints_one_document_that_equals_the_file(suite: Path) -> None:
    ran = bench("run", "bench", "-k", "slow", "--json", "-o", "result.json", *SHORT)
    assert ran.exit_code == 0, ran.output
    document = json.loads(ran.stdout)
    assert document == json.loads(Path("result.json").read_text())
    assert [entry["name"] for entry in document["benchmarks"]] == ["bench_slow"]
    assert document["mmopt"]["figures"] == {}  # -k picks among them as well


def test_a_result_keeps_why_a_benchmark_was_skipped(suite: Path) -> None:
    """And not that others than benchmarks were, which the timed process leaves out."""
    (suite / "bench_it.py").write_text(
        SUITE + "\ndef bench_absent(benchmark):\n    pytest.skip('liger is not installed')\n"
    )
    document = run_suites(["bench"], keyword="absent or slow or exact or plain").document
    assert [entry["name"] for entry in document["benchmarks"]] == ["bench_slow"]
    assert document["mmopt"]["skipped"] == {
        "bench/bench_it.py::bench_absent": "liger is not installed"
    }


def test_a_p95_is_shown_from_enough_rounds_of_single_calls_only(ran: Ran) -> None:
    document = json.loads(ran.result.read_text())
    for entry, rounds, calls in zip(
        document["benchmarks"], (130, 130, 129), (1, 2, 1), strict=True
    ):
        entry["stats"] |= {"data": [1e-3 * i for i in range(1, rounds + 1)], "iterations": calls}
    report = SuiteReport(document)
    assert [test.p95 for test in report.tests] == [pytest.approx(0.12355), None, None]
    console = Console(width=100, file=io.StringIO())
    console.print(report.render())
    assert "124 ms" in console.file.getvalue()  # type: ignore[attr-defined]


def test_pytest_benchmarks_own_storage_carries_the_fingerprint_too(suite: Path) -> None:
    storage = ("--benchmark-save=kept", "--benchmark-storage=stored", "--benchmark-save-data")
    ran = bench("run", "bench", "-k", "slow", "--", *storage)
    assert ran.exit_code == 0, ran.output
    (kept_file,) = Path("stored").rglob("*kept.json")
    assert json.loads(kept_file.read_text())["mmopt"]["fingerprint"]["python"]


def test_options_of_the_project_do_not_spoil_a_run(suite: Path) -> None:
    Path("pyproject.toml").write_text(
        '[tool.pytest.ini_options]\naddopts = "-n 2 -q --color=yes --benchmark-disable"\n'
    )
    refused = bench("run", "bench", *SHORT)
    assert refused.exit_code == 2  # disabled by the project, and said so
    assert "--benchmark-disable" in refused.stderr
    Path("pyproject.toml").write_text(
        '[tool.pytest.ini_options]\naddopts = "-n 2 -q --color=yes"\n'
    )
    ran = bench("run", "bench", "--json", *SHORT)
    assert ran.exit_code == 0, ran.output
    assert len(json.loads(ran.stdout)["benchmarks"]) == 3


REFUSED = {
    "mixed": (["run", "bench", "model"], "bench is a benchmark suite and model is none"),
    "missing file": (["run", "bench/bench_no.py"], "bench/bench_no.py does not exist"),
    "missing test": (["run", "bench/bench_it.py::no"], "bench_it.py::no"),
    "nothing picked": (["run", "bench", "-k", "nothing"], "no benchmark was collected with -k"),
    "bad -k": (["run", "bench", "-k", "("], "Wrong expression passed to '-k'"),
    "bad option": (["run", "bench", "--", "--no-such"], "unrecognized arguments: --no-such"),
    "model options": (
        ["run", "bench", "--rounds", "3", "--memory", "--device", "cuda"],
        "--rounds, --memory, --device cannot be had with bench, a benchmark suite",
    ),
    "-k of a model": (["run", "model", "-k", "x"], "only models were given"),
    "options of a model": (["run", "model", "--", "--x"], "only models were given"),
    "no folder": (["run", "bench", "-o", "no/such.json"], "the folder no does not exist"),
    "exact, missing": (["exact", "no", "--baseline", "b.json", "--update"], "no does not exist"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_exits_2_with_one_message_and_writes_nothing(suite: Path, name: str) -> None:
    arguments, message = REFUSED[name]
    before = files_here()
    refused = bench(*arguments)
    assert refused.exit_code == 2, refused.output
    assert message in refused.stderr
    assert "Traceback" not in refused.output
    assert files_here() == before


def files_here() -> set[Path]:
    """Every file of the current folder but what Python and pytest cache."""
    return {path for path in Path().rglob("*") if "cache" not in str(path)}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def bench_bad(benchmark):\n    raise ValueError('too small')", "ValueError: too small"),
        ("import no_such_module\n", "No module named 'no_such_module'"),
        ("def bench_dies(benchmark):\n    import os; os._exit(7)", "ended with status 7"),
        (
            "def bench_killed(benchmark):\n    import os; os.kill(os.getpid(), 9)",
            "killed by signal 9",
        ),
        ("def bench_leaves(benchmark):\n    import os; os._exit(0)", "ended before its last test"),
        ("def exact_leaves(figures):\n    import os; os._exit(0)", "ended before its last test"),
        ("def exact_bad(figures): assert 1 == 2", "exact_bad - assert 1 == 2"),
        ("def bench_no_fixture(benchmark, nothing): pass", "fixture 'nothing' not found"),
    ],
)
def test_a_suite_that_fails_or_crashes_exits_3_and_keeps_nothing(
    suite: Path, text: str, said: str
) -> None:
    (suite / "bench_it.py").write_text("def bench_ok(benchmark): benchmark(len, '')\n" + text)
    Path("result.json").write_text("of an earlier run")
    failed = bench("run", "bench", "-o", "result.json", *SHORT)
    assert failed.exit_code == 3, failed.output
    assert said in failed.stderr
    assert "_exit(0)" in text or "-m pytest" in failed.stderr  # how to see the rest
    assert len(failed.stderr.splitlines()) < 20
    assert Path("result.json").read_text() == "of an earlier run"


def test_only_the_lines_that_tell_are_shown_of_a_long_failure() -> None:
    noise = [f"bench/bench_it.py::bench_{i} PASSED [ 10%]" for i in range(40)]
    failure = ["E   ValueError: no", "FAILED bench/bench_it.py::bench_x - ValueError: no"]
    assert telling_lines([*noise, failure[0], "", failure[1], "1 failed"]) == failure
    crash = ["bench/bench_it.py::bench_y Fatal Python error: Aborted", "", "frame"]
    assert telling_lines([*noise, *crash, *["deep"] * 50])[:2] == [crash[0], "frame"]
    assert telling_lines([*noise, ""]) == noise[-12:]


def test_an_interrupted_run_leaves_no_process_behind(suite: Path, tmp_path: Path) -> None:
    (suite / "bench_it.py").write_text(
        "import os, pathlib, time\n"
        "def bench_first(benchmark):\n"
        f"    pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n"
        "    benchmark(len, '')\n"
        "def bench_second(benchmark): time.sleep(600)\n"
    )

    @contextmanager
    def interrupts(_what: str, _total: int | None) -> Iterator[Callable[[int], None]]:
        def advance(_steps: int) -> None:
            raise KeyboardInterrupt

        yield advance

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_pytest(["bench"], suites=["bench"], what="time", progress=interrupts)
    assert time.monotonic() - began < 300
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_progress_ends_at_all_of_it(suite: Path) -> None:
    steps: list[int] = []

    @contextmanager
    def counts(_what: str, total: int | None) -> Iterator[Callable[[int], None]]:
        assert total == 100
        yield steps.append

    assert len(measure_figures(["bench"], progress=counts)) == 4
    assert sum(steps) == 100
    assert len(steps) == 2  # a step per test


def test_without_pytest_benchmark_the_message_says_what_to_install(
    suite: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "pytest_benchmark" else found(name, *rest),
    )
    with pytest.raises(MmoptError, match=r"pytest_benchmark is not installed.*mmopt\[bench\]"):
        run_suites(["bench"])


def test_a_pytest_that_times_learns_of_no_xdist_worker_above_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """pytest-benchmark would time nothing in it."""
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    monkeypatch.setenv("PYTEST_ADDOPTS", "-x")
    got = pytest_environment()
    assert "PYTEST_XDIST_WORKER" not in got
    assert got["PYTEST_ADDOPTS"] == "-x"
