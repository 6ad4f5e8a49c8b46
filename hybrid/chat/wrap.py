"""Word wrap of a text that comes piece by piece: the window's edge cuts no word, and nothing that was shown moves."""

from __future__ import annotations

from prompt_toolkit.utils import get_cwidth

_LONG = 24  # columns of a long word; a longer one may be cut
_TAB = 8
_JOINER = "\u200d"  # makes one emoji of those before and after it
_SKIN_TONES = range(0x1F3FB, 0x1F400)
_FLAG_LETTERS = range(0x1F1E6, 0x1F200)  # two of them are one flag


class WordWrap:
    """Knows the column of the cursor, and holds a word back where the line may have no room for the rest of it.

    A word that begins further from the edge than long words are is shown as it comes. A line may also end between
    characters of two columns, as Chinese and Japanese have them, but never inside a character that is made of several.
    `columns` is the window's width at each call, None where lines have no end.
    """

    def __init__(self) -> None:
        self._column = 0
        self._gap = self._word = self._last = ""
        self._begun = False  # the word's first part is on the line already

    def push(self, text: str, columns: int | None) -> str:
        """What to show now that `text` came. A newline brings out all that is held."""
        self._fold(columns)  # the window may be narrower than it was
        out = "".join([self._take(character, columns) for character in text])
        long = _LONG if columns is None else min(_LONG, columns // 2)
        has_room = columns is None or self._column + len(self._gap) + long <= columns
        if self._word and (self._begun or has_room or get_cwidth(self._word) >= long):
            out += self._place_word(columns)
            self._begun = True
        return out

    def _take(self, character: str, columns: int | None) -> str:
        """What can be shown when `character` has come: the word before it, where it ends that."""
        width = get_cwidth(character)
        joined = width == 0 or self._last == _JOINER or ord(character) in _SKIN_TONES
        self._last = character
        if character == "\n":
            return self._end_line(columns)
        if character in " \t":
            out = self._end_word(columns)
            self._gap += " " * (1 if character == " " else _TAB - (self._column + len(self._gap)) % _TAB)
            return out
        if joined and not self._gap and not self._word:
            self._begun = True
        if width < 2 or joined or ord(character) in _FLAG_LETTERS:
            self._word += character
            return ""
        out = self._end_word(columns)
        self._word = character
        return out + self._end_word(columns)

    def _end_line(self, columns: int | None) -> str:
        out = self._end_word(columns)
        self._column, self._gap = 0, ""
        return out + "\n"

    def _end_word(self, columns: int | None) -> str:
        out = self._place_word(columns) if self._word else ""
        self._begun = False
        return out

    def _place_word(self, columns: int | None) -> str:
        """The word with the gap before it, or on a line of its own where it does not fit."""
        out = self._gap + self._word
        if columns and self._column and not self._begun and self._column + get_cwidth(out) > columns:
            out, self._column = f"\n{self._word}", 0
        self._column += get_cwidth(out.lstrip("\n"))
        self._fold(columns)  # the word may be longer than any line
        self._gap = self._word = ""
        return out

    def _fold(self, columns: int | None) -> None:
        """Follow the cursor where the terminal goes on in its next row with a line that is too long."""
        if columns and self._column > columns:
            self._column = (self._column - 1) % columns + 1
