"""The documents are true: their commands parse, their Python runs, their links lead somewhere."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch

import autolite
from autolite import contracts, registry
from autolite.architecture import shape_of
from autolite.cli import main
from autolite.runtime.emit import emit
from autolite.space import load_space
from autolite.tasks.custom import CustomTask
from autolite.techniques.base import Student
from autolite.testing import tiny_model

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> list[str]:
    """Every `autolite ...` line of a code block, and the examples of every command's help."""
    text = "\n".join(d.read_text(encoding="utf-8") for d in DOCUMENTS)
    blocks = "\n".join(re.findall(r"```\w*\n(.*?)```", text, flags=re.S))
    helps = "\n".join(c.help or "" for c in [main, *main.commands.values()])
    known = "|".join(main.commands)
    lines = re.findall(rf"^\s*\$?\s*(autolite (?:{known}).*)$", f"{blocks}\n{helps}", flags=re.M)
    return sorted({line.split("#")[0].strip() for line in lines})


def test_there_are_examples() -> None:
    assert len(commands()) >= 8


@pytest.mark.parametrize("line", commands())
def test_every_documented_command_parses(line: str) -> None:
    words = shlex.split(line)[1:]
    command: click.Command = main
    while isinstance(command, click.Group) and words:
        command = command.commands[words.pop(0)]
    command.make_context(command.name, words, resilient_parsing=False)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_nothing_is_left_to_be_filled_in(document: Path) -> None:
    assert "@@" not in document.read_text(encoding="utf-8")


def test_the_search_spaces_of_the_guide_load(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "spaces.md").read_text(encoding="utf-8")
    example, by_layer = re.findall(r"```yaml\n(.*?)```", text, flags=re.S)  # a space, and steps that it may have
    for steps in (None, by_layer):
        space = example if steps is None else re.sub(r"(?<=\nsteps:).*?(?=stages:)", "\n" + steps, example, flags=re.S)
        (tmp_path / "mine.yaml").write_text(space, encoding="utf-8")
        found = load_space(str(tmp_path / "mine.yaml"))
        assert found.name == "mine"
        assert bool(found.layered) == (steps is not None)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_links_lead_to_files(document: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text(encoding="utf-8")):
        assert (document.parent / target).exists(), target


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules["autolite.search"], "DEMO_BUDGET", "4trials")
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "deploy" / "model.onnx").is_file()


def test_the_loop_over_a_cache_generates_what_transformers_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8"), flags=re.S)
    model = tiny_model("llama", "language-modeling", vocab_size=500)
    emit(Student(model, shape_of(model)), tmp_path / "deploy")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(code, "deploy.md", "exec"), names)
    prompt = torch.tensor([[1, 403, 407]])
    expected = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False, eos_token_id=None
    )
    assert names["tokens"] == expected[0, 3:].tolist()


def test_the_functions_of_the_guide_keep_their_promises(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(encoding="utf-8"), flags=re.S
    )
    given: dict[str, Any] = {}
    monkeypatch.setattr(autolite, "search", lambda *model_and_data, **options: given.update(options))
    exec(compile(code, "extending.md", "exec"), {})
    inner = registry.get("task", "text-classification")
    contracts.check_task(CustomTask(inner, given["loss"], given["metric"]), tiny_data, "bert")
    train = contracts.tiny_context("bert", inner).train
    shorter = given["augment"](train, np.random.default_rng(0))
    assert all(len(a) <= len(b) for a, b in zip(shorter.input_ids, train.input_ids, strict=True))
