"""A distillation that is killed goes on and ends with the bits of one that was not; these tests really kill it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from autolite.architecture import shape_of
from autolite.techniques import checkpoint
from autolite.techniques.base import Context, Student, weights_digest
from autolite.techniques.checkpoint import Checkpoint
from autolite.techniques.distill import Distill, DistillConfig
from autolite.techniques.schedules import WARM_UP, stable_steps, warm_up_stable_decay
from autolite.techniques.training import Optimization, train
from autolite.testing import tiny_model
from tests.techniques.test_objective import shuffled

MakeContext = Callable[..., Context]
DISTILL = Distill()
STEPS = 60
# Everything that a resumed run has to find again: the maps to the teacher's width, the order of several batches a step,
# augmented epochs, schedules.
CONFIG = DistillConfig(
    steps=STEPS, batch_size=5, accumulate=2, attention=1.0, schedule="cosine", temperature_end=1.0, learning_rate=1e-3
)
CHILD = """
import sys
from pathlib import Path
from autolite.techniques import checkpoint
from tests.techniques import conftest, test_checkpoint as test

checkpoint.SECONDS = 0.0
make_context = conftest.make_context.__wrapped__()
context = test.prepared(make_context, Path(sys.argv[1]), lambda done, total: print(done, flush=True))
test.DISTILL.apply(test.narrow(), test.CONFIG, context)
"""


def narrow() -> Student:
    model = tiny_model("bert", hidden_size=16, num_attention_heads=2, layers=2)
    return Student(model, shape_of(model))


def prepared(make_context: MakeContext, cache: Path | None, progress: Callable[[int, int], None]) -> Context:
    return replace(make_context(cache=cache), augment=shuffled, progress=progress)


def test_a_killed_distillation_ends_with_the_same_bits(make_context: MakeContext, tmp_path: Path) -> None:
    steps: list[int] = []
    whole = DISTILL.apply(narrow(), CONFIG, prepared(make_context, None, lambda done, _: steps.append(done)))
    assert steps[0] == 10
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= STEPS // 2:
            break
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "checkpoints").glob("*.safetensors"))) == 1
    steps.clear()
    resumed = DISTILL.apply(narrow(), CONFIG, prepared(make_context, tmp_path, lambda done, _: steps.append(done)))
    assert steps[0] >= STEPS // 2, "what was done is not done again"
    assert weights_digest(resumed.model) == weights_digest(whole.model)
    assert not list((tmp_path / "checkpoints").iterdir()), "a finished run leaves none"


def noisy(parameter: nn.Parameter) -> Callable[[int, int], torch.Tensor]:
    """A loss with randomness of torch's global generator."""
    return lambda item, step: ((parameter - item) ** 2 + torch.randn(3) * parameter).sum()


def trained(file: Path | None, steps: int, stop: int | None = None) -> torch.Tensor:
    parameter = nn.Parameter(torch.zeros(3))

    def after_step() -> None:
        nonlocal stop
        if stop is not None:
            stop -= 1
            if stop < 0:
                raise KeyboardInterrupt

    store = None if file is None else Checkpoint(file)
    batches = iter(range(1000))
    settings = Optimization("test", steps, 0.1)
    train([parameter], noisy(parameter), batches, settings, seed=3, checkpoint=store, after_step=after_step)
    return parameter.detach()


@pytest.mark.parametrize("stop", [1, 7, 19])
def test_the_generator_goes_on_too(stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    before = torch.get_rng_state()
    whole = trained(None, 20)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "run", 20, stop)
    assert (tmp_path / "run").is_file()
    assert torch.equal(trained(tmp_path / "run", 20), whole)
    assert torch.equal(torch.get_rng_state(), before), "the caller's generator stays as it was"


def test_a_longer_run_goes_on_from_a_shorter_one_and_ends_with_the_same_bits(
    make_context: MakeContext, tmp_path: Path
) -> None:
    steps: list[int] = []
    long, short = (CONFIG.model_copy(update={"steps": n, "schedule": "constant"}) for n in (STEPS, STEPS // 3))
    whole = DISTILL.apply(narrow(), long, prepared(make_context, None, lambda done, _: None))
    context = replace(prepared(make_context, None, lambda done, _: steps.append(done)), trunks=tmp_path)
    DISTILL.apply(narrow(), short, context)
    assert [file.stem.rpartition("-")[2] for file in tmp_path.iterdir()] == [str(stable_steps(STEPS // 3))]
    steps.clear()
    longer = DISTILL.apply(narrow(), long, replace(context, last=True))
    assert steps[0] > stable_steps(STEPS // 3), "what was done is not done again"
    assert weights_digest(longer.model) == weights_digest(whole.model)
    assert len(list(tmp_path.iterdir())) == 1, "the last run keeps nothing for longer ones"
    other = DISTILL.apply(narrow(), long.model_copy(update={"temperature": 2.0}), context)
    assert weights_digest(other.model) != weights_digest(whole.model)


def test_a_run_whose_weights_go_to_their_ends_has_nothing_in_common_with_a_longer_one(
    make_context: MakeContext, tmp_path: Path
) -> None:
    context = replace(prepared(make_context, None, lambda done, _: None), trunks=tmp_path)
    DISTILL.apply(narrow(), CONFIG.model_copy(update={"steps": 10}), context)
    assert not list(tmp_path.iterdir())


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_runs_of_any_length_begin_alike(steps: int, more: int) -> None:
    rates = [warm_up_stable_decay(step, steps) for step in range(steps)]
    stable = stable_steps(steps)
    assert rates[:stable] == [warm_up_stable_decay(step, steps + more) for step in range(stable)]
    assert 0 < min(rates) <= max(rates) <= 1
    assert rates[stable:] == sorted(rates[stable:], reverse=True) or stable < WARM_UP


def test_how_often_it_is_saved_changes_nothing(
    make_context: MakeContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DistillConfig(steps=5, batch_size=8)
    context = make_context(cache=tmp_path)
    rarely = DISTILL.apply(narrow(), config, context)
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    always = DISTILL.apply(narrow(), config, make_context())
    assert weights_digest(rarely.model) == weights_digest(always.model)


def test_a_checkpoint_is_written_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Checkpoint(tmp_path / "run")
    assert not store.due()
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    assert store.due()


@pytest.mark.parametrize("damage", [b"", b"\0" * 64, b"not a checkpoint"])
def test_a_damaged_checkpoint_means_the_beginning(damage: bytes, tmp_path: Path) -> None:
    (tmp_path / "run").write_bytes(damage)
    assert torch.equal(trained(tmp_path / "run", 9), trained(None, 9))


def test_another_run_is_not_gone_on_from(
    make_context: MakeContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name of a checkpoint depends on the settings, the student, the data, the seed and the hooks."""
    names: set[str] = set()
    monkeypatch.setattr(Checkpoint, "restore", lambda self, *_: names.add(self.file.name) or 0)
    context = make_context(cache=tmp_path)
    config = DistillConfig(steps=1, batch_size=8)
    other = np.resize(context.train.labels[::-1], len(context.train))
    for student, settings, where in (
        (context.teacher, config, context),
        (narrow(), config, context),
        (context.teacher, config.model_copy(update={"alpha": 0.3}), context),
        (context.teacher, config, replace(context, seed=1)),
        (context.teacher, config, replace(context, augment=shuffled)),
        (context.teacher, config, replace(context, train=replace(context.train, labels=other), memory={})),
    ):
        DISTILL.apply(student, settings, where)
    assert len(names) == 6
