"""Documents of a corpus file, one after another, in memory that does not grow with the file.

JSON records have `text`, or the turns of a conversation in `messages` (role and content) or `conversations` (from and
value). `.jsonl` and `.ndjson` have one on a line, `.json` one after another or in an array. Any other file is plain
text, cut into documents of a few kilobytes, so that text can be split by document whatever its form; but one whose
first line is such a record is read as JSON lines. All may be gzipped, and may begin with a byte order mark.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

from profiler.common.errors import CorpusError

TEXT_SUFFIXES = (".txt", ".md", ".text", ".jsonl", ".ndjson", ".json")
# A record, its text and a copy that shows whether it is valid are in memory at once: 50 MB of ASCII, up to four times
# that of other text. A longer `text` on a line of its own is cut here.
RECORD_CHARACTERS = 16 << 20
_BLOCK_CHARACTERS = 1 << 18
# Where plain text may be cut, and after how many characters; a document has no more than the last number.
_CUTS, _LONGEST = (("\n\n", 4000), ("\n", 6000), (" ", 8000)), 10_000
_ROLES = {"human": "user", "gpt": "assistant"}
_BETWEEN_RECORDS, _BETWEEN_FIELDS = re.compile(r"[\s,\[\]]*"), re.compile(r"[\s,:]*")
_HIGH_SURROGATES = "".join(map(chr, range(0xD800, 0xDC00)))


@dataclass(frozen=True)
class Document:
    """Plain `text`, or chat `messages` to be rendered with the model's template; `place` is FILE:LINE of its start."""

    text: str = ""
    messages: tuple[dict[str, str], ...] = ()
    place: str = field(default="", compare=False)

    @property
    def characters(self) -> int:
        return len(self.text) + sum(len(message["content"]) for message in self.messages)

    def cut(self, characters: int) -> Document:
        """The document with no more of its text than that; a conversation stays whole."""
        return self if len(self.text) <= characters else replace(self, text=self.text[:characters])


Bad = Callable[[CorpusError], None]
Advance = Callable[[int], None]
# What is at one place: a document, or why it cannot be used, or nothing but blanks.
_Found = Document | CorpusError | None


def read_file(path: Path, bad: Bad, advance: Advance = lambda count: None) -> Iterator[Document]:
    """The documents of a file that have text; `bad` is given those that cannot be used, as errors that name the line.

    advance: called with bytes of the file read since its last call. Raises `CorpusError` for a file that is binary or
    cannot be read.
    """
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    with _opened(path, advance) as stream:
        if suffix == ".json":
            read = _json_values
        elif suffix in (".jsonl", ".ndjson") or _begins_with_a_record(stream):
            read = _json_lines
        else:
            read = _plain_text
        for found in read(path, stream):
            if isinstance(found, CorpusError):
                bad(found)
            elif found is not None:
                yield found


class _Counted(io.FileIO):
    """A file that tells how much of it was read."""

    def __init__(self, path: Path, advance: Advance) -> None:
        super().__init__(path)
        self._advance = advance

    def readinto(self, buffer: Any) -> int | None:
        count = super().readinto(buffer)
        self._advance(count or 0)
        return count


@contextmanager
def _opened(path: Path, advance: Advance) -> Iterator[io.TextIOWrapper]:
    """The text of a file, unpacked, with `\\n` as line ends; bytes that are not UTF-8 come as lone surrogates."""
    try:
        with io.BufferedReader(_Counted(path, advance), _BLOCK_CHARACTERS) as raw:
            unpacked = gzip.GzipFile(fileobj=raw) if path.suffix.lower() == ".gz" else raw
            yield io.TextIOWrapper(unpacked, "utf-8-sig", "surrogateescape")
    except (OSError, EOFError, zlib.error) as error:
        raise CorpusError(f"cannot read corpus {path}: {getattr(error, 'strerror', None) or error}") from error


def _begins_with_a_record(stream: io.TextIOWrapper) -> bool:
    """Whether the first line is a record; the stream is at its start again after."""
    first = stream.read(1)
    line = first + stream.readline(RECORD_CHARACTERS) if first == "{" else ""
    stream.seek(0)
    return isinstance(_record(line, ""), Document)


def _json_lines(path: Path, stream: io.TextIOWrapper) -> Iterator[_Found]:
    for number in count(1):
        line = stream.readline(RECORD_CHARACTERS)
        if not line:
            return
        _refuse_binary(path, line)
        if len(line) == RECORD_CHARACTERS and not line.endswith("\n"):
            yield _long_record(line, f"{path}:{number}")
            while (rest := stream.readline(_BLOCK_CHARACTERS)) and not rest.endswith("\n"):
                pass
        elif line.strip():
            yield _record(line, f"{path}:{number}")


