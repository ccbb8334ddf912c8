"""The page around a report: its style, and the parts that it is put together from.

A page needs no script and fetches nothing, and its own policy forbids both. It is readable in light
and dark, on a phone, without a mouse, and on paper.
"""

import re
from collections.abc import Iterable, Sequence
from html import escape

from mmopt.measure.plot import DARK, LIGHT, STYLE, breakable
from mmopt_kernels import __version__

# Contrast of each with its --bg: 4.5 or more.
_LIGHT = f"{LIGHT};--good:#18754a;--warn:#8a5a00;--bad:#b3261e;--info:#0b62c0;--faint:#f5f6f8"
_DARK = f"{DARK};--good:#5cd098;--warn:#f0b429;--bad:#ff8a80;--info:#6cb2ff;--faint:#1f2226"

_STYLE = f"""
:root{{{_LIGHT};color-scheme:light dark}}
@media (prefers-color-scheme:dark){{:root{{{_DARK}}}}}
*{{box-sizing:border-box}}
html{{-webkit-text-size-adjust:100%;text-size-adjust:100%}}
body{{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 system-ui,sans-serif}}
main{{max-width:60rem;margin:0 auto;padding:40px 24px 64px}}
h1{{font-size:1.5rem;line-height:1.25;margin:0;letter-spacing:-.01em}}
h2{{font-size:1.2rem;line-height:1.3;margin:56px 0 12px;letter-spacing:-.005em}}
h3{{font-size:1rem;margin:28px 0 8px}}
h2,h3,p,li,dd,summary{{overflow-wrap:anywhere}}
p{{margin:8px 0}}
a{{color:var(--info)}}
:focus-visible{{outline:2px solid var(--info);outline-offset:3px;border-radius:2px}}
code{{font:.9em ui-monospace,SFMono-Regular,Menlo,monospace}}
.soft{{color:var(--soft)}}
.small{{font-size:.8125rem;line-height:1.45}}
nav ul{{display:flex;flex-wrap:wrap;gap:4px 20px;list-style:none;margin:16px 0 0;padding:0;
font-size:.875rem}}
nav a{{display:inline-block;padding:4px 0}}
.lead{{border-left:4px solid var(--v);padding:2px 0 2px 16px;margin:24px 0}}
.lead p{{margin:4px 0}}
.lead .word{{color:var(--v);font-size:1.75rem;font-weight:700;line-height:1.2;
letter-spacing:.01em}}
.v-bad{{--v:var(--bad)}}.v-warn{{--v:var(--warn)}}.v-good{{--v:var(--good)}}.v-info{{--v:var(--info)}}
.v-soft{{--v:var(--soft)}}
.verdict{{color:var(--v);font-weight:600;font-size:.8125rem;letter-spacing:.02em}}
.note{{border-left:3px solid var(--warn);padding:2px 0 2px 12px;margin:12px 0}}
.rows{{list-style:none;margin:0;padding:0}}
.rows>li{{padding:12px 0;border-top:1px solid var(--line)}}
.rows>li:first-child{{border-top:0}}
.head{{display:flex;justify-content:space-between;align-items:baseline;gap:4px 16px}}
.head .name{{min-width:0;overflow-wrap:anywhere;font-size:.875rem}}
.head .number{{white-space:nowrap;font-variant-numeric:tabular-nums;font-weight:600}}
.plot{{display:block;width:100%;overflow:visible;margin:4px 0}}
.plot text{{fill:var(--soft);font:12px system-ui,sans-serif}}
.plot .grid{{stroke:var(--line)}}
.plot .zero{{stroke:var(--soft)}}
.plot .limit{{stroke:var(--bad);stroke-dasharray:3 3}}
.plot .beyond{{fill:var(--bad);opacity:.07}}
.plot .ci{{fill:var(--v);opacity:.3}}
.plot .dot{{fill:var(--v);stroke:var(--bg);stroke-width:1.5}}
.plot .line{{stroke:var(--c);stroke-width:2}}
.plot .point{{fill:var(--c);stroke:var(--bg);stroke-width:1.5}}
.plot .whisker{{stroke:var(--c);opacity:.5}}
.c0{{--c:var(--c0)}}.c1{{--c:var(--c1)}}.c2{{--c:var(--c2)}}.c3{{--c:var(--c3)}}
.chart{{position:relative;padding:4px 4px 0 56px}}
.chart span{{position:absolute;left:0;width:48px;text-align:right;transform:translateY(-50%);
margin-top:8px;font-size:12px;line-height:1;color:var(--soft);font-variant-numeric:tabular-nums}}
.key{{display:flex;flex-wrap:wrap;gap:4px 20px;list-style:none;margin:8px 0;padding:0;
font-size:.8125rem}}
.key svg{{vertical-align:middle;margin-right:8px}}
.key li{{min-width:0}}
.track{{background:var(--faint);border-radius:2px;margin:4px 0 10px}}
.track div{{height:8px;opacity:.75;border-radius:2px;background:var(--c);min-width:2px}}
.many{{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,16.5rem),1fr));
gap:24px 28px}}
.many figure{{margin:0;min-width:0}}
.many .name{{font-size:.8125rem;line-height:1.35;overflow-wrap:anywhere}}
.ends{{display:flex;justify-content:space-between;gap:8px;font-size:.75rem;color:var(--soft)}}
figcaption,caption{{color:var(--soft);font-size:.8125rem;text-align:left}}
main .mmopt-latency{{border:0;border-radius:0;padding:0;background:none}}
.scroll{{overflow-x:auto;margin:8px 0}}
table{{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}}
th,td{{padding:6px 14px 6px 0;text-align:right;vertical-align:baseline;white-space:nowrap;
border-bottom:1px solid var(--line)}}
thead th{{color:var(--soft);font-weight:500;font-size:.8125rem}}
tbody th{{font-weight:400}}
th.text,td.text{{text-align:left;white-space:normal;overflow-wrap:anywhere}}
th.text:first-child{{min-width:9.5rem}}
tr>:last-child{{padding-right:0}}
details{{margin:12px 0}}
summary{{cursor:pointer;color:var(--info);padding:4px 0}}
dl{{display:grid;grid-template-columns:minmax(7rem,max-content) minmax(0,1fr);gap:2px 20px;
font-size:.875rem;margin:8px 0}}
dt{{color:var(--soft)}}
dd{{margin:0}}
footer{{margin-top:64px;padding-top:16px;border-top:1px solid var(--line)}}
@media (max-width:599px){{main{{padding:24px 16px 48px}}h2{{margin-top:44px}}}}
@media print{{main{{max-width:none}}nav{{display:none}}}}
"""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def page(title: str, body: str) -> str:
    """A whole HTML document.

    Args:
        title: plain text.
        body: HTML, everything from outside escaped.
    """
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{_STYLE}{STYLE}</style>
</head>
<body>
<main>
{body}
<footer class="soft small">Written by mmopt {escape(__version__)}. This page holds all it shows and
fetches nothing.</footer>
</main>
</body>
</html>
"""


def section(name: str, title: str, body: str) -> str:
    """A section that the page's contents can link to.

    Args:
        name: unique in the page, letters and digits.
        title: plain text.
        body: HTML.
    """
    return (
        f'<section aria-labelledby="{name}"><h2 id="{name}">{escape(title)}</h2>{body}</section>\n'
    )


def contents(links: Sequence[tuple[str, str]]) -> str:
    """Links to sections, as (name, title); nothing where there is one section only."""
    if len(links) < 2:
        return ""
    items = "".join(f'<li><a href="#{name}">{escape(title)}</a></li>' for name, title in links)
    return f'<nav aria-label="Contents"><ul>{items}</ul></nav>'


def paragraph(text: str, kind: str = "") -> str:
    """One paragraph of plain text."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def prose(text: str, kind: str = "") -> str:
    """One paragraph of our own words: what stands between a pair of backticks is code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", paragraph(text, kind))


def table(
    label: str, header: Sequence[str], rows: Iterable[Sequence[str]], *, texts: int = 1
) -> str:
    """A table that scrolls by itself where it is wider than the page.

    Args:
        label: what it shows, for those who do not see it.
        header: of its columns.
        rows: plain text, one text per column; the first column names the row.
        texts: how many columns, from the left, hold text rather than numbers.
    """
    kinds = [' class="text"' if index < texts else "" for index in range(len(header))]
    head = "".join(
        f'<th scope="col"{kind}>{escape(cell)}</th>'
        for cell, kind in zip(header, kinds, strict=True)
    )
    lines = []
    for row in rows:
        name, *cells = (
            breakable(cell) if index < texts else escape(cell) for index, cell in enumerate(row)
        )
        rest = "".join(
            f"<td{kind}>{cell}</td>" for cell, kind in zip(cells, kinds[1:], strict=True)
        )
        lines.append(f'<tr><th scope="row"{kinds[0]}>{name}</th>{rest}</tr>')
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def details(summary: str, body: str, *, opened: bool = False) -> str:
    """What a reader opens; `summary` is plain text, `body` HTML."""
    return (
        f"<details{' open' if opened else ''}><summary>{escape(summary)}</summary>{body}</details>"
    )


def definitions(pairs: Iterable[tuple[str, str]]) -> str:
    """Names and their values, both plain text."""
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs)
    return f"<dl>{items}</dl>"
