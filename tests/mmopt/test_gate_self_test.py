"""The gate's self-test: its schedule, its rates, and one short run of the real thing."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mmopt.measure.gate import selftest
from mmopt.measure.gate.decision import LOOKS, Contest, Verdict
from mmopt.measure.gate.report import GateReport, self_test_line
from mmopt.measure.gate.revisions import Revision
from mmopt.measure.gate.selftest import SelfTestReport, Trial, self_test
from mmopt.measure.gate.store import MACHINE_FIELDS, store_self_test, stored_self_test
from mmopt_kernels.errors import InputError, MmoptError

MACHINE = dict.fromkeys(MACHINE_FIELDS, "this one")

EQUAL = Trial(
    slowed=None,
    verdict="PASSED",
    found=(),
    undecided=(),
    seconds=20.0,
    slowdowns={"sort": 0.001},
    peer_failed=None,
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def rates(*trials: Trial) -> dict[str, Any]:
    return SelfTestReport(trials, MACHINE, "2026-11-24T12:00:00+00:00").to_dict()


def test_rates_count_suites_not_benchmarks() -> None:
    alarm = replace(EQUAL, verdict="REGRESSED", found=("sort", "json"))
    slow = replace(EQUAL, slowed="sort")
    found = rates(
        EQUAL,
        alarm,
        replace(EQUAL, undecided=("regex",)),
        replace(slow, found=("sort",)),
        replace(slow, found=("json",)),  # another benchmark: the slowed one passed
        replace(slow, undecided=("sort",)),
    )
    assert (found["trials"], found["false_alarms"], found["inconclusive"]) == (3, 1, 1)
    assert (found["slow_trials"], found["found"], found["missed"]) == (3, 1, 1)
    assert found["false_alarms_beside"] == 1
    assert found["peer"] is None


def test_the_peer_is_counted_on_the_trials_it_ran_on() -> None:
    slow = replace(EQUAL, slowed="sort")
    peer = rates(
        EQUAL,
        replace(EQUAL, peer_failed=()),
        replace(EQUAL, peer_failed=("json",)),
        replace(slow, peer_failed=("json",)),
        replace(slow, peer_failed=("sort", "json")),
    )["peer"]
    assert (peer["trials"], peer["false_alarms"]) == (2, 1)
    assert (peer["slow_trials"], peer["found"]) == (2, 1)


def test_a_stored_result_is_found_on_the_same_machine_only() -> None:
    assert stored_self_test(MACHINE) is None
    store_self_test(rates(EQUAL))
    stored = stored_self_test(MACHINE)
    assert stored is not None
    assert stored["trials"] == 1
    assert stored_self_test({**MACHINE, "cpu": "another"}) is None


def test_a_result_of_another_method_or_a_damaged_one_is_not_carried(cache: Path) -> None:
    store_self_test({**rates(EQUAL), "looks": [*LOOKS, 99]})
    assert stored_self_test(MACHINE) is None
    (cache / "mmopt" / "gate-self-test.json").write_text('{"fingerprint": ')
    assert stored_self_test(MACHINE) is None


@pytest.mark.parametrize("fingerprint", [None, [], 3])
def test_a_stored_result_of_another_shape_is_not_carried(fingerprint: object) -> None:
    store_self_test({**rates(EQUAL), "fingerprint": fingerprint})
    assert stored_self_test(MACHINE) is None


def test_a_result_that_cannot_be_kept_is_refused_before_any_trial(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cache / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "file"))
    with pytest.raises(MmoptError, match=r"cannot be kept.*XDG_CACHE_HOME"):
        self_test(trials=2)


def test_a_user_without_a_home_has_no_stored_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    assert stored_self_test(MACHINE) is None
    with pytest.raises(MmoptError, match=r"home directory.*XDG_CACHE_HOME"):
        store_self_test(rates(EQUAL))


def test_the_repository_of_a_git_hook_is_not_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hooks run with GIT_DIR set, and there the self-test's commits would land."""
    users, own = tmp_path / "users", tmp_path / "own"
    for folder in (users, own):
        folder.mkdir()
    selftest.subprocess.run(["git", "init", "--quiet"], cwd=users, check=True)
    before = sorted(users.rglob("*"))
    monkeypatch.setenv("GIT_DIR", str(users / ".git"))
    selftest._repository(own)
    assert sorted(users.rglob("*")) == before
    assert (own / ".git").is_dir()


def test_every_report_says_how_far_it_can_be_believed() -> None:
    assert "was not measured" in self_test_line(None)
    line = self_test_line(rates(EQUAL, replace(EQUAL, slowed="sort", found=("sort",))))
    assert "0 false alarms in 1 suites" in line
    assert "found 1 of 1 slowdowns by 3%" in line


@pytest.mark.parametrize("arguments", [{"trials": 1}, {"peer_every": -1}])
def test_bad_counts_are_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(InputError, match="expected 2 or more"):
        self_test(**arguments)


def test_the_schedule_slows_one_benchmark_after_every_second_equal_trial(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The gate is replaced by one that answers truly; commits and bookkeeping are real."""
    seen: list[tuple[str, str]] = []

    def truthful(base: str, *, head: str, folder: Path, **_options: Any) -> GateReport:
        seen.append((base, head))
        work = {
            ref: selftest.subprocess.run(
                ["git", "show", f"{ref}:bench/work.json"],
                cwd=folder,
                capture_output=True,
                text=True,
            ).stdout
            for ref in (base, head)
        }
        before, after = map(json.loads, work.values())
        contests = [
            Contest(
                f"bench/bench_light.py::bench_light[{name}]",
                0.03,
                verdict=Verdict.REGRESSED if after[name] > units else Verdict.PASSED,
            )
            for name, units in before.items()
        ]
        return GateReport(
            Revision(base, base),
            Revision(head, head),
            *(0.03, 0.01, tuple(contests), (), {}, None, (), None, 1.0, "now"),
        )

    monkeypatch.setattr(selftest, "gate", truthful)
    log = tmp_path / "log.jsonl"
    report = self_test(trials=6, log=log)
    slowed = [trial.slowed for trial in report.trials]
    assert slowed == [None, None, "integers", None, None, "lookups", None, None, "bisection"]
    assert [trial.found for trial in report.trials if trial.slowed] == [
        ("integers",),
        ("lookups",),
        ("bisection",),
    ]
    assert len({base for base, _ in seen}) == 1
    assert len(log.read_text().splitlines()) == 9
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.slow
def test_the_gate_tells_equal_from_slowed_here() -> None:
    """Two equal revisions and one slowed by 3%, with the real gate and the real peer."""
    report = self_test(trials=2, peer_every=2)
    assert [trial.found for trial in report.trials] == [(), (), ("integers",)]
    assert report.to_dict()["peer"]["trials"] == 1
