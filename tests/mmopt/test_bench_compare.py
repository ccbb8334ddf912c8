"""`mmopt bench compare`: two stored results side by side."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import typer
from typer.testing import CliRunner

from bench_results import CONDITIONS, MACHINE, bench_run, gate, samples, save, suite
from mmopt.cli.bench import bench_app
from mmopt.measure.compare import CANNOT_TELL, compare
from mmopt.measure.statistics import bootstrap_ratio, holm, median
from mmopt_kernels.errors import InputError

app = typer.Typer()
app.add_typer(bench_app, name="bench")


def _run(*arguments: object, columns: int = 120) -> tuple[int, str]:
    ran = CliRunner().invoke(
        app, ["bench", "compare", *map(str, arguments)], env={"COLUMNS": str(columns)}
    )
    return ran.exit_code, ran.stdout


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two runs of one suite; the second takes 1.5 times as long and writes 24 bytes more."""
    a = save(tmp_path / "a.json", suite())
    b = save(tmp_path / "b.json", suite(scale=1.5, seed=1, figures={"bytes": 2072}))
    return a, b


def test_rows_hold_medians_ratio_interval_and_adjusted_p(pair: tuple[Path, Path]) -> None:
    report = compare(*pair)
    assert report.exit_code == 0
    assert [row.name for row in report.rows] == [
        "bench/bench_op.py::bench_forward[mmopt]",
        "bench/bench_op.py::bench_forward[peft]",
        "bench/bench_op.py::bench_export",
    ]
    for row in report.rows:
        assert row.ratio == median(row.b.samples) / median(row.a.samples)
        assert row.interval.low <= row.ratio <= row.interval.high
        assert 1.4 < row.interval.low < row.interval.high < 1.6


def test_p_is_that_of_mann_whitney_adjusted_over_all_rows(tmp_path: Path) -> None:
    a = save(tmp_path / "a.json", suite())
    report = compare(a, save(tmp_path / "b.json", suite(scale=1.01, seed=1)))
    raw = [
        scipy.stats.mannwhitneyu(row.a.samples, row.b.samples, method="exact").pvalue
        for row in report.rows
    ]
    found = [row.p_value for row in report.rows]
    assert found == pytest.approx(holm(raw), rel=1e-9)
    assert all(1e-9 < one < 1 for one in raw)
    assert found != pytest.approx(raw, rel=1e-3)


def test_equal_files_are_told_apart_by_nothing(tmp_path: Path) -> None:
    document = suite()
    report = compare(save(tmp_path / "a.json", document), save(tmp_path / "b.json", document))
    for row in report.rows:
        assert row.ratio == 1
        assert row.p_value == 1
        assert row.interval.low < 1 < row.interval.high


def test_exact_figures_stand_side_by_side(pair: tuple[Path, Path]) -> None:
    report = compare(*pair)
    (figure,) = report.to_dict()["figures"]
    assert (figure["a"], figure["b"]) == (2048, 2072)
    code, shown = _run(*pair)
    assert code == 0
    assert re.search(r"2,048 bytes .* 2,072 bytes .* \+24 \(\+1\.2%\) .* worse", shown)


def test_many_equal_figures_are_counted_and_those_that_differ_are_shown(tmp_path: Path) -> None:
    counts = {f"count {index}": index for index in range(20)}
    a = save(tmp_path / "a.json", suite(figures=counts))
    b = save(tmp_path / "b.json", suite(figures={**counts, "count 7": 8}))
    _, shown = _run(a, b)
    assert re.search(r"count 7 .* 7 bytes .* 8 bytes .* worse", shown)
    assert "19 exact figures are the same in both" in shown
    assert "count 6" not in shown
    assert len(json.loads(_run(a, b, "--json")[1])["figures"]) == 20


