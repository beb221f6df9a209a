"""Language modelling: the next token, its cross-entropy in nats, judged by perplexity."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from autolite.errors import DataError
from autolite.measure import Workload
from autolite.tasks import data, instructions
from autolite.tasks.base import IGNORED, Batch, DataSpec, Split, TaskData
from autolite.tasks.encoding import fingerprint, max_tokens, pad, padded_batches

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

BLOCK = 256
EXAMPLE = 512  # tokens of a prompt and its response
FURTHER = ("next_token_accuracy", "kl_to_teacher_nats", "teacher_agreement")
_NO_LABELS = np.zeros(0, dtype=np.int64)
PROMPT = 128  # tokens of the default workload
CHUNK = 10_000  # characters tokenised at once: a whole book in one call is slow, a line at a time makes other tokens


class LanguageModeling:
    """Plain text, or a column of documents, cut into blocks of tokens; or prompts and responses, each an example.

    A batch's `labels` are already shifted: labels[b, t] is the token that logits[b, t] should predict, that is
    input_ids[b, t + 1]; -100 at an example's last token, in the padding, and for tokens that are only given, such as a
    prompt's. So they are for `loss`, not for a transformers model's own `labels` argument, which shifts once more.
    """

    name = "language-modeling"
    auto_class = "AutoModelForCausalLM"
    best = 1.0
    pipeline_tag = "text-generation"
    default_space = "decoder"
    metric = "perplexity"
    direction: Literal["maximize", "minimize"] = "minimize"

    def load(self, spec: DataSpec, tokenizer: PreTrainedTokenizerBase, config: Any) -> TaskData:
        """Read, cut and tokenise the text, or prompts with responses (`autolite.tasks.instructions`).

        Lines of a plain text follow one another; documents of a column are separated by the end-of-sequence token.
        A missing test split is the last tenth of a plain text, or a tenth of the documents. What is scored is cut into
        `windows`, `spec.stride` apart.

        Raises:
            DataError: naming the file, the column or the row that is wrong, a stride above the blocks' length, or a
                split too short for two blocks.
        """
        if spec.source is None:
            raise DataError("language-modeling has no embedded demo data; give a text (--data)")
        if spec.unlabelled is not None:
            raise DataError(
                "language-modeling needs no labels: put the text of --unlabelled into the training data instead"
            )
        block = max_tokens(spec, tokenizer, config, BLOCK)
        tables = data.read(spec.source)
        found = {split: instructions.columns(table, spec) for split, table in tables.items()}
        if any(found.values()):
            return instructions.load(tables, found, spec, tokenizer, max_tokens(spec, tokenizer, config, EXAMPLE))
        if spec.stride is not None and not 1 <= spec.stride <= block:
            raise DataError(
                f"a stride of {spec.stride} tokens is outside 1 to {block}, the length of a window: give a smaller "
                "--stride, or a larger --max-length"
            )
        notes = [f"{split}: {len(t)} {'lines' if t.plain else 'texts'}, {t.origin}" for split, t in tables.items()]
        documents = {split: _documents(table, spec) for split, table in tables.items()}
        for split in ("test", "validation"):
            if split not in documents:
                documents["train"], documents[split] = _cut(documents["train"], tables["train"].plain, spec.seed)
                how = "the last of" if tables["train"].plain else f"cut by seed {spec.seed} from"
                notes.append(f"{split}: {data.CUT:.0%}, {how} train")
        ids = {split: _tokens(texts, tokenizer) for split, texts in documents.items()}
        cut = {
            split: windows(i, block, block if split == "train" else spec.stride or block) for split, i in ids.items()
        }
        for split, (blocks, _) in cut.items():
            if len(blocks) < (2 if split == "validation" else 1):
                raise DataError(
                    f"the {split} split of '{spec.source}' has {len(ids[split])} tokens, which make {len(blocks)} "
                    f"blocks of up to {block}: too few; give more text or a smaller --max-length"
                )
        selection, search = data.cut([b.tobytes().hex() for b in cut["validation"][0]], 0.5, spec.seed)
        notes.append(f"blocks of {block} tokens" + (f", scored {spec.stride} apart" if spec.stride else ""))
        train, validation, test = (
            Split(split, cut[split][0], None, cut[split][1] if spec.stride and split != "train" else _NO_LABELS)
            for split in ("train", "validation", "test")
        )
        search_half, selection_half = (
            replace(validation.take(half), name=name) for name, half in (("search", search), ("selection", selection))
        )
        digest = fingerprint((train, search_half, selection_half, test))
        return TaskData(train, search_half, selection_half, test, digest, notes=tuple(notes))

    def workload(self, data: TaskData) -> Workload:
        """Return a call for one prompt of 128 tokens, whatever the length of the data's blocks."""
        return Workload(tokens=PROMPT)

    def batches(self, split: Split, size: int, pad_id: int) -> Iterator[Batch]:
        """Return right-padded batches of up to `size` blocks, shortest first; the same ones every time."""

        def shifted(chosen: np.ndarray) -> np.ndarray:
            rows = [np.append(split.input_ids[i][1:], IGNORED) for i in chosen]
            if len(split.labels):
                for row, given in zip(rows, split.labels[chosen], strict=True):
                    row[: max(0, given - 1)] = IGNORED
            return pad(rows, IGNORED)

        return padded_batches(split, size, pad_id, shifted)

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy (nats) of `logits` [batch, tokens, vocab], over the `labels` that ask."""
        from torch.nn.functional import cross_entropy

        return cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)

    def soft_targets(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the rows [m, vocab] of `logits` that predict a token."""
        return logits[labels != IGNORED]

    def score_examples(self, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Return [batch, 2]: the sum of -log p(next token) in nats over a block, and the number of tokens predicted."""
        out = np.empty((len(labels), 2))
        for i, (rows, wanted) in enumerate(zip(logits, labels, strict=True)):
            asked = np.flatnonzero(wanted != IGNORED)
            chosen = _log_probabilities(rows[asked])[np.arange(len(asked)), wanted[asked]]
            out[i] = -chosen.sum(dtype=np.float64), len(asked)
        return out

    def further(self, logits: np.ndarray, teacher: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
        """Return per predicted token: whether it is the most probable one; KL(teacher || finalist) in nats; and whether
        both find the same one the most probable."""
        out = {name: np.empty((len(labels), 2)) for name in FURTHER}
        for i, (ours, theirs, wanted) in enumerate(zip(logits, teacher, labels, strict=True)):
            asked = np.flatnonzero(wanted != IGNORED)
            own, said = _log_probabilities(ours[asked]), _log_probabilities(theirs[asked])
            best = own.argmax(-1)
            sums = (
                (best == wanted[asked]).sum(),
                _divergence(said, own),
                (best == said.argmax(-1)).sum(),
            )
            for name, total in zip(FURTHER, sums, strict=True):
                out[name][i] = total, len(asked)
        return out

    def summary(self, ratio: float) -> float:
        """Perplexity: exp of the mean loss in nats."""
        return math.exp(min(ratio, 700.0))  # a broken candidate's loss must not overflow

    def kept(self, ratio: float, teacher_ratio: float) -> float:
        """1 - (rise of the mean loss in nats over the teacher's)."""
        return 1.0 - (ratio - teacher_ratio)

    def pipeline_outputs(self, logits: np.ndarray, config: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the five most probable next tokens, `[{"token", "score"}]`, from `logits` [tokens, vocab]."""
        last = logits.reshape(-1, logits.shape[-1])[-1].astype(np.float64)
        shifted = np.exp(last - last.max())
        best = np.argsort(-last, kind="stable")[:5]
        return [{"token": int(i), "score": float(shifted[i] / shifted.sum())} for i in best]


def _divergence(said: np.ndarray, own: np.ndarray) -> float:
    """Return the sum of KL(said || own) in nats over rows of log probabilities; what both never say counts nothing, and
    what only `own` never says as the least float32."""
    told = np.exp(said)
    with np.errstate(invalid="ignore"):
        each = np.where(told > 0, told * (said - np.maximum(own, np.finfo(np.float32).min)), 0)
    return float(each.sum(dtype=np.float64))


def _log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Return float32 log p(token) of each row, [rows, vocab]."""
    shifted = logits.astype(np.float32)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def _documents(table: data.Table, spec: DataSpec) -> list[str]:
    """Return the documents; of a plain text, its lines, each with its line end."""
    column = "text" if table.plain else data.text_columns(table, spec.text, None)[0]
    texts = data.texts(table, column)
    if not any(text.strip() for text in texts):
        raise DataError(f"every text in {table.origin} is empty")
    return [text + "\n" for text in texts] if table.plain else [text for text in texts if text.strip()]


def _cut(documents: list[str], plain: bool, seed: int) -> tuple[list[str], list[str]]:
    if plain:
        ends = np.cumsum([len(line) for line in documents])
        at = min(int(np.searchsorted(ends, (1 - data.CUT) * sum(map(len, documents)))), max(len(documents) - 1, 0))
        return documents[:at], documents[at:]
    try:
        stay, go = data.cut(documents, data.CUT, seed)
    except DataError as error:
        raise DataError(f"train: {error}; give more texts, or a folder with train, validation and test") from None
    return [documents[i] for i in stay], [documents[i] for i in go]


def _tokens(documents: list[str], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Tokenise without special tokens, and join, int64 [tokens]."""
    plain = all(text.endswith("\n") for text in documents)
    pieces: list[str] = []
    if plain:
        piece: list[str] = []
        size = 0
        for line in documents:
            piece.append(line)
            size += len(line)
            if size >= CHUNK:
                pieces.append("".join(piece))
                piece, size = [], 0
        pieces += ["".join(piece)] if piece else []
    else:
        pieces = documents
    if not pieces:
        return _NO_LABELS
    encoded = tokenizer(pieces, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    end = [] if plain or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return np.concatenate([np.array([*row, *end], dtype=np.int64) for row in encoded])


def windows(ids: np.ndarray, length: int, stride: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Cut a text into windows of up to `length` tokens that begin `stride` apart; the last ends where the text does.

    Every token but the text's first is predicted in one window, behind `length - stride` others at least once the first
    window is over; if windows do not overlap, the first of each is in none. Source: transformers' guide, "Perplexity of
    fixed-length models".

    Returns:
        The windows that predict something, and how many first tokens of each are only given, int64 [windows]: those
        that an earlier window has, but one at least.
    """
    rows, given, reached = [], [], 0
    for start in range(0, len(ids), stride):
        row = ids[start : start + length]
        known = max(1, reached - start)
        if len(row) > known:
            rows.append(row)
            given.append(known)
        reached = start + len(row)
        if reached == len(ids):
            break
    return rows, np.array(given, dtype=np.int64)
