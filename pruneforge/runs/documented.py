"""Docstrings of functions whose keyword arguments are settings that a pydantic model declares."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from typing import TypeVar

from pydantic import BaseModel

PLACE = "    {settings}\n"
"""The line, among a docstring's arguments, that the settings take the place of, without the function's indentation."""

F = TypeVar("F", bound=Callable[..., object])


def documented(*models: type[BaseModel]) -> Callable[[F], F]:
    """Return a decorator that describes a function's settings as the fields of `models` describe them."""
    descriptions = {name: field.description for model in models for name, field in model.model_fields.items()}

    def decorate(function: F) -> F:
        if function.__doc__ is None:  # python -OO
            return function
        doc = inspect.cleandoc(function.__doc__)  # as Python 3.13 keeps it, and those before do not
        names = [name for name in inspect.signature(function).parameters if f"\n    {name}: " not in doc]
        entries = [f"{name}: {descriptions[name]}" for name in names if name in descriptions]
        lines = [textwrap.fill(entry, 112, initial_indent=" " * 4, subsequent_indent=" " * 8) for entry in entries]
        function.__doc__ = doc.replace(PLACE, "".join(f"{line}\n" for line in lines))
        return function

    return decorate
