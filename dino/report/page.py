"""report.html: one self-contained page that opens offline."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dino.files import write_text

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2733; margin: 0; background: #f6f7f9; }
main { max-width: 1040px; margin: 0 auto; padding: 28px 24px 60px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 0 0 6px; }
section { background: #fff; border: 1px solid #e3e7ec; border-radius: 8px; padding: 18px 20px; margin-top: 18px; }
p { margin: 0 0 10px; color: #51606f; } img { max-width: 100%; height: auto; display: block; }
table { border-collapse: collapse; } td, th { text-align: left; padding: 4px 18px 4px 0; vertical-align: top; }
th { color: #51606f; font-weight: 600; } tbody tr { border-top: 1px solid #edf0f3; }
td.figure { font-variant-numeric: tabular-nums; } td.figure:not(:last-child) { white-space: nowrap; }
pre { font: 12.5px/1.45 ui-monospace, monospace; overflow-x: auto; margin: 0; }
summary { cursor: pointer; color: #51606f; }
.status { display: flex; gap: 10px; align-items: center; margin-top: 8px; color: #51606f; }
.badge { border-radius: 999px; padding: 2px 12px; background: #e3e7ec; color: #1c2733; font-weight: 600; }
.good { background: #d9f0e2; color: #1d6b3f; } .bad { background: #fbe3dd; color: #a2371f; }
.advice { background: #fbe3dd; border-radius: 8px; padding: 10px 14px; margin-top: 12px; color: #1c2733; }
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
    sections: Sequence[Picture | Table],
    settings: str = "",
    status: Status | None = None,
) -> None:
    """Write the page; every text is escaped, every picture embedded.

    Args:
        facts: what ran, name to value.
        settings: the resolved config, shown folded; empty: there is none.
    """
    rows = "".join(f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in facts.items())
    body = "".join(_picture(part) if isinstance(part, Picture) else _table(part) for part in sections)
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">{_refresh(status)}<style>{STYLE}</style>'
        f"</head><body><main><h1>{_text(title)}</h1>{_status(status)}"
        f"<section><h2>What ran</h2><table>{rows}</table></section>{body}"
        f"{_settings(settings)}</main></body></html>\n"
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


def _picture(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    return (
        f"<section><h2>{_text(picture.title)}</h2><p>{_text(picture.caption)}</p>"
        f'<img alt="{_text(picture.title)}" src="data:image/png;base64,{data}"></section>'
    )


def _table(table: Table) -> str:
    head = "".join(f"<th>{_text(column)}</th>" for column in table.columns)
    body = "".join(
        "<tr>" + "".join(f'<td class="figure">{_text(cell)}</td>' for cell in row) + "</tr>" for row in table.rows
    )
    heading = f"<h2>{_text(table.title)}</h2>" if table.title else ""
    caption = f"<p>{_text(table.caption)}</p>" if table.caption else ""
    return f"<section>{heading}{caption}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></section>"


def _text(value: str) -> str:
    return html.escape(str(value), quote=True)
