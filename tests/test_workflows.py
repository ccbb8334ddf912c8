"""The workflows and the gate's action: their structure, and their scripts, run as GitHub would.

What only GitHub can show (that a runner accepts the files, that an artifact arrives) is not tested.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
ACTION = ROOT / ".github" / "actions" / "bench-gate"
DOCUMENTS = [*WORKFLOWS, ACTION / "action.yml"]
OURS_TO_TRUST = {"actions/checkout", "actions/setup-python", "actions/upload-artifact"}


def _load(path: Path) -> dict[Any, Any]:
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(document, dict)
    return document


def _steps(document: dict[Any, Any]) -> list[dict[str, Any]]:
    if "runs" in document:
        return list(document["runs"]["steps"])
    return [step for job in document["jobs"].values() for step in job["steps"]]


# Structure


def test_there_are_the_two_workflows_that_the_project_needs() -> None:
    assert [path.name for path in WORKFLOWS] == ["bench-gate.yml", "ci.yml"]
    runs = [step.get("run") for step in _steps(_load(ROOT / ".github/workflows/ci.yml"))]
    assert ".ci/run" in runs
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    steps = _steps(_load(ROOT / ".github/workflows/bench-gate.yml"))
    assert "./.github/actions/bench-gate" in [step.get("uses") for step in steps]
    assert "make .venv/.ready" in [step.get("run") for step in steps]
    assert "READY := .venv/.ready" in (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_no_script_has_anything_interpolated_into_it(path: Path) -> None:
    """A branch name or a title in a script would run as part of it."""
    steps = _steps(_load(path))
    assert steps
    for step in steps:
        assert "${{" not in step.get("run", "")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_what_is_used_is_ours_or_githubs_own_at_a_stated_version(path: Path) -> None:
    for step in _steps(_load(path)):
        used = step.get("uses")
        if used is None:
            continue
        if used.startswith("./"):
            assert (ROOT / used / "action.yml").is_file()
        else:
            name, _, version = used.partition("@")
            assert name in OURS_TO_TRUST
            assert re.fullmatch(r"v\d+(\.\d+)*|[0-9a-f]{40}", version)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_may_read_and_nothing_else(path: Path) -> None:
    """And they run on code from forks, so never on pull_request_target."""
    workflow = _load(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert set(workflow[True]) <= {"pull_request", "push"}  # YAML reads `on` as true
    for job in workflow["jobs"].values():
        assert "permissions" not in job
        assert job["timeout-minutes"] <= 90
    for step in _steps(workflow):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False
    assert "secrets." not in path.read_text(encoding="utf-8")


def test_a_newer_push_to_a_pull_request_cancels_the_runs_before_it() -> None:
    gate = _load(ROOT / ".github/workflows/bench-gate.yml")["concurrency"]
    assert gate["cancel-in-progress"] is True
    ci = _load(ROOT / ".github/workflows/ci.yml")["concurrency"]
    assert ci["cancel-in-progress"] == "${{ github.event_name == 'pull_request' }}"
    assert all("github.ref" in one["group"] for one in (gate, ci))


def test_every_input_of_the_action_is_used_and_every_input_used_is_declared() -> None:
    action = _load(ACTION / "action.yml")
    used = set(re.findall(r"\binputs\.([\w-]+)", json.dumps(action["runs"])))
    assert used == set(action["inputs"])
    for description in action["inputs"].values():
        assert description["description"]
        assert "default" in description  # nothing is required, so everything has a default
    passed = [
        step.get("with", {})
        for step in _steps(_load(ROOT / ".github/workflows/bench-gate.yml"))
        if step.get("uses") == "./.github/actions/bench-gate"
    ]
    assert len(passed) == 1
    assert all(set(one) <= set(action["inputs"]) for one in passed)


def test_every_variable_the_action_sets_is_read_and_every_variable_read_is_set() -> None:
    scripts = 0
    for step in _load(ACTION / "action.yml")["runs"]["steps"]:
        if "run" not in step:
            continue
        assert step["shell"] == "bash"
        script = ACTION / re.findall(r"\$GITHUB_ACTION_PATH/([\w.]+)", step["run"])[0]
        read = set(re.findall(r"\bGATE_\w+", script.read_text(encoding="utf-8")))
        assert read == set(step["env"])
        scripts += 1
    assert scripts == 2


def test_the_artifact_and_the_comment_follow_a_failed_gate_too() -> None:
    gate, *others = _load(ACTION / "action.yml")["runs"]["steps"]
    assert "continue-on-error" not in gate
    assert len(others) == 2
    for step in others:
        assert step["if"].startswith("always() && ")


# run.sh


@dataclass
class Ran:
    """What run.sh left behind."""

    code: int
    log: str
    summary: str
    outputs: dict[str, str]
    calls: list[list[str]]
    folder: Path


FAKE = """#!{python}
import json, os, sys
from pathlib import Path

