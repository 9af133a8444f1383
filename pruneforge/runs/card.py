"""Cards of what is published: a model's, made from its report, and a study's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import yaml

from pruneforge.documents import parse_yaml, read_text
from pruneforge.errors import PruneForgeError
from pruneforge.plugins import loaded_plugins
from pruneforge.runs.markdown import code, markdown

CARD_FILE = "README.md"

TEMPLATES = Path(__file__).parent / "templates"

TAGS = ["pruneforge", "pruning", "sparsity"]

LICENSE = ("license", "license_name", "license_link")
"""What a card's metadata say of the licence."""


def license_of(folder: Path) -> dict[str, str]:
    """Return what the card of a model says of its licence, or nothing if there is no card that can be read."""
    card = folder / CARD_FILE
    if not card.is_file():
        return {}
    try:
        front = re.match(r"-{3}\s*\n(.*?)\n-{3}\s*(\n|$)", read_text(card, "card"), re.DOTALL)
        metadata = parse_yaml(front[1], "card") if front else {}
    except PruneForgeError:  # it is about the dense model, and decides nothing here
        return {}
    stated = metadata if isinstance(metadata, dict) else {}
    return {name: stated[name] for name in LICENSE if isinstance(stated.get(name), str)}


def model_card(report: Mapping[str, Any], title: str) -> str:
    """Return the card of a pruned model.

    Args:
        report: The report of the run.
        title: What the model is called.
    """
    base = report["recipe"]["model"]
    # A folder may be named as a model of the Hub is; only where the run was made was it known.
    known = {"base_model": base.removeprefix("hf-hub:").partition("@")[0]} if report["model"].get("on_hub") else {}
    known |= report["model"].get("license", {})
    return _filled(
        "model_card.md",
        metadata=_yaml({**known, "tags": TAGS}),
        title=markdown(title),
        model=code(base),
        version=markdown(report["versions"]["pruneforge"]),
        settings=_table(["", ""], [[name, text] for name, text in _settings(report).items()]),
        evaluation=_evaluation(report["evaluation"]),
        warnings="".join(["\n## Warnings\n\n", *(f"- {markdown(text)}\n" for text in report["warnings"])])
        if report["warnings"]
        else "",
        repeat=_filled(_repeat(report)).rstrip(),
    )


def _repeat(report: Mapping[str, Any]) -> str:
    """Return the template that says how a model is made again."""
    if "masks" in report:
        return "repeat_masks.md"
    return "repeat_recovered.md" if report.get("recovered") else "repeat_run.md"


def study_card(report: str, title: str) -> str:
    """Return the card of a study.

    Args:
        report: Its report, in Markdown.
        title: What the study is called.
    """
    results = [{"config_name": "results", "data_files": "results.csv"}]  # what the Hub shows as a table
    return _filled("study_card.md", metadata=_yaml({"tags": TAGS, "configs": results}), title=title, report=report)


def _settings(report: Mapping[str, Any]) -> dict[str, str]:
    """Return what made the model, in words."""
    recipe, sparsity = report["recipe"], report["sparsity"]
    parts = {name: report.get(name) for name in ("metric", "allocator", "recovery", "objective")}
    refiners = report.get("refiners", [])
    scope = report["pattern"]["scope"]
    return {
        "base model": code(recipe["model"]),
        **{name: _part(part) for name, part in parts.items() if part is not None},
        **({"recovered by": ", ".join(map(_part, report["recovered"]))} if report.get("recovered") else {}),
        **({"refined by": ", ".join(map(_part, refiners))} if refiners else {}),
        "pattern": markdown(report["pattern"]["pattern"] + (f", compared within each {scope}" if scope else "")),
        "sparsity": f"{sparsity['reached']:.2%} of {sparsity['weights']:,} weights in {len(report['layers'])} layers",
        "calibration": _calibration(report),
    }


def _part(part: Mapping[str, Any]) -> str:
    options = {name: value for name, value in part["options"].items() if value is not None}
    return code(part["name"]) + (f" ({_assignments(options)})" if options else "")


def _calibration(report: Mapping[str, Any]) -> str:
    data, recipe = report["calibration"], report["recipe"]
    if not data:
        return "none"
    tokens = f", {data['tokens']:,} tokens" if "tokens" in data else ""
    return (
        f"{code(recipe['calibration'] or data['source'])}, {data['samples']:,} samples{tokens}, seed {recipe['seed']}"
    )


def _evaluation(outcomes: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of what the model was evaluated on, by each evaluator's own measure."""
    rows = []
    for outcome in outcomes:
        measure, share = _measure(outcome["task"])
        value = outcome.get(measure)
        text = "in `pruneforge.json`" if value is None else f"{value:.2%}" if share else f"{value:,.2f}"
        rows.append([markdown(outcome["task"]), _assignments(outcome["recipe"]["options"]), markdown(measure), text])
    return f"\n## Evaluation\n\n{_table(['task', 'settings', 'measure', 'value'], rows)}\n" if rows else ""


def _measure(task: str) -> tuple[str, bool]:
    """Return the result that an evaluator is compared by, and whether it is a share."""
    try:
        kind: Any = loaded_plugins().registry.get("evaluator", task.partition(":")[0]).load()
    except PruneForgeError:  # the evaluator is not installed here; most give the loss too
        return "loss", False
    return kind.measure, kind.share


def _filled(template: str, **texts: str) -> str:
    return Template((TEMPLATES / template).read_text(encoding="utf-8")).substitute(texts)


def _yaml(metadata: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(metadata), sort_keys=False).rstrip()


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["-"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _assignments(options: Mapping[str, Any]) -> str:
    return markdown(", ".join(f"{name}={value}" for name, value in options.items()))
