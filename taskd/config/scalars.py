"""What a scalar without quotes means: YAML 1.2's core rules, and YAML 1.1's traps by their names.

YAML 1.1 (most tools) and 1.2 read the same text differently: `no`, `0600`, `10:30`, `8_080`. Where the
two disagree taskd takes neither, and says what to write instead.
"""

from __future__ import annotations

import re

MAX_DIGITS = 300
"""Of an integer in free-form values, as in payloads (SPEC part 3)."""

_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_TRUE = frozenset({"true", "True", "TRUE"})
_FALSE = frozenset({"false", "False", "FALSE"})
_BOOLEAN_WORD = re.compile(r"(?i:yes|no|on|off)")
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")

_TRAPS = (
    (re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?"), "a sexagesimal number (base 60)"),
    (re.compile(r"[-+]?[0-9][0-9_]*_[0-9_]*(\.[0-9_]*)?"), "a number with an underscore in it"),
    (re.compile(r"[-+]?0[0-9]+|[-+]?0o[0-7]+"), "an octal number (leading zero)"),
    (re.compile(r"[-+]?0x[0-9a-fA-F_]+"), "a hexadecimal number"),
    (re.compile(r"[-+]?0b[01_]+"), "a binary number"),
    (_BOOLEAN_WORD, "a boolean (YAML 1.1 yes/no/on/off)"),
)


def is_null(text: str) -> bool:
    """Whether `text` without quotes is no value at all."""
    return text in _NULL


def trap(text: str) -> str | None:
    """Return what YAML 1.1 or 1.2 alone reads in `text` without quotes, or None when both agree."""
    for pattern, name in _TRAPS:
        if pattern.fullmatch(text):
            return name
    return None


def reads_as(text: str) -> str:
    """Return in words what `text` without quotes is: `string`, `an integer`, `a boolean`, ..."""
    if is_null(text):
        return "null"
    if text in _TRUE or text in _FALSE:
        return "a boolean"
    if name := trap(text):
        return name
    if _INTEGER.fullmatch(text):
        return "an integer"
    if _FLOAT.fullmatch(text) or _NOT_FINITE.fullmatch(text):
        return "a float"
    return "string"


def boolean(text: str) -> bool | None:
    """Return the truth that `text` is, or None when it is none."""
    if text in _TRUE:
        return True
    return False if text in _FALSE else None


def is_integer(text: str) -> bool:
    """Whether `text` is a decimal integer, of any length."""
    return _INTEGER.fullmatch(text) is not None


def free(text: str) -> object:
    """Return the value of `text` without quotes where any value may stand (YAML 1.2 core).

    Raises:
        ValueError: a trap, or a number that JSON can't carry; the message says what to write.
    """
    if is_null(text):
        return None
    if (truth := boolean(text)) is not None:
        return truth
    if name := trap(text):
        raise ValueError(f"is {name} to some readers and not to others: put it in quotes to mean a string")
    if _INTEGER.fullmatch(text):
        if len(text) > MAX_DIGITS:
            raise ValueError(f"is an integer of more than {MAX_DIGITS} digits; put it in quotes")
        return int(text)
    if _NOT_FINITE.fullmatch(text):
        raise ValueError("is no finite number; put it in quotes to mean a string")
    if _FLOAT.fullmatch(text):
        number = float(text)
        if number in {float("inf"), float("-inf")}:
            raise ValueError("is no finite number; put it in quotes to mean a string")
        return number
    return text
