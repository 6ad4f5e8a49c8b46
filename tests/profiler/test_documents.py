"""What is a document in each kind of file, what is refused and where, and how much memory long ones take."""

import gzip
import json
import tracemalloc

import pytest

from profiler import documents
from profiler.common.errors import CorpusError
from profiler.documents import Document, read_file

RECORDS = [{"text": "one document"}, {"text": "another"}]
TEXTS = [Document("one document"), Document("another")]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)
ARRAY = json.dumps(RECORDS, indent=1)
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


def read(path, content=None):
    """The documents of a file, and what is told of those that cannot be used."""
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    bad = []
    return list(read_file(path, bad.append)), [str(error).replace(f"{path}:", "at ") for error in bad]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *((name, LINES) for name in ("a.jsonl", "a.JSONL", "a.ndjson", "a.json", "a.txt", "a")),
        *((name, ARRAY) for name in ("a.json", "a.JSON")),
        ("a.jsonl", LINES.replace("\n", "\r\n\r\n")),
        ("a.json", "\n\n".join(json.dumps(record, indent=2) for record in RECORDS)),
    ],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("packed", [False, True])
def test_json_is_read_as_json_whatever_its_name(tmp_path, name, content, mark, packed):
    data = (mark + content).encode()
    path = tmp_path / (name + (".gz" if packed else ""))
    assert read(path, gzip.compress(data) if packed else data) == (TEXTS, [])


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": TURNS}, Document(messages=tuple(TURNS))),
        ({"text": "", "messages": TURNS}, Document(messages=tuple(TURNS))),
        ({"text": None, "messages": TURNS}, Document(messages=tuple(TURNS))),
        ({"text": "kept", "messages": TURNS}, Document("kept")),
        ({"messages": [], "conversations": TURNS}, Document(messages=tuple(TURNS))),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
            Document(messages=tuple(TURNS)),
        ),
        (
            {"conversations": [{"from": "system", "value": "S"}]},
            Document(messages=({"role": "system", "content": "S"},)),
        ),
        ({"text": " \n"}, None),
        ({"messages": []}, None),
        ({"text": "", "conversations": []}, None),
    ],
)
def test_what_a_record_holds(tmp_path, record, expected):
    path = tmp_path / "a.jsonl"
    assert read(path, json.dumps(record)) == ([expected] if expected else [], [])


GOOD = json.dumps(RECORDS[0])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", "is not JSON"),
        ('{"text": "a', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1]", "is a JSON list, expected records"),
        ('{"title": "a"}', "has neither `text` nor `messages`"),
        ('{"text": 3}', "has neither"),
        ('{"messages": [{"role": "user"}]}', "has `messages` without role and content"),
        ('{"conversations": ["Hi"]}', "has `conversations` without role and content"),
        ('{"text": "half an emoji: \\ud83d"}', "is not valid Unicode"),
        ('{"messages": [{"role": "user", "content": "\\udfff"}]}', "is not valid Unicode"),
        (b'{"text": "\xff"}', "is not valid Unicode, expected UTF-8"),
    ],
)
def test_one_bad_line_is_named_and_leaves_the_others(tmp_path, line, message):
    line = line.encode() if isinstance(line, str) else line
    found, bad = read(tmp_path / "a.jsonl", GOOD.encode() + b"\n\n" + line + b"\n" + GOOD.encode())
    assert found == [TEXTS[0]] * 2
    assert len(bad) == 1 and bad[0].startswith("at 3 ") and message in bad[0] and "\n" not in bad[0]


def test_records_of_an_array_have_lines_too(tmp_path):
    records = [RECORDS[0], {"title": "x"}, {"text": "a\nb"}]
    found, bad = read(tmp_path / "a.json", json.dumps(records, indent=1))
    assert [document.place.rpartition(":")[2] for document in found] == ["2", "8"]
    assert bad == ["at 5 has neither `text` nor `messages` with role and content"]


@pytest.mark.parametrize("content", [ARRAY[:-20], ARRAY.replace("}", "", 1), "[{]", "[" * 100_000 + "x"])
def test_an_array_that_is_not_whole_is_refused(tmp_path, content):
    with pytest.raises(CorpusError, match=r"a\.json:\d+ begins no JSON"):
        read(tmp_path / "a.json", content)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_binary_files_are_refused_whole(tmp_path, name):
    with pytest.raises(CorpusError, match="is binary, expected UTF-8 text"):
        read(tmp_path / name, GOOD + "\nab\0cd")


