"""Trains the embedded demo's teacher: a small BERT that tells which part of the standard library a docstring is from.

The text is the running Python's own (`autolite.tasks.demo`), so nothing is downloaded:

    python examples/train_demo_teacher.py --out autolite/demo

First the encoder learns from every passage of the whole library that is not held out: masked words, and which
module a passage is from. Then it is fine-tuned to the demo's labels. The epoch to keep is chosen on validation;
test is scored once, at the end, on the float16 weights that are saved.
"""

from __future__ import annotations

import platform
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import torch
from tokenizers import BertWordPieceTokenizer
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertTokenizer

from autolite.tasks import demo

POSITIONS = 128
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "idlelib", "lib2to3", "ensurepip", "pydoc_data", "config"}

Example = tuple[list[int], int]


def whole_library() -> dict[str, tuple[str, ...]]:
    """Return a part for every top-level module of the library; the demo's own parts keep their names."""
    root = Path(sysconfig.get_path("stdlib"))
    found = {f.stem for f in root.iterdir() if f.suffix == ".py" or (f / "__init__.py").is_file()}
    ours = {module for modules in demo.PARTS.values() for module in modules}
    return {name: (name,) for name in sorted(found - ours - NOT_LIBRARY)} | demo.PARTS


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> BertTokenizer:
    """Train a lower-case WordPiece tokenizer on `texts`."""
    learner = BertWordPieceTokenizer(lowercase=True)
    learner.train_from_iterator(texts, vocab_size=vocabulary, min_frequency=2, show_progress=False)
    return BertTokenizer(tokenizer_object=learner._tokenizer, model_max_length=POSITIONS)


def word_vectors(rows: Sequence[Sequence[int]], vocabulary: int, width: int, window: int = 8) -> torch.Tensor:
    """Return [vocabulary, width] vectors of the words' company: shifted positive pointwise mutual information, reduced.

    As Levy and Goldberg 2014 (Neural Word Embedding as Implicit Matrix Factorization): a start that a few thousand
    passages could not teach by gradient descent.
    """
    counts = torch.zeros(vocabulary, vocabulary)
    for row in rows:
        ids = torch.tensor(row)
        for distance in range(1, min(window, len(ids) - 1) + 1):
            counts.index_put_((ids[:-distance], ids[distance:]), torch.tensor(1.0 / distance), accumulate=True)
    counts += counts.T.clone()
    share = counts.sum(0) / counts.sum()
    context = share**0.75 / (share**0.75).sum()
    information = (counts / counts.sum() / (share[:, None] * context[None, :])).log().nan_to_num(0.0, 0.0, 0.0).relu_()
    left, values, _ = torch.svd_lowrank(information, q=width, niter=4)
    vectors = left * values.sqrt()
    return vectors / vectors.std() * 0.05  # above the positions' 0.02, so that words come first