def _json_values(path: Path, stream: io.TextIOWrapper) -> Iterator[_Found]:
    """Records one after another or in an array, whose brackets and commas are passed over."""
    decoder, text, at, line = json.JSONDecoder(), "", 0, 1
    while True:
        start = _past(_BETWEEN_RECORDS, text, at)
        line += text.count("\n", at, start)
        try:
            value, at = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            more = stream.read(max(_BLOCK_CHARACTERS, len(text) - start))
            if start == len(text) and not more:
                return
            if not more or len(text) - start > RECORD_CHARACTERS:  # where the next one begins is not known
                raise CorpusError(f"{path}:{line} begins no JSON ({error}); correct the file") from error
            _refuse_binary(path, more)
            text, at = text[start:] + more, 0
            continue
        yield _document(value, f"{path}:{line}")
        line += text.count("\n", start, at)


def _plain_text(path: Path, stream: io.TextIOWrapper) -> Iterator[_Found]:
    text, at, line, ended = "", 0, 1, False
    while not ended or at < len(text):
        if not ended and len(text) - at < _BLOCK_CHARACTERS:
            more = stream.read(_BLOCK_CHARACTERS)
            _refuse_binary(path, more)
            text, at, ended = text[at:] + more, 0, not more
            continue
        cuts = [(text.find(gap, at + after, at + _LONGEST), len(gap)) for gap, after in _CUTS]
        end, gap = min((cut for cut in cuts if cut[0] >= 0), default=(min(at + _LONGEST, len(text)), 0))
        if text[at:end].strip():
            yield _valid(Document(text[at:end], place=f"{path}:{line}"))
        line += text.count("\n", at, end + gap)
        at = end + gap


def _past(pattern: re.Pattern[str], text: str, at: int) -> int:
    """Where what `pattern` matches at `at` ends."""
    found = pattern.match(text, at)
    return found.end() if found else at


def _refuse_binary(path: Path, text: str) -> None:
    if "\0" in text:
        raise CorpusError(f"corpus {path} is binary, expected UTF-8 text or JSON (it has NUL bytes)")


def _record(line: str, place: str) -> _Found:
    try:
        return _document(json.loads(line), place)
    except (ValueError, RecursionError) as error:
        return CorpusError(f"{place} is not JSON ({error})")


def _long_record(line: str, place: str) -> _Found:
    """The text of a record of which `line` is the beginning, as far as it is there."""
    decoder, at = json.JSONDecoder(), line.find("{") + 1
    with suppress(ValueError, IndexError, RecursionError):
        while True:
            key, at = decoder.raw_decode(line, _past(_BETWEEN_FIELDS, line, at))
            start = _past(_BETWEEN_FIELDS, line, at)
            if key == "text" and line[start] == '"':
                break
            _, at = decoder.raw_decode(line, start)
        for end in range(len(line), len(line) - 7, -1):  # the cut may be within an escape
            with suppress(ValueError):
                text, _ = decoder.raw_decode(line[:end] + '"', start)
                return _document({"text": text.rstrip(_HIGH_SURROGATES)}, place)
    return CorpusError(f"{place} has more than {RECORD_CHARACTERS:,} characters and does not begin with a text; cut it")


def _document(record: object, place: str) -> _Found:
    """What a JSON record holds: its text, if it has any, or else its messages."""
    if not isinstance(record, dict):
        return CorpusError(f"{place} is a JSON {type(record).__name__}, expected records with `text` or `messages`")
    text = record.get("text")
    if isinstance(text, str) and text.strip():
        return _valid(Document(text, place=place))
    empty = isinstance(text, str)
    for name in ("messages", "conversations"):
        turns = record.get(name)
        if isinstance(turns, list):
            messages = [_message(turn) for turn in turns]
            if None in messages:
                return CorpusError(f"{place} has `{name}` without role and content")
            if messages:
                return _valid(Document(messages=tuple(filter(None, messages)), place=place))
            empty = True
    return None if empty else CorpusError(f"{place} has neither `text` nor `messages` with role and content")


def _message(turn: object) -> dict[str, str] | None:
    """One turn of a conversation, by `role` and `content`, or by `from` and `value` as ShareGPT has them."""
    if not isinstance(turn, dict):
        return None
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(role, str) or not isinstance(content, str):
        return None
    return turn if "role" in turn and "content" in turn else {"role": _ROLES.get(role, role), "content": content}


def _valid(document: Document) -> Document | CorpusError:
    """The document, unless its text has parts of characters: bytes that are not UTF-8, or halves of JSON escapes."""
    try:
        for text in (document.text, *(part for m in document.messages for part in (m["role"], m["content"]))):
            text.encode()
    except UnicodeEncodeError as error:
        return CorpusError(f"{document.place} is not valid Unicode, expected UTF-8 ({error})")
    return document
