"""The figures for a person: a table, and a plot where one is asked for."""

from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from dflash_jax.errors import InputError
from serve.bench.figures import Figures

COLUMNS = "load", "way", "tokens\n/s", "over\nplain", "first\ntoken", "per\ntoken", "accepted\nlength", "same"


def table(rows: Sequence[Figures], caption: str) -> Table:
    """One line a load and way of decoding, narrow enough for 80 columns."""
    caption += "; times are p50/p99 in ms"
    out = Table(title="dflash bench serve", caption=caption, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in COLUMNS:
        out.add_column(name, justify="left" if name in ("load", "way") else "right", no_wrap=True)
    for i, f in enumerate(rows):
        if i and rows[i - 1].load != f.load:
            out.add_section()
        out.add_row(
            f.load, f.way, f"{f.tokens_per_second:.0f}", "" if f.speedup is None else f"{f.speedup:.2f}x",
            f"{1000 * f.first_token_p50:.0f}/{1000 * f.first_token_p99:.0f}",
            f"{1000 * f.per_token_p50:.1f}/{1000 * f.per_token_p99:.1f}",
            f"{f.acceptance_length:.2f}", f"{f.identical}/{f.requests}",
        )  # fmt: skip
    return out


def require_plots() -> None:
    """InputError where matplotlib is not installed: better before the measuring than after it."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise InputError("--plot needs matplotlib; pip install matplotlib") from error


def plot(rows: Sequence[Figures], file: Path) -> None:
    """Throughput, time to the first token and time a token by load, a line for each way, as an image."""
    from matplotlib.figure import Figure

    loads = list(dict.fromkeys(f.load for f in rows))
    axes = (figure := Figure(figsize=(12, 3.6), layout="constrained")).subplots(1, 3)
    for way in dict.fromkeys(f.way for f in rows):
        own = [f for f in rows if f.way == way]
        at = [loads.index(f.load) for f in own]
        axes[0].plot(at, [f.tokens_per_second for f in own], marker="o", label=way)
        for ax, name in zip(axes[1:], ("first_token", "per_token"), strict=True):
            (line,) = ax.plot(at, [1000 * getattr(f, f"{name}_p50") for f in own], marker="o", label=f"{way}, p50")
            p99 = [1000 * getattr(f, f"{name}_p99") for f in own]
            ax.plot(at, p99, marker="x", linestyle=":", color=line.get_color(), label=f"{way}, p99")
    titles = ("tokens/s, all requests together", "time to first token, ms", "time per token, ms")
    for ax, title in zip(axes, titles, strict=True):
        ax.set_title(title)
        ax.set_xticks(range(len(loads)), loads, rotation=20)
        ax.set_ylim(bottom=0)
        ax.legend()
    figure.savefig(file, dpi=150)