def batches(examples: Sequence[Example], size: int, shuffle: bool) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (ids [batch, tokens], labels [batch]) of passages of like length; 0 pads."""
    order = torch.randperm(len(examples)).tolist() if shuffle else list(range(len(examples)))
    pools = [
        sorted(order[i : i + 16 * size], key=lambda j: len(examples[j][0])) for i in range(0, len(order), 16 * size)
    ]
    groups = [pool[i : i + size] for pool in pools for i in range(0, len(pool), size)]
    for g in torch.randperm(len(groups)).tolist() if shuffle else range(len(groups)):
        rows = [torch.tensor(examples[j][0]) for j in groups[g]]
        yield torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor([examples[j][1] for j in groups[g]])


def accuracy(model: BertForSequenceClassification, examples: Sequence[Example]) -> float:
    """Return the fraction of `examples` that `model` labels rightly."""
    model.train(False)
    with torch.no_grad():
        right = sum(
            int((model(input_ids=ids, attention_mask=(ids > 0).long()).logits.argmax(-1) == labels).sum())
            for ids, labels in batches(examples, 64, shuffle=False)
        )
    return right / len(examples)


def train(
    model: BertForSequenceClassification,
    examples: Sequence[Example],
    epochs: int,
    rate: float,
    mask_id: int,
    masked: float,
    words: BertForMaskedLM | None = None,
    validation: Sequence[Example] = (),
    smoothing: float = 0.0,
    size: int = 32,
) -> None:
    """Train on passages in which a share `masked` of the tokens is hidden; `words` also has to guess those.

    With `validation`, the model ends with the weights of the epoch that scored best there.
    """
    parameters = {id(p): p for module in (model, words) if module is not None for p in module.parameters()}.values()
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))
    steps = epochs * -(-len(examples) // size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps + 1, pct_start=0.1)
    best, kept, started = 0.0, {}, time.monotonic()
    for epoch in range(epochs):
        model.train()
        total, total_words = 0.0, 0.0
        for ids, labels in batches(examples, size, shuffle=True):
            hidden = (torch.rand(ids.shape) < masked) & (ids > 4)  # ids 0 to 4 are the special tokens
            shown = torch.where(hidden, mask_id, ids)
            with torch.autocast("cpu", torch.bfloat16):
                out = model.bert(input_ids=shown, attention_mask=(ids > 0).long())
                logits = model.classifier(model.dropout(out.pooler_output))
                loss = torch.nn.functional.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
                word_loss = torch.zeros(())
                if words is not None:
                    guesses = words.cls(out.last_hidden_state[hidden]).float()
                    word_loss = torch.nn.functional.cross_entropy(guesses, ids[hidden])
            optimizer.zero_grad()
            torch.autograd.backward(loss + 0.5 * word_loss)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(labels)
            total_words += word_loss.item() * len(labels)
        line = f"epoch {epoch + 1}/{epochs} loss {total / len(examples):.3f} words {total_words / len(examples):.3f}"
        line += f" {time.monotonic() - started:.0f} s"
        if validation:
            score = accuracy(model, validation)
            line += f" validation {score:.4f}"
            if score > best:
                best, kept = score, {k: v.clone() for k, v in model.state_dict().items()}
        click.echo(line)
    if kept:
        model.load_state_dict(kept)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the model.")
@click.option("--pretrain-epochs", default=6, show_default=True)
@click.option("--epochs", default=12, show_default=True)
@click.option("--layers", default=4, show_default=True)
@click.option("--hidden", default=192, show_default=True)
@click.option("--vocabulary", default=5000, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(out: Path, pretrain_epochs: int, epochs: int, layers: int, hidden: int, vocabulary: int, seed: int) -> None:
    """Train the demo teacher from random weights and save it with its model card."""
    torch.manual_seed(seed)
    started = time.process_time()
    corpus = demo.read_corpus()
    splits = {name: [p for p in corpus if p.split == name] for name in ("train", "validation", "test")}
    held_out = {p.text.lower() for name in ("validation", "test") for p in splits[name]}
    library = [
        p
        for p in demo.read_corpus(parts=whole_library())
        if (p.split == "train" or p.label not in demo.PARTS) and p.text.lower() not in held_out
    ]
    tokenizer = train_tokenizer([p.text for p in library], vocabulary)

    def encode(passages: Sequence[demo.Passage], labels: Sequence[str]) -> list[Example]:
        ids = tokenizer([p.text for p in passages], truncation=True, max_length=POSITIONS)["input_ids"]
        return [(row, labels.index(p.label)) for row, p in zip(ids, passages, strict=True)]

    modules, labels = sorted({p.label for p in library}), list(demo.PARTS)
    click.echo(f"{len(library)} passages of {len(modules)} modules; { ({k: len(v) for k, v in splits.items()}) }")

    def config(names: Sequence[str]) -> BertConfig:
        return BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 32,
            intermediate_size=4 * hidden,
            max_position_embeddings=POSITIONS,
            id2label=dict(enumerate(names)),
            label2id={name: i for i, name in enumerate(names)},
        )

    pretrained = BertForSequenceClassification(config(modules))
    words = BertForMaskedLM(config(modules))
    words.bert = pretrained.bert
    encoded_library = encode(library, modules)
    vectors = word_vectors([ids for ids, _ in encoded_library], len(tokenizer), hidden)
    with torch.no_grad():
        pretrained.bert.embeddings.word_embeddings.weight.copy_(vectors)
    words.cls.predictions.decoder.weight = pretrained.bert.embeddings.word_embeddings.weight
    mask_id = tokenizer.mask_token_id
    train(pretrained, encoded_library, pretrain_epochs, 1e-3, mask_id, 0.2, words)

    model = BertForSequenceClassification(config(labels))
    model.bert = pretrained.bert
    with torch.no_grad():  # the demo's parts are among the modules: start from what was learnt of them
        model.classifier.weight.copy_(pretrained.classifier.weight[[modules.index(label) for label in labels]])
        model.classifier.bias.copy_(pretrained.classifier.bias[[modules.index(label) for label in labels]])
    encoded = {name: encode(passages, labels) for name, passages in splits.items()}
    train(model, encoded["train"], epochs, 2e-4, mask_id, 0.1, None, encoded["validation"], smoothing=0.1)
    minutes = (time.process_time() - started) / 60

    torch.nn.Module.to(model, torch.float16)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    model = BertForSequenceClassification.from_pretrained(out, dtype=torch.float32)
    scores = {name: accuracy(model, encoded[name]) for name in ("validation", "test")}
    parameters = sum(p.numel() for p in model.parameters())
    (out / "README.md").write_text(
        card(labels, splits, len(library), scores, parameters, minutes, layers, hidden, seed)
    )
    click.echo(f"{scores} {parameters} parameters, {minutes:.1f} minutes")


def card(
    labels: Sequence[str],
    splits: dict[str, list[demo.Passage]],
    library: int,
    scores: dict[str, float],
    parameters: int,
    minutes: float,
    layers: int,
    hidden: int,
    seed: int,
) -> str:
    """Return the model card."""
    test = len(splits["test"])
    error = 1.96 * (scores["test"] * (1 - scores["test"]) / test) ** 0.5
    return f"""---
