"""Recipe files: everything that was asked of a run, in a form that repeats it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from pruneforge.documents import read_yaml
from pruneforge.errors import PruneForgeError

RECIPE_FILE = "recipe.yaml"


R = TypeVar("R", bound=BaseModel)


def validated(kind: type[R], **values: Any) -> R:
    """Return a recipe, or resources, of these settings.

    Raises:
        PruneForgeError: Naming the setting that does not fit.
    """
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        raise PruneForgeError(f"{first['loc'][0]}={first['input']!r}: {first['msg'].lower()}") from None


def save_recipe(recipe: BaseModel, folder: Path) -> None:
    """Write a recipe to `folder` as YAML, without what was left at its default."""
    values = recipe.model_dump(mode="json", exclude_defaults=True)
    (folder / RECIPE_FILE).write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def read_config(path: Path) -> dict[str, Any]:
    """Return the settings of a recipe file, or of a report that holds one under `recipe`.

    Args:
        path: YAML or JSON.

    Raises:
        PruneForgeError: The file cannot be read, or holds no settings.
    """
    values = read_yaml(path, "recipe")
    if isinstance(values, dict) and isinstance(values.get("recipe"), dict):
        values = values["recipe"]
    if not isinstance(values, dict):
        raise PruneForgeError(f"recipe {str(path)!r} holds no settings; write one `name: value` a line")
    return {str(name): value for name, value in values.items()}
