"""Tables for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from autolite.front import Candidate, Front
    from autolite.hardware.profile import Profile
    from autolite.measure import Measurement


def size(count: float) -> str:
    """Return bytes as people read them: 12.3 MB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _with_interval(found: Measurement, unit: str) -> str:
    return f"{found.value:.3g}{unit} ({found.low:.3g}-{found.high:.3g})"


def front_table(front: Front) -> Table:
    """Return one row a candidate, the fastest first, with the baseline above them."""
    source = front.candidates[0].latency_ms.source if front.candidates else "predicted"
    work = front.workload
    table = Table(
        title=f"{front.model['name']} on {front.target['name']}: latency {source}, batch {work['batch']}, "
        f"{work['tokens']} tokens, {work['threads']} threads",
        title_justify="left",
    )
    metric = front.teacher["quality"]["metric"]
    heads = ("id", metric, f"test {metric}", "kept (95 %)", "latency ms (95 %)", "faster", "size", "smaller", "what")
    for head in heads:
        last = head == "what"
        table.add_column(head, justify="left" if last else "right", no_wrap=not last, ratio=1 if last else None)
    base, teacher = front.baseline, front.teacher
    table.add_row(
        "teacher",
        f"{teacher['quality']['value']:.4g}",
        f"{teacher['test']['value']:.4g}" if teacher["test"] else "-",
        "100%",
        f"{base['latency_ms']['value']:.3g}",
        "1x",
        size(base["size_bytes"]["value"]),
        "1x",
        "fp32 baseline",
        style="dim",
        end_section=True,
    )
    for candidate in front:
        table.add_row(*_row(front, candidate))
    return table


def _row(front: Front, c: Candidate) -> list[str]:
    return [
        c.id,
        f"{c.quality.value:.4g}",
        f"{c.test.value:.4g}" if c.test else "-",
        f"{c.kept.value:.1%} ({c.kept.low:.1%}-{c.kept.high:.1%})",
        _with_interval(c.latency_ms, ""),
        f"{c.faster.value:.2f}x",
        size(c.size_bytes.value),
        f"{front.baseline['size_bytes']['value'] / c.size_bytes.value:.2f}x",
        c.plan.describe(),
    ]


def misses_table(front: Front) -> Table:
    """Return the nearest misses and what blocked each."""
    table = Table(title="No candidate meets the constraints. The nearest misses:", title_justify="left")
    for head in ("id", "kept", "latency ms", "size", "blocked by"):
        table.add_column(head)
    for miss in front.nearest_misses:
        table.add_row(
            miss["id"],
            f"{miss['kept']['value']:.1%}",
            f"{miss['latency_ms']['value']:.3g}",
            size(miss["size_bytes"]["value"]),
            ", ".join(f"{name} ({excess:.1%} over)" for name, excess in miss["blocked_by"].items()),
        )
    return table


def targets_table(profiles: dict[str, Profile]) -> Table:
    """Return one row a target."""
    table = Table()
    for head in ("target", "runs on", "memory", "what it is"):
        table.add_column(head)
    for name, profile in profiles.items():
        unit = f"{profile.default_unit}, {profile.threads} threads"
        table.add_row(name, unit, f"{profile.memory.size.value:g} GB", profile.description)
    table.add_row("local", "this machine", "", "measured here when first used")
    return table


def profile_table(profile: Profile) -> Table:
    """Return every number of a profile with where it comes from."""
    table = Table(title=f"{profile.name}: {profile.description}", title_justify="left")
    for head in ("number", "value", "kind", "+-", "source", "date"):
        table.add_column(head)
    for path, number in profile.numbers().items():
        unit = "" if number.unit == "1" else f" {number.unit}"
        row = (f"{number.value:g}{unit}", number.kind, f"{number.sigma:.0%}", number.source, str(number.date))
        table.add_row(path, *row)
    return table
