"""The report of a run: one HTML file with figures, plots as inline SVG, and the whole configuration."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib.figure

from train.tracking import read_log

Lines = Sequence[dict[str, Any]]

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title><style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse } td, th { padding: .2rem 1rem .2rem 0; text-align: left; font-weight: normal }
td { font-variant-numeric: tabular-nums } svg { max-width: 100%; height: auto }
pre { background: #f4f4f4; padding: 1rem }
</style></head><body>
<h1>{{ title }}</h1>
<table>{% for name, value in figures %}<tr><th>{{ name }}</th><td>{{ value }}</td></tr>{% endfor %}</table>
{% for name, text, svg in plots %}<h2>{{ name }}</h2><p>{{ text }}</p>{{ svg | safe }}{% endfor %}
<h2>Configuration</h2><pre>{{ config }}</pre>
</body></html>
"""


def write_report(folder: Path, config: str) -> Path:
    """report.html in the run's folder, made of its log."""
    lines = read_log(folder)
    page = jinja2.Environment(autoescape=True).from_string(_PAGE)
    path = folder / "report.html"
    part = path.with_suffix(".part")
    title = f"Drafter in {folder.name}"
    part.write_text(page.render(title=title, figures=figures(lines), plots=plots(lines), config=config), "utf-8")
    part.replace(path)
    return path


def figures(lines: Lines) -> list[tuple[str, str]]:
    """What the run came to: names and values."""
    last: dict[str, Any] = {}
    for line in lines:
        last |= line
    made = [("steps", str(last.get("step", 0)))]
    best = max(
        (line for line in lines if "acceptance_length" in line), key=lambda x: x["acceptance_length"], default={}
    )
    if best:
        text = f"{best['acceptance_length']:.3f} tokens a round, at step {best['step']} (exported)"
        made.append(("best acceptance length, decoded", text))
    names = {
        "acceptance_length": "last acceptance length, decoded",
        "held_out_acceptance": "acceptance length on held-out responses",
        "held_out_nll": "held-out loss, nats a token",
        "loss": "training loss",
        "tokens_per_second": "tokens a second",
        "mfu": "model flops utilisation",
    }
    made += [(text, f"{last[name]:.4g}") for name, text in names.items() if name in last]
    skipped = sum(line.get("skipped", 0) > 0 for line in lines)
    return [*made, ("lines of the log with skipped steps", str(skipped))]


def plots(lines: Lines) -> list[tuple[str, str, str]]:
    """(name, explanation, SVG) of what the log has."""
    curves = [
        ("Loss", "Of the training steps, and in nats a token on held-out responses.", ("loss", "held_out_nll")),
        (
            "Acceptance length",
            "Tokens a round: decoded with the real loop, and as blocks of training and held-out responses give it.",
            ("acceptance_length", "acceptance", "held_out_acceptance"),
        ),
        ("Gradient norm", "Before clipping.", ("gradient_norm",)),
    ]
    made = [(name, text, curve(lines, keys)) for name, text, keys in curves if any(k in x for x in lines for k in keys)]
    bars = {"accepted": "kept, decoded", "held_out_accuracy": "right, held-out responses"}
    latest = {text: next((x[key] for x in reversed(lines) if key in x), None) for key, text in bars.items()}
    series = {text: values for text, values in latest.items() if values}
    if series:
        text = "How often the drafter's row is kept by verification, and how often it is right by itself."
        made.insert(2, ("Acceptance by position", text, positions(series)))
    return made


def curve(lines: Lines, keys: Sequence[str]) -> str:
    """Values over steps."""
    figure, axes = _axes("step")
    for key in keys:
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=key, marker="o" if len(points) < 30 else "", markersize=3)
    return _svg(figure, axes)


def positions(series: dict[str, Sequence[float]]) -> str:
    """Bars for the positions of a block."""
    figure, axes = _axes("position in the block")
    width = 0.8 / len(series)
    for place, (name, values) in enumerate(series.items()):
        axes.bar(
            [k + 1 + (place - (len(series) - 1) / 2) * width for k in range(len(values))], values, width, label=name
        )
    axes.set_ylim(0, 1)
    return _svg(figure, axes)


def _axes(label: str) -> tuple[Any, Any]:
    figure = matplotlib.figure.Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(label)
    axes.grid(alpha=0.3)
    return figure, axes


def _svg(figure: Any, axes: Any) -> str:
    """The picture as an element: without what only stands in front of one in a file of its own."""
    axes.legend()
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]
