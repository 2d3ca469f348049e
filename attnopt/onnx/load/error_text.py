"""Untrusted text from files and their libraries, for messages."""

from __future__ import annotations

from attnopt.base.notation import shortened


def quoted(text: str, length: int = 300) -> str:
    """Truncated, and without terminal control characters."""
    shown = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
    return shortened(shown, length)


def reason(error: Exception) -> str:
    """The type, message and notes of the error."""
    return quoted(f"{type(error).__name__}: {error}") + "".join(
        f" ({quoted(note)})" for note in getattr(error, "__notes__", ())
    )
