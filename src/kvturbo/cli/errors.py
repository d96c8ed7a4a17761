"""Errors that end a command with one line on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UsageError(Exception):
    """The input is bad: exit code 2."""


class CommandFailed(Exception):
    """The command ran and did not succeed: exit code 1."""


@contextmanager
def bad_input() -> Iterator[None]:
    """Turns what the library raises about its arguments into a UsageError. Wrap only calls that check input."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(str(error)) from error
