"""A search in the manner of EvoPress (Sieberling et al., EvoPress: Accurate Dynamic Model Compression, ICML 2025)."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from pruneforge import Allocator, Evaluator, PruneForgeError, Trials, create

if TYPE_CHECKING:
    import optuna

STUDY_FILE = "search.sqlite3"
"""Optuna's study, in the folder of the trials."""

DRAWS = 100
"""How often a child is drawn again that was tried before."""

Levels = dict[str, int]


class Search(Allocator):
    """Blocks have the sparsity that an evaluator likes best, of those that an evolution with elitism tries.

    Block b has the sparsity `s + step * l_b`, all its layers the same, with integer levels `-most <= l_b <= most`. The
    first trial is uniform: all levels are zero. Each further one is a child of the best so far (a (1+1) evolution,
    where EvoPress evaluates generations of 64): `min(r, r')` times, with r and r' drawn from 1 to 3, one block gains a
    level and another loses one. The sum of levels stays zero, so blocks of equal size keep the budget; with others the
    engine shifts all sparsities by the same amount. The result is the best trial, and never worse than uniform on the
    task that is searched by.

    Each trial prunes the model, and is evaluated on the whole task: EvoPress stitches layers that were pruned before,
    which needs layers that do not depend on one another, and sorts children out on few tokens first. Optuna keeps the
    trials, in `search.sqlite3` in the folder of the search; the next child depends on the seed and the trials before it
    alone, so that a search that goes on after a kill ends as one that was not interrupted.
    """

    argument: ClassVar[str | None] = "task"

    class Options(Allocator.Options):
        """Options of the search."""

        task: str = Field(description="evaluator to search by, or name:argument")
        task_options: dict[str, Any] = Field(default_factory=dict, description="options of the evaluator")
        trials: int = Field(64, ge=1, description="allocations to try, the uniform one included")
        step: float = Field(0.05, gt=0, lt=1, description="sparsity by which two levels differ")
        most: int = Field(3, ge=1, description="levels above or below the mean that a block may be")

    options: Options

    def __init__(self, **options: Any) -> None:
        """Take the options, and look at once whether the evaluator exists and takes its own."""
        super().__init__(**options)
        self.evaluator: Evaluator = create("evaluator", self.options.task, **self.options.task_options)

    def allocate(
        self, measures: Mapping[str, Any], sizes: Mapping[str, Mapping[str, int]], sparsity: float
    ) -> dict[str, float]:
        """Return what the search starts from: `sparsity` for each layer."""
        return {name: sparsity for layers in sizes.values() for name in layers}

    def search(self, trials: Trials, sizes: Mapping[str, Mapping[str, int]], sparsity: float) -> dict[str, float]:
        """Return the sparsity of each layer in the best trial.

        Raises:
            PruneForgeError: There is nothing to vary, the folder holds another search, or a trial fails.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        blocks = [block for block, layers in sizes.items() if layers]
        low, high = self._range(sparsity)
        if len(blocks) < 2 or not low < 0 < high:
            raise PruneForgeError(
                f"there is nothing to search: {len(blocks)} blocks, and levels from {low} to {high} around sparsity "
                f"{sparsity:g} in steps of {self.options.step:g}; ask for smaller steps, or leave out the allocator"
            )
        levels: dict[str, optuna.distributions.BaseDistribution]
        levels = {block: optuna.distributions.IntDistribution(low, high) for block in blocks}
        study = self._study(trials, _evolution(levels, low, high, trials.seed, self.evaluator.higher_is_better))
        for number in trials.progress.track(range(self.options.trials), "searching an allocation"):
            if number < len(finished(study)):
                continue
            trial = study.ask(levels)
            allocation = self._allocation(trial.params, sizes, sparsity)
            study.tell(trial, self._value(trials.evaluate(allocation, self.options.task, self.options.task_options)))
        tried = finished(study)[: self.options.trials]
        winner = best(tried, self.evaluator.higher_is_better)
        trials.found = {
            "trials": len(tried),
            "measure": self.evaluator.measure,
            "uniform": tried[0].value,
            "best": winner.value,
            "levels": {block: winner.params[block] for block in blocks},
        }
        return self._allocation(winner.params, sizes, sparsity)

    def _range(self, sparsity: float) -> tuple[int, int]:
        """Return the lowest and the highest level at which a block's sparsity is from 0 to 1."""
        step, most = self.options.step, self.options.most
        return -min(most, int(sparsity / step + 1e-9)), min(most, int((1 - sparsity) / step + 1e-9))

    def _allocation(
        self, levels: Mapping[str, int], sizes: Mapping[str, Mapping[str, int]], sparsity: float
    ) -> dict[str, float]:
        return {
            name: min(max(sparsity + self.options.step * levels[block], 0.0), 1.0)
            for block, layers in sizes.items()
            for name in layers
        }

    def _value(self, results: Mapping[str, Any]) -> float:
        """Return what a trial is worth; one that gives no number is as bad as can be."""
        measure = self.evaluator.measure
        if not isinstance(results.get(measure), int | float):
            raise PruneForgeError(f"evaluator {self.evaluator.name!r} gives no number {measure!r} to search by")
        value = float(results[measure])
        return value if not math.isnan(value) else -math.inf if self.evaluator.higher_is_better else math.inf

    def _study(self, trials: Trials, sampler: optuna.samplers.BaseSampler) -> optuna.Study:
        """Return a new study, or the one in the folder, without the trial that was interrupted."""
        import optuna

        storage = None
        if trials.folder is not None:
            trials.folder.mkdir(parents=True, exist_ok=True)
            storage = f"sqlite:///{trials.folder.absolute() / STUDY_FILE}"
        directions = optuna.study.StudyDirection
        direction = directions.MAXIMIZE if self.evaluator.higher_is_better else directions.MINIMIZE
        study = optuna.create_study(
            storage=storage, sampler=sampler, study_name="search", direction=direction, load_if_exists=True
        )
        own = self.options.model_dump(mode="json", exclude={"trials"})  # of which there may be more the next time
        _check_same(study, {**trials.identity, **own}, trials.folder)
        for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        return study


