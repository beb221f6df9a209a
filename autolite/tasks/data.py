"""Reading of data sets: a file, a folder or a hub name becomes named tables of columns; and the cuts between splits."""

from __future__ import annotations

import csv
import difflib
import gzip
import hashlib
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autolite.errors import DataError

Columns = dict[str, list[Any]]

TEXT = (
    "text",
    "sentence",
    "content",
    "review",
    "question",
    "query",
    "utterance",
    "comment",
    "body",
    "message",
    "title",
)
PAIRS = (
    ("text_a", "text_b"),
    ("text1", "text2"),
    ("sentence1", "sentence2"),
    ("sentence_a", "sentence_b"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
)
LABEL = ("label", "labels", "label_text", "category", "class", "target", "sentiment", "intent", "topic", "polarity")
SPLITS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation"} | {
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
META = {"meta.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}  # about data
CUT = 0.1  # share of train that becomes a missing validation or test split


@dataclass(frozen=True)
class Table:
    """Rows of one split. `origin` is what messages call it; `plain` says that the rows are the lines of a text."""

    origin: str
    columns: Columns
    plain: bool = False

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))


def read(source: str) -> dict[str, Table]:
    """Read `source`, a file, a folder or the name of a hub data set ("name" or "name:configuration").

    Returns:
        Tables by split ("train", "validation", "test"); there is always a "train", and no table is empty.

    Raises:
        DataError: if nothing is there, or a file is empty, damaged or of an unknown format.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        tables = _read_folder(path)
    elif path.is_file():
        tables = {"train": read_file(path)}
    else:
        tables = _read_hub(source)
    for split, table in tables.items():
        if not len(table):
            raise DataError(f"the {split} split of '{source}' ({table.origin}) has no rows")
    return tables


def read_file(path: Path) -> Table:
    """Read one file by its extension; `.gz` may follow any of them.

    Raises:
        DataError: naming the file, and the line where one is wrong.
    """
    kind = _kind(path)
    if kind is None:
        raise DataError(f"cannot tell the format of '{path}'; known: {', '.join(EXTENSIONS)}, and each with .gz")
    try:
        content = path.read_bytes()
        if path.suffix.lower() == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"'{path}' cannot be read: {error}") from error
    if not content.strip():
        raise DataError(f"'{path}' is empty")
    if kind == ".parquet":
        return Table(path.name, _parquet(content, path))
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"'{path}' is not UTF-8 text: {error.reason} at byte {error.start}; convert it first"
        ) from error
    columns = READERS[kind](text, path)
    if not any(columns.values()):
        raise DataError(f"'{path}' has no rows")
    return Table(path.name, columns, plain=kind == ".txt")


def _kind(path: Path) -> str | None:
    suffixes = [s.lower() for s in path.suffixes if s.lower() != ".gz"]
    return suffixes[-1] if suffixes and suffixes[-1] in EXTENSIONS else None


def _lines(text: str) -> list[str]:
    """Split at line ends only: `str.splitlines` would also cut at U+2028 and the like inside a text."""
    return text.replace("\r\n", "\n").removesuffix("\n").split("\n")


def _jsonl(text: str, path: Path) -> Columns:
    rows = []
    for number, line in enumerate(_lines(text), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (json.JSONDecodeError, RecursionError) as error:
                raise DataError(f"line {number} of '{path}' is not JSON: {error}") from error
            if not isinstance(rows[-1], dict):
                raise DataError(f"line {number} of '{path}' is not a JSON object but {short(rows[-1])}")
    return _columns(rows)


def _json(text: str, path: Path) -> Columns:
    try:
        data = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return _jsonl(text, path)  # many files called .json hold one object a line
    if isinstance(data, dict) and isinstance(data.get("data"), list):
        data = data["data"]
    if isinstance(data, dict) and data and all(isinstance(v, list) for v in data.values()):
        if len({len(v) for v in data.values()}) > 1:
            raise DataError(f"the columns of '{path}' differ in length: { ({k: len(v) for k, v in data.items()}) }")
        return data
    rows = data if isinstance(data, list) else [data]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"row {number} of '{path}' is not a JSON object but {short(row)}")
    return _columns(rows)


def _columns(rows: Sequence[Mapping[str, Any]]) -> Columns:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _separated(text: str, path: Path) -> Columns:
    header = text.split("\n", 1)[0]
    separator = "\t" if _kind(path) == ".tsv" else max(",;\t", key=header.count)
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default refuses texts above 128 KiB
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        rows = [row for row in reader if row]
    except csv.Error as error:
        if separator != "\t":
            raise DataError(f"line {reader.line_num} of '{path}' is not well-formed: {error}") from error
        rows = _unquoted(text)
    quoted = header.startswith('"')  # names that are quoted say that marks are no part of the texts
    if separator == "\t" and not quoted and any("\t" in field and "\n" in field for row in rows for field in row):
        plain = _unquoted(text)  # two marks of two rows may have made one of them
        rows = plain if len({len(row) for row in plain}) == 1 else rows
    names = rows[0]
    for number, row in enumerate(rows[1:], 1):
        if len(row) != len(names):
            raise DataError(f"row {number} of '{path}' has {len(row)} fields, but the header has {len(names)}")
    return {name: [row[i] for row in rows[1:]] for i, name in enumerate(names)}


def _unquoted(text: str) -> list[list[str]]:
    """Rows of a file that separates by tabs and never quotes, as GLUE's: its quotation marks belong to the texts."""
    return [line.split("\t") for line in _lines(text) if line]


