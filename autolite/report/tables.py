"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from autolite.devices.base import Health
    from autolite.devices.measure import Measured
    from autolite.front import Candidate, Front
    from autolite.hardware.calibration import Calibrated
    from autolite.hardware.profile import ComputeUnit, Profile
    from autolite.runtime.tune import Found
    from autolite.runtime.variants import Place
    from autolite.search.reprice import Repriced

DRIFT = 0.05  # by so much a model is slower in the end than in the beginning that it is told


def size(count: float) -> str:
    """Return bytes as people read them: 12.3 MB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _basis(front: Front) -> str:
    """What a front's predicted latencies rest on, the surest first; empty for what does not say."""
    basis = {kind: share for kind, share in front.target.get("basis", {}).items() if kind != "timed" and share >= 0.005}
    shares = ", ".join(f"{100 * share:.0f} % {kind}" for kind, share in basis.items())
    name = front.target["name"]
    return f"Predicted latencies rest on numbers that are {shares}: autolite targets show {name}" if shares else ""


def front_table(front: Front, was: Mapping[str, str] | None = None) -> Group:
    """Return the front: a row a candidate, the fastest first, under the teacher's; then what was done to each.

    With `was`, a column of that name says something of each candidate by its id.
    """
    source: str = front.candidates[0].latency_ms.source if front.candidates else "predicted"
    if where := front.target.get("measured_on"):
        source += f" on {where}"
    work, metric = front.workload, front.teacher["quality"]["metric"]
    generated = f", {work['generated']} generated" if work["generated"] else ""
    threads = f"{work['threads']} thread{'s' if work['threads'] > 1 else ''}"
    table = Table(
        title=f"{front.model['name']} on {front.target['name']}: latency {source}, batch {work['batch']}, "
        f"{work['tokens']} tokens{generated}, {threads}; intervals 95 %",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    base, teacher = front.baseline, front.teacher
    # An interrupted run has not seen the test split, nor has what another target brought back.
    scored = "test" if teacher["test"] and all(c.test for c in front) else "quality"
    columns = ["id"] if was is None else ["id", "was"]
    found = [f"{teacher[scored]['split']} {metric}", "kept", "latency ms", "faster", "size", "smaller"]
    found += ["first ms", "tokens/s", "ms each"] if generated else []
    for head in (*columns, *found):
        # On a narrow terminal the intervals go below their values.
        table.add_column(
            head, justify="left" if head in columns else "right", no_wrap=head not in ("kept", "latency ms")
        )
    whole = base["size_bytes"]["value"]
    table.add_row(
        *["teacher", ""][: len(columns)],
        f"{teacher[scored]['value']:.4g}",
        "",
        f"{base['latency_ms']['value']:.3g}",
        "",
        size(whole),
        "",
        style="dim",
    )
    for c in front:
        kept, latency = c.kept, c.latency_ms
        table.add_row(
            *([c.id] if was is None else [c.id, was.get(c.id, "-")]),
            f"{getattr(c, scored).value:.4g}",
            f"{kept.value:.1%} ({100 * kept.low:.1f}-{kept.high:.1%})",
            f"{latency.value:.3g} ({latency.low:.3g}-{latency.high:.3g})",
            f"{c.faster.value:.2f}x",
            size(c.size_bytes.value),
            f"{whole / c.size_bytes.value:.2f}x",
            *(_generation(c, work["batch"]) if generated else []),
        )
    notes = [f"{c.id}  {c.plan.describe()}" for c in front]
    for c in (each for each in front if each.kept_of_seeds):
        shares = ", ".join(f"{seed}: {one:.1%}" for seed, one in zip(c.seeds, c.kept_of_seeds, strict=True))
        notes.append(f"{c.id}  is seed {c.plan.seed}; on selection the seeds keep {shares}")
    tied = sorted({c.id for c in front if c.ties})
    if tied:
        notes.append(f"In quality the data cannot tell these apart: {', '.join(tied)}")
    if basis := _basis(front):
        notes.append(basis)
    return Group(table, *further_tables(front), *map(Text, notes))


def further_tables(front: Front) -> list[Table]:
    """Return what else a task says of the candidates and the teacher on *test*, in a table; in none if that is
    nothing."""
    rows = {c.id: {name: (n.value, n.low, n.high) for name, n in c.further.items()} for c in front if c.further}
    if not rows:
        return []
    said = front.teacher.get("further", {})
    rows = {"teacher": {name: (n["value"], n["low"], n["high"]) for name, n in said.items()}, **rows}
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    for head in ("id", *(f"test {name.replace('_', ' ')}" for name in names)):
        table.add_column(head, justify="left" if head == "id" else "right")
    for one, row in rows.items():
        cells = ("{:.3g} ({:.3g}-{:.3g})".format(*row[name]) if name in row else "" for name in names)
        table.add_row(one, *cells, style="dim" if one == "teacher" else "")
    return [table]


def _generation(candidate: Candidate, batch: int) -> list[str]:
    """Return the time to the first token, the tokens a second of all sequences, and the time of each further one."""
    first, rate = candidate.ttft_ms, candidate.tokens_per_second
    if first is None or rate is None:
        return ["", "", ""]
    return [f"{first.value:.3g}", f"{rate.value:.3g}", f"{1e3 * batch / rate.value:.3g}"]


def repriced_table(found: Repriced) -> Group:
    """Return a run's front on another target, how it differs from that on the run's own, and what is not on it."""
    front, before = found.front, found.before
    here, there = front.target["name"], before.target["name"]
    ranks = {c.id: f"{place}." for place, c in enumerate(before, 1)}
    notes = [
        f"Latency, memory and energy are predicted for {here}; quality is as scored on the run's processor, "
        f"{before.confidence['scored_on']}.",
        f"was: the place by latency on the run's own front, on {there}; - for what was not on it.",
    ]
    gone = [c.id for c in before if c.id not in {one.id for one in front} and c.id not in found.refused]
    if gone:
        notes.append(f"On the front on {there}, not here: {', '.join(gone)}")
    notes += [f"Refused: {name}: {reason}" for name, reason in found.refused.items()]
    if found.removed:
        notes.append(
            f"Their folders were removed, since they were not on the front on {there}: {', '.join(found.removed)}; "
            f"autolite search ... --target {here} --out ... makes candidates for {here}"
        )
    if found.promising:
        notes.append(
            f"Plans that were only screened and look better here: {len(found.promising)}; type autolite search ... "
            f"--target {here} --out ... to train them"
        )
    return Group(front_table(front, ranks) if front.candidates else misses_table(front), *map(Text, notes))


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
            ", ".join(f"{name} ({excess:.1%} beyond)" for name, excess in miss["blocked_by"].items()),
        )
    return table


