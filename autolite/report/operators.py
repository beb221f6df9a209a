"""The operator profile of a model as a table for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from autolite.runtime.operators import OperatorProfile, Row

By = Literal["operator", "layer", "node"]

_TOP = {"operator": 12, "layer": 50, "node": 20}  # rows shown unless asked otherwise


def operators_table(profile: OperatorProfile, by: By = "operator", top: int | None = None) -> Group:
    """Return what takes the time of a call, by operator class, layer or node.

    Args:
        profile: of a model.
        by: what a row is.
        top: rows shown; the others are added up in one.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    heads = {
        "operator": ["operator", "nodes"],
        "layer": ["layer", "attention us", "ffn us"],
        "node": ["node", "output"],
    }
    for head in (*heads[by], "us", "share", "GFLOP/s", "of peak"):
        table.add_column(head, justify="left" if head in ("operator", "layer", "node", "output") else "right")
    rows = _rows(profile, by)
    shown = rows[: top or _TOP[by]]
    for row, extra in shown:
        table.add_row(row.name, *extra, *_numbers(row))
    if rest := rows[len(shown) :]:
        blank = [""] * (len(heads[by]) - 1)
        micros = sum(row.microseconds for row, _ in rest)
        share = sum(row.share for row, _ in rest)
        table.add_row(f"{len(rest)} others", *blank, f"{micros:,.0f}", f"{share:.1%}", style="dim")
    return Group(Text(_title(profile)), table, *map(Text, _notes(profile)))


def _rows(profile: OperatorProfile, by: By) -> list[tuple[Row, list[str]]]:
    match by:
        case "operator":
            return [(row, [str(row.calls)]) for row in profile.operators()]
        case "layer":
            return [
                (row, [f"{parts[part]:,.0f}" if part in parts else "" for part in ("attention", "ffn")])
                for row, parts in profile.layers()
            ]
        case "node":
            nodes = sorted(profile.nodes, key=lambda node: -node.microseconds)
            return [(profile.row(node.name, [node]), [" ".join(map(str, node.outputs))]) for node in nodes]


def _numbers(row: Row) -> tuple[str, str, str, str]:
    return (
        f"{row.microseconds:,.0f}" if row.microseconds >= 10 else f"{row.microseconds:.1f}",
        f"{row.share:.1%}",
        "" if row.gflops is None else f"{row.gflops:.3g}",
        "" if row.peak_share is None else f"{row.peak_share:.0%}",
    )


def _title(profile: OperatorProfile) -> str:
    low, high = profile.call.median_interval()
    return (
        f"{profile.model} in ONNX Runtime {profile.version}, {profile.workload}: "
        f"{profile.call.median:.3g} ms a call ({low:.3g}-{high:.3g})"
    )


def _notes(profile: OperatorProfile) -> list[str]:
    from autolite.runtime.sequences import BEFORE

    call, operators = 1e3 * profile.call.median, profile.microseconds
    threads = f"{profile.workload.threads} thread{'s' if profile.workload.threads > 1 else ''}"
    taken = f"{len(profile.nodes)} nodes take {operators:,.0f} us, {operators / call:.0%} of a call"
    given = {name: value for name, value in profile.inputs.items() if not name.startswith(BEFORE)}
    before = f"{count} keys and values of no earlier calls" if (count := len(profile.inputs) - len(given)) else ""
    if profile.disturbed:
        taken += "; other programs disturbed the calls, so run this again on a quiet machine"
    return [
        "Inputs: " + ", ".join(f"{name} {value}" for name, value in given.items()) + (before and f", {before}"),
        f"{taken}. A call of an empty model takes {1e3 * profile.empty:.0f} us.",
        f"Recorded, a call takes {profile.traced.median:.3g} ms: {profile.recording:.1f} us of recording are taken off "
        "each node.",
        f"Rates are of products only. Peaks of this machine in GFLOP/s, {threads}: "
        + ", ".join(f"{kernel} {peak:.3g}" for kernel, peak in profile.peaks.items()),
    ]