def test_names_in_one_file_only_are_listed(tmp_path: Path) -> None:
    a = save(tmp_path / "a.json", suite(names=("bench_x", "bench_old"), figures={"old": 1}))
    b = save(tmp_path / "b.json", suite(names=("bench_x", "bench_new"), figures={"new": 1}))
    report = compare(a, b)
    assert report.only_a == ("bench/bench_op.py::bench_old",)
    assert report.only_b == ("bench/bench_op.py::bench_new",)
    _, shown = _run(a, b)
    assert "Only in A: bench/bench_op.py::bench_old" in shown
    assert "Only in B: bench/bench_op.py::bench_new" in shown
    assert re.search(r"exact_op::old .* only in A", shown)
    assert re.search(r"exact_op::new .* only in B", shown)


def test_different_machines_are_refused_and_every_field_is_named(tmp_path: Path) -> None:
    a = save(tmp_path / "a.json", bench_run())
    other = {**MACHINE, "cpu": "Other CPU", "torch": "2.14.0", "quota_cores": 1.5}
    b = save(tmp_path / "b.json", bench_run(machine=other))
    with pytest.raises(InputError) as caught:
        compare(a, b)
    said = str(caught.value)
    assert "cpu: Example CPU @ 2.0 GHz in A, Other CPU in B" in said
    assert "torch: 2.13.0+cpu in A, 2.14.0 in B" in said
    assert "quota_cores: - in A, 1.5 in B" in said
    assert "cores: 2 in A" not in said
    assert "--allow-different" in said
    code, shown = _run(a, b, "--json")
    assert code == 2
    assert json.loads(shown)["exit_code"] == 2


def test_allow_different_looks_and_says_so_first(tmp_path: Path) -> None:
    a = save(tmp_path / "a.json", bench_run())
    b = save(tmp_path / "b.json", bench_run(machine={**MACHINE, "cpu": "Other CPU"}))
    code, shown = _run(a, b, "--allow-different", "-o", tmp_path / "page.html")
    assert code == 0
    assert shown.startswith("Machine or versions differ")
    assert "cpu: Example CPU @ 2.0 GHz in A, Other CPU in B" in shown.splitlines()[1]
    page = (tmp_path / "page.html").read_text()
    assert page.index("Machine or versions differ") < page.index("Time per call, B against A")
    different = json.loads(_run(a, b, "--allow-different", "--json")[1])["different"]
    assert different == [{"field": "cpu", "a": "Example CPU @ 2.0 GHz", "b": "Other CPU"}]


@pytest.mark.parametrize("known", [(True, False), (False, True), (False, False)])
def test_an_unknown_machine_counts_as_different(known: tuple[bool, bool], tmp_path: Path) -> None:
    a = save(tmp_path / "a.json", suite(ours=known[0]))
    b = save(tmp_path / "b.json", suite(ours=known[1]))
    with pytest.raises(InputError, match=r"unknown machine in [AB]"):
        compare(a, b)
    assert len(compare(a, b, allow_different=True).rows) == 3