def targets_table(profiles: dict[str, Profile]) -> Table:
    """Return one row a target."""
    table = Table(caption="a model runs on the first of several processors; docs/targets.md says how to choose another")
    for head in ("target", "runs on", "memory", "what it is"):
        table.add_column(head)
    for name, profile in profiles.items():
        memory = f"{profile.memory.size.value:g} GB"
        others = [unit for unit in profile.units if unit is not profile.unit and not unit.unavailable]
        units = "\n".join(_unit(unit) for unit in (profile.unit, *others))
        table.add_row(name, units, memory, profile.description)
    table.add_row("local", "this machine", "", "measured here when first used")
    return table


def _unit(unit: ComputeUnit) -> str:
    return f"{unit.name}, {unit.threads} thread{'s' if unit.threads > 1 else ''}"


def profile_table(profile: Profile) -> Table:
    """Return every number of a profile with where it comes from."""
    caption = f"when it is warm: {profile.thermal}" if profile.thermal else None
    table = Table(title=f"{profile.name}: {profile.description}", caption=caption, title_justify="left")
    for head in ("number", "value", "kind", "+-", "source", "date"):
        table.add_column(head)
    for path, number in profile.numbers().items():
        unit = "" if number.unit == "1" else f" {number.unit}"
        row = (f"{number.value:g}{unit}", number.kind, f"{number.sigma:.0%}", number.source, str(number.date))
        table.add_row(path, *row)
    return table