def _parquet(content: bytes, path: Path) -> Columns:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        table = pq.read_table(io.BytesIO(content))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"'{path}' is not a Parquet file: {error}") from error
    columns: Columns = table.to_pydict()
    return columns


READERS: dict[str, Callable[[str, Path], Columns]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _separated,
    ".tsv": _separated,
    ".txt": lambda text, _path: {"text": _lines(text)},
}
EXTENSIONS = (*READERS, ".parquet")


def _read_folder(folder: Path) -> dict[str, Table]:
    files = sorted(f for f in folder.iterdir() if f.is_file() and _kind(f) and f.name not in META)
    by_split: dict[str, list[Path]] = {}
    for file in files:
        if match := re.match(rf"({'|'.join(SPLITS)})([-_.].*)$", file.name, re.IGNORECASE):
            by_split.setdefault(SPLITS[match[1].lower()], []).append(file)
    if not by_split and len(files) == 1:
        by_split = {"train": files}
    if "train" not in by_split:
        there = ", ".join(f.name for f in files) or "no data file"
        raise DataError(f"no train file in '{folder}' (it holds {there}); name one train.jsonl, .csv, .parquet or .txt")
    tables = {}
    for split in sorted(by_split, key=["train", "validation", "test"].index):
        parts = [read_file(file) for file in by_split[split]]
        names = list(parts[0].columns)
        kinds = {(_kind(file), file.suffix.lower() == ".gz") for file in by_split[split]}
        if len(kinds) > 1 or any(set(part.columns) != set(names) for part in parts):
            raise DataError(
                f"the {split} files in '{folder}' ({', '.join(p.origin for p in parts)}) have different columns or"
                " formats; keep one of them"
            )
        columns = {name: [value for part in parts for value in part.columns[name]] for name in names}
        tables[split] = Table(", ".join(part.origin for part in parts), columns, parts[0].plain)
    return tables


def _read_hub(source: str) -> dict[str, Table]:
    missing = f"'{source}' is no file, no folder and no data set that can be reached on the hub"
    name, _, configuration = source.partition(":")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name) or _kind(Path(name)):
        raise DataError(missing)
    from datasets import ClassLabel, load_dataset

    try:
        loaded = load_dataset(name, configuration or None)
    except ValueError as error:
        if known := re.search(r"(?:available configs|Available): \[(.*?)\]", str(error)):
            raise DataError(f"choose a configuration of '{name}' with '{name}:NAME': {known[1]}") from error
        raise DataError(f"{missing}: {short(error)}") from error
    except Exception as error:  # datasets has dozens of network and parsing errors of its own
        raise DataError(f"{missing}: {short(error)}") from error
    tables: dict[str, Table] = {}
    for split, rows in loaded.items():
        if (known_split := SPLITS.get(re.split(r"[_.-]", split)[0])) and known_split not in tables:
            columns = rows.to_dict()
            for column, feature in rows.features.items():
                if isinstance(feature, ClassLabel):
                    columns[f"{column}_text"] = [
                        feature.int2str(v) if v is not None and v >= 0 else None for v in columns[column]
                    ]
            tables[known_split] = Table(f"{source}, split {split}", columns)
    if "train" not in tables:
        raise DataError(f"'{source}' has no train split (it has {', '.join(loaded)})")
    return tables


def text_columns(table: Table, text: str | None, pair: str | None) -> tuple[str, str | None]:
    """Return the names of the text column and, for pairs, of the second text's; None means by convention.

    Raises:
        DataError: naming the column that is missing, those there are, and the option that chooses one.
    """
    if text is None and pair is None:
        for first, second in PAIRS:
            if (a := find(table, first)) and (b := find(table, second)):
                return a, b
    chosen = column(table, text, [n for n in TEXT if n != pair] + [a for a, _ in PAIRS], "text", "--text")
    return chosen, column(table, pair, (), "second text", "--pair") if pair is not None else None