def _check_same(study: optuna.Study, identity: dict[str, Any], folder: Path | None) -> None:
    """Note what a new study is of, or raise if the study is of something else."""
    known = study.user_attrs.get("identity")
    if known is None:
        study.set_user_attr("identity", identity)
    elif known != identity:
        other = sorted(name for name in known.keys() | identity if known.get(name) != identity.get(name))
        raise PruneForgeError(
            f"the search in {str(folder)!r} is another one, which differs in {', '.join(other)}; remove that folder, "
            "or name another output"
        )


def finished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Return the trials of a study that have a value, in their order."""
    from optuna.trial import TrialState

    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def best(tried: Sequence[optuna.trial.FrozenTrial], higher_is_better: bool) -> optuna.trial.FrozenTrial:
    """Return the best of some trials, the first of equal ones."""
    sign = -1 if higher_is_better else 1
    return min(tried, key=lambda trial: sign * (trial.value if trial.value is not None else math.nan))


def mutated(levels: Levels, low: int, high: int, rng: random.Random) -> Levels:
    """Return levels of which up to three pairs have moved by one, apart, so that their sum stays."""
    child = dict(levels)
    for _ in range(min(rng.randint(1, 3), rng.randint(1, 3))):
        pairs = [(up, down) for up in child for down in child if up != down and child[up] < high and child[down] > low]
        up, down = rng.choice(pairs)
        child[up] += 1
        child[down] -= 1
    return child


def _evolution(
    levels: dict[str, optuna.distributions.BaseDistribution], low: int, high: int, seed: int, higher_is_better: bool
) -> optuna.samplers.BaseSampler:
    """Return a sampler of Optuna's that proposes children of the best trial."""
    import optuna

    class Evolution(optuna.samplers.BaseSampler):
        def infer_relative_search_space(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
            return levels

        def sample_relative(
            self, study: optuna.Study, trial: optuna.trial.FrozenTrial, search_space: dict[str, Any]
        ) -> dict[str, Any]:
            tried = finished(study)
            if not tried:
                return dict.fromkeys(levels, 0)
            rng = random.Random(f"{seed} {len(tried)}")
            parent = {block: best(tried, higher_is_better).params[block] for block in levels}
            known = [each.params for each in tried]
            child = mutated(parent, low, high, rng)
            for _ in range(DRAWS):
                if child not in known:
                    break
                child = mutated(parent, low, high, rng)
            return child

        def sample_independent(self, *args: Any) -> Any:
            raise NotImplementedError("all levels are drawn together")

    return Evolution()
