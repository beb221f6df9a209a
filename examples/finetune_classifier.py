"""Fine-tunes a sentence encoder into a classifier, to be compressed afterwards.

    python examples/finetune_classifier.py --model sentence-transformers/all-MiniLM-L6-v2 --data sst2/ --out teacher/
    autolite search --model teacher/ --data sst2/ --target pixel8

The data comes in every form that AutoLite reads; the labels' names are taken from it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from autolite.errors import AutoliteError
from autolite.tasks import data
from autolite.tasks.base import Batch, DataSpec, Split
from autolite.tasks.text_classification import TextClassification
from autolite.techniques.teacher import autocast, to_tensors

TASK = TextClassification()
POOL = 50  # batches shuffled together before they are sorted by length: random order, little padding


def label_names(source: str, column: str | None) -> list[str]:
    """Return the names of the labels in the train split, in the order of their ids."""
    table = data.read(source)["train"]
    label = data.column(table, column, data.LABEL, "label", "--label")
    values = table.columns[label]
    words = next((table.columns[n] for n in (f"{label}_text", f"{label}_name") if n in table.columns), values)
    if all(isinstance(value, int) for value in values):
        names = dict(zip(values, map(str, words), strict=True))
        return [names.get(i, f"LABEL_{i}") for i in range(max(values) + 1)]
    return sorted({str(value) for value in values})


def shuffled(split: Split, size: int, pad_id: int, rng: random.Random) -> Iterator[Batch]:
    """Yield the split's batches in random order, each of texts of like length."""
    order = rng.sample(range(len(split)), len(split))
    batches: list[Batch] = []
    for start in range(0, len(order), POOL * size):
        batches += TASK.batches(split.take(order[start : start + POOL * size]), size, pad_id)
    rng.shuffle(batches)
    yield from batches


def accuracy(model: PreTrainedModel, splits: list[Split], size: int, pad_id: int, device: str) -> float:
    """Return the accuracy over all `splits` together."""
    model.train(False)
    total = np.zeros(2)
    with torch.inference_mode():
        for batch in (b for split in splits for b in TASK.batches(split, size, pad_id)):
            inputs, _ = to_tensors(batch, device)
            total += TASK.score_examples(model(**inputs).logits.float().cpu().numpy(), batch.labels).sum(0)
    return TASK.summary(float(total[0] / total[1]))


@click.command()
@click.option("--model", "source", required=True, help="Encoder: a folder or a hub id.")
@click.option("--data", "data_source", required=True, help="A file, a folder or a hub data set.")
@click.option("--text", help="Column of the text.")
@click.option("--pair", help="Column of the second text.")
@click.option("--label", help="Column of the label.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the classifier.")
@click.option("--epochs", default=3, show_default=True)
@click.option("--lr", default=5e-5, show_default=True)
@click.option("--batch-size", default=32, show_default=True)
@click.option("--max-length", default=128, show_default=True, help="Longest text, in tokens.")
@click.option("--limit", type=int, help="Train on that many rows only.")
@click.option("--seed", default=0, show_default=True)
def main(
    source: str,
    data_source: str,
    text: str | None,
    pair: str | None,
    label: str | None,
    out: Path,
    epochs: int,
    lr: float,
    batch_size: int,
    max_length: int,
    limit: int | None,
    seed: int,
) -> None:
    """Fine-tune an encoder into a text classifier and print its validation and test accuracy."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        names = label_names(data_source, label)
        config = AutoConfig.from_pretrained(
            source, id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)}
        )
        tokenizer = AutoTokenizer.from_pretrained(source)
        loaded = TASK.load(DataSpec(data_source, text, pair, label, max_length, seed), tokenizer, config)
    except AutoliteError as error:
        raise click.UsageError(str(error)) from error
    for note in loaded.notes:
        click.echo(note)
    model = AutoModelForSequenceClassification.from_pretrained(source, config=config, dtype=torch.float32).to(device)
    train = loaded.train.take(rng.sample(range(len(loaded.train)), min(limit or 10**9, len(loaded.train))))
    validation, pad_id = [loaded.search, loaded.selection], tokenizer.pad_token_id

    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    steps = epochs * -(-len(train) // batch_size)
    warmup = min(200, max(1, steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, max(0.0, (steps - step) / (steps - warmup + 1)))
    )
    started, step = time.monotonic(), 0
    for epoch in range(1, epochs + 1):
        model.train()
        for batch in shuffled(train, batch_size, pad_id, rng):
            inputs, labels = to_tensors(batch, device)
            with autocast(device):
                logits = model(**inputs).logits
            loss = TASK.loss(logits, labels)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            step += 1
            if step % 100 == 0:
                click.echo(f"step {step}/{steps} loss {loss.item():.3f} {time.monotonic() - started:.0f} s")
        score = accuracy(model, validation, batch_size, pad_id, device)
        click.echo(f"epoch {epoch}/{epochs}: validation accuracy {score:.4f} {time.monotonic() - started:.0f} s")
    click.echo(f"test accuracy {accuracy(model, [loaded.test], batch_size, pad_id, device):.4f}")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
