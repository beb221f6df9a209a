"""The command line: parse, validate, call one function."""

from __future__ import annotations

import os

import click

from autolite.cli import models, search, targets
from autolite.cli.terminal import reported


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="autolite")
@reported
def main() -> None:
    r"""Compress a Hugging Face transformer for a device by searching.

    \b
    Examples:
      autolite search --target pixel8                      # the embedded demo: nothing to download
      autolite search --model ./my-bert --data reviews.jsonl --target local --max-drop 1% --budget 15m
      autolite front runs/my-bert-local
      autolite export runs/my-bert-local --max-drop 1% deploy/
      autolite measure deploy/ --target ssh://pi@raspberrypi
      autolite profile deploy/
    """
    # Set before any heavy import: a progress bar of a library or a fork of the tokenizer would garble the live view.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


for command in (
    search.search,
    search.worker,
    search.front,
    search.export,
    models.measure,
    models.profile,
    models.chat,
    targets.targets,
    targets.device,
    targets.calibrate,
    models.variants,
):
    main.add_command(command)
