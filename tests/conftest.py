"""A tiny user: a model folder and a data file, as `autolite search` takes them."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

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


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 400 labelled sentences."""
    return write_jsonl(tmp_path_factory.mktemp("data") / "reviews.jsonl", sentences(400, 0))


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
