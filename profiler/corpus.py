"""Calibration text: files to documents, documents to token windows of fixed length.

A folder stands for the text and JSON files in it. Files are read twice and their text is not kept, so that memory is
one document of at most `RECORD_CHARACTERS` and 8 characters for each token that is wanted, whatever the corpus.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from profiler.common.errors import CorpusError, InputError
from profiler.documents import TEXT_SUFFIXES, Advance, Bad, Document, read_file

_SUFFIXES = (*TEXT_SUFFIXES, *(f"{suffix}.gz" for suffix in TEXT_SUFFIXES))
_BLOCK_BYTES = 1 << 20
# Text is kept for the tokens that are wanted; most take 2 to 5 characters. Where this does not do, more is read.
_CHARACTERS_PER_TOKEN = 8


@dataclass(frozen=True)
class CorpusUse:
    """What windows were made of: documents in the corpus, those used, those unusable, and the first of these."""

    documents: int
    used: int
    skipped: int = 0
    first_skipped: str = ""


@dataclass(frozen=True)
class TokenWindows:
    """Token windows [n, context] int64 and, per token, the number of the document that it came from."""

    tokens: np.ndarray
    documents: np.ndarray
    use: CorpusUse | None = None

    @property
    def count(self) -> int:
        return len(self.tokens)


class Skipped:
    """What becomes of documents that cannot be used: the first one is raised or, with `skip`, they are counted."""

    def __init__(self, skip: bool = False) -> None:
        self._skip, self.count, self.first = skip, 0, ""

    def __call__(self, error: CorpusError) -> None:
        if not self._skip:
            raise CorpusError(f"{error}; correct it, or leave such documents out with --skip-bad") from error
        self.count, self.first = self.count + 1, self.first or str(error)


def corpus_files(paths: Sequence[Path]) -> list[Path]:
    """The files that `paths` stand for, folders searched in sorted order; empty ones are left out.

    Raises `CorpusError` where one is missing or no regular file. Of the kernel's files, which say that they are empty,
    some wait for ever.
    """
    found: list[Path] = []
    for path in paths:
        try:
            files = _inside(path) if path.is_dir() else [path]
            if not path.exists():
                raise CorpusError(f"corpus {path} does not exist; give a text file, a .jsonl file or a folder of them")
            if not all(file.is_file() for file in files):
                raise CorpusError(f"corpus {path} is no regular file; write what it gives to a file first")
            found += [file for file in files if file.stat().st_size]
        except OSError as error:
            raise CorpusError(f"cannot read corpus {path}: {error.strerror}") from error
    return found


def _inside(folder: Path) -> list[Path]:
    if (folder / "config.json").is_file():
        raise CorpusError(f"corpus {folder} is a model folder; put MODEL before --corpus")
    found = sorted(p for p in folder.rglob("*") if p.is_file() and p.name.lower().endswith(_SUFFIXES))
    if not found:
        raise CorpusError(f"no text in {folder}: expected {', '.join(TEXT_SUFFIXES)} files, or such with .gz")
    return found


def corpus_hash(paths: Sequence[Path], advance: Advance = lambda count: None) -> str:
    """16 hex digits of a SHA-256 over all corpus files, in order; `advance` is called with bytes read meanwhile."""
    digest = hashlib.sha256()
    for path in corpus_files(paths):
        found = hashlib.sha256()
        try:
            with path.open("rb") as file:
                while block := file.read(_BLOCK_BYTES):
                    found.update(block)
                    advance(len(block))
        except OSError as error:
            raise CorpusError(f"cannot read corpus {path}: {error.strerror}") from error
        digest.update(found.digest())
    return digest.hexdigest()[:16]


def read_documents(paths: Sequence[Path], bad: Bad, advance: Advance = lambda count: None) -> Iterator[Document]:
    """All documents of `paths`, one after another; `bad` is given those that cannot be used.

    advance: called with bytes read since its last call. Raises `CorpusError` for binary or empty input.
    """
    empty = True
    for path in corpus_files(paths):
        for document in read_file(path, bad, advance):
            empty = False
            yield document
    if empty:
        raise CorpusError(f"{', '.join(map(str, paths))}: empty corpus, no text found; give a file with text in it")


def token_windows(
    documents: Callable[[Bad], Iterable[Document]],
    encode: Callable[[Document, int], list[int]],
    context: int,
    max_tokens: int,
    seed: int,
    skip_bad: bool = False,
) -> TokenWindows:
    """Up to `max_tokens` tokens in windows of `context`, from documents in a seeded random order, packed end to end.

    documents: gives them anew at each call, the same in the same order. encode: a document's first tokens, so many.
    Raises `CorpusError` when the documents hold fewer tokens than one window, and where one cannot be used, unless such
    are skipped.
    """
    read = Skipped(skip_bad)
    sizes = np.array([document.characters for document in documents(read)], np.int64)
    order = np.random.default_rng(seed).permutation(len(sizes))
    wanted = max(1, max_tokens // context) * context
    kept = _CHARACTERS_PER_TOKEN * wanted
    while True:
        drawn = order[: np.searchsorted(np.cumsum(sizes[order]), kept) + 1]
        skipped = copy(read)
        tokens, owners = _encode(_drawn(documents, drawn, kept), encode, wanted, skipped)
        if len(tokens) >= wanted or (len(drawn) == len(order) and sizes.max(initial=0) <= kept):
            break
        kept *= _CHARACTERS_PER_TOKEN
    count = min(len(tokens), wanted) // context
    if count == 0:
        raise CorpusError(
            f"corpus too short: {len(tokens)} tokens, expected at least one window of {context}; "
            "add text or ask for shorter windows"
        )
    shape = (count, context)
    tokens, owners = tokens[: count * context], owners[: count * context]
    use = CorpusUse(len(sizes), len(np.unique(owners)), skipped.count, skipped.first)
    return TokenWindows(tokens.reshape(shape), owners.reshape(shape), use)


def _drawn(
    documents: Callable[[Bad], Iterable[Document]], numbers: np.ndarray, characters: int
) -> Iterator[tuple[int, Document]]:
    """The documents of these numbers, in their order, with so many characters of each."""
    wanted, found = set(numbers.tolist()), dict[int, Document]()
    for number, document in enumerate(documents(lambda error: None)):
        if number in wanted:
            found[number] = document.cut(characters)
        if len(found) == len(wanted):
            break
    yield from ((number, found[number]) for number in numbers.tolist() if number in found)


def _encode(
    documents: Iterable[tuple[int, Document]], encode: Callable[[Document, int], list[int]], wanted: int, bad: Bad
) -> tuple[np.ndarray, np.ndarray]:
    """The first `wanted` tokens of documents, int64 [n], or all, and their documents' numbers, int32 [n]."""
    tokens, owners, left = [np.empty(0, np.int64)], [np.empty(0, np.int32)], wanted
    for number, document in documents:
        try:
            tokens.append(np.array(encode(document, left), np.int64))
        except InputError as error:
            bad(CorpusError(f"{document.place}: {error}"))
            continue
        owners.append(np.full(len(tokens[-1]), number, np.int32))
        left -= len(tokens[-1])
        if left <= 0:
            break
    return np.concatenate(tokens), np.concatenate(owners)