arguments = sys.argv[1:]
with open(os.environ["FAKE_CALLS"], "a") as file:
    print(json.dumps(arguments), file=file)
if arguments[:2] == ["bench", "gate"]:
    print("the gate's own words", flush=True)
    print("    ```</details> and a warning", file=sys.stderr, flush=True)
    if os.environ.get("FAKE_REPORT"):
        Path(arguments[arguments.index("-o") + 1]).write_text(os.environ["FAKE_REPORT"])
    sys.exit(int(os.environ["FAKE_CODE"]))
assert arguments[:2] == ["bench", "report"], arguments
report = json.loads(Path(arguments[2]).read_text())
if os.environ.get("FAKE_BROKEN_REPORT"):
    sys.exit("no report today")
for option, text in (("--markdown", "# verdict: " + report["verdict"] + "\\n"),
                     ("--junit", "<testsuites/>"), ("--html", "<html></html>")):
    Path(arguments[arguments.index(option) + 1]).write_text(text)
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """main with two commits, a branch with one, and their merge checked out, as on GitHub."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    _git(folder, "init", "--quiet", "--initial-branch=main")
    _git(folder, "commit", "--quiet", "--allow-empty", "-m", "first")
    _git(folder, "checkout", "--quiet", "-b", "topic")
    _git(folder, "commit", "--quiet", "--allow-empty", "-m", "topic")
    _git(folder, "checkout", "--quiet", "main")
    _git(folder, "commit", "--quiet", "--allow-empty", "-m", "second")
    _git(folder, "checkout", "--quiet", "--detach")
    _git(folder, "merge", "--quiet", "--no-ff", "-m", "merge", "topic")
    return folder


def _git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    result = subprocess.run(
        ["git", *identity, *arguments],
        cwd=folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return result.stdout.strip()


def _pull(checkout: Path) -> dict[str, str]:
    """What the event says about the pull request of topic to main."""
    return {
        "GATE_PULL_HEAD": _git(checkout, "rev-parse", "topic"),
        "GATE_PULL_BASE": _git(checkout, "rev-parse", "main"),
    }


def _report(verdict: str, *rows: str) -> str:
    benchmarks = [{"name": f"bench_{row}", "verdict": row} for row in rows]
    return json.dumps({"verdict": verdict, "benchmarks": benchmarks, "figures": []})


def _run(checkout: Path, code: int, report: str = "", **variables: str) -> Ran:
    """run.sh in `checkout`, with an mmopt on PATH that exits with `code` and leaves `report`."""
    bin = checkout.parent / "bin"
    bin.mkdir(exist_ok=True)
    (bin / "mmopt").write_text(FAKE.format(python=sys.executable))
    (bin / "mmopt").chmod(0o755)
    (bin / "python3").unlink(missing_ok=True)
    (bin / "python3").symlink_to(sys.executable)
    calls, outputs, summary = (checkout.parent / name for name in ("calls", "outputs", "summary"))
    for path in (calls, outputs, summary):
        path.write_text("")
    environment = {
        "PATH": f"{bin}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(checkout.parent),
        "GITHUB_OUTPUT": str(outputs),
        "GITHUB_STEP_SUMMARY": str(summary),
        "GATE_FOLDER": str(checkout.parent / "gate folder"),
        **(_pull(checkout) if "GATE_PULL_BASE" not in variables else {}),
        "FAKE_CODE": str(code),
        "FAKE_REPORT": report,
        "FAKE_CALLS": str(calls),
        **variables,
    }
    result = subprocess.run(
        ["bash", ACTION / "run.sh"],
        cwd=checkout, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    return Ran(
        code=result.returncode,
        log=result.stdout + result.stderr,
        summary=summary.read_text(),
        outputs=dict(line.split("=", 1) for line in outputs.read_text().splitlines()),
        calls=[json.loads(line) for line in calls.read_text().splitlines()],
        folder=Path(environment["GATE_FOLDER"]),
    )


@pytest.mark.parametrize("inconclusive", ["fail", "warn"])
@pytest.mark.parametrize(
    ("code", "verdict"), [(0, "PASSED"), (0, "IMPROVED"), (1, "REGRESSED"), (3, "INCONCLUSIVE")]
)
def test_the_gates_exit_code_is_the_steps_and_warn_softens_an_open_answer_only(
    checkout: Path, code: int, verdict: str, inconclusive: str
) -> None:
    ran = _run(checkout, code, _report(verdict, verdict, "NEW"), GATE_INCONCLUSIVE=inconclusive)
    softened = code == 3 and inconclusive == "warn"
    assert ran.code == (0 if softened else code)
    assert ran.outputs == {
        "verdict": verdict, "exit-code": str(code), "folder": str(ran.folder)
    }  # fmt: skip
    assert ran.summary.startswith(f"# verdict: {verdict}\n")
    assert ("lets that pass" in ran.summary) == softened
    assert ("::warning" in ran.log) == softened
    assert ("::error" in ran.log) == (ran.code != 0)
    assert "the gate's own words" in ran.log
    assert {path.name for path in ran.folder.iterdir()} == {
        "gate.json", "gate.log", "gate.xml", "gate.html", "summary.md"
    }  # fmt: skip


@pytest.mark.parametrize("inconclusive", ["fail", "warn"])
@pytest.mark.parametrize("code", [1, 2, 3, 127])
def test_a_gate_without_a_report_fails_and_its_words_are_the_summary(
    checkout: Path, code: int, inconclusive: str
) -> None:
    ran = _run(checkout, code, GATE_INCONCLUSIVE=inconclusive)
    assert ran.code == code
    assert ran.outputs["verdict"] == ""
    assert f"no report, exit code {code}.**" in ran.summary
    assert "\n    the gate's own words\n" in ran.summary
    assert "\n        ```</details> and a warning\n" in ran.summary  # inside the code block
    assert len(ran.calls) == 1


@pytest.mark.parametrize("row", ["FAILED", "MISSING", "SOMETHING ELSE"])
def test_warn_does_not_let_a_crashed_or_missing_benchmark_pass(checkout: Path, row: str) -> None:
    report = _report("INCONCLUSIVE", "INCONCLUSIVE", row)
    assert _run(checkout, 3, report, GATE_INCONCLUSIVE="warn").code == 3


@pytest.mark.parametrize(
    "report",
    ["", "{", "[]", '{"verdict": "PASSED"}', _report("REGRESSED"), _report("PASSED\nverdict=x")],
    ids=["none", "corrupt", "list", "partial", "contradicts", "injects"],
)
def test_an_exit_code_of_0_without_a_report_that_agrees_is_no_pass(
    checkout: Path, report: str
) -> None:
    ran = _run(checkout, 0, report)
    assert ran.code == 3
    assert ran.outputs["verdict"] in ("", "REGRESSED")
    assert "That is no pass" in ran.summary


def test_a_report_that_cannot_be_written_leaves_the_verdict_alone(checkout: Path) -> None:
    for code, verdict in ((0, "PASSED"), (1, "REGRESSED")):
        ran = _run(checkout, code, _report(verdict, verdict), FAKE_BROKEN_REPORT="1")
        assert ran.code == code
        assert "::warning title=bench gate::The report could not be written" in ran.log
        assert ran.summary.startswith(f"**bench gate: {verdict}, exit code {code}.**")


def test_what_an_earlier_run_left_is_not_taken_for_this_ones(checkout: Path) -> None:
    assert _run(checkout, 0, _report("PASSED", "PASSED")).code == 0
    ran = _run(checkout, 0)
    assert ran.code == 3
    assert [path.name for path in sorted(ran.folder.iterdir())] == ["gate.log", "summary.md"]


def test_inputs_reach_the_gate_as_they_are_and_none_can_become_an_option(checkout: Path) -> None:
    ran = _run(
        checkout, 0, _report("PASSED", "PASSED"),
        GATE_BASE="main", GATE_HEAD="topic", GATE_SUITE="--self-test; touch $(pwd)/x",
        GATE_MARGIN="5%", GATE_CONFIG="a b.toml", GATE_BUDGET="60",
    )  # fmt: skip
    assert ran.calls[0] == [
        "bench", "gate", "--base=main", "-o", str(ran.folder / "gate.json"), "--head=topic",
        "--margin=5%", "--config=a b.toml", "--budget=60", "--", "--self-test; touch $(pwd)/x",
    ]  # fmt: skip
    assert ran.calls[1][:3] == ["bench", "report", str(ran.folder / "gate.json")]
    assert not list(checkout.glob("x"))


def test_inputs_left_out_are_left_to_the_gate(checkout: Path) -> None:
    ran = _run(checkout, 0, _report("PASSED", "PASSED"))
    base = _git(checkout, "rev-parse", "main")
    assert ran.calls[0] == ["bench", "gate", f"--base={base}", "-o", str(ran.folder / "gate.json")]


def test_a_setting_that_does_not_exist_is_refused_before_anything_runs(checkout: Path) -> None:
    ran = _run(checkout, 0, _report("PASSED"), GATE_INCONCLUSIVE="ignore")
    assert (ran.code, ran.calls) == (2, [])
    assert "neither 'fail' nor 'warn'" in ran.log


def test_the_base_of_a_merge_is_its_first_parent_even_when_the_event_names_an_older_one(
    checkout: Path,
) -> None:
    ran = _run(
        checkout,
        0,
        _report("PASSED", "PASSED"),
        **{**_pull(checkout), "GATE_PULL_BASE": _git(checkout, "rev-parse", "main~1")},
    )
    assert f"--base={_git(checkout, 'rev-parse', 'main')}" in ran.calls[0]


def test_the_base_of_a_branch_is_where_it_left_the_base_branch(checkout: Path) -> None:
    _git(checkout, "checkout", "--quiet", "topic")
    ran = _run(checkout, 0, _report("PASSED", "PASSED"))
    assert f"--base={_git(checkout, 'rev-parse', 'main~1')}" in ran.calls[0]


def test_without_a_pull_request_the_base_must_be_named(checkout: Path) -> None:
    ran = _run(checkout, 0, _report("PASSED"), GATE_PULL_BASE="", GATE_PULL_HEAD="")
    assert (ran.code, ran.calls) == (2, [])
    assert "there is no input 'base'" in ran.log


def test_a_base_that_a_shallow_checkout_left_out_is_fetched(checkout: Path) -> None:
    """actions/checkout's default has one commit: neither the base nor a branch name is there."""
    head, main = _git(checkout, "rev-parse", "HEAD"), _git(checkout, "rev-parse", "main")
    _git(checkout, "config", "uploadpack.allowAnySHA1InWant", "true")
    _git(checkout, "branch", "merged", head)
    shallow = checkout.parent / "shallow"
    _git(checkout.parent, "init", "--quiet", str(shallow))
    _git(shallow, "remote", "add", "origin", checkout.as_uri())
    _git(shallow, "fetch", "--quiet", "--depth=1", "origin", "merged")
    _git(shallow, "checkout", "--quiet", "--detach", "FETCH_HEAD")
    for base in ("", "merged"):
        ran = _run(shallow, 0, _report("PASSED", "PASSED"), GATE_BASE=base, **_pull(checkout))
        assert ran.code == 0
        assert f"--base={head if base else main}" in ran.calls[0]
        _git(shallow, "cat-file", "-e", f"{main}^{{commit}}")


