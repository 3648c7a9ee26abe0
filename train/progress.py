"""Progress for people: a bar in a terminal, plain lines in a file."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

import rich.console
import rich.progress

from train.processes import is_first

QUIET = 10.0  # seconds between plain lines


@contextlib.contextmanager
def bar(name: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """A bar, moved by calling what is yielded with how much is done and a text. Only the first process shows it."""
    console = rich.console.Console(file=sys.stderr, quiet=not is_first())
    if not console.is_terminal:
        yield _lines(console, name, total)
        return
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("{task.fields[text]}"),
    )
    with rich.progress.Progress(*columns, console=console, speed_estimate_period=120.0) as progress:
        task = progress.add_task(name, total=total, text="")
        yield lambda done, text: progress.update(task, completed=done, text=text)


def _lines(console: rich.console.Console, name: str, total: int) -> Callable[[int, str], None]:
    shown = [-QUIET]

    def show(done: int, text: str) -> None:
        if text and (done >= total or time.monotonic() - shown[0] > QUIET):
            shown[0] = time.monotonic()
            console.print(f"{name} {done}/{total} {text}", soft_wrap=True, highlight=False)

    return show
