"""Plots as inline SVG whose colours are the page's own, so that they follow light, dark and print."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Stand-ins, which the page's variables of these names replace in the SVG.
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
# Inches: across a screen, and across a phone, where the same text must not shrink.
WIDE, NARROW = 9.6, 4.4


def new_figure(width: float, height: float) -> Figure:
    """A figure that belongs to no window; sizes are inches."""
    # What it says of its caches is no news of the run.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def to_svg(figure: Figure, name: str, title: str, *, variables: Mapping[str, str] = VARIABLES) -> str:
    """The figure as an element for a page: ids of its own, colours by variable, the page's font."""
    import matplotlib

    buffer = io.BytesIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue().decode()
    text = text[text.index("<svg") :]
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r'font: ([^;"]*?)\'DejaVu Sans\'[^;"]*', r"font: \1system-ui, sans-serif", text)
    for colour, variable in variables.items():
        text = text.replace(colour, f"var(--{variable})")
    head = f'<svg viewBox="@" role="img" aria-label="{Markup.escape(title)}">'
    text = re.sub(r'<svg [^>]*viewBox="([^"]+)"[^>]*>', lambda match: head.replace("@", match[1], 1), text, count=1)
    return text.strip()


def plot(name: str, title: str, draw: Callable[[float], Figure]) -> Markup:
    """A plot that is drawn twice, of which the page shows the one that fits; ``draw`` is given the width in inches."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        wide = to_svg(draw(WIDE), name, title)
        narrow = to_svg(draw(NARROW), f"{name}-narrow", title)
    return Markup(f'<div class="plot wide">{wide}</div><div class="plot narrow">{narrow}</div>')
