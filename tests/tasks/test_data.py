import csv
import gzip
import io
import json
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from autolite.errors import DataError
from autolite.tasks import data

# Everything UTF-8 can hold: line separators of all kinds, quotes, "NA", texts that look like numbers.
TEXTS = st.one_of(st.sampled_from(["NA", "null", "None", "1", "", 'a "b"', "a,b;c\td", "\u2028", "\x85"]), st.text())
ROWS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=8)


def as_csv(rows: list[tuple[str, str]], separator: str) -> bytes:
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=separator, quoting=csv.QUOTE_ALL).writerows([("text", "label"), *rows])
    return out.getvalue().encode("utf-8")


def as_parquet(rows: list[tuple[str, str]]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table({"text": [t for t, _ in rows], "label": [v for _, v in rows]}), out)
    return out.getvalue()


def as_objects(rows: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"text": t, "label": v} for t, v in rows]


WRITERS = {
    ".jsonl": lambda rows: "\n".join(json.dumps(r, ensure_ascii=False) for r in as_objects(rows)).encode(),
    ".json": lambda rows: json.dumps(as_objects(rows)).encode(),
    ".csv": lambda rows: as_csv(rows, ","),
    ".tsv": lambda rows: as_csv(rows, "\t"),
    ".parquet": as_parquet,
}


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("zipped", [False, True])
@given(rows=ROWS)
@example(rows=[("\t\n", "NA")])  # reads as two rows of two fields, too, where marks belong to the texts
def test_every_format_gives_back_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, zipped: bool, rows: list[tuple[str, str]]
) -> None:
    content = WRITERS[suffix](rows)
    path = tmp_path_factory.mktemp("data") / (f"d{suffix}.gz" if zipped else f"d{suffix}")
    path.write_bytes(gzip.compress(content, mtime=0) if zipped else content)
    table = data.read(str(path))["train"]
    assert table.columns == {"text": [t for t, _ in rows], "label": [v for _, v in rows]}


