"""Trains the model of the tabular benchmark: a GPT-2 of three layers that spells docstrings, 0.13 million parameters.

    python benchmarks/tabular_model.py

Writes benchmarks/data/tabular_model/: config.json, float16 weights, and blocks.npz with the blocks of 64 characters
that the table is made of ("train", which scores are taken from, and "search", which the loss is taken of). Both come
from the demo's corpus, the running Python's standard library: under another Python, or on another processor, the model
differs. The demo's own teacher is unsuitable: a quarter of its neurons in 2 bits lose nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import click
import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from autolite.tasks.demo import read_corpus
from autolite.tasks.language_modeling import LanguageModeling

FOLDER = Path(__file__).parent / "data" / "tabular_model"
SYMBOLS, BLOCK = 64, 64  # of the alphabet (the last stands for all others), and characters of a block
KEPT = {"train": 256, "search": 64}  # blocks in the file
BATCH, RATE = 64, 4e-3


def blocks(texts: list[str], symbols: str) -> np.ndarray:
    """Return the texts, one after the other, as blocks of characters, uint8 [blocks, BLOCK]."""
    number = {symbol: index for index, symbol in enumerate(symbols)}
    ids = np.array([number.get(symbol, SYMBOLS - 1) for symbol in "\n".join(texts)], np.uint8)
    return ids[: len(ids) // BLOCK * BLOCK].reshape(-1, BLOCK)


def train(model: GPT2LMHeadModel, data: torch.Tensor, steps: int, rng: np.random.Generator) -> None:
    """Train by AdamW under a cosine, with a warm-up of a twentieth."""
    task = LanguageModeling()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.05)
    warm = steps / 20
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: min((done + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * done / steps))
    )
    for step in range(steps):
        ids = data[torch.from_numpy(rng.integers(len(data), size=BATCH))].long()
        loss = task.loss(model(ids).logits[:, :-1], ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            click.echo(f"step {step}: {loss.item():.3f} nats")


@click.command()
@click.option("--steps", default=1000, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(steps: int, seed: int) -> None:
    """Train the model and write it with its blocks."""
    texts: dict[str, list[str]] = {"train": [], "validation": []}
    for passage in read_corpus():
        texts.setdefault(passage.split, []).append(passage.text.lower())
    counts = Counter("".join(texts["train"]))
    symbols = "".join(symbol for symbol, _ in counts.most_common(SYMBOLS - 1))
    data = {"train": blocks(texts["train"], symbols), "search": blocks(texts["validation"], symbols)}
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=SYMBOLS,
        n_positions=BLOCK,
        n_embd=64,
        n_layer=3,
        n_head=4,
        n_inner=192,
        activation_function="relu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    model = GPT2LMHeadModel(config)
    rng = np.random.default_rng(seed)
    train(model, torch.from_numpy(data["train"]), steps, rng)
    model.half().save_pretrained(FOLDER)
    (FOLDER / "generation_config.json").unlink(missing_ok=True)
    chosen = {name: found[np.sort(rng.choice(len(found), KEPT[name], replace=False))] for name, found in data.items()}
    np.savez_compressed(FOLDER / "blocks.npz", **chosen)


if __name__ == "__main__":
    main()
