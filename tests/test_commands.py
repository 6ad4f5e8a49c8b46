"""What commands take from files and standard input."""

import io
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from hybrid.commands import _read_prompt
from hybrid.errors import InputError


@pytest.mark.parametrize(
    ("data", "text"), [(b"a\n\n", "a\n"), (b"\xef\xbb\xbfa\r\n", "a"), ("日\n本".encode(), "日\n本"), (b"", "")]
)
def test_a_prompt_is_a_files_text_without_its_last_newline(data, text, tmp_path, monkeypatch):
    (tmp_path / "p").write_bytes(data)
    assert _read_prompt(tmp_path / "p") == text
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    assert _read_prompt(Path("-")) == text


def test_no_more_is_read_of_a_prompt_than_any_context_holds(tmp_path, monkeypatch):
    with (tmp_path / "p").open("wb") as file:
        file.truncate(2**30)
    endless = SimpleNamespace(buffer=io.BufferedReader(Endless()))
    monkeypatch.setattr(sys, "stdin", endless)
    for path in (tmp_path / "p", Path("-")):
        with pytest.raises(InputError, match=r"has more than 16,777,216 bytes; give a shorter text"):
            _read_prompt(path)


class Endless(io.RawIOBase):
    """Gives letters for ever."""

    def readable(self):
        return True

    def readinto(self, buffer):
        buffer[:] = b"a" * len(buffer)
        return len(buffer)


@pytest.mark.parametrize(("name", "message"), [("none", "cannot read the prompt"), ("", "Is a directory")])
def test_a_prompt_that_cannot_be_read(name, message, tmp_path):
    with pytest.raises(InputError, match=message):
        _read_prompt(tmp_path / name)


def test_a_prompt_that_is_no_text(tmp_path):
    (tmp_path / "p").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is not UTF-8 text"):
        _read_prompt(tmp_path / "p")
