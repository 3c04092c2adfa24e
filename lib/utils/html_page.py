"""Self-contained HTML pages: pictures, styles and scripts are in the file, so it works offline.

Functions that return HTML have escaped the text they were given; `page` puts such pieces together.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from utils.weights import atomic_write

STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8882; --accent: #2a6fdb; }
* { box-sizing: border-box; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; padding: 1.2rem; max-width: 1400px; }
h1 { font-size: 1.4rem; margin: 0 0 .6rem; }
h2 { font-size: 1.1rem; margin: 1.6rem 0 .5rem; }
img, canvas, svg { max-width: 100%; height: auto; }
figure { margin: 0; }
figcaption { font-size: .85rem; overflow-wrap: anywhere; }
table { border-collapse: collapse; margin: .5rem 0; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .7rem; text-align: left; }
td.number, th.number { text-align: right; }
tbody tr:hover { background: var(--soft); }
table.sortable th { cursor: pointer; user-select: none; white-space: nowrap; }
table.sortable th[aria-sort=ascending]::after { content: " ▲"; }
table.sortable th[aria-sort=descending]::after { content: " ▼"; }
.wide { overflow-x: auto; }
"""

SORT_SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = row => row.cells[column].dataset.value;
    const numeric = head.classList.contains("number");
    const order = (a, b) => {
      const x = key(a), y = key(b);
      // Cells without a value stay at the end either way.
      if (x === "" || y === "") return (x === "") - (y === "");
      return (numeric ? x - y : x.localeCompare(y)) * (up ? 1 : -1);
    };
    const body = table.tBodies[0];
    body.append(...[...body.rows].sort(order));
  }));
}
"""


def page(title: str, body: str, *, style: str = "", script: str = "") -> str:
    """A whole document.

    Args:
        title: plain text, for the window and the heading.
        body: HTML.
        style, script: CSS and JavaScript added to what tables need.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Nothing may be fetched, whatever ends up in the page.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
        "connect-src 'self'\">\n"
        f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n{body}\n<script>{SORT_SCRIPT}{script}</script>\n"
        "</body>\n</html>\n"
    )


def write_page(path: str | Path, html: str) -> None:
    """Write a page, whole or not at all. Raises OSError if it cannot be written."""
    with atomic_write(Path(path)) as file:
        file.write(html.encode())


def table(
    headers: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    digits: int = 3,
    sortable: bool = True,
) -> str:
    """A table; a click on a header sorts by that column, a second click the other way.

    Args:
        headers: plain text of the columns.
        rows: values by column. Numbers are rounded to `digits` (integers are not) and sorted as
            numbers; None and NaN give an empty cell, at the end of either order.
    """
    rows = [list(row) for row in rows]
    numeric = [
        all(_is_number(row[c]) or _is_empty(row[c]) for row in rows) for c in range(len(headers))
    ]
    kinds = [' class="number"' if number else "" for number in numeric]
    head = "".join(f"<th{k}>{escape(text)}</th>" for k, text in zip(kinds, headers, strict=True))
    lines = []
    for row in rows:
        cells = "".join(
            f'<td{kind} data-value="{escape(_sort_key(value))}">'
            f"{escape(_shown(value, digits))}</td>"
            for kind, value in zip(kinds, row, strict=True)
        )
        lines.append(f"<tr>{cells}</tr>")
    name = ' class="sortable"' if sortable else ""
    body = "\n".join(lines)
    return (
        f'<div class="wide"><table{name}><thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def figure(source: str, caption: str = "") -> str:
    """A picture by its data URI, with a line of plain text below it."""
    text = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    alt = escape(caption)
    return f'<figure><img src="{escape(source)}" alt="{alt}" loading="lazy">{text}</figure>'


def data_uri(content: bytes, mime: str) -> str:
    """A file's content as a URI, e.g. of mime type image/svg+xml."""
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def image_uri(im: np.ndarray, *, longest: int | None = None, quality: int = 85) -> str:
    """An image (H, W, 3) uint8 BGR as a JPEG in a data URI.

    Args:
        longest: shrink it until its longer side has at most so many pixels.
    """
    scale = 1.0 if longest is None else longest / max(im.shape[:2])
    if scale < 1:
        size = [max(1, round(side * scale)) for side in im.shape[1::-1]]
        im = cv2.resize(im, size, interpolation=cv2.INTER_AREA)
    done, encoded = cv2.imencode(".jpg", im, [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not done:
        raise ValueError(f"an image of shape {im.shape} cannot be encoded")
    return data_uri(encoded.tobytes(), "image/jpeg")


def json_block(name: str, value: Any) -> str:
    """Data for a page's script: `JSON.parse(document.getElementById(name).textContent)`."""
    # "</script>" in a string would end the block.
    text = json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="{escape(name)}">{text}</script>'


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, (float, np.floating)) and bool(np.isnan(value)))


def _sort_key(value: Any) -> str:
    return "" if _is_empty(value) else str(value)


def _shown(value: Any, digits: int) -> str:
    if _is_empty(value):
        return ""
    return f"{value:.{digits}f}" if isinstance(value, (float, np.floating)) else str(value)