def column(table: Table, name: str | None, conventional: Iterable[str], meaning: str, option: str) -> str:
    """Return the column called `name`, or the first of the `conventional` names that the table has.

    Raises:
        DataError: naming what is missing, the columns there are, and the option that chooses one.
    """
    there = ", ".join(f"'{c}'" for c in table.columns)
    if name is not None:
        if found := find(table, name):
            return found
        near = difflib.get_close_matches(name, table.columns, n=1, cutoff=0.5)
        hint = f" did you mean '{near[0]}'?" if near else f" choose one with {option}."
        raise DataError(f"no column '{name}' in {table.origin} (option {option}):{hint} Columns: {there}")
    for candidate in conventional:
        if found := find(table, candidate):
            return found
    raise DataError(f"no {meaning} column in {table.origin}: name it with {option}. Columns: {there}")


def find(table: Table, name: str) -> str | None:
    """Return a column's name as the table writes it, whatever the case; None if there is none."""
    if name in table.columns:
        return name
    return next((c for c in table.columns if c.casefold() == name.casefold()), None)


def texts(table: Table, name: str) -> list[str]:
    """Return a column of texts; a missing value is the empty text, and half of a surrogate pair, which no tokenizer
    takes, is the replacement character.

    Raises:
        DataError: naming the first row whose value is not a text.
    """
    values = ["" if value is None else value for value in table.columns[name]]
    for number, value in enumerate(values, 1):
        if not isinstance(value, str):
            raise DataError(f"row {number} of {table.origin}: '{name}' is {short(value)}, which is not a text")
    return [whole(value) for value in values]


def whole(text: str) -> str:
    """Return a text with what is half of a character, which nothing encodes, replaced."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def cut(keys: Sequence[str], share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut rows in two by hashing their keys with `seed`: rows with equal keys stay together.

    Returns:
        The rows that remain and about `share` of them all (at least one row on each side), both in order.

    Raises:
        DataError: if there are fewer than two different keys.
    """
    order: dict[str, bytes] = {k: hashlib.sha256(f"{seed}/{k}".encode("utf-8", "surrogatepass")).digest() for k in keys}
    if len(order) < 2:
        raise DataError(f"too few different rows to cut ({len(order)}, of {len(keys)} rows)")
    count = dict.fromkeys(order, 0)
    for key in keys:
        count[key] += 1
    wanted, taken, size = max(1, round(share * len(keys))), set(), 0
    for key in sorted(order, key=order.__getitem__)[:-1]:
        if size and size + count[key] > wanted:
            continue
        taken.add(key)
        size += count[key]
        if size >= wanted:
            break
    cut_off = np.array([key in taken for key in keys])
    return np.flatnonzero(~cut_off), np.flatnonzero(cut_off)


def assign(keys: Mapping[str, Sequence[str]], seed: int) -> tuple[dict[str, tuple[str, np.ndarray]], list[str]]:
    """Say which rows make up the splits train, search, selection and test, given each row's key by split found.

    A missing test split is a tenth of train, then a missing validation split a tenth of the rest; validation is cut
    into two halves, search and selection. All cuts are by `cut`.

    Returns:
        By split: the split found that its rows come from, and their indices there; and a note for each cut.

    Raises:
        DataError: if a split has too few rows to cut.
    """
    rows = {split: (split, np.arange(len(k))) for split, k in keys.items()}
    notes = []

    def part(split: str, share: float) -> tuple[tuple[str, np.ndarray], tuple[str, np.ndarray]]:
        source, indices = rows[split]
        try:
            stay, go = cut([keys[source][int(i)] for i in indices], share, seed)
        except DataError as error:
            raise DataError(f"{split}: {error}; give more rows, or a folder with train, validation and test") from None
        return (source, indices[stay]), (source, indices[go])

    for split in ("test", "validation"):
        if split not in rows:
            rows["train"], rows[split] = part("train", CUT)
            notes.append(f"{split}: {len(rows[split][1])} rows, {CUT:.0%} cut from train by seed {seed}")
    rows["selection"], rows["search"] = part("validation", 0.5)
    del rows["validation"]
    return rows, notes


def short(value: object) -> str:
    """Return a value, or what an error says, in one line for a message."""
    text = " ".join((str(value) if isinstance(value, Exception) else f"{value!r}").split())
    return text if len(text) <= 100 else text[:99] + "…"