def test_the_output_says_what_it_cannot_tell(pair: tuple[Path, Path], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    code, shown = _run(*pair, "-o", page)
    assert code == 0
    for text in (" ".join(shown.split()), page.read_text()):
        assert "may be no change of the program" in text
        assert "mmopt bench gate" in text
    assert json.loads(_run(*pair, "--json")[1])["cannot_tell"] == CANNOT_TELL


def test_warnings_of_either_file_are_shown(tmp_path: Path) -> None:
    a = save(tmp_path / "a.json", bench_run())
    b = save(tmp_path / "b.json", {**bench_run(), "conditions": None})
    _, shown = _run(a, b)
    assert f"Warning, A: {CONDITIONS['warnings'][0]}" in shown
    assert "Warning, B" not in shown


def test_bars_point_to_the_slower_side_and_end_at_the_ratio(tmp_path: Path) -> None:
    names = ("bench_slower", "bench_faster")
    a, b = suite(names=names), suite(names=names)
    for entry, factor in zip(b["benchmarks"], (1.2, 0.9), strict=True):
        entry["stats"]["data"] = [factor * value for value in entry["stats"]["data"]]
    _, shown = _run(save(tmp_path / "a.json", a), save(tmp_path / "b.json", b))
    slower, faster = (
        next(line for line in shown.splitlines() if line.endswith(f"{change}  {name}"))
        for change, name in (("+20.0%", "bench_slower"), ("-10.0%", "bench_faster"))
    )
    assert slower[:20].strip(" ─") == ""
    assert slower[20] == "│"
    assert slower[21:41] == "█" * 20  # the scale ends at 20%
    assert faster[10:20] == "█" * 10
    assert faster[21:41].strip(" ─") == ""


def test_brackets_in_names_are_no_markup(tmp_path: Path) -> None:
    name = "bench_x[red]bold[/red]"
    a = save(tmp_path / "a.json", suite(names=(name,)))
    b = save(tmp_path / "b.json", suite(names=(name,), seed=1))
    code, shown = _run(a, b)
    assert code == 0
    assert name in shown


def test_narrow_terminals_keep_every_number(pair: tuple[Path, Path]) -> None:
    _, shown = _run(*pair, columns=80)
    for row in compare(*pair).rows:
        assert f"{row.interval.low:.3f}-{row.interval.high:.3f}" in shown
    assert all(len(line) <= 80 for line in shown.splitlines())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("a.json", "a.json"), "a.json was given twice"),
        (("a.json", "no.json"), "no.json does not exist"),
        (("a.json", "gate.json"), "gate.json is a gate's report"),
        (("a.json", "other.json"), "have no benchmark and no exact figure in common"),
        (("a.json", "b.json", "-o", "."), "is a folder, expected a file"),
        (("a.json", "b.json", "-o", "no/such/p.html"), "does not exist. Create it first"),
        (("a.json", "b.json", "-o", "page.json"), "expected a name that ends in .html"),
    ],
)
def test_bad_input_exits_2_and_writes_nothing(
    arguments: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "a.json", suite())
    save(tmp_path / "b.json", suite(seed=1))
    save(tmp_path / "gate.json", gate())
    save(tmp_path / "other.json", suite(names=("bench_other",), figures={}))
    before = sorted(tmp_path.iterdir())
    code, shown = _run(*arguments, "--json")
    assert code == 2
    assert said in json.loads(shown)["error"]["message"]
    assert sorted(tmp_path.iterdir()) == before


def test_a_result_is_never_overwritten_by_the_page(tmp_path: Path) -> None:
    a = save(tmp_path / "a.html", suite())
    b = save(tmp_path / "b.json", suite(seed=1))
    code, shown = _run(a, b, "-o", a, "--json")
    assert code == 2
    assert "is one of the results" in json.loads(shown)["error"]["message"]
    assert json.loads(a.read_text()) == suite()


def test_bootstrap_ratio_agrees_with_scipy() -> None:
    base, head = samples(1e-3, 41, seed=1), samples(1.1e-3, 30, seed=2)
    ours = bootstrap_ratio(base, head, resamples=20000)
    theirs = scipy.stats.bootstrap(
        (base, head),
        lambda x, y, axis: np.median(y, axis=axis) / np.median(x, axis=axis),
        n_resamples=20000,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    width = theirs.high - theirs.low
    assert ours.low == pytest.approx(theirs.low, abs=0.1 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.1 * width)


def test_bootstrap_ratio_covers_the_true_ratio_about_as_often_as_it_says() -> None:
    """Two normal samples with medians 1 and 1.1."""
    draw = random.Random(0)
    covered = 0
    for seed in range(300):
        base = [draw.gauss(1, 0.05) for _ in range(31)]
        head = [draw.gauss(1.1, 0.05) for _ in range(31)]
        interval = bootstrap_ratio(base, head, resamples=1000, seed=seed)
        covered += interval.low <= 1.1 <= interval.high
    # 0.95 with a standard error of 0.013; the percentile interval of a median is a little wide.
    assert 0.92 <= covered / 300 <= 0.99


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_bootstrap_ratio_refuses_what_has_no_ratio(bad: float) -> None:
    for base, head in (([1.0, bad], [1.0]), ([1.0], [bad])):
        with pytest.raises(InputError, match="bootstrap"):
            bootstrap_ratio(base, head)
    with pytest.raises(InputError, match="no samples"):
        bootstrap_ratio([], [1.0])
    with pytest.raises(InputError, match="confidence is 1"):
        bootstrap_ratio([1.0], [1.0], confidence=1)
