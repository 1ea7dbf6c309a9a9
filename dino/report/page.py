"""report.html: one self-contained page that opens offline."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dino.files import write_text
from dino.report.plots import Panel, svg

STYLE = """
:root { color-scheme: light dark;
  --ink: light-dark(#1c2733, #dfe6ee); --faint: light-dark(#51606f, #9aa8b7); --edge: light-dark(#e3e7ec, #303b47);
  --paper: light-dark(#fff, #1a2129); --ground: light-dark(#f6f7f9, #11161c); --healthy: light-dark(#2e8b57, #4cc38a);
  --good: light-dark(#d9f0e2, #16402a); --bad: light-dark(#fbe3dd, #4a2219); }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); margin: 0; background: var(--ground); }
main { max-width: 1040px; margin: 0 auto; padding: 28px 24px 60px; overflow-wrap: anywhere; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 0 0 6px; }
section { background: var(--paper); border: 1px solid var(--edge); border-radius: 8px; padding: 18px 20px;
  margin-top: 18px; }
p { margin: 0 0 10px; color: var(--faint); } img { max-width: 100%; height: auto; display: block; border-radius: 4px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; }
td, th { text-align: left; padding: 4px 18px 4px 0; vertical-align: top; }
th { color: var(--faint); font-weight: 600; white-space: nowrap; } tbody tr { border-top: 1px solid var(--edge); }
td.figure { font-variant-numeric: tabular-nums; overflow-wrap: normal; }
td.figure:not(:last-child) { white-space: nowrap; } td.figure:last-child { min-width: 8em; }
pre { font: 12.5px/1.45 ui-monospace, monospace; overflow-x: auto; margin: 0; overflow-wrap: normal; }
summary { cursor: pointer; color: var(--faint); }
.status, .legend { display: flex; flex-wrap: wrap; gap: 10px; align-items: center; margin-top: 8px; }
.status { color: var(--faint); }
.legend { margin: 0 0 8px; gap: 4px 16px; } .legend span::before { content: "━ "; }
.badge { border-radius: 999px; padding: 2px 12px; background: var(--edge); color: var(--ink); font-weight: 600; }
.good { background: var(--good); color: light-dark(#1d6b3f, #9fe0bb); }
.bad { background: var(--bad); color: light-dark(#a2371f, #ffb4a2); }
.advice { background: var(--bad); border-radius: 8px; padding: 10px 14px; margin-top: 12px; color: var(--ink); }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 290px), 1fr)); gap: 12px; }
svg { width: 100%; height: auto; font: 10.5px system-ui, sans-serif; fill: var(--faint); }
svg .title { font-size: 12.5px; font-weight: 600; fill: var(--ink); } svg .grid { stroke: var(--edge); }
svg .level { stroke: var(--faint); stroke-dasharray: 5 4; } svg .healthy { fill: var(--healthy); opacity: .16; }
svg .line { fill: none; stroke-width: 1.6; stroke-linejoin: round; stroke: currentColor; }
svg circle { fill: currentColor; } svg .strip { fill: transparent; } svg .at circle { opacity: 0; }
svg .at:hover circle { opacity: 1; } svg .at:hover .strip { fill: var(--faint); opacity: .12; }
.c0 { color: light-dark(#1f5fa8, #74b0f4); } .c1 { color: light-dark(#c8553d, #f08a72); }
.c2 { color: light-dark(#2e8b57, #67cf97); } .c3 { color: light-dark(#8a4fa3, #c79be0); }
.c4 { color: light-dark(#b8860b, #e5bd55); } .c5 { color: light-dark(#008b8b, #5fd0d0); }
.c6 { color: light-dark(#d0447d, #f58ab5); } .c7 { color: light-dark(#6b7280, #a5adb8); }
@media (max-width: 600px) { main { padding: 16px 10px 40px; } section { padding: 12px; }
  td, th { padding-right: 10px; } td.figure:first-child { white-space: normal; min-width: 7em; } }
"""


class Picture(NamedTuple):
    """A PNG with its heading and a sentence on how to read it."""

    title: str
    caption: str
    png: bytes


class Table(NamedTuple):
    """A table with its heading and a sentence on how it came about."""

    title: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


class Curves(NamedTuple):
    """Panels of curves with a heading and a sentence on how to read them; lines with names have a legend."""

    title: str
    caption: str
    panels: Sequence[Panel]


class Code(NamedTuple):
    """Lines to copy, with a heading and a sentence on what they do."""

    title: str
    caption: str
    text: str


Section = Picture | Table | Curves | Code


class Status(NamedTuple):
    """What stands under the heading.

    Attributes:
        state: of the run, in a word or two.
        verdict, advice: on its health; empty: none yet.
        is_good: whether the verdict is.
        refresh: seconds after which a browser opens the page again, while the run is alive; 0: never.
        written: seconds since 1970; a page that is much older than `refresh` says so.
    """

    state: str
    verdict: str = ""
    advice: str = ""
    is_good: bool = True
    refresh: int = 0
    written: int = 0


def write(
    path: Path,
    title: str,
    facts: dict[str, str],
    sections: Sequence[Section],
    settings: str = "",
    status: Status | None = None,
) -> None:
    """Write the page; every text is escaped, every picture embedded.

    Args:
        facts: what ran, name to value.
        settings: the resolved config, shown folded; empty: there is none.
    """
    rows = "".join(f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in facts.items())
    ran = f'<section><h2>What ran</h2><div class="scroll"><table>{rows}</table></div></section>' if rows else ""
    body = "".join(map(_section, sections))
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"{_refresh(status)}<style>{STYLE}</style>"
        f"</head><body><main><h1>{_text(title)}</h1>{_status(status)}"
        f"{ran}{body}{_settings(settings)}</main></body></html>\n"
    )
    write_text(path, page)


def _settings(settings: str) -> str:
    if not settings:
        return ""
    summary = "<summary>All settings (config.yaml)</summary>"
    return f"<section><details>{summary}<pre>{_text(settings)}</pre></details></section>"


def _refresh(status: Status | None) -> str:
    return f'<meta http-equiv="refresh" content="{status.refresh}">' if status and status.refresh else ""


def _status(status: Status | None) -> str:
    if status is None:
        return ""
    parts = [f'<span class="badge">{_text(status.state)}</span>']
    if status.verdict:
        kind = "good" if status.is_good else "bad"
        parts.append(f'<span class="badge {kind}">{_text(status.verdict)}</span>')
    if status.refresh:
        parts.append(f'<span id="age">This page renews itself every {status.refresh} s.</span>{_age_script(status)}')
    advice = f'<p class="advice">{_text(status.advice)}</p>' if status.advice else ""
    return f'<div class="status">{"".join(parts)}</div>{advice}'


def _age_script(status: Status) -> str:
    """A run that was killed leaves a page that would say for ever that it runs."""
    return (
        f"<script>const age = Date.now() / 1000 - {status.written};"
        f"if (age > {10 * status.refresh} + 300) document.getElementById('age').textContent = "
        "'No news for ' + Math.round(age / 60) + ' minutes: the run may have ended.';</script>"
    )


def _section(part: Section) -> str:
    heading = f"<h2>{_text(part.title)}</h2>" if part.title else ""
    caption = f"<p>{_text(part.caption)}</p>" if part.caption else ""
    match part:
        case Picture():
            data = base64.b64encode(part.png).decode()
            content = f'<img alt="{_text(part.title)}" src="data:image/png;base64,{data}">'
        case Curves():
            content = f'{_legend(part.panels)}<div class="panels">{"".join(map(svg, part.panels))}</div>'
        case Code():
            content = f"<pre>{_text(part.text)}</pre>"
        case Table():
            content = _table(part)
    return f"<section>{heading}{caption}{content}</section>"


def _legend(panels: Sequence[Panel]) -> str:
    names = {number: line.name for panel in panels for number, line in enumerate(panel.lines) if line.name}
    spans = "".join(f'<span class="c{number % 8}">{_text(name)}</span>' for number, name in sorted(names.items()))
    return f'<div class="legend">{spans}</div>' if spans else ""


def _table(table: Table) -> str:
    head = "".join(f"<th>{_text(column)}</th>" for column in table.columns)
    body = "".join(
        "<tr>" + "".join(f'<td class="figure">{_text(cell)}</td>' for cell in row) + "</tr>" for row in table.rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _text(value: str) -> str:
    return html.escape(str(value), quote=True)
