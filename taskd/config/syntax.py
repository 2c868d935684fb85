"""Syntax errors of YAML in words for the person who made them, at the line to change.

PyYAML says where it stopped; for a quote or a bracket that was never closed that is far below the line
that has to change, so the opening line is named instead.
"""

from __future__ import annotations

import re

import yaml

from taskd.errors import Problem

_NO_SPACE = re.compile(r"\s*(?:- )?([A-Za-z_][\w.-]*):(?=\S)(?!//)")


class MarkedLoader(yaml.SafeLoader):
    """A loader that is only asked for events, and remembers the last quotes that span lines."""

    long_quote: tuple[int, int] | None = None
    """First and last line of it, counted from 0."""

    def scan_flow_scalar(self, style: str) -> yaml.ScalarToken:
        """Note where a quoted scalar of several lines begins and ends."""
        token: yaml.ScalarToken = super().scan_flow_scalar(style)
        if token.end_mark.line > token.start_mark.line:
            self.long_quote = (token.start_mark.line, token.end_mark.line)
        return token


def syntax_problems(error: Exception, loader: MarkedLoader, lines: list[str]) -> list[Problem]:
    """Return the problems that say why `loader` stopped reading `lines`."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        line = loader.get_mark().line + 1
        return [
            Problem(line, "", "a character escape (\\x, \\u, \\U) or a number here names nothing that exists")
        ]
    context, problem = error.context or "", error.problem or ""
    stopped = error.problem_mark.line
    opened = error.context_mark.line if error.context_mark else stopped
    quote = "a quote opened here is never closed"
    if "quoted scalar" in context and ("end of stream" in problem or "document separator" in problem):
        if loader.long_quote and loader.long_quote[1] == opened:
            opened = loader.long_quote[0]  # that quote was closed by the opening of this one
        return [_at(opened, f"{quote} (no closing quote up to the end of the file)")]
    if loader.long_quote and loader.long_quote[1] == stopped and "escape" not in problem:
        return [_at(loader.long_quote[0], f"{quote} on this line: it runs on to line {stopped + 1}")]
    if "flow" in context and _is_unclosed(problem, opened, stopped, lines):
        bracket = "bracket [" if "sequence" in context else "brace {"
        return [_at(opened, f"a {bracket} opened here is never closed: {problem}")]
    if "could not find expected ':'" in problem:
        return [_at(opened, f"{problem} after the key: write `key: value`, with a space after the colon")]
    problems = [_at(stopped, f"{problem}{_hint(context, problem)}")]
    if "mapping values" in problem and stopped > 0 and (match := _NO_SPACE.match(lines[stopped - 1])):
        message = f"no space after the colon of {match[1]!r}, so this is no key but text: mapping values"
        problems.append(_at(stopped - 1, f"{message} need `key: value`"))
    return problems


def _is_unclosed(problem: str, opened: int, stopped: int, lines: list[str]) -> bool:
    if "stream end" in problem or "document start" in problem:
        return True
    if stopped == opened or stopped >= len(lines):
        return False
    return _indent(lines[stopped]) <= _indent(lines[opened])


def _hint(context: str, problem: str) -> str:
    if "mapping values" in problem:
        return ": a value with a colon and a space in it needs quotes; else look at the indentation"
    if "'\\t'" in problem:
        return ": a tab can't indent, use spaces"
    if "cannot start any token" in problem:
        return ": put the value in quotes"
    if "escape" in problem or "hexadecimal" in problem:
        return " (unknown escape in double quotes): double the backslash, or use single quotes"
    if "alias" in context or "anchor" in context:
        what = "alias" if "alias" in context else "anchor"
        return f" (read as {what}): a value that begins with * or & needs quotes"
    if "tag" in context or "tag" in problem:
        return " (tag): tags are not supported; a value that begins with ! needs quotes"
    if "document start" in problem:
        return ": the file must hold one document"
    if "block end" in problem or "node content" in problem:
        return ": look at the indentation, the quotes and the brackets here and on the line before"
    return ""


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def _at(line: int, message: str) -> Problem:
    return Problem(line + 1, "", message)
