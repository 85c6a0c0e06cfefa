"""What a run prints: lines, and bars and a live view on a terminal.

Bars are for people; where output is piped, the same facts come as lines, so that a log file reads well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from pyfastlora.trainer.live import LiveView


class Bar:
    """One running progress bar; a no-op where there is no terminal."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def update(self, completed: float, note: str | None = None, total: float | None = None) -> None:
        """Moves the bar to `completed`; `note` is shown beside it until the next one."""
        fields = {} if note is None else {"note": note}
        self._progress.update(self._task, completed=completed, total=total, **fields)  # type: ignore[arg-type]


class Console:
    """Plain lines to one stream, and bars below them while something runs.

    terminal and width say what the stream is, instead of looking at it.
    """

    def __init__(
        self,
        file: TextIO | None = None,
        quiet: bool = False,
        terminal: bool | None = None,
        width: int | None = None,
    ) -> None:
        from rich.console import Console as RichConsole

        self._rich = RichConsole(
            file=file, quiet=quiet, force_terminal=terminal, width=width, highlight=False, soft_wrap=True
        )

    @property
    def is_terminal(self) -> bool:
        """Whether somebody watches: bars are drawn then, and lines per step are not needed."""
        return self._rich.is_terminal

    def say(self, text: str = "", style: str | None = None) -> None:
        """Prints text as it is: square brackets are not markup."""
        self._rich.print(text, style=style, markup=False)

    def head(self, text: str) -> None:
        """Prints a heading."""
        self.say()
        self.say(text, style="bold")

    def coloured(self, stretches: Iterable[tuple[str, str]]) -> None:
        """Prints stretches of text one behind the other, each in its style."""
        from rich.text import Text

        self._rich.print(Text.assemble(*stretches))

    @contextmanager
    def bar(self, title: str, total: float | None, unit: str = "") -> Iterator[Bar]:
        """A bar from 0 to total (None: length unknown) for the time of a with block."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self._rich, transient=True, disable=not self.is_terminal) as progress:
            yield Bar(progress, progress.add_task(title, total=total, note=""))

    @contextmanager
    def live(self) -> Iterator[LiveView | None]:
        """The numbers of a run in place, for the time of a with block; None where nobody watches."""
        if not self.is_terminal or self._rich.quiet:
            yield None
            return
        from pyfastlora.trainer.live import LiveView

        with LiveView(self._rich) as view:
            yield view