@given(lines=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n\r")), min_size=1))
def test_plain_text_gives_its_lines(tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> None:
    path = tmp_path_factory.mktemp("data") / "book.txt"
    path.write_text("x" + "\n".join(lines) + "\n", encoding="utf-8", newline="")
    table = data.read(str(path))["train"]
    assert table.plain
    assert table.columns["text"] == ["x" + lines[0], *lines[1:]]


@pytest.mark.parametrize(
    "content",
    ['{"text": ["a", "b"], "label": [0, 1]}', '{"data": [{"text": "a", "label": 0}, {"text": "b", "label": 1}]}'],
)
def test_json_in_columns_or_under_a_data_key(tmp_path: Path, content: str) -> None:
    (tmp_path / "d.json").write_text(content)
    assert data.read(str(tmp_path / "d.json"))["train"].columns == {"text": ["a", "b"], "label": [0, 1]}


def test_csv_with_semicolons_and_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("text;label\na, b;0\n", encoding="utf-8-sig")
    assert data.read(str(tmp_path / "d.csv"))["train"].columns == {"text": ["a, b"], "label": ["0"]}


def test_a_folder_is_split_by_the_names_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "train-00000-of-00002.csv").write_text("text,label\na,0\n")
    (tmp_path / "train-00001-of-00002.csv").write_text("text,label\nb,1\n")
    (tmp_path / "dev.jsonl.gz").write_bytes(gzip.compress(b'{"text": "c", "label": 1}', mtime=0))
    (tmp_path / "test.parquet").write_bytes(as_parquet([("d", "1")]))
    (tmp_path / "meta.json").write_text('{"task": "anything"}')
    tables = data.read(str(tmp_path))
    assert {split: t.columns["text"] for split, t in tables.items()} == {
        "train": ["a", "b"],
        "validation": ["c"],
        "test": ["d"],
    }
    assert tables["train"].origin == "train-00000-of-00002.csv, train-00001-of-00002.csv"


def test_the_same_split_in_two_formats_is_not_read_twice(tmp_path: Path) -> None:
    for name in ("train.csv", "test.csv"):
        (tmp_path / name).write_text("text,label\na,0\n")
    (tmp_path / "test.csv.gz").write_bytes(gzip.compress(b"text,label\na,0\n", mtime=0))
    with pytest.raises(DataError, match=r"\(test.csv, test.csv.gz\) have different columns or formats; keep one"):
        data.read(str(tmp_path))


def test_marks_belong_to_the_texts_where_tabs_separate_and_nothing_is_quoted(tmp_path: Path) -> None:
    """GLUE's files; a mark at the beginning of a text would begin a quoted one, which ends at the next row's."""
    file = tmp_path / "train.tsv"
    for rows in (
        [('"extreme ops " exceeds expectations', "1"), ('a "b" c', "0")],
        [('"a', "1"), ('b"', "0")],
    ):
        file.write_text("sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows))
        assert list(zip(*data.read(str(file))["train"].columns.values(), strict=True)) == rows


def test_half_of_a_surrogate_pair_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text('{"text": "cut \\ud83d"}\n{"text": "whole \\ud83d\\ude00"}\n')
    assert data.texts(data.read(str(file))["train"], "text") == ["cut \ufffd", "whole \U0001f600"]


def test_a_folder_with_one_file_of_any_name(tmp_path: Path) -> None:
    (tmp_path / "reviews.csv").write_text("text,label\na,0\n")
    assert list(data.read(str(tmp_path))) == ["train"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("d.jsonl", b"", "'{path}' is empty"),
        ("d.jsonl.gz", gzip.compress(b"\n \n", mtime=0), "'{path}' is empty"),
        ("d.json", b"[]", "'{path}' has no rows"),
        ("d.csv", b"text,label\n", "'{path}' has no rows"),
        ("d.jsonl", b'{"text": "a"}\n{"text": ', "line 2 of '{path}' is not JSON"),
        ("d.jsonl", b'{"text": "a"}\n\n7', "line 3 of '{path}' is not a JSON object but 7"),
        ("d.json", b'["a"]', "row 1 of '{path}' is not a JSON object but 'a'"),
        ("d.json", b'{"text": ["a"], "label": [0, 1]}', "the columns of '{path}' differ in length"),
        ("d.csv", b"text,label\na,0\nb,1,2\n", "row 2 of '{path}' has 3 fields, but the header has 2"),
        ("d.csv", b'text,label\n"a,0\n', "line 2 of '{path}' is not well-formed"),
        ("d.parquet", b"PAR1 no more", "'{path}' is not a Parquet file"),
        ("d.jsonl.gz", b"not compressed", "'{path}' cannot be read: Not a gzipped file"),
        (
            "d.jsonl.gz",
            gzip.compress(b'{"text": "a"}' * 99, mtime=0)[:-20],
            "'{path}' cannot be read: Compressed file ended",
        ),
        ("d.jsonl.gz", gzip.compress(b"{}", mtime=0)[:10] + b"\xff" * 20, "'{path}' cannot be read: Error -3 while"),
        (
            "d.txt",
            "Größe".encode("latin-1"),
            "'{path}' is not UTF-8 text: invalid start byte at byte 2; convert it first",
        ),
        (
            "d.xlsx",
            b"x",
            "cannot tell the format of '{path}'; known: .jsonl, .ndjson, .json, .csv, .tsv, .txt, .parquet",
        ),
    ],
)
def test_a_file_that_cannot_be_used_says_why(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        data.read(str(path))
    assert str(error.value).startswith(says.format(path=path))


def test_nothing_of_that_name(tmp_path: Path) -> None:
    for source in (str(tmp_path / "none.jsonl"), "none.jsonl", "./none", "no such thing"):
        with pytest.raises(DataError) as error:
            data.read(source)
        assert str(error.value) == f"'{source}' is no file, no folder and no data set that can be reached on the hub"


def test_a_hub_name_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object) -> None:
        raise ConnectionError("Couldn't reach\n the hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match="'imdb' is no file, no folder and no data set that can be reached on the hub:"):
        data.read("imdb")


def test_a_hub_data_set_gives_its_splits_and_the_names_of_its_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    rows = datasets.Dataset.from_dict({"sentence": ["a", "b"], "label": [1, -1]}, features=features)
    asked = []

    def load(name: str, configuration: str | None) -> datasets.DatasetDict:
        asked.append((name, configuration))
        return datasets.DatasetDict(train=rows, validation_matched=rows, unsupervised=rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    tables = data.read("nyu-mll/glue:sst2")
    assert asked == [("nyu-mll/glue", "sst2")]
    assert list(tables) == ["train", "validation"]
    assert tables["train"].columns == {"sentence": ["a", "b"], "label": [1, -1], "label_text": ["good", None]}


def test_a_hub_data_set_of_several_configurations_lists_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        raise ValueError(
            "Config name is missing.\nPlease pick one among the available configs: ['cola', 'sst2']\nExample"
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match="choose a configuration of 'glue' with 'glue:NAME': 'cola', 'sst2'"):
        data.read("glue")


def test_a_folder_that_cannot_be_used_says_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no train file in '.*' \(it holds no data file\)"):
        data.read(str(tmp_path))
    (tmp_path / "test.csv").write_text("text,label\na,0\n")
    (tmp_path / "more.csv").write_text("text,label\na,0\n")
    with pytest.raises(DataError, match=r"no train file in '.*' \(it holds more.csv, test.csv\)"):
        data.read(str(tmp_path))
    (tmp_path / "train.csv").write_text("text,label\na,0\n")
    (tmp_path / "train.txt").write_text("a\n")
    with pytest.raises(DataError, match=r"the train files in '.*' \(train.csv, train.txt\) have different columns"):
        data.read(str(tmp_path))


def table(*columns: str) -> data.Table:
    return data.Table("d.csv", {name: ["x"] for name in columns})


@pytest.mark.parametrize(
    ("columns", "text", "pair", "found"),
    [
        (("id", "Text", "label"), None, None, ("Text", None)),
        (("label", "review"), None, None, ("review", None)),
        (("premise", "hypothesis", "label"), None, None, ("premise", "hypothesis")),
        (("question", "sentence"), None, None, ("question", "sentence")),
        (("sentence1", "sentence2"), "sentence2", None, ("sentence2", None)),
        (("text", "context"), None, "context", ("text", "context")),
        (("a", "b"), "a", "b", ("a", "b")),
    ],
)
def test_columns_are_found_by_convention_or_by_name(
    columns: tuple[str, ...], text: str | None, pair: str | None, found: tuple[str, str | None]
) -> None:
    assert data.text_columns(table(*columns), text, pair) == found


def test_a_column_that_is_not_there_names_the_nearest_and_the_option() -> None:
    with pytest.raises(DataError) as error:
        data.text_columns(table("review_text", "label"), "reviewtext", None)
    assert str(error.value) == (
        "no column 'reviewtext' in d.csv (option --text): did you mean 'review_text'? Columns: 'review_text', 'label'"
    )
    with pytest.raises(DataError, match=r"no column 'q' in d.csv \(option --pair\): choose one with --pair."):
        data.text_columns(table("text", "label"), None, "q")
    with pytest.raises(DataError, match=r"no text column in d.csv: name it with --text. Columns: 'a', 'b'"):
        data.text_columns(table("a", "b"), None, None)
    with pytest.raises(DataError, match=r"no label column in d.csv: name it with --label. Columns: 'text'"):
        data.column(table("text"), None, data.LABEL, "label", "--label")


def test_a_text_column_of_numbers_names_the_row() -> None:
    with pytest.raises(DataError, match=r"row 2 of d.csv: 'text' is 7, which is not a text"):
        data.texts(data.Table("d.csv", {"text": [None, 7]}), "text")


@given(keys=st.lists(st.text(max_size=2), min_size=2, max_size=60), share=st.floats(0.05, 0.5), seed=st.integers(0, 9))
def test_a_cut_is_disjoint_complete_reproducible_and_never_parts_equal_rows(
    keys: list[str], share: float, seed: int
) -> None:
    if len(set(keys)) < 2:
        with pytest.raises(DataError, match="too few different rows"):
            data.cut(keys, share, seed)
        return
    stay, go = data.cut(keys, share, seed)
    assert sorted([*stay, *go]) == list(range(len(keys)))
    assert len(stay) > 0
    assert len(go) > 0
    assert not {keys[i] for i in stay} & {keys[i] for i in go}
    assert all(np.array_equal(a, b) for a, b in zip((stay, go), data.cut(keys, share, seed), strict=True))
    # No farther from the share than the repeated rows force it to be.
    assert abs(len(go) - share * len(keys)) <= max(Counter(keys).values())


def test_missing_splits_are_tenths_of_train_and_validation_is_halved() -> None:
    keys = {"train": [f"row {i}" for i in range(1000)]}
    rows, notes = data.assign(keys, seed=3)
    assert {split: (source, len(i)) for split, (source, i) in rows.items()} == {
        "train": ("train", 810),
        "test": ("train", 100),
        "selection": ("train", 45),
        "search": ("train", 45),
    }
    assert sorted(i for _, indices in rows.values() for i in indices) == list(range(1000))
    assert notes == [
        "test: 100 rows, 10% cut from train by seed 3",
        "validation: 90 rows, 10% cut from train by seed 3",
    ]
    other, _ = data.assign(keys, seed=4)
    assert not np.array_equal(rows["test"][1], other["test"][1])


def test_splits_that_are_there_are_left_alone() -> None:
    rows, notes = data.assign({"train": ["a", "b"], "validation": ["c", "d"], "test": ["e"]}, seed=0)
    assert notes == []
    assert list(rows["train"][1]) == [0, 1]
    assert {source for source, _ in (rows["search"], rows["selection"])} == {"validation"}
    assert sorted([*rows["search"][1], *rows["selection"][1]]) == [0, 1]


def test_too_few_rows_to_cut_say_so() -> None:
    with pytest.raises(DataError, match=r"train: too few different rows to cut \(1, of 2 rows\); give more rows"):
        data.assign({"train": ["same", "same"]}, seed=0)
