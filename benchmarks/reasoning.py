"""Sums of several steps under compression: accuracy and tokens spent, by the number of steps and by sparsity.

    python -m pruneforge_reasoning.train_sums --output models/adder
    python benchmarks/reasoning.py models/adder

Prunes the small LLaMA that does sums with each metric at each sparsity, and asks it sums of one, three and six steps.
Writes `benchmarks/results/reasoning.json` and `docs/results/reasoning.md`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from outcome import made_on, with_machine, write

import pruneforge

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "reasoning.json", ROOT / "docs" / "results" / "reasoning.md"
METRICS: dict[str, dict[str, Any]] = {
    "magnitude": {},
    "wanda": {"calibration": "sums", "samples": 64, "seqlen": 128},
    "random": {},
}
COARSE = [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5]
FINE = [percent / 100 for percent in (10, 20, 30, 40, 50, 55, *range(60, 83), 85)]
"""Steps of one percent where accuracies fall, so that the first sparsity at which half is lost has lost little more."""
STEPS = [1, 3, 6]
SHORT, LONG = "1 step", "3 steps"
HEAD = """# Reasoning under compression: sums

Made by `python benchmarks/reasoning.py`. A LLaMA of 0.34 M parameters (`python -m pruneforge_reasoning.train_sums`)
does sums of digits step by step, `3+9+4=` being answered `3+9=12;12+4=16`. It is asked 200 sums of three and of six
steps that it was not trained on, and the hundred sums of one step, which it was (`pruneforge eval MODEL --task
reasoning --data sums`). After Zhang et al., When Reasoning Meets Compression (2025), who found that harder tasks
collapse earlier. A model this small shows nothing about their tasks (AIME 2024, FOLIO, temporal sequences, MuSiQue),
which the same evaluator asks.

Share of right answers, and the mean tokens of an answer in parentheses. At random is the control.
"""


def summary(results: dict[str, Any]) -> dict[str, Any]:
    """Return accuracy, tokens and unfinished answers by difficulty."""
    wanted = ("accuracy", "tokens", "unfinished")
    return {name: {key: part[key] for key in wanted} for name, part in results["by_difficulty"].items()}


def measured(model: str, count: int) -> dict[str, Any]:
    """Return the summaries of the dense model, and of each metric by sparsity."""
    asked = {"data": "sums", "source_options": {"count": count, "steps": STEPS}, "max_new_tokens": 96}
    found: dict[str, Any] = {"dense": summary(pruneforge.evaluate(model, "reasoning", batch_size=200, **asked))}
    for metric, calibration in METRICS.items():
        found[metric] = {}
        for sparsity in COARSE if metric == "random" else FINE:
            pruned = pruneforge.prune(model, metric, sparsity=sparsity, **calibration)
            results = summary(pruneforge.evaluate(pruned, "reasoning", batch_size=200, **asked))
            found[metric][str(sparsity)] = results
            print(metric, sparsity, {name: tuple(part.values()) for name, part in results.items()}, flush=True)
    return found


def collapse(dense: dict[str, Any], by_sparsity: dict[str, Any]) -> str:
    """Return what one-step sums have lost at the first sparsity at which three-step sums have lost half."""

    def lost(results: dict[str, Any], name: str) -> float:
        return 1 - results[name]["accuracy"] / dense[name]["accuracy"]

    for sparsity, results in by_sparsity.items():
        if lost(results, LONG) >= 0.5:
            tokens = [f"{part['tokens'] / dense[name]['tokens'] - 1:+.1%} ({name})" for name, part in results.items()]
            return (
                f"At {float(sparsity):.0%}, sums of three steps have lost {lost(results, LONG):.0%} of their accuracy, "
                f"and of one step {lost(results, SHORT):.0%};\ntokens: {', '.join(tokens)}."
            )
    return "Sums of three steps never lose half of their accuracy."


def page(document: dict[str, Any]) -> str:
    """Return the page of the results."""
    found = document["results"]
    lines = [HEAD]
    for metric in METRICS:
        rows = {"dense": found["dense"], **found[metric]}
        lines += [f"## {metric}", "", collapse(found["dense"], found[metric]), ""]
        lines += [f"| sparsity | {' | '.join(found['dense'])} | unfinished |", f"|---|{'---:|' * (len(STEPS) + 1)}"]
        for name, results in rows.items():
            cells = [f"{part['accuracy']:.1%} ({part['tokens']:.1f})" for part in results.values()]
            unfinished = sum(part["unfinished"] for part in results.values())
            label = name if name == "dense" else f"{float(name):.0%}"
            lines.append(f"| {label} | {' | '.join(cells)} | {unfinished} |")
        lines.append("")
    lines.append(made_on(document, "torch", "transformers"))
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write results and page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder that train_sums wrote")
    parser.add_argument("--count", type=int, default=200, help="sums of each length")
    asked = parser.parse_args()
    document = with_machine({"results": measured(asked.model, asked.count)})
    write(document, RESULTS, page(document), PAGE)


if __name__ == "__main__":
    main()
