"""Tasks of the Language Model Evaluation Harness, through its Python API."""

from __future__ import annotations

import contextlib
import functools
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

import torch
from pydantic import Field

from pruneforge import Evaluator, PruneForgeError, Subject

ZERO_SHOT_7 = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
"""The seven tasks of the published zero-shot tables."""

COMPARE_CHOICES = ("multiple_choice", "loglikelihood")
"""What lm-eval calls the output of tasks for which it keeps the batch size that it found to fit."""

BATCH_ON_CPU = 8
"""Prompts in a batch on the CPU unless another number is asked for."""


class LMEval(Evaluator):
    """Any task lm-eval knows: `lm-eval:TASK[,TASK]`; `zero-shot-7` stands for the seven published ones.

    Results, standard errors ("N/A" where lm-eval has none), task versions and shots are lm-eval's own, under its names.
    """

    argument: ClassVar[str | None] = "tasks"

    measure = "mean_accuracy"
    higher_is_better = True
    share = True
    measured = frozenset({"batch_size"})

    class Options(Evaluator.Options):
        """Options of the lm-eval evaluator."""

        tasks: str = Field(description="names of tasks, separated by commas")
        include_path: str | None = Field(
            None, description="folder of local task definitions", json_schema_extra={"runs_code": True}
        )
        num_fewshot: int | None = Field(None, ge=0, description="examples in the prompt; by default the task's own")
        limit: int | None = Field(None, ge=1, description="only the first so many documents of each task")

    options: Options

    def evaluate(self, subject: Subject) -> dict[str, Any]:
        """Return lm-eval's results by task, and their mean accuracy.

        Items are the questions of tasks that have an accuracy, as TASK/NUMBER: whether each is right (1) or wrong (0).
        """
        import lm_eval

        from pruneforge_lm_eval.harness import Harness

        include = self.options.include_path
        if include is not None and not Path(include).is_dir():
            raise PruneForgeError(f"include-path {include!r} is no folder")
        if subject.model.processor is None:
            raise PruneForgeError("the model came without a tokenizer, which lm-eval needs; pass processor=")
        names = self._names()
        manager = _task_manager(include, names)
        _check_known(names, manager)
        printed = io.StringIO()  # bars and advice of lm-eval's and its libraries' own
        try:
            with (
                subject.progress.stage(f"lm-eval: {', '.join(names)}"),
                contextlib.redirect_stdout(printed),
                contextlib.redirect_stderr(printed),
            ):
                harness = Harness(subject, subject.batch_size or usual_batch_size(subject.device))
                outcome = lm_eval.simple_evaluate(
                    model=harness,
                    tasks=names,
                    task_manager=manager,
                    num_fewshot=self.options.num_fewshot,
                    limit=self.options.limit,
                    random_seed=subject.seed,
                    numpy_random_seed=subject.seed,
                    torch_random_seed=subject.seed,
                    fewshot_random_seed=subject.seed,
                )
        except Exception as error:  # tasks, data sets and the harness each raise their own
            reason = " ".join(str(error).split())[:300]
            raise PruneForgeError(f"lm-eval cannot run {', '.join(names)}: {reason}") from error
        results = self._results(outcome, names)
        results["batch_size"] = _batch_size(harness, outcome["configs"])
        if subject.items:
            results["items"], without = _items(outcome["samples"])
            if without:
                results["warnings"].append(f"questions of {', '.join(without)} have no accuracy, and are no items")
        return results

    def _names(self) -> list[str]:
        names: list[str] = []
        for name in (part.strip() for part in self.options.tasks.split(",")):
            names += ZERO_SHOT_7 if name == "zero-shot-7" else [name] if name else []
        if not names:
            raise PruneForgeError("lm-eval needs the name of a task: lm-eval:TASK[,TASK]")
        return names

    def _results(self, outcome: dict[str, Any], tasks: list[str]) -> dict[str, Any]:
        results = {
            task: {key: _plain(value) for key, value in values.items()} for task, values in outcome["results"].items()
        }
        accuracies = {task: float(results[task]["acc,none"]) for task in tasks if "acc,none" in results.get(task, {})}
        without = ", ".join(task for task in tasks if task not in accuracies)
        warnings = [f"mean_accuracy leaves out {without}, without an accuracy (`acc,none`)"] if without else []
        if self.options.limit:
            warnings.append(f"only the first {self.options.limit} documents of each task were used")
        return {
            "results": results,
            "mean_accuracy": fmean(accuracies.values()) if accuracies else None,
            "task_versions": outcome["versions"],
            "shots": outcome.get("n-shot", {}),
            "documents": {task: count["effective"] for task, count in outcome.get("n-samples", {}).items()},
            "warnings": warnings,
        }


