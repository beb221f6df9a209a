import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from autolite.tasks import demo
from autolite.tasks.base import DataSpec, TaskData
from autolite.tasks.text_classification import TextClassification

TASK = TextClassification()


@pytest.fixture(scope="module")
def corpus() -> list[demo.Passage]:
    return demo.read_corpus()


@pytest.fixture(scope="module")
def data() -> TaskData:
    model = AutoModelForSequenceClassification.from_pretrained(demo.demo_model_path())
    tokenizer = AutoTokenizer.from_pretrained(demo.demo_model_path())
    return TASK.load(DataSpec(None), tokenizer, model.config)


def test_every_part_is_in_the_corpus_and_large_enough(corpus: list[demo.Passage]) -> None:
    sizes = Counter(p.label for p in corpus)
    assert set(sizes) <= set(demo.PARTS)
    assert len(sizes) >= 12  # a distribution may package one or two parts apart
    assert min(sizes.values()) >= 50


def test_texts_are_unique_and_of_the_promised_length(corpus: list[demo.Passage]) -> None:
    assert len({p.text.lower() for p in corpus}) == len(corpus)
    assert all(demo.FEWEST_WORDS <= len(p.text.split()) <= demo.PASSAGE_WORDS for p in corpus)


def test_no_member_is_in_two_splits(corpus: list[demo.Passage]) -> None:
    splits: dict[tuple[str, str], set[str]] = {}
    for p in corpus:
        splits.setdefault((p.label, p.member), set()).add(p.split)
    assert all(len(found) == 1 for found in splits.values())
    shares = Counter(p.split for p in corpus)
    assert shares["train"] / len(corpus) == pytest.approx(0.7, abs=0.08)
    assert shares["test"] / len(corpus) == pytest.approx(0.15, abs=0.06)


def test_methods_belong_to_their_class_and_so_do_conditional_definitions(tmp_path: Path) -> None:
    words = " ".join(f"word{i}" for i in range(9))
    (tmp_path / "part.py").write_text(
        f'"""the module says {words}"""\n'
        f'class A:\n    """the class says {words}"""\n    def m(self):\n        """the method says {words}"""\n'
        f'if True:\n    try:\n        def f():\n            """the function says {words}"""\n    except E: pass\n'
        f'async def g():\n    """too short"""\n'
    )
    found = demo.read_corpus(tmp_path, {"label": ("part",)})
    assert {(p.member, p.text.split()[1]) for p in found} == {
        ("part", "module"),
        ("A", "class"),
        ("A", "method"),
        ("f", "function"),
    }


def test_a_text_of_two_parts_has_no_label_and_is_left_out(tmp_path: Path) -> None:
    same, other = '"""one two three four five six seven eight"""', '"""A B C D E F G H"""'
    (tmp_path / "a.py").write_text(f"{same}\ndef f():\n    {other}\n")
    (tmp_path / "b.py").write_text(f"def g():\n    {same}\n")
    assert [(p.label, p.text) for p in demo.read_corpus(tmp_path, {"a": ("a",), "b": ("b",)})] == [
        ("a", "A B C D E F G H")
    ]


def test_what_cannot_be_read_is_passed_over(tmp_path: Path) -> None:
    package = tmp_path / "part"
    (package / "test").mkdir(parents=True)
    (package / "bad.py").write_text("def f(:\n")
    (package / "nul.py").write_bytes(b"x = 1\0")
    (package / "latin.py").write_bytes(
        b"# coding: latin-1\n" + '"""eins zwei drei vier fünf sechs sieben acht"""'.encode("latin-1")
    )
    (package / "wrong.py").write_bytes('"""Größe"""'.encode("latin-1"))
    (package / "gone.py").symlink_to(package / "nowhere.py")
    (package / "deep.py").write_text("x = " + "(" * 5000 + ")" * 5000)
    (package / "test" / "tests.py").write_text('"""one two three four five six seven eight nine"""')
    found = demo.read_corpus(tmp_path, {"part": ("part",), "absent": ("absent",)})
    assert [p.text for p in found] == ["eins zwei drei vier fünf sechs sieben acht"]


def test_long_docstrings_are_cut_between_paragraphs() -> None:
    paragraphs = [" ".join(f"{name}{i}" for i in range(40)) for name in "abc"]
    assert list(demo.passages("\n\n".join(paragraphs))) == paragraphs
    long = " ".join(map(str, range(150)))
    assert [len(text.split()) for text in demo.passages(long)] == [64, 64, 22]
    assert list(demo.passages("only a few words")) == []


def test_no_module_of_the_library_is_imported_for_it() -> None:
    code = (
        "import sys; from autolite.tasks import demo; before = set(sys.modules); demo.read_corpus();"
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before} & {'turtle', 'tkinter', 'unittest'}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_demo_task_has_the_corpus_splits(data: TaskData, corpus: list[demo.Passage]) -> None:
    sizes = Counter(p.split for p in corpus)
    assert len(data.train) == sizes["train"]
    assert len(data.search) + len(data.selection) == sizes["validation"]
    assert len(data.test) == sizes["test"]
    assert data.labels == tuple(demo.PARTS)
    assert 10 <= data.p90_tokens <= 128


def test_the_shipped_teacher_is_small_and_as_good_as_its_card_says(data: TaskData) -> None:
    folder = demo.demo_model_path()
    assert sum(f.stat().st_size for f in folder.iterdir()) < 8e6
    card = (folder / "README.md").read_text(encoding="utf-8")
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    assert 2e6 <= model.num_parameters() <= 4e6
    for name, splits in (("test", [data.test]), ("validation", [data.search, data.selection])):
        said = re.search(rf"^\| {name} .*\| (0\.\d+)", card, re.MULTILINE)
        assert said is not None
        sums = np.zeros(2)
        with torch.inference_mode():
            for batch in (b for split in splits for b in TASK.batches(split, 64, pad_id=0)):
                logits = model(**{k: torch.from_numpy(v) for k, v in batch.inputs.items()}).logits
                sums += TASK.score_examples(logits.numpy(), batch.labels).sum(axis=0)
        # The text differs from one Python version to the next.
        assert TASK.summary(sums[0] / sums[1]) == pytest.approx(float(said[1]), abs=0.05)