def test_packed_files_that_are_damaged_are_refused(tmp_path):
    data = gzip.compress(LINES.encode())
    for damaged in (data[:-9], b"no gzip", data[:12] + b"\x00\x00" + data[14:]):
        with pytest.raises(CorpusError, match=r"cannot read corpus .*a\.jsonl\.gz: "):
            read(tmp_path / "a.jsonl.gz", damaged)


def test_plain_text_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path):
    text = "\n\n".join(f"Paragraph {n} " + "word " * 200 for n in range(20))
    found, _ = read(tmp_path / "book.txt", text)
    assert len(found) > 3 and "\n\n".join(d.text for d in found) == text
    lines = [int(document.place.rpartition(":")[2]) for document in found]
    assert [text.split("\n")[line - 1][:12] for line in lines] == [document.text[:12] for document in found]


@pytest.mark.parametrize("newline", ["\n\n", "\r\n\r\n", "\n", "\r", " ", ""])
def test_text_of_any_form_is_several_documents(tmp_path, newline):
    found, _ = read(tmp_path / "book.txt", newline.join("word " * 100 for _ in range(1600)))
    assert 79 < len(found) < 201 and sum(d.text.count("word") for d in found) >= 160_000 - 100
    assert max(d.characters for d in found) <= 10_000


def test_text_with_bytes_of_another_encoding_names_the_line(tmp_path):
    found, bad = read(tmp_path / "book.txt", b"good text\n" * 700 + b"caf\xe9\n" + b"good text\n" * 700)
    assert len(found) == 2 and len(bad) == 1 and "at 602 is not valid Unicode, expected UTF-8" in bad[0]


@pytest.mark.parametrize("ending", ['"}', ' \\u00e9\\n"}', '\\ud83d\\ude00"}', "\\\\"])
@pytest.mark.parametrize("at", range(8))
def test_the_text_of_a_longer_line_than_fits_is_cut(tmp_path, monkeypatch, ending, at):
    monkeypatch.setattr(documents, "RECORD_CHARACTERS", 100)
    line = '{"id": 1, "meta": {"text": "x", "a": [2]}, "text": "' + "a" * (35 + at) + ending * 20 + '"}'
    found, bad = read(tmp_path / "a.jsonl", line + "\n" + GOOD)
    assert bad == [] and found[1] == TEXTS[0]
    assert found[0].text.startswith("a" * 35) and found[0].characters <= 100


@pytest.mark.parametrize(
    "line", ['{"messages": [{"role": "user", "content": "' + "a" * 99, "[" * 150, '{"id": ' + "1" * 99]
)
def test_other_longer_lines_are_refused(tmp_path, monkeypatch, line):
    monkeypatch.setattr(documents, "RECORD_CHARACTERS", 100)
    found, bad = read(tmp_path / "a.jsonl", line + "\n" + GOOD)
    assert found == [TEXTS[0]] and "at 1 has more than 100 characters and does not begin with a text" in bad[0]


@pytest.mark.parametrize("name", ["one_line.txt", "one_line.txt.gz", "one_line.jsonl", "array.json"])
def test_memory_does_not_grow_with_a_file(tmp_path, name, monkeypatch):
    monkeypatch.setattr(documents, "RECORD_CHARACTERS", 1 << 18)
    text = "words without an end " * 400_000  # 8 MB
    content = {"jsonl": '{"text": "' + text, "json": json.dumps([{"text": text[:4000]}] * 2000)}.get(
        name.split(".")[1], text
    )
    path = tmp_path / name
    path.write_bytes(gzip.compress(content.encode(), 1) if name.endswith("gz") else content.encode())
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_file(path, pytest.fail)) in (1, 2000, *range(1040, 1060))
        assert tracemalloc.get_traced_memory()[1] < 4e6
    finally:
        tracemalloc.stop()


def test_progress_counts_the_files_bytes(tmp_path):
    path, seen = tmp_path / "a.txt", []
    path.write_text("word " * 200_000)
    assert list(read_file(path, pytest.fail, seen.append)) and sum(seen) < 1_010_000 and len(seen) > 3