def variants_table(rows: Sequence[tuple[Place, Sequence[Found], str]]) -> Table:
    """The options of each place: the chosen one is bold, those that compute something else are struck out."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("place", "format", "sizes", "microseconds of each option"):
        table.add_column(column, no_wrap=column != "microseconds of each option")
    for place, options, chosen in rows:
        cells = []
        for found in options:
            style = "bold green" if found.option == chosen else "" if found.equivalent else "strike dim"
            text = f"{found.option} {found.microseconds:,.{0 if found.microseconds >= 100 else 1}f}"
            cells.append(f"[{style}]{text}[/]" if style else text)
        table.add_row(place.kind, place.format, " x ".join(map(str, place.sizes)), "   ".join(cells))
    return table


def health_table(health: Health) -> Table:
    """Return what a device is and how it does."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    degrees = "" if health.celsius is None else f"{health.celsius:.0f} degrees"
    limit = "" if health.margin_celsius is None else f", slows down {health.margin_celsius:.0f} above that"
    for name, text in {
        "device": f"{health.model}, {health.machine}, {health.cores} cores",
        "system": f"{health.system}, {health.libc}" + (f", Python {health.python}" if health.python else ""),
        "onnxruntime": health.onnxruntime or "not installed",
        "memory": size(health.memory_bytes),
        "free on disk": size(health.free_bytes),
        "temperature": degrees + limit or "it does not tell",
        "clocks": ", ".join(f"{each} MHz" for each in health.megahertz or ()) or "it does not tell",
    }.items():
        table.add_row(name, text)
    return table


def measured_table(found: Measured) -> Group:
    """Return models that were timed on a device, each with what was predicted of it."""
    device, predicted = found.health, any(row.predicted for row in found.rows)
    first = next(iter(found.rows[0].measured.values()))
    table = Table(
        title=f"{device.model}, {found.workload}, {first.runtime}; intervals 95 %",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    heads = ["model", "latency ms", "p90", "faster", "size", "memory"]
    heads += [f"predicted by {found.profile}", "off by"] if predicted else []
    for head in heads:
        table.add_column(head, justify="left" if head == "model" else "right", overflow="fold")
    for row in found.rows:
        latency, ratio, memory = (row.measured.get(name) for name in ("latency_ms", "faster", "memory_bytes"))
        assert latency is not None
        cells = [
            row.path,
            f"{latency.value:.3g} ({latency.low:.3g}-{latency.high:.3g})",
            f"{row.measured['p90_ms'].value:.3g}",
            "" if ratio is None else f"{ratio.value:.2f}x ({ratio.low:.2f}-{ratio.high:.2f})",
            size(row.size_bytes),
            "" if memory is None else size(memory.value),
        ]
        if guess := row.predicted.get("latency_ms"):
            cells += [
                f"{guess.value:.3g} ({guess.low:.3g}-{guess.high:.3g})",
                f"{guess.value / latency.value - 1:+.0%}",
            ]
        table.add_row(*cells)
    return Group(table, *map(Text, _notes_of(found)))


def _notes_of(found: Measured) -> Iterator[str]:
    """What there is to say of how it was measured."""
    worst = max(found.rows, key=lambda row: abs(row.drift))
    if abs(worst.drift) > DRIFT:
        way = "slower" if worst.drift > 0 else "faster"
        yield (
            f"{worst.path} was {abs(worst.drift):.0%} {way} in the end than in the beginning: the device changed its "
            "clock, or something else ran on it; let it cool, or give it more time with --seconds"
        )
    degrees = [state.celsius for state in found.states if state.celsius is not None]
    if degrees:
        yield f"{degrees[0]:.0f} degrees in the beginning, {max(degrees):.0f} at most"
    for reason in dict.fromkeys(row.unpredicted for row in found.rows if row.unpredicted):
        few = "" if any(row.predicted for row in found.rows) else "nothing is predicted: "
        names = ", ".join(row.path for row in found.rows if row.unpredicted == reason)
        yield few + reason if few else f"not predicted: {names}: {reason}"


def calibration_table(
    found: Calibrated, before: str = "by the probes alone", after: str = "calibrated, by models of other families"
) -> Table:
    """Return how far the predictions of a calibrated profile are off; what they were `before` and `after` it."""
    table = Table(title=found.profile.description, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
    for head in (f"of {len(found.errors)} models", "mean error", "within 10 %", "worst"):
        table.add_column(head, justify="left" if head.startswith("of ") else "right")
    for name, errors in {before: found.before, after: found.errors}.items():
        sizes = abs(errors)
        table.add_row(name, f"{sizes.mean():.1%}", f"{(sizes <= 0.1).mean():.0%}", f"{errors[sizes.argmax()]:+.0%}")
    return table
