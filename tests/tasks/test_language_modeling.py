import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from autolite import registry
from autolite.architecture import shape_of
from autolite.errors import DataError
from autolite.measure import Workload
from autolite.runtime.emit import emit
from autolite.runtime.onnxruntime import OnnxRuntime
from autolite.search.scoring import score
from autolite.tasks.base import DataSpec, Split
from autolite.tasks.language_modeling import LanguageModeling, windows
from autolite.techniques.base import Student
from autolite.testing import tiny_model

TASK = LanguageModeling()


def gpt2_config() -> GPT2Config:
    return GPT2Config(vocab_size=64, n_positions=16, n_embd=8, n_layer=1, n_head=2)


def book(lines: int) -> str:
    return "".join(f"w{i % 60} w{i * 7 % 60} w{i * i % 60}\n" for i in range(lines))


def split_of(*lengths: int) -> Split:
    rng = np.random.default_rng(0)
    return Split("test", [rng.integers(4, 64, n) for n in lengths], None, np.zeros(0, dtype=np.int64))


def test_it_is_registered() -> None:
    assert isinstance(registry.get("task", "language-modeling"), LanguageModeling)


def test_a_plain_text_is_cut_into_blocks_in_its_order(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "book.txt").write_text(book(400))
    data = TASK.load(DataSpec(str(tmp_path / "book.txt")), tokenizer, gpt2_config())
    ids = tokenizer(book(400), add_special_tokens=False)["input_ids"]
    train = np.concatenate(data.train.input_ids)
    test = np.concatenate(data.test.input_ids)
    assert train.tolist() == ids[: len(train)]
    assert test.tolist() == ids[-len(test) :]
    assert all(len(block) == 16 for block in data.train.input_ids[:-1])
    assert len(test) == pytest.approx(0.1 * len(ids), abs=6)
    validation = [tuple(block) for s in (data.search, data.selection) for block in s.input_ids]
    assert sum(map(len, validation)) + len(train) + len(test) == len(ids)
    assert abs(len(data.search) - len(data.selection)) <= 1
    assert data.notes == (
        "train: 400 lines, book.txt",
        "test: 10%, the last of train",
        "validation: 10%, the last of train",
        "blocks of 16 tokens",
    )
    assert data.labels == ()
    assert len(data.train.labels) == 0


def test_documents_are_joined_by_the_end_token_and_cut_whole(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    documents = [" ".join([f"w{i}"] * 5) for i in range(50)]
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps({"text": d}) for d in documents))
    data = TASK.load(DataSpec(str(tmp_path / "d.jsonl"), max_length=6), tokenizer, gpt2_config())
    blocks = {s.name: [b.tolist() for b in s.input_ids] for s in (data.train, data.search, data.selection, data.test)}
    assert {name: len(b) for name, b in blocks.items()} == {"train": 41, "search": 2, "selection": 2, "test": 5}
    assert all(b[-1] == 3 and len(set(b[:5])) == 1 for split in blocks.values() for b in split)
    assert len({b[0] for split in blocks.values() for b in split}) == 50


def test_equal_seeds_give_equal_data(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "book.txt").write_text(book(300))
    digests = [
        TASK.load(DataSpec(str(tmp_path / "book.txt"), seed=seed), tokenizer, gpt2_config()).fingerprint
        for seed in (0, 0, 1)
    ]
    assert digests[0] == digests[1] != digests[2]


def test_the_workload_is_a_prompt_whatever_the_blocks_are(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "book.txt").write_text(book(400))
    data = TASK.load(DataSpec(str(tmp_path / "book.txt")), tokenizer, gpt2_config())
    assert data.p90_tokens == 16
    assert TASK.workload(data) == Workload(batch=1, tokens=128)


