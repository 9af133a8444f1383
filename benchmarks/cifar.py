"""Top-1 accuracy of a small vision transformer against sparsity, by metric and scope.

    python benchmarks/cifar_train.py --data cifar10.zip --output runs/cifar-vit
    python benchmarks/cifar.py --model runs/cifar-vit --data cifar10.zip

Calibrates on 256 training images and measures on the test images. Writes `benchmarks/results/cifar.json`,
`docs/results/cifar.png` and `docs/results/cifar.md`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pruneforge
from pruneforge.progress import BarProgress
from pruneforge.runs.provenance import machine, versions

ROOT = Path(__file__).parents[1]
SPARSITIES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
SCOPES: tuple[tuple[str, str | None], ...] = (
    ("magnitude", "layer"),
    ("magnitude", "row"),
    ("wanda", "layer"),
    ("wanda", "row"),
    ("gblm", "layer"),
    ("gblm", "row"),
    ("sparsegpt", None),  # chooses its own comparison groups
)


def measure(model: Path, data: Path) -> dict[str, Any]:
    """Prune and evaluate every combination."""
    task: dict[str, Any] = {"data": data, "options": {"workers": 1, "source_options": {"split": "test"}}}
    dense = pruneforge.evaluate(model, "imagenet", **task)
    rows = []
    jobs = [(metric, scope, sparsity) for metric, scope in SCOPES for sparsity in SPARSITIES]
    for metric, scope, sparsity in BarProgress().track(jobs, "cifar"):
        result = pruneforge.prune(
            model,
            metric,
            sparsity,
            None,
            data,
            samples=256,
            options={"scope": scope} if scope else {},
            source_options={"split": "train", "balanced": True},
        )
        found = pruneforge.evaluate(result, "imagenet", **task)
        rows.append(
            {
                "metric": metric,
                "scope": scope or "own",
                "sparsity": sparsity,
                "top1": found["top1"],
                "interval": found["top1_interval"],
                "loss": found["loss"],
                "seconds": result.report["measured"]["seconds"]["total"],
            }
        )
    return {
        "dense": {"top1": dense["top1"], "interval": dense["top1_interval"], "images": dense["images"]},
        "rows": rows,
        "machine": machine(),
        "versions": versions(),
    }


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw top-1 against sparsity, a line a metric and scope."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    colours = {"magnitude": "tab:gray", "wanda": "tab:blue", "gblm": "tab:orange", "sparsegpt": "tab:green"}
    for metric, scope in SCOPES:
        own = [row for row in results["rows"] if (row["metric"], row["scope"]) == (metric, scope or "own")]
        label = f"{metric}, {scope}" if scope else metric
        style = "--" if scope == "layer" else "-"
        values = [100 * row["top1"] for row in own]
        axes.plot([100 * row["sparsity"] for row in own], values, style, marker="o", label=label, color=colours[metric])
    axes.axhline(100 * results["dense"]["top1"], color="black", linewidth=0.8, label="dense")
    axes.axhline(10, color="black", linewidth=0.8, linestyle=":", label="chance")
    axes.set(xlabel="sparsity (%)", ylabel="top-1 accuracy (%)", title="ViT of 1.2 M parameters on CIFAR-10")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def page(results: dict[str, Any]) -> str:
    """Return `docs/results/cifar.md`."""
    dense, where = results["dense"], results["machine"]
    lines = [
        "# A vision transformer on CIFAR-10",
        "",
        "Made by `python benchmarks/cifar.py --model runs/cifar-vit --data cifar10.zip`, on a model that "
        "`benchmarks/cifar_train.py` trained on 6,000 images. The numbers are in "
        "[`benchmarks/results/cifar.json`](../../benchmarks/results/cifar.json).",
        "",
        f"Top-1 accuracy (%) on {dense['images']:,} test images; dense: **{100 * dense['top1']:.1f}** "
        f"(95 % interval {100 * dense['interval'][0]:.1f} to {100 * dense['interval'][1]:.1f}). Calibration: 256 "
        "training images, balanced over the classes, the evaluation transform. Unstructured.",
        "",
        "![Top-1 against sparsity](cifar.png)",
        "",
        "| metric | scope | " + " | ".join(f"{sparsity:.0%}" for sparsity in SPARSITIES) + " |",
        "|---|---|" + "---:|" * len(SPARSITIES),
    ]
    for metric, scope in SCOPES:
        own = [row for row in results["rows"] if (row["metric"], row["scope"]) == (metric, scope or "own")]
        cells = " | ".join(f"{100 * row['top1']:.1f}" for row in own)
        lines.append(f"| {metric} | {scope or 'its own'} | {cells} |")
    lines += [
        "",
        f"Machine: {where['processor']}, {where['cores']} cores, {where['threads']} threads; "
        f"torch {results['versions']['torch']}, timm {results['versions']['timm']}.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder that benchmarks/cifar_train.py wrote")
    parser.add_argument("--data", type=Path, required=True, help="zip of CIFAR-10 as an image folder")
    arguments = parser.parse_args()
    results = measure(arguments.model, arguments.data)
    (ROOT / "benchmarks" / "results" / "cifar.json").write_text(json.dumps(results, indent=2) + "\n")
    plot(results, ROOT / "docs" / "results" / "cifar.png")
    (ROOT / "docs" / "results" / "cifar.md").write_text(page(results))
    print(page(results))


if __name__ == "__main__":
    main()
