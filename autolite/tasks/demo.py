"""The embedded demo: docstrings of the running Python's standard library, labelled with the part they come from."""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

# Packages and modules that every CPython from 3.11 to 3.14 has, chosen among those with the most docstrings. What a
# Linux distribution may leave out (tkinter, idlelib, test) or a version dropped (distutils) is not here.
PARTS: dict[str, tuple[str, ...]] = {
    "asyncio": ("asyncio",),
    "decimal": ("_pydecimal",),
    "email": ("email",),
    "http": ("http",),
    "importlib": ("importlib",),
    "inspect": ("inspect",),
    "ipaddress": ("ipaddress",),
    "logging": ("logging",),
    "multiprocessing": ("multiprocessing",),
    "tarfile": ("tarfile",),
    "turtle": ("turtle",),
    "unittest": ("unittest",),
    "urllib": ("urllib",),
    "xml": ("xml",),
}
PASSAGE_WORDS = 64
FEWEST_WORDS = 8  # "Return the value." says nothing about where it comes from
# A class falls whole into one split, so big classes make the shares uneven: of the first 500 salts, the most even one.
SALT = "189"


@dataclass(frozen=True, order=True)
class Passage:
    """Up to `PASSAGE_WORDS` words of one docstring; `member` is its module's top-level class or function."""

    label: str
    member: str
    text: str

    @property
    def split(self) -> str:
        """70 % of the members are "train", 15 % "validation", 15 % "test": the same under every Python version."""
        digest = hashlib.sha256(f"{SALT}/{self.label}.{self.member}".encode()).digest()
        share = int.from_bytes(digest[:4]) / 2**32
        return "train" if share < 0.7 else "validation" if share < 0.85 else "test"


def read_corpus(stdlib: Path | None = None, parts: dict[str, tuple[str, ...]] | None = None) -> list[Passage]:
    """Read the passages of all `parts` (label -> top-level modules), sorted, each text once.

    Sources are parsed, never imported; files that cannot be read or parsed, and parts that this installation
    lacks, are passed over. Texts that two parts share are left out, for they have no one label.

    Args:
        stdlib: folder of the library's sources; by default the running interpreter's.
        parts: by default `PARTS`.
    """
    root = stdlib or Path(sysconfig.get_path("stdlib"))
    found: dict[str, list[Passage]] = {}
    for label, modules in (parts or PARTS).items():
        for file in sorted(f for module in modules for f in _sources(root, module)):
            for member, docstring in _docstrings(file, root):
                for text in passages(docstring):
                    found.setdefault(text.lower(), []).append(Passage(label, member, text))
    return sorted(min(same) for same in found.values() if len({p.label for p in same}) == 1)


def demo_model_path() -> Path:
    """Return the folder of the shipped demo teacher: config, float16 safetensors, tokenizer and model card."""
    return Path(__file__).parent.parent / "demo"


def passages(docstring: str) -> Iterator[str]:
    """Yield the docstring in passages of up to `PASSAGE_WORDS` words, cut between paragraphs where possible.

    >>> list(passages("Return the   length of the proxy object, once more."))
    ['Return the length of the proxy object, once more.']
    """
    words: list[str] = []
    for paragraph in re.split(r"\n\s*\n", docstring):
        new = paragraph.split()
        if len(words) + len(new) > PASSAGE_WORDS and len(words) >= FEWEST_WORDS:
            yield " ".join(words[:PASSAGE_WORDS])
            words = []
        words += new
        while len(words) > PASSAGE_WORDS:
            yield " ".join(words[:PASSAGE_WORDS])
            words = words[PASSAGE_WORDS:]
    if len(words) >= FEWEST_WORDS:
        yield " ".join(words)


def _sources(root: Path, module: str) -> Iterable[Path]:
    tests = {"test", "tests", "idle_test"}
    package = (f for f in (root / module).rglob("*.py") if not tests & set(f.relative_to(root).parts))
    return [*package, *(f for f in [root / f"{module}.py"] if f.is_file())]


def _docstrings(file: Path, root: Path) -> Iterator[tuple[str, str]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's sources
            tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return
    if docstring := ast.get_docstring(tree):
        module = file.relative_to(root).with_suffix("").as_posix().removesuffix("/__init__")
        yield module, docstring
    yield from _members(tree, "")


def _members(node: ast.AST, member: str) -> Iterator[tuple[str, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = member or child.name
            if docstring := ast.get_docstring(child):
                yield name, docstring
            yield from _members(child, name)
        elif isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):  # "if", "try" and the like
            yield from _members(child, member)
