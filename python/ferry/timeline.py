"""A trace as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

__all__ = ["draw_svg"]

_ROWS = ("compute", "waits", "copies", "reads")
_COLOURS = {"compute": "#4c78a8", "waits": "#e45756", "copies": "#f58518", "reads": "#54a24b"}
_HEIGHT, _GAP, _LEFT, _TOP = 22, 6, 70, 20


def draw_svg(events: Sequence[dict[str, Any]], width: int = 960) -> str:
    """An SVG document of Chrome trace events: a row a resource, a bar a span, its name on pointing.

    Args:
        events: ``traceEvents`` of a trace; times in microseconds.
        width: of the picture, in pixels.
    """
    names = {
        event["tid"]: event["args"]["name"]
        for event in events
        if event.get("ph") == "M" and event.get("name") == "thread_name"
    }
    spans = [event for event in events if event.get("ph") == "X" and names.get(event["tid"]) in _ROWS]
    rows = [row for row in _ROWS if any(names[span["tid"]] == row for span in spans)]
    height = _TOP + len(rows) * (_HEIGHT + _GAP) + _GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="11">'
    ]
    if spans:
        begin = min(span["ts"] for span in spans)
        length = max(max(span["ts"] + span["dur"] for span in spans) - begin, 1e-9)
        scale = (width - _LEFT - _GAP) / length
        parts.append(f'<text x="{_LEFT}" y="13">0</text>')
        parts.append(f'<text x="{width - _GAP}" y="13" text-anchor="end">{length / 1e3:.1f} ms</text>')
        for i, row in enumerate(rows):
            y = _TOP + i * (_HEIGHT + _GAP)
            parts.append(f'<text x="{_GAP}" y="{y + 15}">{row}</text>')
            for span in spans:
                if names[span["tid"]] != row:
                    continue
                x = _LEFT + (span["ts"] - begin) * scale
                parts.append(
                    f'<rect x="{x:.2f}" y="{y}" width="{max(span["dur"] * scale, 0.3):.2f}" '
                    f'height="{_HEIGHT}" fill="{_COLOURS[row]}" fill-opacity="0.8">'
                    f'<title>{escape(span["name"])}: {span["dur"] / 1e3:.2f} ms</title></rect>'
                )
    else:
        parts.append(f'<text x="{_GAP}" y="13">nothing was recorded</text>')
    return "\n".join([*parts, "</svg>"])
