"""The view of a run on a terminal: the numbers of its last record in place, and a bar below them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

_WIDE = 76  # columns of a terminal from which on two numbers stand side by side


class LiveView:
    """Shows itself for the time of a with block; lines that are printed meanwhile stand above it."""

    def __init__(self, console: Console) -> None:
        self._pairs = 2 if console.width >= _WIDE else 1
        self._values: Mapping[str, str] = {}
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeElapsedColumn(),
        )
        self._bar = Progress(*columns, console=console)
        self._task = self._bar.add_task("training", total=None)
        self._live = Live(console=console, get_renderable=self._draw, transient=True)

    def __enter__(self) -> LiveView:
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def stepped(self, step: int, total: int | None) -> None:
        """Moves the bar."""
        self._bar.update(self._task, completed=step, total=total)

    def show(self, values: Mapping[str, str]) -> None:
        """Puts other numbers in the place of those before."""
        self._values = values
        self._live.refresh()

    def _draw(self) -> Any:
        table = Table.grid(padding=(0, 2))
        for _ in range(self._pairs):
            table.add_column(style="dim", no_wrap=True)
            table.add_column(min_width=10, no_wrap=True)
        cells = [cell for pair in self._values.items() for cell in pair]
        for start in range(0, len(cells), 2 * self._pairs):
            table.add_row(*cells[start : start + 2 * self._pairs])
        return Group(Panel(table, expand=False), self._bar) if cells else self._bar
