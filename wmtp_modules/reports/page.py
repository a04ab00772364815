"""What every HTML page shares: its frame with the style inside, tables, and writing it whole.

A page is one file without a script, and its policy forbids a browser to load or run anything.
"""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from wmtp_modules.files import new_file

STYLE = Path(__file__).with_name("page.css")


def write_page(path: str | Path, title: str, body: str, *, narrow: bool = False) -> None:
    """Write a page, whole or not at all. ``body`` is HTML, ``title`` is text."""
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    page = (
        "<!doctype html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
        f"<title>{escape(title)}</title>\n<style>\n{STYLE.read_text(encoding='utf-8')}</style>\n"
        f"</head>\n<body{' class=narrow' if narrow else ''}>\n{body}</body>\n</html>\n"
    )
    with new_file(Path(path)) as unfinished:
        unfinished.write_text(page, encoding="utf-8", errors="replace")


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    kind: str = "",
    own: int | None = None,
) -> str:
    """A table of texts; ``kind`` is its class, row ``own`` is in bold."""
    lines = [f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>"]
    for i, row in enumerate(rows):
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row)
        lines.append(f"<tr{' class=own' if i == own else ''}>{cells}</tr>")
    attribute = f" class='{kind}'" if kind else ""
    return f"<div class='scroll'><table{attribute}>\n" + "\n".join(lines) + "\n</table></div>\n"


def section(title: str, *parts: str, name: str | None = None) -> str:
    """A heading with what is below it; nothing if that is empty. ``name`` is for links to it."""
    body = "".join(parts)
    anchor = f" id='{escape(name)}'" if name else ""
    return f"<h2{anchor}>{escape(title)}</h2>\n{body}" if body.strip() else ""


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of text; nothing for an empty one."""
    attribute = f" class='{kind}'" if kind else ""
    return f"<p{attribute}>{escape(text)}</p>\n" if text else ""


def charts(*figures: str) -> str:
    """Figures side by side, as many as fit; nothing if all are empty."""
    inside = "".join(figures)
    return f"<div class='charts'>\n{inside}</div>\n" if inside else ""
