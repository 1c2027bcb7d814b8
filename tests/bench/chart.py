"""The figures of a run as one SVG, readable on light and on dark pages."""

from collections.abc import Sequence
from html import escape

from tests.bench.report import Document

# A label, a value and a colour.
Bar = tuple[str, float, str]
# A title and its bars.
Panel = tuple[str, Sequence[Bar]]

_STYLE = """
svg { font-family: system-ui, -apple-system, "Segoe UI", sans-serif; font-size: 12px }
text { fill: #52514e } .title { fill: #0b0b0b; font-weight: 600 } .value { fill: #0b0b0b }
.page { fill: #fcfcfb } .http { fill: #2a78d6 } .grpc { fill: #1baf7a } .other { fill: #a3a19b }
@media (prefers-color-scheme: dark) {
  text { fill: #c3c2b7 } .title, .value { fill: #ffffff } .page { fill: #1a1a19 }
  .http { fill: #3987e5 } .grpc { fill: #199e70 } .other { fill: #7a7872 }
}
"""
_WIDTH, _MARGIN, _GAP = 800, 20, 40
_PANEL_WIDTH = (_WIDTH - 2 * _MARGIN - _GAP) // 2
_LABEL_WIDTH, _VALUE_WIDTH = 112, 60
# Names of loads with more than size and workers have more dashes, and no place in the chart.
_PLAIN_DASHES = 2
_BAR_HEIGHT, _ROW_HEIGHT, _HEAD_HEIGHT = 14, 20, 56


def draw_chart(document: Document) -> str:
    """Draw the events a second of every measured load of the matrix, one panel a batch size."""
    sizes = sorted({figures["events_per_request"] for figures in _shown(document)})
    panels = [
        (f"{size:,} event{'s' if size > 1 else ''} a request", _collect_bars(document, size))
        for size in sizes
    ]
    return draw_panels("Events stored a second", document, panels)


def draw_panels(title: str, document: Document, panels: Sequence[Panel]) -> str:
    """Draw panels of bars, two beside each other, under the place where they were measured."""
    parts, y = [], _HEAD_HEIGHT
    for pair in (panels[i : i + 2] for i in range(0, len(panels), 2)):
        for column, panel in enumerate(pair):
            x = _MARGIN + column * (_PANEL_WIDTH + _GAP)
            parts += _draw_panel(x, y, *panel)
        y += (max(len(bars) for _, bars in pair) + 2) * _ROW_HEIGHT
    return "\n".join([*_draw_page(title, document, y), *parts, "</svg>\n"])


def _shown(document: Document) -> list[Document]:
    kinds = ("http-", "grpc-", "baseline-")
    return [
        figures
        for figures in document["measurements"]
        if figures["name"].startswith(kinds) and figures["name"].count("-") == _PLAIN_DASHES
    ]


def _collect_bars(document: Document, size: int) -> list[Bar]:
    bars = [_make_bar(f) for f in _shown(document) if f["events_per_request"] == size]
    if size == 1000:
        bars.append(("COPY alone", document["copy"]["rows_per_second"], "other"))
    return bars


def _make_bar(figures: Document) -> Bar:
    speed = figures["events_per_second"]
    workers = f"{figures['workers']} worker{'s' if figures['workers'] > 1 else ''}"
    if figures["server"] == "baseline":
        return f"FastAPI, {workers}", speed, "other"
    name = {"http": "HTTP", "grpc": "gRPC"}[figures["protocol"]]
    return f"{name}, {workers}", speed, figures["protocol"]


def _draw_page(title: str, document: Document, height: int) -> Sequence[str]:
    machine = document["machine"]
    place = (
        f"{machine['cores']} cores for service, PostgreSQL {document['postgresql']} and load"
        f" generator ({machine['processor']}), {document['date'][:10]}. Each panel has its scale."
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img"'
        f' aria-label="{title}">',
        f"<style>{_STYLE}</style>",
        f'<rect class="page" width="{_WIDTH}" height="{height}" rx="6"/>',
        f'<text class="title" x="{_MARGIN}" y="24">{title}</text>',
        f'<text x="{_MARGIN}" y="42">{escape(place)}</text>',
    )


def _draw_panel(x: int, y: int, title: str, bars: Sequence[Bar]) -> list[str]:
    longest = max(value for _, value, _ in bars)
    room = _PANEL_WIDTH - _LABEL_WIDTH - _VALUE_WIDTH
    parts = [f'<text class="title" x="{x}" y="{y + 14}">{title}</text>']
    for row, (label, value, colour) in enumerate(bars):
        top = y + (row + 1) * _ROW_HEIGHT + 2
        left, width = x + _LABEL_WIDTH, max(1, round(room * value / longest))
        parts += [
            f'<text x="{x}" y="{top + 11}">{label}</text>',
            f'<rect class="{colour}" x="{left}" y="{top}" width="{width}" height="{_BAR_HEIGHT}"'
            ' rx="2"/>',
            f'<text class="value" x="{left + width + 6}" y="{top + 11}">{value:,.0f}</text>',
        ]
    return parts
