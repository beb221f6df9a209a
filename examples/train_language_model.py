"""Trains a small Llama-type language model from scratch on a text, to be compressed afterwards.

    python examples/train_language_model.py --data wiki_paragraphs/ --out teacher-wiki/
    autolite search --model teacher-wiki/ --data wiki_paragraphs/ --task language-modeling --target local

The tokenizer is a byte-level BPE trained on the same text. The text comes in every form that AutoLite reads; validation
chooses nothing here, it is printed beside the test perplexity.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import click
import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from autolite.errors import AutoliteError
from autolite.tasks import data
from autolite.tasks.base import DataSpec, Split
from autolite.tasks.language_modeling import LanguageModeling
from autolite.techniques.teacher import autocast, to_tensors

TASK = LanguageModeling()
END, BLOCK = "<|endoftext|>", 256
WARM_UP = 0.05  # fraction of the steps in which the learning rate rises; a cosine follows


def train_tokenizer(source: str, vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the train split of `source`."""
    table = data.read(source)["train"]
    texts = data.texts(table, "text" if table.plain else data.text_columns(table, None, None)[0])
    learner = ByteLevelBPETokenizer()
    learner.train_from_iterator(texts, vocab_size=vocabulary, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=learner._tokenizer, eos_token=END, bos_token=END, pad_token=END, model_max_length=BLOCK
    )


@torch.inference_mode()
def perplexity(model: LlamaForCausalLM, splits: list[Split], size: int, pad_id: int) -> float:
    """Return the perplexity over all blocks of `splits` together."""
    model.train(False)
    total = np.zeros(2)
    for batch in (b for split in splits for b in TASK.batches(split, size, pad_id)):
        inputs, _ = to_tensors(batch, str(model.device))
        total += TASK.score_examples(model(**inputs).logits.float().cpu().numpy(), batch.labels).sum(0)
    return TASK.summary(float(total[0] / total[1]))


@click.command()
@click.option("--data", "source", required=True, help="A text file, a folder with its splits, or a hub data set.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the model.")
@click.option("--vocabulary", default=4096, show_default=True)
@click.option("--width", default=256, show_default=True, help="Hidden width.")
@click.option("--layers", default=4, show_default=True)
@click.option("--heads", default=8, show_default=True, help="Query heads; half as many key/value heads.")
@click.option("--ffn", default=704, show_default=True, help="Feed-forward width.")
@click.option("--epochs", default=4, show_default=True)
@click.option("--lr", default=2e-3, show_default=True)
@click.option("--batch-size", default=16, show_default=True, help=f"Blocks of {BLOCK} tokens.")
@click.option("--seed", default=0, show_default=True)
def main(
    source: str,
    out: Path,
    vocabulary: int,
    width: int,
    layers: int,
    heads: int,
    ffn: int,
    epochs: int,
    lr: float,
    batch_size: int,
    seed: int,
) -> None:
    """Train a tokenizer and a Llama-type model on a text and print validation and test perplexity."""
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tokenizer = train_tokenizer(source, vocabulary)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 2),
            intermediate_size=ffn,
            max_position_embeddings=2 * BLOCK,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        loaded = TASK.load(DataSpec(source, max_length=BLOCK, seed=seed), tokenizer, config)
    except AutoliteError as error:
        raise click.UsageError(str(error)) from error
    for note in loaded.notes:
        click.echo(note)
    model = LlamaForCausalLM(config).to(device)
    pad_id, validation = tokenizer.pad_token_id, [loaded.search, loaded.selection]
    batches = list(TASK.batches(loaded.train, batch_size, pad_id))
    steps = epochs * len(batches)
    parameters = sum(p.numel() for p in model.parameters())
    click.echo(f"{parameters / 1e6:.1f} M parameters, {len(loaded.train)} blocks, {steps} steps")

    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)
    warm = max(1, round(WARM_UP * steps))

    def rate(done: int) -> float:
        falling = 0.5 * (1 + math.cos(math.pi * max(0, done - warm) / max(1, steps - warm)))
        return min((done + 1) / warm, 0.1 + 0.9 * falling)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    started, step, rng = time.monotonic(), 0, np.random.default_rng(seed)
    for epoch in range(1, epochs + 1):
        model.train()
        for index in rng.permutation(len(batches)):
            inputs, labels = to_tensors(batches[index], device)
            with autocast(device):
                logits = model(**inputs).logits
            loss = TASK.loss(logits, labels)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            step += 1
            if step % 20 == 0:
                click.echo(f"step {step}/{steps} loss {loss.item():.3f} {time.monotonic() - started:.0f} s")
        score = perplexity(model, validation, batch_size, pad_id)
        click.echo(f"epoch {epoch}/{epochs}: validation perplexity {score:.2f} {time.monotonic() - started:.0f} s")
    click.echo(f"test perplexity {perplexity(model, [loaded.test], batch_size, pad_id):.2f}")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
