"""The demo's report: one table for the terminal and the page, and the page itself."""

from html import escape
from pathlib import Path
from typing import Any

from mmopt.measure.plot import latency_plot
from mmopt.measure.results import Measurement

HEADER = (
    "model",
    "accuracy",
    "max abs",
    "cosine",
    "MB",
    "p50 ms",
    "texts/s",
    "peak MB",
)

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid #8884; }
th { font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
.scroll { overflow-x: auto; }
.fails { color: #c5221f; font-weight: 600; }
@media (prefers-color-scheme: dark) { .fails { color: #ff8a80; } }
footer { opacity: .75; font-size: .875rem; }
"""


def table_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row of text per model, in the order of HEADER; a dash is not measured."""
    tuned = _percent(report["train"]["test_accuracy"])
    rows = [
        (
            "untuned probe",
            _percent(report["probe"]["test_accuracy"]),
            *"-" * 6,
        ),
        ("PyTorch eager", tuned, "-", "-", "-", *_speed(report, "eager")),
        ("torch.compile", "-", "-", "-", "-", *_speed(report, "compile")),
    ]
    for precision in ("fp32", "int8"):
        stage = parity_of(report["export"][precision], precision)
        rows.append(
            (
                f"ORT {precision}",
                _percent(report["verify"][precision]["accuracy"]),
                f"{stage['max_abs']:.2g}",
                f"{stage['cosine']:.6f}",
                f"{report['export'][precision]['size'] / 1e6:.1f}",
                *_speed(report, "ort", precision),
            )
        )
    return rows


def parity_of(export: dict[str, Any], precision: str) -> dict[str, Any]:
    """The parity stage of an export at its precision, on the test sentences."""
    stage: dict[str, Any] = next(
        stage
        for stage in export["stages"]
        if stage["stage"] == precision and stage["kind"] == "text"
    )
    return stage


def write_html(report: dict[str, Any], path: Path) -> None:
    """Write the page: checks, table, latency plot, machine. Self-contained, no script."""
    head = "".join(f"<th>{escape(title)}</th>" for title in HEADER)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>"
        for row in table_rows(report)
    )
    checks = "".join(
        f"<li>{escape(check['name'])}: {escape(check['found'])} "
        f"(expected {escape(check['expected'])}) "
        + ("holds</li>" if check["holds"] else '<span class="fails">does not hold</span></li>')
        for check in report["checks"]
    )
    answer = report["serve"]
    fingerprint = report["bench"]["fingerprint"]
    machine = ", ".join(
        f"{key} {value}" for key, value in fingerprint.items() if isinstance(value, str | int)
    )
    notes = (
        "The probe is a linear classifier on the embeddings of the untuned model; all others are "
        f"tuned. Accuracy is on {report['train']['test_examples']} test docstrings. p50 is of one "
        "text of 32 tokens, texts/s of a batch of 8. Differences and cosine are of the logits of "
        f"{parity_of(report['export']['int8'], 'int8')['rows']} test sentences against the tuned "
        "PyTorch model in fp32. PyTorch runs the adapter beside its base, as trained; in ONNX it "
        "is merged. Sizes are of the whole artifact. Peak memory is of a fresh process at batch 8."
    )
    path.write_text(
        f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>mmopt demo</title>
<style>{_STYLE}</style>
<h1>mmopt demo</h1>
<p>all-MiniLM-L6-v2, fine-tuned with LoRA to tell from a docstring what kind of object it
documents; merged, exported to ONNX, verified and served, in {report["seconds"]:.0f} s.</p>
<ul>{checks}</ul>
<div class="scroll"><table><tr>{head}</tr>{body}</table></div>
<p>{notes}</p>
<h2>Latency</h2>
{latency_plot(measurements(report))}
<p>Served over HTTP: “{escape(answer["sentence"])}” documents a
<b>{escape(answer["label"])}</b> ({answer["score"]:.0%}).</p>
<footer>{escape(machine)}</footer>
</html>
""",
        encoding="utf-8",
    )


def measurements(report: dict[str, Any]) -> list[Measurement]:
    """The benchmark's measurements as the plot takes them."""
    return [
        Measurement(
            source=row["source"],
            backend=row["backend"],
            batch=row["batch"],
            length=row["length"],
            samples=tuple(row["samples_seconds"]),
            calls=row["calls_per_sample"],
        )
        for row in report["bench"]["measurements"]
    ]


def _speed(report: dict[str, Any], backend: str, source: str = "") -> tuple[str, str, str]:
    """p50 of one text in ms, throughput at batch 8, and peak memory over both, in MB."""
    rows = [
        row
        for row in report["bench"]["measurements"]
        if row["backend"] == backend and row["source"].endswith(source)
    ]
    by_batch = {row["batch"]: row for row in rows}
    peaks = [row["memory"]["process_bytes"] for row in rows if row["memory"]]
    return (
        f"{by_batch[1]['median_seconds'] * 1e3:.2f}",
        f"{by_batch[8]['sequences_per_second']:.0f}",
        f"{max(peaks) / 1e6:.0f}" if peaks else "-",
    )


def _percent(share: float) -> str:
    return f"{share:.2%}"
