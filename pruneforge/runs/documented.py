"""Docstrings of functions whose keyword arguments are settings that a pydantic model declares."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from typing import TypeVar

from pydantic import BaseModel

PLACE = "        {settings}\n"
"""The line, among a docstring's arguments, that the settings take the place of."""

F = TypeVar("F", bound=Callable[..., object])


def documented(*models: type[BaseModel]) -> Callable[[F], F]:
    """Return a decorator that describes a function's settings as the fields of `models` describe them."""
    descriptions = {name: field.description for model in models for name, field in model.model_fields.items()}

    def decorate(function: F) -> F:
        doc = function.__doc__
        if doc is None:  # python -OO
            return function
        names = [name for name in inspect.signature(function).parameters if f"        {name}: " not in doc]
        entries = [f"{name}: {descriptions[name]}" for name in names if name in descriptions]
        lines = [textwrap.fill(entry, 112, initial_indent=" " * 8, subsequent_indent=" " * 12) for entry in entries]
        function.__doc__ = doc.replace(PLACE, "".join(f"{line}\n" for line in lines))
        return function

    return decorate
