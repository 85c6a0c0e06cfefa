"""User mistakes on the command line: one sentence on stderr and an exit code, no traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import click


class _Mistake(click.ClickException):
    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"Error: {self.format_message()}", file=file, err=True)


@contextmanager
def mistakes_reported() -> Iterator[None]:
    """Turns a UserError raised inside into click's way of ending a program.

    Another error has a line "hint: .." behind its traceback where one is known.
    """
    from pyfastlora.trainer.errors import UserError
    from pyfastlora.trainer.hints import add_hint

    try:
        yield
    except UserError as error:
        raise _Mistake(str(error), error.exit_code) from error
    except Exception as error:  # it keeps its traceback
        add_hint(error)
        raise