def usual_batch_size(device: torch.device) -> int | str:
    """Return the batch size where none is asked for: on a GPU "auto", the largest that lm-eval finds to fit.

    Not on the CPU, where the search knows no end of memory: it tries five batches of 64 prompts as long as the longest
    and takes 64, if the system has not ended the process.
    """
    return BATCH_ON_CPU if device.type == "cpu" else "auto"


def _batch_size(harness: Any, configs: Mapping[str, Mapping[str, Any]]) -> int | str:
    """Return the batch size that all tasks had, or "auto" where lm-eval does not keep what it found to fit.

    It keeps the size for tasks that compare choices, and not the one that it finds for those that generate text.
    """
    kept = all(config.get("output_type") in COMPARE_CHOICES for config in configs.values())
    sizes = set(harness.batch_sizes.values()) if kept else set()
    found: int | str = sizes.pop() if len(sizes) == 1 else harness.batch_size
    return found


def _plain(value: Any) -> Any:
    """Return a number of numpy's as one of Python's, and everything else as it is."""
    return value.item() if hasattr(value, "item") else value


def _items(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> tuple[dict[str, list[Any]], list[str]]:
    """Return a record of each question, and the tasks whose questions have no accuracy."""
    right = {
        f"{task}/{question['doc_id']}": float(question["acc"])
        for task, questions in samples.items()
        for question in questions
        if question["filter"] == "none" and "acc" in question
    }
    with_accuracy = {name.rpartition("/")[0] for name in right}
    return {"id": list(right), "acc": list(right.values())}, [task for task in samples if task not in with_accuracy]


def _task_manager(include_path: str | None, names: Sequence[str]) -> Any:
    """Return lm-eval's index of tasks: of all, which takes ten seconds, or where that is enough, of some folders."""
    from lm_eval import tasks

    folders = () if include_path else tuple(_folders(Path(tasks.__file__).parent, names))
    return _index(include_path, folders)


@functools.cache
def _index(include_path: str | None, folders: tuple[str, ...]) -> Any:
    """Return the index of some folders alone, or of lm-eval's own and those of a path."""
    from lm_eval.tasks import TaskManager

    if folders:
        return TaskManager(include_defaults=False, include_path=list(folders))
    return TaskManager(include_path=include_path)


def _folders(root: Path, names: Sequence[str]) -> list[str]:
    """Return the folders of lm-eval's own tasks with these names.

    Returns:
        None of them if a name is not that of exactly one task with a file of its own. Groups, tags and names that are
        made when they are read need the whole index.
    """
    found: dict[str, list[Path]] = {name: [] for name in names}
    for file in root.glob("**/*.yaml"):
        match = re.search(
            rb"^(task|group):[ \t]*[\"']?([\w.-]+)[\"']?[ \t]*(#.*)?\r?$", file.read_bytes(), re.MULTILINE
        )
        if match and (name := match[2].decode()) in found:
            found[name] += [file] if match[1] == b"task" else [file, file]
    if any(len(files) != 1 for files in found.values()):
        return []
    return sorted({str(files[0].parent) for files in found.values()})


def _check_known(names: list[str], manager: Any) -> None:
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise PruneForgeError(
            f"lm-eval knows no task {', '.join(unknown)}; `lm-eval ls tasks` lists them, `include_path` adds local ones"
        )


class ZeroShot7(LMEval):
    """The seven zero-shot tasks of the published tables, and their mean accuracy."""

    argument = None

    class Options(LMEval.Options):
        """Options of lm-eval, with the tasks given."""

        tasks: str = Field(",".join(ZERO_SHOT_7), description="the seven tasks")

    options: Options
