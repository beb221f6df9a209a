"""Search, and what is done with what a search has found."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from autolite.cli.terminal import reported, terminal, told
from autolite.errors import NoCandidateError
from autolite.search.samplers import SAMPLERS

if TYPE_CHECKING:
    from autolite.front import Front

EXIT_INTERRUPTED = 130


@click.command()
@click.option(
    "--target",
    "--targets",
    required=True,
    help="A device of `autolite targets`, or the path of a profile; or several, by comma.",
)
@click.option("--model", help="A folder or a hub name; the embedded demo model if not given.")
@click.option("--data", help="A file (JSONL, CSV, TSV, Parquet, text; .gz of each), a folder, or a hub name.")
@click.option("--task", default="text-classification", show_default=True, help="Or language-modeling.")
@click.option("--budget", help="Time or trials: 90s, 15m, 1h30m, 40trials.  [default: 15m; demo: 150s]")
@click.option("--max-drop", help="Quality that may be lost, of the teacher's: 1%.")
@click.option("--min-quality", type=float, help="Absolute limit of the task's metric: 0.9.")
@click.option("--max-latency", help="Of a whole call: 5ms.")
@click.option("--max-ttft", help="Language models: time to the first token, 200ms.")
@click.option("--min-tokens-per-second", help="Language models, with --workload tokens=128,generated=64: 20.")
@click.option("--max-size", help="6MB.")
@click.option("--max-memory", help="100MB.")
@click.option("--strict", is_flag=True, help="Hold --max-drop against the lower end of the 95 % interval.")
@click.option("--objectives", default="quality,latency,size", show_default=True, help="What the front is of.")
@click.option("--space", help="A search space of search_spaces/, or a path.  [default: default; decoder; demo: quick]")
@click.option("--workload", help="The call that is priced: batch=1,tokens=64,threads=1.  [default: from the data]")
@click.option(
    "--runtime",
    default="onnxruntime",
    show_default=True,
    help="Or openvino (x86; needs autolite[openvino]), or auto: the faster of both on this machine.",
)
@click.option("--measure-on", help="A device that the finalists are timed on in the end: ssh://pi@raspberrypi, adb://.")
@click.option("--text", help="Column of the text, prompt or chat, if not found by convention.")
@click.option("--pair", "text_pair", help="Column of the second text of a pair.")
@click.option("--label", help="Column of the label, or of the response to a prompt.")
@click.option("--max-length", type=click.IntRange(min=1), help="Tokens of an example beyond which it is cut.")
@click.option("--stride", type=click.IntRange(min=1), help="Score texts in overlapping windows, so many tokens apart.")
@click.option("--unlabelled", help="More texts to distill on, without labels: a file, a folder, or a hub name.")
@click.option("--cache-size", help="The teacher's outputs kept on disk: 500MB.  [default: a tenth of the free space]")
@click.option("--out", type=click.Path(), help="Folder of the run.  [default: runs/MODEL-TARGET]")
@click.option("--storage", help="Any SQLAlchemy URL for the study.  [default: SQLite in the run's folder]")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Train each finalist with so many, and keep the best.",
)
@click.option("--device", default="cpu", show_default=True, help="Where training runs: cpu, cuda.")
@click.option(
    "--sampler",
    type=click.Choice(list(SAMPLERS)),
    default="additive",
    show_default=True,
    help="What proposes plans.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Further processes on this machine; all share its cores.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON event a line on standard output.")
@click.option("--quiet", is_flag=True, help="Only the path of the run.")
@reported
def search(as_json: bool, quiet: bool, **options: Any) -> None:
    r"""Search; the same command again goes on where it stopped.

    \b
    Examples:
      autolite search --target pixel8
      autolite search --model ./my-bert --data ./reviews --target raspberry-pi-5 --max-drop 1% --budget 1h
      autolite search --model ./my-bert --data ./reviews --targets pixel8,raspberry-pi-5
      autolite search --model ./my-bert --data ./reviews --target raspberry-pi-5 --measure-on ssh://pi@raspberrypi
      autolite search --model ./pair-bert --data mrpc.csv --text s1 --pair s2 --label same --target local
      autolite search --model ./my-llama --data notes.txt --task language-modeling --target local
      autolite search --model ./my-llama --data notes.txt --task language-modeling --target pixel8 --max-ttft 300ms

    \b
    Exit codes: 0 a front; 3 no candidate meets the constraints (nearest misses written);
                2 bad usage or input; 130 interrupted, front written.
    """
    import autolite
    from autolite.front import read_front
    from autolite.report.live import watch
    from autolite.report.tables import front_table, misses_table

    console = terminal()
    try:
        with watch(console, quiet=quiet, as_json=as_json) as observer:
            result = autolite.search(**options, observer=observer)
    except KeyboardInterrupt:
        if as_json:
            click.echo(json.dumps({"event": "interrupted"}))
        click.echo("interrupted: what was found is kept; the same command goes on from here", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except NoCandidateError as error:
        if error.run is not None and as_json:
            click.echo(_front_event(error.run))
        elif error.run is not None and not quiet:
            console.print(misses_table(read_front(error.run)))
        raise
    if as_json:
        click.echo(_front_event(result.path))
    elif quiet:
        click.echo(result.path)
    else:
        console.print(front_table(result.front) if result.front.candidates else misses_table(result.front))
        spent = result.front.budget
        click.echo(f"{result.path}/front.json: {_counted(result.front)} after {spent['spent_seconds']:.0f} s")
        for file in sorted(result.path.glob("front-*.json")):
            there = read_front(result.path, file.stem.removeprefix("front-"))
            click.echo(f"{file}: {_counted(there)} on {there.target['name']}")
        limit = "--max-drop 1% " if any(c.kept.value >= 0.99 for c in result.front) else ""
        click.echo(f"next: autolite export {result.path} {limit}deploy/")


def _counted(front: Front) -> str:
    return f"{len(front)} candidate{'' if len(front) == 1 else 's'}"


def _front_event(run: Path) -> str:
    return json.dumps({"event": "front", "path": str(run), **json.loads((run / "front.json").read_text("utf-8"))})


@click.command()
@click.argument("run", type=click.Path(path_type=str))
@click.option(
    "--storage", envvar="AUTOLITE_STORAGE", help="The URL that the search was given.  [default: SQLite in RUN]"
)
@click.option("--threads", type=click.IntRange(min=1), help="Cores for training and scoring.  [default: all]")
@click.option("--quiet", is_flag=True, help="Only errors.")
@reported
def worker(run: str, storage: str | None, threads: int | None, quiet: bool) -> None:
    r"""Evaluate trials of a search that runs, here or on another machine that sees RUN and the database.

    It may be stopped and killed at any time: its trial is taken up by another process. It ends with the search.

    \b
    Examples:
      autolite worker runs/my-bert-pixel8
      autolite worker runs/my-bert-pixel8 --storage postgresql+psycopg://me@server/searches --threads 4
    """
    import signal

    from autolite.report.live import watch
    from autolite.search.worker import work

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # both end it in the same way: what it holds is given up
    try:
        with watch(terminal(), quiet=quiet) as observer:
            done = work(run, storage, threads, observer)
    except KeyboardInterrupt:
        if not quiet:
            click.echo("interrupted: another process takes up its trial", err=True)
        sys.exit(EXIT_INTERRUPTED)
    if not quiet:
        click.echo(f"{run}: the search is finished; this worker evaluated {done} trials")


@click.command()
@click.argument("run", type=click.Path(path_type=str))
@click.option("--target", help="Price and rank everything that was confirmed for this target instead.")
@click.option("--workload", help="With --target: tokens=64,threads=1.  [default: the run's, on the target's threads]")
@click.option("--max-drop", help="With --target: quality that may be lost, 1%.  [default of each limit: the run's]")
@click.option("--max-latency", help="With --target: 5ms.")
@click.option("--max-ttft", help="With --target: time to the first token, 200ms.")
@click.option("--min-tokens-per-second", help="With --target: 20.")
@click.option("--max-size", help="With --target: 6MB.")
@click.option("--max-memory", help="With --target: 100MB.")
@click.option("--storage", help="With --target: the URL that the run was given.  [default: SQLite in its folder]")
@click.option("--json", "as_json", is_flag=True, help="front.json on standard output.")
@reported
def front(run: str, target: str | None, as_json: bool, **changes: str | None) -> None:
    r"""Show the front of a run, on its own target or on another one.

    Another target takes seconds: nothing is trained or scored again.

    \b
    Examples:
      autolite front runs/demo-pixel8
      autolite front runs/demo-pixel8 --target raspberry-pi-5
      autolite front runs/demo-pixel8 --target x86-avx512 --workload tokens=32,threads=1 --max-drop 3%
      autolite front runs/my-llama-local --target pixel8 --workload generated=64 --min-tokens-per-second 20
    """
    from autolite.front import read_front
    from autolite.report.tables import front_table, misses_table, repriced_table

    if target is None:
        if pointless := [name for name, value in changes.items() if value is not None]:
            raise click.UsageError(f"--{pointless[0].replace('_', '-')} needs --target, which it prices anew for")
        found, console = read_front(Path(run)), terminal()
        if as_json:
            click.echo(json.dumps(found.to_json(), indent=1))
            return
        console.print(front_table(found) if found.candidates else misses_table(found))
    else:
        from autolite.search.reprice import reprice

        repriced = reprice(run, target, **changes, progress=told)
        found = repriced.front
        if as_json:
            click.echo(json.dumps(found.to_json(), indent=1))
            return
        terminal().print(repriced_table(repriced))
    if not found.complete:
        click.echo("this run was interrupted: the same search command goes on from here")


@click.command()
@click.argument("run", type=click.Path(path_type=str))
@click.argument("out", type=click.Path(path_type=str))
@click.option("--target", help="Which of the targets that were searched for.  [default: the first]")
@click.option("--max-drop", help="Quality that may be lost: 1%.  [default: the run's own constraints]")
@click.option("--max-latency", help="5ms.")
@click.option("--max-ttft", help="Time to the first token: 200ms.")
@click.option("--min-tokens-per-second", help="20.")
@click.option("--max-size", help="6MB.")
@click.option("--by", type=click.Choice(["latency", "size"]), default="latency", show_default=True)
@click.option("--format", "form", type=click.Choice(["onnx", "ort"]), default="onnx", show_default=True)
@reported
def export(
    run: str,
    out: str,
    target: str | None,
    by: Any,
    form: Any,
    **given: str | None,
) -> None:
    r"""Copy the best candidate that meets the limits to OUT.

    The format ort is for the reduced builds of ONNX Runtime that phones and browsers have.

    \b
    Examples:
      autolite export runs/demo-pixel8 --max-drop 1% deploy/
      autolite export runs/demo-pixel8 --max-drop 3% --by size deploy-small/
      autolite export runs/my-llama-local --max-ttft 200ms deploy-llama/
      autolite export runs/demo-pixel8 --format ort deploy-phone/
    """
    from autolite.front import Result
    from autolite.search.settings import parse_limits

    limits = parse_limits(**given)
    picked = Result(Path(run)).pick(
        limits.max_drop,
        max_latency_ms=limits.max_latency_ms,
        max_ttft_ms=limits.max_ttft_ms,
        min_tokens_per_second=limits.min_tokens_per_second,
        max_size_bytes=limits.max_size_bytes,
        by=by,
        target=target,
    )
    folder = picked.export(out, form)
    chosen = picked.candidate
    size = (folder / "model.ort").stat().st_size if form == "ort" else int(chosen.size_bytes.value)
    click.echo(
        f"{out}: candidate {chosen.id}, {chosen.kept.value:.1%} kept, {chosen.faster.value:.1f}x faster "
        f"({chosen.latency_ms.source}), {size:,} bytes"
    )
