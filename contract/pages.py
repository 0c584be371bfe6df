"""Pages that need nothing else, for the reports of the stages: a style, tables, figures that are part of the page.

Equal input gives equal bytes. Everything that comes from data is escaped.
"""

import html
import io
import re
from collections.abc import Callable, Iterable

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Figures are drawn in these colours, which become variables of the page, so that they follow light and dark.
INK, MUTED, KEPT, REMOVED = "#000001", "#000002", "#000003", "#000004"
TRAIN, VALID, TEST = "#000005", "#000006", "#000007"
SERIES = tuple(f"#0001{i:02x}" for i in range(1, 11))  # of what is compared: the first and its parts are blue
VARIABLES = {INK: "ink", MUTED: "muted", KEPT: "kept", REMOVED: "removed", TRAIN: "train", VALID: "valid", TEST: "test"}
VARIABLES |= {colour: f"s{i}" for i, colour in enumerate(SERIES, 1)}
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "colarec",  # ids, drawn at random otherwise
    "text.parse_math": False,  # a $ in a name is a $
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
}

CSS = """\
:root { --page: #fff; --ink: #1d2430; --muted: #667080; --line: #e1e5ea; --panel: #f6f7f9; --kept: #7f9cc0;
  --removed: #cf6a4c; --train: #7f9cc0; --valid: #e0a83c; --test: #b4507f; --good: #2c7a4b;
  --s1: #1f5fa8; --s2: #5b9bd8; --s3: #a3c6ec; --s4: #d9822b; --s5: #3a8f5c; --s6: #8a5fbf; --s7: #b5485d;
  --s8: #8a8f98; --s9: #b59a2b; --s10: #2a9d9d; }
@media (prefers-color-scheme: dark) { :root { --page: #14181e; --ink: #e3e7ec; --muted: #98a2b0; --line: #2c333d;
  --panel: #1c2129; --kept: #6787b0; --removed: #d77a5d; --train: #6787b0; --valid: #d9a441; --test: #c4678f;
  --good: #63b785; --s1: #5a9be6; --s2: #3f78b4; --s3: #2d5580; --s4: #e0954a; --s5: #58b07c; --s6: #a585d6;
  --s7: #d06a7e; --s8: #9aa0aa; --s9: #cbb04a; --s10: #45b5b5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1040px; padding: 40px 24px 64px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
h1 { margin: 0 0 4px; font-size: 26px; font-weight: 650; }
h2 { margin: 44px 0 10px; padding-top: 18px; border-top: 1px solid var(--line); font-size: 18px; font-weight: 650; }
h3 { margin: 20px 0 6px; font-size: 15px; font-weight: 650; }
p { margin: 6px 0 12px; max-width: 75ch; }
.note { color: var(--muted); font-size: 13.5px; }
.counts { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 20px 0; }
.counts div { padding: 12px 16px; border-radius: 8px; background: var(--panel); }
.counts b { display: block; font-size: 23px; font-weight: 600; font-variant-numeric: tabular-nums; }
.counts span { color: var(--muted); font-size: 13.5px; }
.pair { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(380px, 100%), 1fr)); gap: 8px 32px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 20px 5px 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--muted); font-weight: 500; }
.number { text-align: right; white-space: nowrap; }
code { font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.good { color: var(--good); font-weight: 600; }
svg { display: block; width: 100%; height: auto; margin: 8px 0; }
svg text { font-family: inherit !important; }
@media print { body { padding: 0; } h2 { break-after: avoid; } svg, table { break-inside: avoid; } }
"""


def whole_page(title: str, body: str, style: str = "") -> str:
    """A whole page. `body` is HTML, its first heading is not added; `style`: more CSS."""
    return f"""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{html.escape(title)}</title>
<style>
{CSS}{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


class Html(str):
    """Text that is HTML already."""


def code(text: str) -> Html:
    return Html(f"<code>{html.escape(text)}</code>")


def table(head: tuple[str, ...], rows: Iterable[Iterable[str]], align: str) -> str:
    """`align`: of each column l(eft) or r(ight). Cells that are not Html are escaped."""

    def line(tag: str, cells: Iterable[str]) -> str:
        texts = (cell if isinstance(cell, Html) else html.escape(cell) for cell in cells)
        starts = (f"<{tag} class=number>" if side == "r" else f"<{tag}>" for side in align)
        return "<tr>" + "".join(f"{a}{text}</{tag}>" for a, text in zip(starts, texts, strict=True)) + "</tr>"

    lines = [line("th", head)] if head else []
    return '<div class="scroll"><table>' + "\n".join([*lines, *(line("td", row) for row in rows)]) + "</table></div>"


def counted(num: int, whole: int) -> tuple[str, str]:
    return f"{num:,}", share(num, whole)


def share(part: float, whole: float) -> str:
    """In percent; what is not nothing does not look like nothing, nor like all."""
    percent = 100 * part / whole if whole else 0
    if 0 < percent < 0.01:
        return "< 0.01%"
    if 99.99 < percent < 100:
        return "> 99.99%"
    return f"{percent:.2f}%" if 0 < percent < 1 or 99 < percent < 100 else f"{percent:.1f}%"


def figure(draw: Callable[[Axes], None], label: str, inches: tuple[float, float]) -> str:
    """The SVG of what `draw` puts into the axes, to be part of a page. `label`: for those who cannot see it."""
    with matplotlib.rc_context(STYLE):
        drawing = Figure(figsize=inches, layout="constrained")
        draw(drawing.add_subplot())
        stream = io.StringIO()
        drawing.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    svg = stream.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    # The page sets the size; ids are of the page, not of the figure.
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    prefix = re.sub(r"\W+", "-", label)
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)


def short(num: float, _place: int | None = None) -> str:
    """1500000 -> 1.5M."""
    for unit, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if abs(num) >= unit:
            return f"{num / unit:.4g}{letter}"
    return f"{num:g}"
