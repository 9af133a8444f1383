"""What prunes, and the run that a recipe asks of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pruneforge.errors import PruneForgeError
from pruneforge.interfaces.allocator import Allocator
from pruneforge.interfaces.metric import Metric, prunes_blocks, scores_layers
from pruneforge.interfaces.objective import Objective
from pruneforge.interfaces.patterns import NM, Pattern, parse_pattern
from pruneforge.interfaces.recipe import PruneRecipe
from pruneforge.interfaces.recovery import Recovery, recovers_models
from pruneforge.interfaces.refiner import Refiner
from pruneforge.interfaces.run import Run
from pruneforge.interfaces.statistics import (
    BlockGradientStatistic,
    InputStatistic,
    OutputStatistic,
    kind_of,
    of_model_gradients,
)


@dataclass(frozen=True)
class Method:
    """What prunes: a metric, and what goes with it."""

    metric: Metric
    allocator: Allocator | None = None
    refiners: tuple[Refiner, ...] = ()
    recovery: Recovery | None = None
    objective: Objective | None = None

    def run(self, recipe: PruneRecipe, folder: Path | None) -> Run:
        """Return the run that a recipe asks for.

        Raises:
            PruneForgeError: Sparsity, pattern, scope, allocation and propagation contradict one another.
        """
        pattern = make_pattern(self.metric, recipe.sparsity, recipe.pattern)
        run = Run(recipe, self.metric, pattern, folder, self.allocator, self.refiners, self.recovery)
        if uses_model_gradients(run) or recovers_models(run.recovery):
            run.objective = self.objective
        # A run in company has the recipe of one of its own, which knows nothing of what concerns the others.
        own: dict[str, Any] = {} if run.objective is not None else {"objective": None, "objective_options": {}}
        own["streams"] = {name: source for name, source in recipe.streams.items() if name in run.streams}
        run.recipe = recipe.model_copy(update=own)
        for why in _contradictions(run):
            raise PruneForgeError(why)
        if self.metric.permutes:
            run.warnings.append(
                f"masks fit {pattern} only with the inputs of each layer permuted, as the result's `permutations` say; "
                "in the layers' own order they do not"
            )
        return run


def _contradictions(run: Run) -> Iterator[str]:
    """Yield what cannot be: scope, allocation, propagation and what goes with the metric against one another."""
    metric, allocator, recovery = run.metric, run.allocator, run.recovery
    compares = [kind for kind in map(kind_of, run.requires) if getattr(kind, "with_target", False)]
    if metric.permutes and not isinstance(run.pattern, NM):
        yield (
            f"metric {metric.name!r} is asked to permute columns, which serves N:M patterns alone, and the pattern is "
            f"{run.pattern}; ask for N:M, or for no permutation"
        )
    if metric.permutes and run.refiners:
        yield (
            f"refiner {run.refiners[0].name!r} works in the layer's own order of columns, and metric {metric.name!r} "
            "is asked to permute them; leave out the refiner, or ask for no permutation"
        )
    if run.scope == "model" and run.propagate == "pruned" and sees_activations(run):
        yield (
            "scope=model compares scores of all blocks, so none can be pruned before the last is calibrated; "
            "add `propagate` dense"
        )
    if run.scope in ("block", "model") and not scores_layers(metric):
        yield (
            f"scope={run.scope} compares scores of several layers, and metric {metric.name!r} has none: it "
            "prunes each layer for itself"
        )
    if run.scope in ("block", "model") and prunes_blocks(metric):
        yield (
            f"scope={run.scope} compares scores of several layers, and metric {metric.name!r} decides over a "
            "block in its own way; choose another scope"
        )
    if run.scope == "model" and allocator is not None:
        yield f"scope=model chooses each layer's sparsity itself, and so does allocator {allocator.name!r}"
    if run.scope == "model" and recovery is not None and recovery.targets:
        yield (
            f"scope=model prunes once all batches have passed, and recovery {recovery.name!r} learns from them "
            "block by block; choose another scope"
        )
    if compares and run.propagate == "dense":
        yield (
            f"statistic {compares[0].__name__} compares a block's output with the dense model's, and with `propagate` "
            "dense the two are the same; prune with `propagate` pruned"
        )
    if compares and allocator is not None and allocator.uses_scores:
        yield (
            f"allocator {allocator.name!r} needs scores in the dense model, where statistic {compares[0].__name__} has "
            "nothing to compare"
        )


def make_pattern(metric: Metric, sparsity: float | None, pattern: str | None) -> Pattern:
    """Return the pattern asked for, with the metric's scope.

    Raises:
        PruneForgeError: Sparsity, pattern and scope contradict one another.
    """
    asked = parse_pattern(sparsity, pattern, metric.comparison_group() or "layer")
    chosen = getattr(metric.options, "scope", None)
    if isinstance(asked, NM) and chosen is not None:
        raise PruneForgeError(f"scope={chosen} does not go with pattern {asked}, which compares within groups")
    return asked


def sees_activations(run: Run) -> bool:
    """Return whether a run's masks depend on how earlier blocks were pruned."""
    if run.recovery is not None and run.recovery.targets:
        return True
    # Gradients of the model's loss are those of the dense model.
    seen = (InputStatistic, OutputStatistic, BlockGradientStatistic)
    return any(issubclass(kind_of(required), seen) for required in run.requires)


def uses_model_gradients(run: Run) -> bool:
    """Return whether a run requires gradients of the model's loss."""
    return any(of_model_gradients(kind_of(required)) for required in run.requires)