def test_a_split_that_is_too_short_says_so(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "book.txt"
    path.write_text(book(12))
    with pytest.raises(DataError, match=r"split of '.*' has .* tokens, which make . blocks of up to 16: too few"):
        TASK.load(DataSpec(str(path)), tokenizer, gpt2_config())
    path.write_text("w1\n")
    with pytest.raises(DataError, match=r"split of '.*' has 0 tokens, which make 0 blocks of up to 16: too few"):
        TASK.load(DataSpec(str(path)), tokenizer, gpt2_config())


def test_there_is_no_demo(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="no embedded demo data"):
        TASK.load(DataSpec(None), tokenizer, gpt2_config())


def recipe(model: torch.nn.Module, ids: torch.Tensor, max_length: int, stride: int) -> tuple[float, int]:
    """The loop of https://huggingface.co/docs/transformers/perplexity; returns perplexity and the tokens that count.

    One thing is changed. The guide weights a window's mean loss by the number of its targets less one, for the first of
    them is shifted away. It is in windows that do not overlap; in others, transformers takes the mean over all.
    """
    nll_sum, n_tokens, prev_end_loc = 0.0, 0, 0
    for begin_loc in range(0, len(ids), stride):
        end_loc = min(begin_loc + max_length, len(ids))
        trg_len = end_loc - prev_end_loc
        input_ids = ids[None, begin_loc:end_loc]
        target_ids = input_ids.clone()
        target_ids[:, :-trg_len] = -100
        with torch.no_grad():
            loss = model(input_ids, labels=target_ids).loss
        num_loss_tokens = int((target_ids[:, 1:] != -100).sum())
        if stride == max_length:
            assert num_loss_tokens == int((target_ids != -100).sum()) - 1
        if num_loss_tokens:
            nll_sum += float(loss) * num_loss_tokens
            n_tokens += num_loss_tokens
        prev_end_loc = end_loc
        if end_loc == len(ids):
            break
    return math.exp(nll_sum / n_tokens), n_tokens


@pytest.mark.parametrize("stride", [16, 12, 8, 3, 1])
@pytest.mark.parametrize("words", [15, 97, 128])
def test_strided_perplexity_is_that_of_the_guide_of_transformers(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, stride: int, words: int
) -> None:
    for split, text in {
        "train": book(90),
        "validation": book(60),
        "test": " ".join(f"w{i * i % 60}" for i in range(words)),
    }.items():
        (tmp_path / f"{split}.txt").write_text(text)
    model = tiny_model("llama", "language-modeling", max_position_embeddings=16)
    data = TASK.load(DataSpec(str(tmp_path), stride=stride), tokenizer, model.config)
    emit(Student(model, shape_of(model)), tmp_path / "model")
    scored = score(OnnxRuntime().load(tmp_path / "model" / "model.onnx"), TASK, data.test, pad_id=0)
    ids = torch.tensor(tokenizer((tmp_path / "test.txt").read_text(), add_special_tokens=False)["input_ids"])
    perplexity, tokens = recipe(model, ids, 16, stride)
    assert TASK.summary(scored.ratio) == pytest.approx(perplexity, rel=1e-4)
    assert (
        scored.examples[:, 1].sum() == tokens == (len(ids) - 1 if stride < 16 else len(ids) - math.ceil(len(ids) / 16))
    )


def test_training_text_and_texts_without_a_stride_are_cut_into_blocks(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    (tmp_path / "book.txt").write_text(book(400))
    plain = TASK.load(DataSpec(str(tmp_path / "book.txt")), tokenizer, gpt2_config())
    strided = TASK.load(DataSpec(str(tmp_path / "book.txt"), stride=4), tokenizer, gpt2_config())
    assert strided.train.digest == plain.train.digest
    assert len(plain.test.labels) == len(plain.train.labels) == 0
    assert strided.fingerprint != plain.fingerprint
    assert strided.notes[-1] == "blocks of 16 tokens, scored 4 apart"
    halves = [strided.search, strided.selection]
    counted = sum(len(ids) - given for s in halves for ids, given in zip(s.input_ids, s.labels, strict=True))
    assert counted == sum(len(b) for s in (plain.search, plain.selection) for b in s.input_ids) - 1


@given(st.integers(2, 60), st.integers(2, 9), st.integers(1, 9))
def test_windows_predict_each_token_once_behind_as_much_as_fits(tokens: int, length: int, stride: int) -> None:
    stride = min(stride, length)
    rows, given = windows(np.arange(tokens), length, stride)
    predicted = [int(i) for row, known in zip(rows, given, strict=True) for i in row[known:]]
    alone = set(range(0, tokens, length)) if stride == length else {0}  # the first of a window that nothing overlaps
    assert predicted == [i for i in range(tokens) if i not in alone]
    for row, known in zip(rows, given, strict=True):
        assert row.tolist() == list(range(row[0], row[-1] + 1))
        assert known >= max(1, min(length - stride, int(row[0]) and length))


@pytest.mark.parametrize("stride", [0, 17])
def test_a_stride_leaves_no_token_out(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, stride: int) -> None:
    (tmp_path / "book.txt").write_text(book(400))
    with pytest.raises(DataError, match=f"a stride of {stride} tokens is outside 1 to 16, the length of a window"):
        TASK.load(DataSpec(str(tmp_path / "book.txt"), stride=stride), tokenizer, gpt2_config())


@given(lengths=st.lists(st.integers(2, 9), min_size=1, max_size=9), size=st.integers(1, 4))
def test_labels_are_the_next_token_of_every_position_but_the_last(lengths: list[int], size: int) -> None:
    split = split_of(*lengths)
    seen = []
    for batch in TASK.batches(split, size, pad_id=0):
        seen += batch.indices.tolist()
        for ids, mask, labels, i in zip(
            batch.inputs["input_ids"], batch.inputs["attention_mask"], batch.labels, batch.indices, strict=True
        ):
            n = lengths[i]
            assert ids.tolist() == [*split.input_ids[i], *[0] * (len(ids) - n)]
            assert mask.tolist() == [1] * n + [0] * (len(ids) - n)
            assert labels.tolist() == [*split.input_ids[i][1:], *[-100] * (len(ids) - n + 1)]
    assert sorted(seen) == list(range(len(lengths)))


def test_loss_and_score_are_the_models_own_loss() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(gpt2_config()).train(False)
    for split in (split_of(16, 16), split_of(5, 9, 12)):
        (batch,) = TASK.batches(split, 8, pad_id=0)
        inputs = {name: torch.from_numpy(array) for name, array in batch.inputs.items()}
        own_labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        with torch.no_grad():
            out = model(**inputs, labels=own_labels)
        labels = torch.from_numpy(batch.labels)
        assert TASK.loss(out.logits, labels).item() == pytest.approx(out.loss.item(), rel=1e-6)
        scores = TASK.score_examples(out.logits.numpy(), batch.labels)
        assert scores[:, 1].tolist() == [len(split.input_ids[i]) - 1 for i in batch.indices]
        ratio = scores[:, 0].sum() / scores[:, 1].sum()
        assert ratio == pytest.approx(out.loss.item(), rel=1e-6)
        assert TASK.summary(ratio) == pytest.approx(math.exp(out.loss.item()), rel=1e-5)
        assert TASK.soft_targets(out.logits, labels).shape == (scores[:, 1].sum(), 64)


def test_what_is_said_further_of_a_student_is_what_torch_computes() -> None:
    torch.manual_seed(0)
    (batch,) = TASK.batches(split_of(5, 9, 12), 8, pad_id=0)
    ours, theirs = 4 * torch.randn(2, *batch.labels.shape, 64)
    found = TASK.further(ours.numpy(), theirs.numpy(), batch.labels)
    labels = torch.from_numpy(batch.labels)
    own, said, wanted = ours[labels != -100], theirs[labels != -100], labels[labels != -100]
    kl = torch.nn.functional.kl_div(own.log_softmax(-1), said.log_softmax(-1), reduction="batchmean", log_target=True)
    ratios = {name: sums[:, 0].sum() / sums[:, 1].sum() for name, sums in found.items()}
    assert ratios == {
        "next_token_accuracy": pytest.approx((own.argmax(-1) == wanted).float().mean().item()),
        "kl_to_teacher_nats": pytest.approx(kl.item(), rel=1e-5),
        "teacher_agreement": pytest.approx((own.argmax(-1) == said.argmax(-1)).float().mean().item()),
    }
    assert all(sums[:, 1].tolist() == [4, 8, 11] for sums in found.values())
    itself = TASK.further(theirs.numpy(), theirs.numpy(), batch.labels)
    assert itself["kl_to_teacher_nats"][:, 0].tolist() == [0, 0, 0]
    # What the teacher never says adds nothing, what the student alone never says very much, and neither is no number.
    never = theirs.clone()
    never[..., 7] = -torch.inf
    assert TASK.further(never.numpy(), never.numpy(), batch.labels)["kl_to_teacher_nats"][:, 0].tolist() == [0, 0, 0]
    unsaid = TASK.further(never.numpy(), theirs.numpy(), batch.labels)["kl_to_teacher_nats"]
    assert np.isfinite(unsaid).all()
    assert (unsaid[:, 0] > 1e30).all()


def test_a_uniform_model_has_the_vocabulary_as_its_perplexity() -> None:
    (batch,) = TASK.batches(split_of(4, 7), 8, pad_id=0)
    sums = TASK.score_examples(np.full((2, 7, 64), 3.0, dtype=np.float32), batch.labels).sum(axis=0)
    assert TASK.summary(sums[0] / sums[1]) == pytest.approx(64.0, rel=1e-6)
    assert TASK.summary(1e9) < math.inf


def test_kept_falls_by_the_rise_of_the_loss_in_nats() -> None:
    assert TASK.kept(3.02, 3.0) == pytest.approx(0.98)
    assert TASK.kept(2.9, 3.0) == pytest.approx(1.1)
    assert TASK.direction == "minimize"


def test_the_pipeline_gives_the_most_probable_next_tokens() -> None:
    logits = np.zeros((3, 10), dtype=np.float32)
    logits[-1, 7] = math.log(9)
    outputs = TASK.pipeline_outputs(logits, {})
    assert len(outputs) == 5
    assert outputs[0]["token"] == 7
    assert outputs[0]["score"] == pytest.approx(0.5)
    assert outputs[1]["score"] == pytest.approx(1 / 18)
