"""Word wrap of a stream: where lines break, what waits for its end, and that the pieces it comes in do not matter."""

import random

import pytest
from prompt_toolkit.utils import get_cwidth

from hybrid.chat.wrap import WordWrap


def wrapped(text: str, columns: int | None, sizes: list[int] | None = None) -> str:
    """`text` through one wrapper, in pieces of `sizes` characters in turn, by default whole."""
    wrap, shown, at = WordWrap(), "", 0
    for size in [*(sizes or []), len(text)]:
        shown += wrap.push(text[at : at + size], columns)
        at += size
    return shown + wrap.push("\n", columns)


@pytest.mark.parametrize(
    ("text", "columns", "lines"),
    [
        ("one two three", 20, ["one two three"]),
        ("one two three", 13, ["one two three"]),
        ("one two three", 12, ["one two", "three"]),
        ("one two three four", 9, ["one two", "three", "four"]),
        ("ends just here and on", 9, ["ends just", "here and", "on"]),
        ("two  spaces   three", 10, ["two", "spaces", "three"]),
        ("  indented\n\n    more", 20, ["  indented", "", "    more"]),
        ("at the edge   \nnext", 11, ["at the edge", "next"]),
        ("a\tb\tc", 40, ["a       b       c"]),
        ("12345678\tb", 12, ["12345678", "b"]),
        ("well abcdefghijklmno end", 10, ["well", "abcdefghijklmno end"]),
        ("abcdefghijklmno end of it", 10, ["abcdefghijklmno end", "of it"]),
        ("abcdefghijklmnopqrst end", 10, ["abcdefghijklmnopqrst", "end"]),
        ("天地玄黄宇宙", 8, ["天地玄黄", "宇宙"]),
        ("abc天地玄黄", 8, ["abc天地", "玄黄"]),
        ("天地玄 word", 8, ["天地玄", "word"]),
        ("aaa cafe\u0301 x", 8, ["aaa cafe\u0301", "x"]),
        ("xx 👨\u200d👩\u200d👧 👍🏽", 10, ["xx 👨\u200d👩\u200d👧", "👍🏽"]),
        ("abcde 👍🏽!", 8, ["abcde 👍🏽!"]),
        ("abcd 🇩🇪🇫🇷", 8, ["abcd", "🇩🇪🇫🇷"]),
        ("no end of the line", None, ["no end of the line"]),
        ("a b c", 1, ["a", "b", "c"]),
    ],
)
def test_lines_end_between_words(text, columns, lines):
    assert wrapped(text, columns) == "\n".join(lines) + "\n"


@pytest.mark.parametrize("seed", range(20))
def test_pieces_do_not_matter_and_no_line_is_too_wide(seed):
    rng = random.Random(seed)
    letters = ["ab", "longer", "word", " ", " ", " ", "  ", "\n", "天", "e\u0301"]
    text = "".join(rng.choices(letters, k=200))
    columns = rng.randint(60, 100)  # no word made of these is as long as what is shown before it is whole
    sizes = [rng.randint(1, 9) for _ in range(300)]
    shown = wrapped(text, columns, sizes)
    assert shown == wrapped(text, columns)
    assert all(get_cwidth(line) <= columns for line in shown.split("\n"))
    assert shown.replace("\n", "").replace(" ", "") == text.replace("\n", "").replace(" ", "")


def test_a_word_is_shown_as_it_comes_but_waits_near_the_edge():
    wrap = WordWrap()
    assert [wrap.push(piece, 40) for piece in ("Hel", "lo", " wor", "ld")] == ["Hel", "lo", " wor", "ld"]
    pieces = (" weather", " today", " inter", "national", "ly", " x")
    assert [wrap.push(piece, 40) for piece in pieces] == [*pieces[:2], "", "", "", "\ninternationally x"]
    assert [wrap.push(piece, 40) for piece in ("yz", "\n")] == ["yz", "\n"]


def test_a_word_longer_than_any_line_is_not_waited_for():
    wrap = WordWrap()
    assert wrap.push("a " * 15, 40).strip() == " ".join("a" * 15)
    shown = [wrap.push("h", 40) for _ in range(60)]
    assert "".join(shown) == "\n" + "h" * 60
    assert max(n for n, piece in enumerate(shown) if not piece) < 20  # the half of this window


def test_a_window_that_changes_is_followed():
    wrap = WordWrap()
    assert wrap.push("a" * 50 + " b ", 80) == "a" * 50 + " b"
    assert wrap.push("cc dd\n", 20) == " cc dd\n"  # 50 + 2 columns, folded at 20, end at 12
    wrap.push("a" * 30 + " b ", 80)
    assert wrap.push("cccccccccc\n", 20) == "\ncccccccccc\n"  # and 32 at 12, where 11 more do not fit
    assert wrap.push("e" * 15 + " fffff\n", 20) == "e" * 15 + "\nfffff\n"
    assert wrap.push("e" * 15 + " fffff\n", 21) == "e" * 15 + " fffff\n"
