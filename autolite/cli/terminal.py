"""What commands share: the terminal, options, and domain errors, which become messages and exit codes here."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

import click

from autolite.errors import AutoliteError, InputError

if TYPE_CHECKING:
    from rich.console import Console


def terminal(*, stderr: bool = False) -> Console:
    """Return the terminal; without one there is no width to fit: wide lines are for files and pipes to keep whole."""
    from rich.console import Console

    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=200)


def told(message: str) -> None:
    """Say what is done, where it is no part of the output."""
    click.echo(message, err=True)


def reported(command: Callable[..., None]) -> Callable[..., None]:
    """End in one clear sentence and the error's exit code instead of a traceback."""

    @wraps(command)
    def call(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except AutoliteError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(error.exit_code)

    # Click keeps the lines of a paragraph that begins with a backspace; the docstrings are raw and say backslash, b.
    call.__doc__ = (command.__doc__ or "").replace("\\b", "\b")
    return call


def numbers(text: str | None) -> list[int]:
    """Read numbers and ranges: "0,4-7" is [0, 4, 5, 6, 7]; nothing is [].

    Raises:
        InputError: if it is anything else.
    """
    found: list[int] = []
    for part in (text or "").split(",") if text is not None else ():
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        ends = (first, last if dash else first)
        if not all(end.isascii() and end.isdecimal() for end in ends) or int(ends[0]) > int(ends[1]):
            raise InputError(f"'{text}' does not name cores: give numbers and ranges, as in 0,4-7")
        found += range(int(ends[0]), int(ends[1]) + 1)
    return found