license: psf-2.0
language: en
pipeline_tag: text-classification
---
# The demo teacher

A BERT of {layers} layers, hidden width {hidden}, {parameters / 1e6:.2f} million parameters, from random weights;
it tells which part of Python's standard library a passage of a docstring comes from:
{", ".join(labels)}.

| split | passages | accuracy |
|---|---|---|
| validation (the epoch was chosen on it) | {len(splits["validation"])} | {scores["validation"]:.4f} |
| test (scored once) | {test} | {scores["test"]:.4f} +- {error:.3f} |

- **Data**: the docstrings of modules, classes and functions of CPython {platform.python_version()}, cut between
  paragraphs into passages of {demo.FEWEST_WORDS} to {demo.PASSAGE_WORDS} words; {len(splits["train"])} of them for
  training. A module's top-level class or function falls whole into one split, by the hash of its name, so the methods
  of a class are never on both sides; equal texts are kept once. Under another Python version the text, and so the
  score, differs a little.
- **What makes it easy, and hard**: docstrings often name their own part ("event loop", "Decimal"); nothing was removed.
  Test and training share no class or function, but they do share writers and vocabulary.
- **Training**: word vectors from co-occurrence; pre-training on {library} passages of the whole library, none of them
  held out (masked words,
  and the module of each), then fine-tuning; seed {seed}, {minutes:.1f} minutes of one processor core.
  Script: `examples/train_demo_teacher.py`.
- **Use**: a small real model to try AutoLite on. It is good for nothing else.
- **Licence**: the docstrings are part of CPython, under the PSF licence; the weights were trained on them.
"""


if __name__ == "__main__":
    main()
