"""Texts of any origin in Markdown."""

from __future__ import annotations


def markdown(text: str) -> str:
    """Return a text as Markdown shows it, in one line, whatever its characters mean to Markdown."""
    text = " ".join(text.split())
    for character in "\\|*_`<[":
        text = text.replace(character, f"\\{character}")
    return text


def code(text: str) -> str:
    """Return a text set as code, or as it is where that cannot hold it: within code nothing is escaped."""
    return f"`{text}`" if not set(text) & set("|`<\n") else markdown(text)
