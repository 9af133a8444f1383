"""The cells of a study: each combination of a model, a method, a pattern and a draw."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pruneforge.errors import PruneForgeError
from pruneforge.interfaces.patterns import parse_pattern
from pruneforge.interfaces.recipe import PruneRecipe
from pruneforge.plugins import loaded_plugins
from pruneforge.runs.recipe_file import validated
from pruneforge.studies.study import OF_METHOD, OF_MODEL, Study, StudyModel, Task


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        model: Name of the model.
        method: Name of the method.
        pattern: Sparsity or N:M.
        seed: Calibration draw.
        recipe: The run, which can be repeated alone.
        tasks: What its result is evaluated on.
        keeps: What is kept of it beside the results: "details", "items", "masks".
        sources: Hashes of the plugin files that it uses, by file name.
    """

    model: str
    method: str
    pattern: float | str
    seed: int
    recipe: PruneRecipe
    tasks: tuple[Task, ...]
    keeps: frozenset[str] = frozenset()
    sources: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Where the cell is kept below the study's folder."""
        return f"{self.model}/{self.method}/{str(self.pattern).replace(':', 'of')}/{self.seed}"

    def asked(self) -> dict[str, Any]:
        """Return everything that decides the cell's result, of types that JSON holds."""
        tasks = [task.model_dump(mode="json") for task in self.tasks]
        # Plugin files count by what is in them, wherever they are.
        recipe = self.recipe.model_dump(mode="json", exclude={"plugins"}, exclude_defaults=True)
        everything = {"recipe": recipe, "tasks": tasks, "plugins": dict(self.sources)}
        asked: dict[str, Any] = json.loads(json.dumps(everything, sort_keys=True))  # whatever the order in a file
        return asked

    def fingerprint(self) -> str:
        """Return a short hash of what was asked."""
        return hashlib.sha256(json.dumps(self.asked(), sort_keys=True).encode()).hexdigest()[:12]


def cells_of(study: Study, plugins: list[str]) -> list[Cell]:
    """Return the cells of a study, in the order of its models, methods, patterns and seeds.

    Args:
        study: The study.
        plugins: Python files that were loaded as plugins.

    Raises:
        PruneForgeError: A pattern is none, or the baseline or a method's model is not among those of the study.
    """
    methods = study.all_methods()
    for label, method in methods.items():
        for name in method.models or ():
            if name not in study.models:
                raise PruneForgeError(f"method {label!r} is for model {name!r}, which is not among the study's")
    if study.compared_with not in methods:
        raise PruneForgeError(f"baseline {study.baseline!r} is not among the methods: {', '.join(methods)}")
    return [cell for name, model in study.models.items() for cell in _of_model(study, name, model, methods, plugins)]


def _of_model(
    study: Study, name: str, model: StudyModel, methods: Mapping[str, Any], plugins: list[str]
) -> Iterator[Cell]:
    of_model = {**model.model_dump(include=set(OF_MODEL)), "propagate": study.propagate}
    seeds = study.seeds_of(name)
    for label, method in methods.items():
        if method.models is not None and name not in method.models:
            continue
        own = {**of_model, **method.overrides()}
        for pattern in method.patterns or study.patterns:
            sparsity, text = (None, pattern) if isinstance(pattern, str) else (pattern, None)
            parse_pattern(sparsity, text, "row")
            for seed in seeds:
                recipe = validated(
                    PruneRecipe,
                    **own,
                    **method.model_dump(include=set(OF_METHOD)),
                    sparsity=sparsity,
                    pattern=text,
                    seed=seed,
                    device=study.device,
                )
                files = _used(plugins, recipe, model.tasks)
                recipe = recipe.model_copy(update={"plugins": files})
                sources = {Path(file).name: hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16] for file in files}
                kept = {
                    "details": study.details and seed == min(seeds) and recipe.calibration is not None,
                    "items": study.items,
                    "masks": study.keep_masks,
                }
                keeps = frozenset(what for what, wanted in kept.items() if wanted)
                yield Cell(name, label, pattern, seed, recipe, tuple(model.tasks), keeps, sources)


def _used(files: Sequence[str], recipe: PruneRecipe, tasks: Sequence[Task]) -> list[str]:
    """Return the plugin files that register something that a cell names, or an adapter, which models choose."""
    registry = loaded_plugins().registry
    named: dict[str, Sequence[str | None]] = {
        "metric": [recipe.metric],
        "allocator": [recipe.allocator],
        "refiner": recipe.refine,
        "recovery": [recipe.recover],
        "objective": [recipe.objective],
        "source": [recipe.calibration, *recipe.streams.values()],
        "evaluator": [task.task for task in tasks],
        "adapter": [entry.name for entry in registry.entries("adapter")],
    }
    used = set()
    for kind, specs in named.items():
        names = {spec.partition(":")[0] for spec in specs if spec}
        used |= {entry.plugin for entry in registry.entries(kind) if entry.name in names}
    return [file for file in files if file in used]
