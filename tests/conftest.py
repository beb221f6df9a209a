"""A tiny user: a model folder, a data file and a search space, as `autolite search` takes them."""

from __future__ import annotations

import atexit
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import autolite
from autolite.front import Result
from tests.databases import postgresql

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before torch is imported: tests run in a process for each core, and threads that compete for cores crawl.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The locks of a machine are in its temporary folder: tests of one process must not wait for timings in another's, whose
# work they may hold up until something happens.
os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())  # what failed tests leave stays there
os.environ["TMPDIR"] = tempfile.mkdtemp(prefix="autolite-tests-")
tempfile.tempdir = None
# What was found out in other runs of the tests, or by whoever runs them, is not there.
os.environ["XDG_CACHE_HOME"] = os.path.join(os.environ["TMPDIR"], "cache")
os.chmod(os.environ["TMPDIR"], 0o755)  # PostgreSQL's server has a user of its own
atexit.register(shutil.rmtree, os.environ["TMPDIR"], ignore_errors=True)

GOOD, BAD = ("great", "fine", "lovely", "bright"), ("awful", "poor", "dull", "broken")


def sentences(count: int, seed: int) -> list[dict[str, object]]:
    """Sentences whose label is decided by one telling word among fillers."""
    rng = random.Random(seed)
    rows: list[dict[str, object]] = []
    for _ in range(count):
        label = rng.random() < 0.5
        words = [f"w{rng.randrange(20)}" for _ in range(rng.randint(3, 9))]
        words.insert(rng.randrange(len(words)), rng.choice(GOOD if label else BAD))
        rows.append({"text": " ".join(words), "label": int(label)})
    return rows


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user who has run nothing: what others keep in the cache folder is not there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 400 labelled sentences."""
    return write_jsonl(tmp_path_factory.mktemp("data") / "reviews.jsonl", sentences(400, 0))


@pytest.fixture(scope="session")
def hopeless_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same sentences with labels that nothing in them tells."""
    rows = [{**row, "label": i % 7 % 2} for i, row in enumerate(sentences(400, 0))]
    return write_jsonl(tmp_path_factory.mktemp("data") / "coin.jsonl", rows)


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small BERT that has learnt those sentences."""
    import torch

    from autolite.testing import tiny_model, tiny_tokenizer

    folder = tmp_path_factory.mktemp("teacher")
    tokenizer = tiny_tokenizer([*GOOD, *BAD])
    model = tiny_model("bert", num_labels=2)
    model.train()
    rows = sentences(400, 1)
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for start in [*range(0, 400, 50)] * 12:
        batch = rows[start : start + 50]
        inputs = tokenizer([str(r["text"]) for r in batch], padding=True, return_tensors="pt")
        loss = model(**inputs, labels=torch.tensor([r["label"] for r in batch])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# A search small enough to be run a dozen times in the tests: a few training steps.
SPACE = """
name: tiny
description: All four techniques, a few steps each.
steps:
  - share: {part: [none, ffn], groups: 2}
  - prune: {heads: [1.0, 0.5], ffn: {low: 0.25, high: 1.0, step: 0.25}, depth: [1.0, 0.67], round_to: 8}
  - distill: {temperature: {low: 1.0, high: 4.0, stage: recover, default: 2.0}, batch_size: 16}
  - quantize: {attention: [int8, fp32], ffn: [int8, kmeans4, fp32], embedding: [fp32, int8, int4]}
stages:
  screen: {trials: 6, effort: 2}
  recover: {trials: 3, effort: 4, max_effort: 20}
  confirm: {trials: 4, effort: 6, max_effort: 40}
start:
  - {share.part: none, prune.heads: 1.0, prune.ffn: 1.0, prune.depth: 1.0, quantize.attention: int8}
"""

RunSearch = Callable[..., Result]


@pytest.fixture(scope="session")
def tiny_space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("space") / "tiny.yaml"
    file.write_text(SPACE, encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def run_search(tiny_teacher: Path, tiny_data: Path, tiny_space: Path) -> RunSearch:
    """Return `autolite.search` on the tiny teacher; any argument can be replaced."""

    def run(**changes: Any) -> Result:
        usual = {"target": "pixel8", "space": str(tiny_space), "budget": "8trials"}
        return autolite.search(**{"model": tiny_teacher, "data": tiny_data, **usual, **changes})

    return run


@pytest.fixture(scope="session")
def finished(run_search: RunSearch, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """One finished search, shared by the tests that only look at what it left."""
    return run_search(out=tmp_path_factory.mktemp("runs") / "finished")


@pytest.fixture(scope="session")
def postgresql_url() -> Iterator[str]:
    """The URL of a PostgreSQL server; skips where there is none to start."""
    with postgresql() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a database, of either kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'shared.db'}"
    url: str = request.getfixturevalue("postgresql_url")
    return url
