"""Calibration text: files to documents, documents to token windows of fixed length.

A `.jsonl` line is a document with `text` or `messages`; any other file is plain text, cut at blank lines into documents
of a few kilobytes, so that text can be split by document whatever its form. A folder stands for the .txt, .md, .text,
.jsonl and .ndjson files in it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from profiler.common.errors import CorpusError

_TEXT_DOCUMENT_CHARACTERS = 4000
_TEXT_SUFFIXES = (".txt", ".md", ".text", ".jsonl", ".ndjson")


@dataclass(frozen=True)
class Document:
    """Plain `text`, or chat `messages` to be rendered with the model's template."""

    text: str = ""
    messages: tuple[dict[str, str], ...] = ()


@dataclass(frozen=True)
class TokenWindows:
    """Token windows [n, context] int64 and, per token, the number of the document that it came from."""

    tokens: np.ndarray
    documents: np.ndarray

    @property
    def count(self) -> int:
        return len(self.tokens)


def corpus_files(paths: Sequence[Path]) -> list[Path]:
    """The files that `paths` stand for, folders searched in sorted order. Raises `CorpusError` when one is missing."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            if (path / "config.json").is_file():
                raise CorpusError(f"corpus {path} is a model folder; put MODEL before --corpus")
            found += sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in _TEXT_SUFFIXES)
        elif path.is_file():
            found.append(path)
        else:
            raise CorpusError(f"corpus {path} does not exist; give a text file, a .jsonl file or a folder of them")
    if not found:
        raise CorpusError(f"no text in {', '.join(map(str, paths))}: expected {', '.join(_TEXT_SUFFIXES)} files")
    return found


def corpus_hash(paths: Sequence[Path]) -> str:
    """16 hex digits of a SHA-256 over all corpus files, in order."""
    digest = hashlib.sha256()
    for path in corpus_files(paths):
        try:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise CorpusError(f"cannot read corpus {path}: {error.strerror}") from error
    return digest.hexdigest()[:16]


def read_documents(paths: Sequence[Path]) -> list[Document]:
    """All documents of `paths`. Raises `CorpusError` for binary, malformed or empty input."""
    documents: list[Document] = []
    for path in corpus_files(paths):
        text = _read_text(path)
        documents += _jsonl(path, text) if path.suffix in (".jsonl", ".ndjson") else _paragraphs(text)
    if not documents:
        raise CorpusError(f"{', '.join(map(str, paths))}: empty corpus, no text found; give a file with text in it")
    return documents


def token_windows(
    documents: Sequence[Document],
    encode: Callable[[Document], list[int]],
    context: int,
    max_tokens: int,
    seed: int,
) -> TokenWindows:
    """Up to `max_tokens` tokens in windows of `context`, from documents in a seeded random order, packed end to end.

    Raises `CorpusError` when the documents hold fewer tokens than one window.
    """
    order = np.random.default_rng(seed).permutation(len(documents))
    wanted = max(1, max_tokens // context) * context
    tokens: list[int] = []
    owners: list[int] = []
    for index in order:
        encoded = encode(documents[index])
        tokens += encoded
        owners += [int(index)] * len(encoded)
        if len(tokens) >= wanted:
            break
    count = min(len(tokens), wanted) // context
    if count == 0:
        raise CorpusError(
            f"corpus too short: {len(tokens)} tokens, expected at least one window of {context}; "
            "add text or ask for shorter windows"
        )
    shape, used = (count, context), count * context
    return TokenWindows(np.array(tokens[:used]).reshape(shape), np.array(owners[:used], np.int32).reshape(shape))


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CorpusError(f"cannot read corpus {path}: {error.strerror}") from error
    try:
        if b"\0" in data:
            raise ValueError("it has NUL bytes")
        return data.decode("utf-8-sig")
    except ValueError as error:
        raise CorpusError(f"corpus {path} is binary, expected UTF-8 text or JSONL ({error})") from error


def _jsonl(path: Path, text: str) -> Iterator[Document]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record: Any = json.loads(line)
            line.encode()
        except (ValueError, RecursionError) as error:
            raise CorpusError(f"{path} line {number} is not JSON ({error})") from error
        record = record if isinstance(record, dict) else {}
        if isinstance(record.get("text"), str):
            if record["text"].strip():
                yield Document(text=record["text"])
        elif _is_conversation(record.get("messages")):
            if record["messages"]:
                yield Document(messages=tuple(record["messages"]))
        else:
            raise CorpusError(f"{path} line {number} has neither `text` nor `messages` with role and content")


def _is_conversation(messages: object) -> bool:
    return isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )


def _paragraphs(text: str) -> Iterator[Document]:
    """Documents of some 4,000 characters, cut at blank lines, or at any line where there are no blank ones."""
    text = text.replace("\r\n", "\n")
    gap = "\n\n" if "\n\n" in text else "\n"
    part: list[str] = []
    size = 0
    for paragraph in text.split(gap):
        part.append(paragraph)
        size += len(paragraph)
        if size >= _TEXT_DOCUMENT_CHARACTERS:
            yield Document(text=gap.join(part))
            part, size = [], 0
    if size and "".join(part).strip():
        yield Document(text=gap.join(part))
