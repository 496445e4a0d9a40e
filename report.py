"""What every report is made of: a Markdown table, a line plot, and one HTML page from a jinja2 template.

rows -> table(rows) -> "| a | b |"...       {name: [(x, y), ...]} -> plot(series, title, x) -> "<svg ...>"
page("judge.html", title=..., ...) -> HTML; templates lie beside this file and extend page.html, the common style
"""

import html
import math
from pathlib import Path

COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2")


def table(rows):
    """Rows of cells, the first the header -> a Markdown table."""
    lines = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in [lines[0], ["---"] * len(lines[0]), *lines[1:]])


def grid(rows):
    """Rows of cells, the first the header -> an HTML table."""
    from markupsafe import Markup, escape

    row = lambda cells, tag: "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"
    body = "\n".join(row(cells, "td" if i else "th") for i, cells in enumerate(rows))
    return Markup(f'<div class="wide"><table>{body}</table></div>')


def page(template, **values):
    """HTML of a template. Values are escaped; `grid` is at hand."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader, strict = FileSystemLoader(Path(__file__).parent / "templates"), StrictUndefined
    pages = Environment(loader=loader, autoescape=True, undefined=strict, trim_blocks=True, lstrip_blocks=True)
    return pages.get_template(template).render(grid=grid, **values)


def ticks(low, high, count=5):
    """Round numbers between low and high."""
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= count)
    return [round(i * step, 10) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def plot(series, title, x):
    """{name: [(x, y), ...]} -> an SVG line plot with axes and a legend; x: the name of that axis."""
    lines = {name: [(a, b) for a, b in points if math.isfinite(b)] for name, points in series.items()}
    known = [point for points in lines.values() for point in points] or [(0, 0)]
    (x0, x1), (y0, y1) = ((min(v), max(v) if max(v) > min(v) else min(v) + 1) for v in zip(*known))
    left, top, right, bottom = 56, 28, 628, 280
    px = lambda v: left + (v - x0) / (x1 - x0) * (right - left)
    py = lambda v: bottom - (v - y0) / (y1 - y0) * (bottom - top)
    text = lambda a, b, words, more: f'<text x="{a:.1f}" y="{b:.1f}" {more}>{html.escape(str(words))}</text>'
    style = 'font-family="system-ui" font-size="12" fill="#444" style="max-width:100%;height:auto"'
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 320" width="640" {style}>']
    out.append(text(left, 16, title, 'font-size="14" fill="#111"'))
    out.append(text((left + right) / 2, 314, x, 'text-anchor="middle"'))
    out += [text(px(v), bottom + 16, f"{v:g}", 'text-anchor="middle"') for v in ticks(x0, x1)]
    for v in ticks(y0, y1):
        out.append(f'<path d="M{left} {py(v):.1f}H{right}" stroke="#ddd"/>')
        out.append(text(left - 6, py(v) + 4, f"{v:g}", 'text-anchor="end"'))
    for i, (name, points) in enumerate(lines.items()):
        colour, path = COLOURS[i % len(COLOURS)], "L".join(f"{px(a):.1f} {py(b):.1f}" for a, b in points)
        out.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>' if points else "")
        out.append(text(right - 4, top + 14 * (i + 1), name, f'text-anchor="end" fill="{colour}"'))
    return "".join(out) + "</svg>"
