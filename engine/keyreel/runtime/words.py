"""Splits queries into words, and corrects them."""

from __future__ import annotations

import re
import string

# Words that say nothing about a picture.
_SILENT = """
a an the this that these those some one its his her their my your our of in on at to from with without by for
into onto over under near next beside behind above below between against around across along through up down
out off front and or but as while is are be being was were has have having there it he she they i we you who
which
"""
SILENT = frozenset(_SILENT.split())
LONGEST = 24  # longest word to correct; the work grows with the square of its letters
_WORD = re.compile(r"[^\W\d_]+")
_DOUBLED = re.compile(r"(.)\1+")
_SOUNDS = (("ph", "f"), ("rh", "r"), ("ck", "k"), ("qu", "k"), ("c", "k"), ("z", "s"), ("y", "i"))
_ENDINGS = (("ies", ("y",)), ("es", ("",)), ("s", ("",)), ("ing", ("", "e")), ("ed", ("", "e")))


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case, without digits and signs."""
    return _WORD.findall(text.lower())


def stems(word: str) -> set[str]:
    """A word, and the words that it may be an inflection of."""
    found = {word}
    for ending, others in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            found |= {word.removesuffix(ending) + other for other in others}
    return found


def misspellings(word: str) -> set[str]:
    """The words that a word of five to LONGEST letters may misspell.

    One letter may be missing, extra, wrong, or swapped with the next. The first letter stays (Norvig 2007, "How to
    write a spelling corrector").
    """
    if not 5 <= len(word) <= LONGEST:
        return set()
    halves = [(word[:at], word[at:]) for at in range(1, len(word) + 1)]
    found = {
        left + letter + right[skip:] for left, right in halves for letter in string.ascii_lowercase for skip in (0, 1)
    }
    found |= {left + right[1:] for left, right in halves}
    found |= {left + right[1] + right[0] + right[2:] for left, right in halves if len(right) > 1}
    return found - {word}


def sound(word: str) -> str:
    """A word as one may write it by ear: the same for "elephant" and "elefant", "bicycle" and "bycicle"."""
    for written, heard in _SOUNDS:
        word = word.replace(written, heard)
    return _DOUBLED.sub(r"\1", word).removesuffix("e")
