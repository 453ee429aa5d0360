"""Plots as inline SVG with the colours of the page, so that they follow light, dark and print."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Placeholders that the CSS variables of these names replace in the SVG.
INK, SOFT, LINE, PAPER, WAIT = "#010101", "#020202", "#030303", "#040404", "#050505"
VARIABLES = {INK: "ink", SOFT: "soft", LINE: "line", PAPER: "paper", WAIT: "wait"}
SERIES = tuple(f"#0606{number:02x}" for number in range(1, 8))
VARIABLES |= {colour: f"series-{number}" for number, colour in enumerate(SERIES, start=1)}
STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "text.color": INK,
}
# Inches. The text is about as large as that of the page at 40rem, where style.css ends, and can be read on a phone.
WIDTH = 5.2


def load_matplotlib() -> None:
    """Import what :func:`plot` draws with, which takes longer than to draw."""
    import matplotlib.backends.backend_agg
    import matplotlib.backends.backend_svg
    import matplotlib.figure  # noqa: F401


def plot(name: str, title: str, height: float, draw: Callable[[Figure], None]) -> Markup:
    """Return a plot as an SVG element with unique ids, the CSS variables of the page as colours, and its font.

    ``draw`` fills a figure that is :data:`WIDTH` by ``height`` inches; the page scales it to the width that it has.
    """
    # Messages of matplotlib about its caches have nothing to do with the run.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    buffer = io.BytesIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH, height))
        FigureCanvasAgg(figure)
        draw(figure)
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue().decode()
    text = text[text.index("<svg") :]
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r'font: ([^;"]*?)\'DejaVu Sans\'[^;"]*', r"font: \1system-ui, sans-serif", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    head = f'<svg viewBox="@" role="img" aria-label="{Markup.escape(title)}">'
    text = re.sub(r'<svg [^>]*viewBox="([^"]+)"[^>]*>', lambda match: head.replace("@", match[1], 1), text, count=1)
    return Markup(f'<div class="plot">{text.strip()}</div>')
