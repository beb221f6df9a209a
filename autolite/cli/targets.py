"""Targets and devices."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click
from click.core import ParameterSource

from autolite.cli.terminal import numbers, reported, terminal, told
from autolite.errors import InputError


@click.group(invoke_without_command=True)
@click.pass_context
@reported
def targets(context: click.Context) -> None:
    r"""List the devices that can be searched for.

    \b
    Examples:
      autolite targets
      autolite targets show pixel8
    """
    if context.invoked_subcommand is None:
        from autolite.hardware.profile_files import load_profile, profile_names
        from autolite.report.tables import targets_table

        terminal().print(targets_table({name: load_profile(name) for name in profile_names()}))


@targets.command("show")
@click.argument("name")
@reported
def show_target(name: str) -> None:
    r"""Show every number of a target with its source; "local" measures this machine first.

    \b
    Example:
      autolite targets show raspberry-pi-5
    """
    from autolite.hardware import load_target
    from autolite.report.tables import profile_table

    terminal().print(profile_table(load_target(name, progress=told)))


@click.group()
@reported
def device() -> None:
    r"""Look after a device that models are timed on.

    \b
    Examples:
      autolite device setup ssh://pi@raspberrypi
      autolite device check adb://
    """


@device.command("setup")
@click.argument("address")
@click.option(
    "--aar",
    type=click.Path(path_type=Path),
    help="For a phone: the package onnxruntime-android, downloaded.",
)
@reported
def setup_device(address: str, aar: Path | None) -> None:
    r"""Install ONNX Runtime in a folder of its own on a device, which needs no internet.

    A board needs Python; for a phone, Android's NDK has to be here. docs/devices.md has more.

    \b
    Examples:
      autolite device setup ssh://pi@raspberrypi
      autolite device setup adb:// --aar onnxruntime-android-1.32.0.aar
    """
    from autolite.devices import connected
    from autolite.devices.setup import setup
    from autolite.report.tables import health_table

    with connected(address) as there:
        terminal().print(health_table(setup(there, told, aar)))
    click.echo(f"next: autolite measure DIR --target {address}")


@device.command("check")
@click.argument("address")
@click.option("--json", "as_json", is_flag=True, help="JSON on standard output.")
@reported
def check_device(address: str, as_json: bool) -> None:
    r"""Show what a device is and how it does.

    \b
    Examples:
      autolite device check ssh://pi@raspberrypi
      autolite device check adb:// --json
    """
    from autolite.devices import connected
    from autolite.devices.base import health_of
    from autolite.report.tables import health_table

    with connected(address) as there:
        found = health_of(there)
    if as_json:
        click.echo(json.dumps(asdict(found), indent=1))
        return
    terminal().print(health_table(found))
    if found.onnxruntime is None:
        click.echo(f"next: autolite device setup {address}")


@click.command()
@click.argument("address", metavar="[ADDRESS|TARGET]", default="local")
@click.option("--budget", default="5m", show_default=True, help="Time: 2m, 10m.")
@click.option("--threads", type=click.IntRange(min=1), help="That models compute with.  [default: all cores]")
@click.option("--cores", help="To run on these only: 4-7 or 0,2.  [default: any]")
@click.option("--fresh", is_flag=True, help="Forget what was timed before.")
@click.option("--table", type=click.Path(path_type=Path), help="CSV file of latencies measured elsewhere.")
@click.option(
    "--out",
    type=click.Path(path_type=str),
    help="File.  [default: after the device or the table; local: --target local has it]",
)
@click.pass_context
@reported
def calibrate(
    context: click.Context,
    address: str,
    budget: str,
    threads: int | None,
    cores: str | None,
    fresh: bool,
    table: Path | None,
    out: str | None,
) -> None:
    r"""Measure a device for predictions: probes first, then small models of many kinds.

    What comes out is a profile to search for. An interrupted calibration goes on where it was. With a table of
    latencies that were measured elsewhere, nothing is timed: the target named is corrected by it.

    \b
    Examples:
      autolite calibrate
      autolite calibrate ssh://pi@raspberrypi --budget 10m --out my-board.yaml
      autolite calibrate adb:// --cores 4-7 --out my-phone.yaml
      autolite calibrate raspberry-pi-5 --table latencies.csv --out my-board.yaml
    """
    if table is not None:
        for name in ("budget", "threads", "cores", "fresh"):
            if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
                raise click.UsageError(f"--{name} is about timing, and with --table nothing is timed: leave it out")
        _calibrate_by_table(address, table, out)
        return
    from autolite.devices.calibrate import calibrate as calibrated
    from autolite.devices.calibrate import destination, keep
    from autolite.report.tables import calibration_table
    from autolite.search.settings import parse_budget

    seconds, chosen = parse_budget(budget).seconds, numbers(cores)
    if seconds is None:
        raise click.BadParameter("give a time, such as 5m", param_hint="--budget")
    file = destination(address, chosen, out)  # what is wrong there is told before anything is timed
    found = calibrated(address, threads=threads, cores=chosen, budget=seconds, fresh=fresh, progress=told)
    terminal().print(calibration_table(found))
    keep(found.profile, file)
    click.echo(f"next: autolite search --target {file or 'local'} --workload threads={found.profile.threads}")


def _calibrate_by_table(name: str, table: Path, out: str | None) -> None:
    from autolite.devices.calibrate import destination, keep
    from autolite.hardware import LOCAL
    from autolite.hardware.profile_files import load_profile
    from autolite.hardware.table import calibrated_by_table, read_table
    from autolite.report.tables import calibration_table

    if name == LOCAL:
        raise InputError(
            f"{table} corrects a target: name the one that is nearest to its device, as in autolite calibrate "
            f"raspberry-pi-5 --table {table}"
        )
    file = destination(name, (), out or f"{table.stem}.yaml")
    profile = load_profile(name)
    found = calibrated_by_table(profile, read_table(table, profile), table.name)
    terminal().print(calibration_table(found, f"{profile.name} as it was", "calibrated, by other models of the table"))
    keep(found.profile, file)
    click.echo(f"next: autolite search --target {file} --workload threads={found.profile.threads}")