def test_a_base_that_is_nowhere_is_left_to_the_gate_to_refuse(checkout: Path) -> None:
    ran = _run(checkout, 2, GATE_BASE="no-such-branch")
    assert ran.code == 2
    assert "The base could not be fetched" in ran.log
    assert "--base=no-such-branch" in ran.calls[0]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing_in_run_sh() -> None:
    result = subprocess.run(["shellcheck", ACTION / "run.sh"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


# comment.py


@dataclass
class FakeGitHub:
    """The three calls that comment.py makes, and what it was sent."""

    url: str = ""
    status: int = 200
    comments: list[dict[str, Any]] = field(default_factory=list)
    calls: list[tuple[str, str, Any]] = field(default_factory=list)


@pytest.fixture
def github() -> Iterator[FakeGitHub]:
    state = FakeGitHub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = int(self.path.rsplit("page=", 1)[1])
            self._answer(state.comments[100 * (page - 1) : 100 * page])

        def do_POST(self) -> None:
            self._answer({})

        do_PATCH = do_POST

        def _answer(self, value: Any) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            state.calls.append((self.command, self.path.split("?")[0], body))
            assert self.headers["Authorization"] == "Bearer a-token"
            self.send_response(state.status)
            self.end_headers()
            self.wfile.write(json.dumps(value).encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


def _comment(tmp_path: Path, url: str, event: dict[str, Any], summary: str) -> str:
    (tmp_path / "event.json").write_text(json.dumps(event))
    (tmp_path / "summary.md").write_text(summary)
    result = subprocess.run(
        [sys.executable, ACTION / "comment.py"],
        env={
            "GITHUB_EVENT_PATH": str(tmp_path / "event.json"),
            "GITHUB_API_URL": url,
            "GITHUB_REPOSITORY": "someone/something",
            "GATE_NAME": "bench-gate",
            "GATE_SUMMARY": str(tmp_path / "summary.md"),
            "GATE_TOKEN": "a-token",
            "NO_PROXY": "127.0.0.1",
        },
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


PULL = {"pull_request": {"number": 7}}
MARKER = "<!-- mmopt bench gate: bench-gate -->"


def test_the_first_comment_is_posted_and_the_next_run_rewrites_it(
    tmp_path: Path, github: FakeGitHub
) -> None:
    assert _comment(tmp_path, github.url, PULL, "all well") == ""
    method, path, body = github.calls[-1]
    assert (method, path) == ("POST", "/repos/someone/something/issues/7/comments")
    assert body == {"body": f"{MARKER}\nall well"}

    bot, person = {"type": "Bot"}, {"type": "User"}
    github.comments = [
        {"id": 1, "user": person, "body": f"{MARKER}\nnot the bot's"},
        {"id": 2, "user": bot, "body": "<!-- mmopt bench gate: another -->\n"},
        *({"id": n, "user": person, "body": "talk"} for n in range(100, 220)),
        {"id": 3, "user": bot, "body": f"{MARKER}\nall well"},
    ]
    assert _comment(tmp_path, github.url, PULL, "worse") == ""
    method, path, body = github.calls[-1]
    assert (method, path) == ("PATCH", "/repos/someone/something/issues/comments/3")
    assert body == {"body": f"{MARKER}\nworse"}


def test_a_summary_too_long_for_a_comment_is_cut_and_says_so(
    tmp_path: Path, github: FakeGitHub
) -> None:
    _comment(tmp_path, github.url, PULL, "x" * 100_000)
    body = github.calls[-1][2]["body"]
    assert len(body) < 65_536
    assert body.endswith("(cut here; the artifact has all of it)")


def test_without_permission_there_is_a_warning_and_no_failure(
    tmp_path: Path, github: FakeGitHub
) -> None:
    github.status = 403
    said = _comment(tmp_path, github.url, PULL, "all well")
    assert said.startswith("::warning")
    assert "403; `pull-requests: write` is needed" in said


def test_without_a_pull_request_or_a_github_there_is_a_warning_and_no_failure(
    tmp_path: Path, github: FakeGitHub
) -> None:
    assert "this is no pull request" in _comment(tmp_path, github.url, {}, "all well")
    assert github.calls == []
    assert "could not be reached" in _comment(tmp_path, "http://127.0.0.1:9", PULL, "all well")
