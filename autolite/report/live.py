"""The live view of a search: a rich panel on a terminal, plain lines elsewhere, JSON events for scripts."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from autolite.search.progress import Observer, Snapshot

LINE_EVERY = 10.0  # seconds between plain lines of the same trial
STAGES = {
    "profile": "profile: model, data, target, teacher",
    "screen": "screen: many plans, little training",
    "recover": "recover: the promising ones, more training",
    "confirm": "confirm: the finalists, full training, whole folders",
    "waiting": "waiting",
    "finish": "finish: the test split",
    "stopping": "stopping",
}


@contextmanager
def watch(console: Console, *, quiet: bool = False, as_json: bool = False) -> Iterator[Observer]:
    """Yield an observer that shows a search on `console` in the form that suits it."""
    if quiet:
        yield lambda snapshot: None
    elif as_json:
        yield _json_lines(console)
    elif console.is_terminal:
        with Live(console=console, refresh_per_second=4, transient=True) as live:
            yield lambda snapshot: live.update(_panel(snapshot))
    else:
        yield _plain_lines(console)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def _time(snapshot: Snapshot) -> str:
    left = "" if snapshot.left is None else f", {_clock(max(snapshot.left, 0))} left"
    return f"{_clock(snapshot.spent)} spent{left}"


def _counts(snapshot: Snapshot) -> str:
    return "  ".join(
        f"{stage} {done}" + (f"/{planned}" if planned else "") for stage, (done, planned) in snapshot.trials.items()
    )


def _panel(snapshot: Snapshot) -> Group:
    head = Text.assemble((STAGES.get(snapshot.stage, snapshot.stage), "bold"), f"   {_time(snapshot)}")
    parts: list[Text | Table | ProgressBar] = [head, Text(f"trials: {_counts(snapshot)}   {snapshot.doing}")]
    if snapshot.steps:
        share = f" step {snapshot.step}/{snapshot.steps}"
        bar = Table.grid()
        bar.add_row(ProgressBar(total=snapshot.steps, completed=snapshot.step, width=40), Text(share))
        parts.append(bar)
    if snapshot.front:
        table = Table(
            "kept", "faster", "smaller", "what", title=f"front of stage {snapshot.front_stage} so far", box=None
        )
        table.title_justify = "left"
        for row in snapshot.front:
            table.add_row(f"{row.kept:.1%}", f"{row.faster:.1f}x", f"{row.smaller:.1f}x", Text(row.what, no_wrap=True))
        parts.append(table)
    return Group(*parts)


def _plain_lines(console: Console) -> Observer:
    last_key, last_time = "", 0.0

    def show(snapshot: Snapshot) -> None:
        nonlocal last_key, last_time
        key = f"{snapshot.stage} {snapshot.doing} {snapshot.trials}"
        now = time.monotonic()
        if key == last_key and now - last_time < LINE_EVERY:
            return
        last_key, last_time = key, now
        step = f" step {snapshot.step}/{snapshot.steps}" if snapshot.steps else ""
        best = max(snapshot.front, key=lambda row: row.kept * row.faster, default=None)
        found = f"; e.g. {best.kept:.1%} kept at {best.faster:.1f}x" if best else ""
        counts = _counts(snapshot) or "no trials yet"
        console.print(
            f"[{_time(snapshot)}] {snapshot.stage}: {snapshot.doing}{step} ({counts}){found}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )

    return show


def _json_lines(console: Console) -> Observer:
    def show(snapshot: Snapshot) -> None:
        console.file.write(json.dumps({"event": "progress", **asdict(snapshot)}) + "\n")
        console.file.flush()

    return show
