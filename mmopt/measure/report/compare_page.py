"""Two stored results side by side as one HTML page: `mmopt bench compare -o`."""

from mmopt.measure.compare import CANNOT_TELL, CompareReport, figure_rows, p_text
from mmopt.measure.plot import HOW_TO_READ, Panel, Strip, distributions
from mmopt.measure.report.charts import Share, shares
from mmopt.measure.report.markup import (
    contents,
    definitions,
    page,
    paragraph,
    prose,
    section,
    table,
)
from mmopt.measure.report.wording import HOW_NAMED, fields_of, machine_line
from mmopt.measure.results import format_seconds
from mmopt.measure.statistics import Interval

# Beyond this the samples could lie by chance as they do; only the colour of a row follows it.
_LEVEL = 0.05


def compare_page(report: CompareReport) -> str:
    """The page: cautions, ratios with intervals, distributions, exact figures, machines."""
    named = list(zip(report.rows, report.names, strict=True))
    sections: list[tuple[str, str, str]] = []
    if report.rows:
        ratios = [
            Share(
                name=name,
                word="",
                kind="soft" if row.p_value > _LEVEL else "bad" if row.ratio > 1 else "good",
                value=row.ratio - 1,
                interval=Interval(row.interval.low - 1, row.interval.high - 1),
                limit=None,
                remarks=f"{format_seconds(row.a.median)} → {format_seconds(row.b.median)} · "
                f"ratio {row.ratio:.3f}, 95% interval {row.interval.low:.3f} to "
                f"{row.interval.high:.3f} · p {p_text(row.p_value)}",
            )
            for row, name in named
        ]
        how = "Dot: median of B over median of A. Band: its 95% bootstrap interval. Grey: the "
        how += f"samples do not tell A from B (Mann-Whitney, Holm-adjusted p above {_LEVEL})."
        if any(row.a.backend for row in report.rows):
            how += f" {HOW_NAMED}"
        drawn = shares(ratios, faster="B faster", slower="B slower") + paragraph(how, "soft small")
        sections.append(("ratios", "Time per call, B against A", drawn))
        panels = [Panel(name, [Strip("A", row.a, 0), Strip("B", row.b, 1)]) for row, name in named]
        caption = f"Each dot is one sample, in seconds per call. {HOW_TO_READ}"
        sections.append(("samples", "Samples", distributions(panels, caption)))
    if report.figures:
        rows = figure_rows(report.figures)
        shown = table("Exact figures", ("figure", "A", "B", "change", ""), rows)
        sections.append(("figures", "Exact figures", shown))
    alone = [f"Only in A: {name}" for name in report.only_a]
    alone += [f"Only in B: {name}" for name in report.only_b]
    if alone:
        sections.append(("alone", "In one file only", "".join(map(paragraph, alone))))
    sections.append(("machines", "Machine and conditions", _machines(report)))
    parts = [
        "<header><h1>Two results compared</h1>",
        *(prose(line.strip(), "note") for line in report.cautions),
        *(
            paragraph(f"{side}: {file.path} · {file.when:%Y-%m-%d %H:%M}", "soft")
            for side, file in (("A", report.a), ("B", report.b))
        ),
        contents([(name, title) for name, title, _ in sections]),
        "</header>\n",
        prose(CANNOT_TELL, "note"),
        *(section(*one) for one in sections),
    ]
    return page(f"{report.a.path.name} and {report.b.path.name} compared", "".join(parts))


def _machines(report: CompareReport) -> str:
    parts = []
    files = (("A", report.a), ("B", report.b))
    shown = files if report.different else files[:1]
    for side, file in shown:
        title = machine_line(file.fingerprint)
        parts.append(paragraph(f"{side}: {title}" if report.different else title))
        parts.append(definitions(fields_of(file.fingerprint or {})))
    for side, file in files:
        parts += [paragraph(f"Warning, {side}: {warning}", "note") for warning in file.warnings]
    return "".join(parts)
