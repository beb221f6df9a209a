"""What a search shows while it runs: a panel on a terminal, lines elsewhere, JSON for scripts."""

from __future__ import annotations

import io
import json

from rich.console import Console

from autolite.report.live import watch
from autolite.search.progress import FrontRow, Snapshot

ROW = FrontRow("prune(heads=0.5)", 0.943, 7.6, 9.2)
SNAPSHOT = Snapshot(
    "recover", "trial 3", 120, 333, 65.2, 84.8, {"screen": (24, 24), "recover": (2, 6)}, (ROW,), "screen"
)


def shown(terminal: bool, *snapshots: Snapshot, as_json: bool = False, quiet: bool = False) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=100, color_system=None)
    with watch(console, as_json=as_json, quiet=quiet) as observer:
        for snapshot in snapshots:
            observer(snapshot)
    return stream.getvalue()


def test_the_panel_has_stage_time_trials_step_and_the_front() -> None:
    text = shown(True, SNAPSHOT)
    for part in ("recover", "1:05 spent, 1:24 left", "screen 24/24", "trial 3", "120/333", "front of stage screen"):
        assert part in text
    assert "94.3%" in text
    assert "7.6x" in text


def test_lines_say_a_thing_once() -> None:
    text = shown(False, SNAPSHOT, SNAPSHOT)
    assert text.count("\n") == 1
    assert "94.3% kept at 7.6x" in text


def test_json_lines_are_whole_snapshots() -> None:
    (event,) = map(json.loads, shown(False, SNAPSHOT, as_json=True).splitlines())
    assert event["event"] == "progress"
    assert event["front"][0]["faster"] == 7.6
    assert event["trials"]["recover"] == [2, 6]


def test_quiet_is_quiet() -> None:
    assert shown(True, SNAPSHOT, quiet=True) == ""
