"""Ctrl-C waits while the database is in use: a process that is interrupted inside a transaction may keep the database
locked, against itself too, for as long as the exception holds on to the connection."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

from sqlalchemy import Engine, event

_in_use = 0  # connections of the main thread, which is the one that is interrupted
_handlers: dict[int, Callable[[int, Any], Any]] = {}
_waiting: list[int] = []


def let_finish(engine: Engine) -> None:
    """Deliver SIGINT, and SIGTERM where it is handled, after the connections of `engine` that are in use were given
    back; a second one at once, for the database may not answer."""
    event.listen(engine, "checkout", _taken)
    event.listen(engine, "checkin", _given_back)


def _taken(*_: Any) -> None:
    global _in_use
    if threading.current_thread() is not threading.main_thread():
        return
    _in_use += 1
    if _in_use == 1:
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if callable(handler):
                _handlers[number] = handler
                signal.signal(number, _arrived)


def _given_back(*_: Any) -> None:
    global _in_use
    if threading.current_thread() is not threading.main_thread() or not _in_use:
        return
    _in_use -= 1
    if _in_use == 0:
        for number, handler in _handlers.items():
            signal.signal(number, handler)
        _handlers.clear()
        numbers = _waiting.copy()
        _waiting.clear()
        for number in numbers:
            signal.raise_signal(number)


def _arrived(number: int, frame: Any) -> None:
    if _waiting:
        _waiting.clear()
        _handlers[number](number, frame)
    else:
        _waiting.append(number)
