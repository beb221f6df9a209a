"""Look at a model: how long it takes, and where, and what it says."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import click

from autolite.cli.terminal import numbers, reported, terminal, told
from autolite.errors import InputError, ModelError


@click.command()
@click.argument("paths", metavar="DIR...", nargs=-1, required=True, type=click.Path(path_type=str))
@click.option(
    "--target", "device", default="local", show_default=True, help="Or ssh://[user@]host[:port], adb://[serial]."
)
@click.option(
    "--workload", help="The call: batch=1,tokens=64,threads=1.  [default: the first model's; else 128 tokens]"
)
@click.option("--profile", help="Target that the prediction is by.  [default: the device's own, if it is known]")
@click.option("--seconds", type=click.FloatRange(min=0), help="For all calls together.  [default: 4 for each model]")
@click.option("--cores", help="To run on these only: 4-7 or 0,2.  [default: any]")
@click.option("--json", "as_json", is_flag=True, help="JSON on standard output.")
@reported
def measure(paths: tuple[str, ...], device: str, cores: str | None, as_json: bool, **how: Any) -> None:
    r"""Time models on a device, and compare with what was predicted.

    DIR is a candidate's folder, another folder or file with a model.onnx, or a run: its teacher and all its candidates.
    All are timed in turn; "faster" is against the first one. docs/devices.md has more.

    \b
    Examples:
      autolite measure deploy/
      autolite measure runs/demo-pixel8 --target ssh://pi@raspberrypi
      autolite measure model.onnx deploy/ --target adb:// --workload tokens=32,threads=4 --cores 4-7
    """
    from autolite.devices.measure import measure_models
    from autolite.report.tables import measured_table

    found = measure_models(paths, device, cores=numbers(cores), progress=told, **how)
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=1))
    else:
        terminal().print(measured_table(found))


@click.command()
@click.argument("path", metavar="DIR", type=click.Path(path_type=str))
@click.option("--workload", help="The call: batch=1,tokens=64,threads=1.  [default: the candidate's; else 128 tokens]")
@click.option("--by", type=click.Choice(["operator", "layer", "node"]), default="operator", show_default=True)
@click.option("--top", type=click.IntRange(min=1), help="Rows of the table.  [default: 12 operators, 20 nodes]")
@click.option("--json", "as_json", is_flag=True, help="All operators, layers and nodes on standard output.")
@reported
def profile(path: str, workload: str | None, by: Any, top: int | None, as_json: bool) -> None:
    r"""Show where the microseconds of a model go.

    DIR is a candidate's folder, or another folder or file with a model.onnx. docs/profile.md explains the columns.

    \b
    Examples:
      autolite profile runs/demo-pixel8/candidates/92a9dfd2
      autolite profile deploy/ --by layer --workload batch=1,tokens=64,threads=1
      autolite profile model.onnx --by node --top 30
      autolite profile deploy/ --json
    """
    from autolite.profiling import profile as profiled
    from autolite.report.operators import operators_table

    found = profiled(path, workload, progress=told)
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=1, allow_nan=False))
    else:
        terminal().print(operators_table(found, by, top))


@click.command()
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="JSON on standard output.")
@reported
def variants(threads: int, as_json: bool) -> None:
    r"""Show which equivalent forms of a graph's pieces were timed on this machine, and which is taken.

    \b
    Examples:
      autolite variants
      autolite variants --threads 2 --json
    """
    from autolite.report.tables import variants_table
    from autolite.runtime.tune import fastest, table

    rows = table(threads)
    if as_json:
        found = [
            {
                "place": place.kind,
                "format": place.format,
                "sizes": place.sizes,
                "chosen": fastest(place, options),
                "options": [vars(o) for o in options],
            }
            for place, options in rows
        ]
        click.echo(json.dumps(found, indent=1))
    elif rows:
        terminal().print(variants_table([(place, options, fastest(place, options)) for place, options in rows]))
    else:
        click.echo(f"nothing was timed on {threads} threads yet: a search with --target local does it where it matters")


@click.command()
@click.argument("path", metavar="DIR", type=click.Path(path_type=str))
@click.option("--prompt", help="Answer this and end.  [default: ask for one after another]")
@click.option("--system", help="What the model is told first; needs a tokenizer with a chat template.")
@click.option("--max-new-tokens", type=int, help="Of an answer.  [default: 256, or what the model has room for]")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0: the most probable token, always.")
@click.option("--top-k", type=int, default=0, help="Draw from so many of the most probable tokens.  [default: all]")
@click.option("--top-p", type=float, default=1.0, help="Draw from those with this probability together.  [default: 1]")
@click.option("--seed", type=int, help="Equal seeds draw equal answers.")
@reported
def chat(path: str, prompt: str | None, system: str | None, **how: Any) -> None:
    r"""Talk with a language model.

    DIR is a candidate's folder. With a chat template the conversation is remembered; without one, each text is
    continued. Ctrl-C ends an answer, and Ctrl-D the conversation.

    \b
    Examples:
      autolite chat deploy/
      autolite chat deploy/ --temperature 0.8 --top-p 0.95 --seed 1
      autolite chat deploy/ --prompt "Once upon a time" --max-new-tokens 60
    """
    from autolite.inference import LanguageModelingPipeline, pipeline

    model = pipeline(path)
    if not isinstance(model, LanguageModelingPipeline):
        raise ModelError(f"{path} was made for the task '{model.task}'; give the folder of a language model")
    template = model.tokenizer.chat_template is not None
    if system is not None and not template:
        raise InputError("--system needs a chat template, which the tokenizer does not have; leave it out")
    first = [] if system is None else [{"role": "system", "content": system}]

    def answer(messages: list[dict[str, str]]) -> str:
        return _shown(model.stream(messages if template else messages[-1]["content"], **how))

    if prompt is not None:
        answer([*first, {"role": "user", "content": prompt}])
    else:
        _converse(first, answer)


def _converse(first: list[dict[str, str]], answer: Callable[[list[dict[str, str]]], str]) -> None:
    said = list(first)
    for text in _asked():
        said.append({"role": "user", "content": text})
        try:
            said.append({"role": "assistant", "content": answer(said)})
        except InputError as error:  # most likely the conversation has become too long
            told(f"error: {error}. The conversation begins anew")
            said = list(first)


def _asked() -> Iterator[str]:
    """Yield what the user says, until Ctrl-D, or Ctrl-C at the prompt."""
    console = terminal()
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            if text := console.input("[bold]> [/bold]").strip():
                yield text
    click.echo()


def _shown(pieces: Iterator[str]) -> str:
    """Write pieces as they come, and return the whole; Ctrl-C ends it early."""
    found = []
    with suppress(KeyboardInterrupt):
        for piece in pieces:
            found.append(piece)
            click.echo(piece, nl=False)
    click.echo()
    return "".join(found)
