"""The page that shows the results of `benchmarks/speed.py` and `benchmarks/costs.py`."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

from workload import SAMPLES, SHAPE, TOKENS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results" / "speed.md"
WORK = """A random LLaMA of 29.5 M parameters (hidden 512, 8 blocks) in float32, 64 samples of 512 tokens, 50 %. Every
run is a process of its own. Seconds from the model's folder to pruned weights, the libraries imported before;
PruneForge's time includes writing them. `plain` is [the loop of the research
repositories](../../benchmarks/plain_loop.py): one sample at a time, a statistic for each layer, full sorts, autograd
over the whole model. Agreement is the share of weights on which a mask is the same as PruneForge's (see below). Memory
is the peak above what the imported libraries take; peaks and times compare best on the same libraries, so PruneForge
runs on llm-compressor's as well."""
FLOOR = """The floor is the bare matrix products, weights and attention, of two forward passes over all blocks, for
SparseGPT with the Gram products, for GBLM with a forward and a backward pass more; timed on PruneForge's libraries
before and after each metric's runs, for the machine's speed drifts. PruneForge computes less than that: calibration of
a block ends before its last product, the last block is not propagated, and of a Gram matrix about two thirds are
summed."""
AGREEMENT = """Share of weights on which the plain loop prunes what PruneForge does, in the first and the last block, on
16 of the samples. The repositories (and llm-compressor) prune one weight too many wherever one threshold serves many
rows; `exact` is the plain loop without that. A difference in one weight moves what later blocks see, and in SparseGPT
all that is chosen after it; in float32 the order of sums makes such differences."""
AIMS = """The last column is what PruneForge would reach at the speed of the floor, doing nothing but its products.
Where a ratio to another contender is missed, the stages above say where the time is: calibrate and propagate are the
forward passes. GBLM runs every block forward once more than the plain loop, because it holds the graph of one block at
a time, which lets models larger than memory through. Of several sparsities each needs a column loop of its own in
SparseGPT."""
STAGES = ("capture", "gradients", "calibrate", "propagate", "prune", "write")
PASSES = {"wanda": 2, "sparsegpt": 2, "gblm": 5}
"""Forward passes whose products a metric needs; a backward pass has those of two."""

OVER_FLOOR = {"wanda": 1.5, "sparsegpt": 2.5}
OVER_PEER = {"wanda": 3.0, "sparsegpt": 2.5}

AXES = {
    "samples": "samples",
    "tokens": "tokens a sample",
    "hidden_size": "width (line over its square)",
    "num_hidden_layers": "blocks",
    "patterns": "sparsities at once, dense, on the work above",
}


def write() -> None:
    """Write `docs/results/speed.md` from what results there are."""
    lines = [
        "# Speed",
        "",
        "Made by `make bench`. Runs took turns; medians where there are several rounds.",
        "",
    ]
    speed, costs = _read("speed"), _read("costs")
    if speed:
        lines += [*_peers(speed), *_profile(speed)]
    agreed = _read("agreement")
    if agreed:
        lines += _agreement(agreed)
    if speed and costs:
        lines += _aims(speed["metrics"], costs)
    if costs:
        lines += _costs(costs)
    PAGE.write_text("\n".join(lines).rstrip() + "\n")


def _read(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def _floor(metric: str, found: dict[str, Any]) -> float:
    """Return the seconds of the products that a metric needs."""
    floor = found[metric]["floor"]
    passes = (floor["weights"] + floor["attention"]) * PASSES[metric] / 2
    return passes + (floor["gram"] if metric == "sparsegpt" else 0)


def _peers(document: dict[str, Any]) -> list[str]:
    lines = [
        "## Beside others",
        "",
        *textwrap.wrap(WORK, 118),
        "",
        "| metric | contender | seconds | times PruneForge's | agreement | memory, MB | peak, MB |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for metric, found in document["metrics"].items():
        ours = found["pruneforge"]["seconds"]
        for who, run in found.items():
            if who == "floor":
                continue
            agreed = f"{run['agreement']:.4%}" if "agreement" in run else ""
            above = (run["peak_bytes"] - run["imported_bytes"]) / 1e6
            lines.append(
                f"| `{metric}` | {who} | {run['seconds']:.1f} | {run['seconds'] / ours:.2f} | {agreed} | {above:.0f} | "
                f"{run['peak_bytes'] / 1e6:.0f} |"
            )
    lines += [
        "",
        *textwrap.wrap(FLOOR, 118),
        "",
        "| metric | floor, seconds | PruneForge over it | llm-compressor over it | plain loop over it |",
        "|---|---:|---:|---:|---:|",
    ]
    for metric, found in document["metrics"].items():
        if metric in PASSES:
            floor = _floor(metric, document["metrics"])
            over = [
                f"{found[who]['seconds'] / floor:.2f}" if who in found else ""
                for who in ("pruneforge", "llm-compressor", "plain")
            ]
            lines.append(f"| `{metric}` | {floor:.1f} | {' | '.join(over)} |")
    lines += ["", _machine(document)]
    if document["peers"]:
        lines.append(f"Peers: {', '.join(f'{name} {version}' for name, version in document['peers'].items())}.")
    return [*lines, ""]


def _agreement(document: dict[str, Any]) -> list[str]:
    cases = list(next(iter(document["metrics"].values())))
    rows = [
        f"| `{metric}` | {' | '.join(f'{found[case][0]:.4%}, {found[case][-1]:.4%}' for case in cases)} |"
        for metric, found in document["metrics"].items()
    ]
    head = [f"| metric | {' | '.join(cases)} |", f"|---|{'---:|' * len(cases)}"]
    lines = ["## Agreement", "", *textwrap.wrap(AGREEMENT, 118), "", *head, *rows, ""]
    return [*lines, *(_pretrained(document["pretrained"]) if "pretrained" in document else [])]


def _pretrained(document: dict[str, Any]) -> list[str]:
    sizes = list(next(iter(document["agreement"].values())))
    millions = document["parameters"] / 1e6
    said = (
        f"Wanda on a pretrained LLaMA of {millions:.0f} M parameters, {document['samples']} samples of "
        f"{document['tokens']} tokens, in float32 on one thread: the share of weights that PruneForge and the "
        "repositories' loop both keep or both prune, by samples that go through a block together. Sums are rounded "
        "in another order than theirs, with one sample a batch as with more: in the first blocks a few weights in a "
        "million have scores so equal that it decides, and what they change is seen by all later ones. Made by "
        "`benchmarks/agreement.py --model DIR --text FILE`, which `make bench` leaves out."
    )
    return [
        *textwrap.wrap(said, 118),
        "",
        f"| pattern | {' | '.join(f'`--batch-size {size}`' for size in sizes)} |",
        f"|---|{'---:|' * len(sizes)}",
        *(
            f"| {pattern} | {' | '.join(f'{found[size]:.4%}' for size in sizes)} |"
            for pattern, found in document["agreement"].items()
        ),
        "",
        _machine(document),
        "",
    ]


def _profile(document: dict[str, Any]) -> list[str]:
    return [
        "## Where PruneForge's time goes",
        "",
        "Seconds of the last round.",
        "",
        f"| metric | {' | '.join(STAGES)} | rest |",
        f"|---|{'---:|' * (len(STAGES) + 1)}",
        *(
            f"| `{metric}` | {_stages(found['pruneforge']['stages'], found['pruneforge']['all_seconds'][-1])} |"
            for metric, found in document["metrics"].items()
            if "stages" in found["pruneforge"]
        ),
        "",
    ]


def _stages(seconds: dict[str, float], total: float) -> str:
    """Return the seconds of each stage, and those in none of them: opening, laying out files, finishing."""
    rest = total - sum(seconds.get(stage, 0.0) for stage in STAGES)
    return " | ".join([*(f"{seconds[stage]:.2f}" if stage in seconds else "" for stage in STAGES), f"{rest:.2f}"])


class Aim(NamedTuple):
    """A ratio that was aimed for: at least, or at most, `wanted`; and what it would be at the speed of the floor."""

    what: str
    at_least: bool
    wanted: float
    reached: float
    at_floor: float | None = None

    def row(self) -> str:
        """Return the row of the table."""
        met = self.reached >= self.wanted if self.at_least else self.reached <= self.wanted
        bound = "at least" if self.at_least else "at most"
        limit = "" if self.at_floor is None else f"{self.at_floor:.2f}"
        return f"| {self.what} | {bound} {self.wanted} | {self.reached:.2f} | {'' if met else 'missed'} | {limit} |"


def _aims(speed: dict[str, Any], costs: dict[str, Any]) -> list[str]:
    """Return what was aimed for beside what was reached."""
    aims = [aim for metric in speed for aim in _aims_of(metric, speed)]
    if {"wanda", "gblm"} <= set(speed):
        ratio = speed["gblm"]["pruneforge"]["seconds"] / speed["wanda"]["pruneforge"]["seconds"]
        aims.append(Aim("`gblm`: time over that of `wanda`", False, 4.0, ratio))
    passes = costs["vit"]["wanda"] / costs["vit"]["two forward passes"]
    aims.append(Aim("`wanda` on DeiT-small: time over two bare forward passes", False, 1.3, passes))
    for name, curve in costs["curves"].items():
        metric, axis = name.split(" ")
        if axis == "patterns":
            ratio = curve["seconds"]["8"] / curve["seconds"]["1"]
            aims.append(Aim(f"`{metric}`: eight sparsities at once over one", False, 1.3, ratio))
    table = ["| figure | aim | reached | | at the floor |", "|---|---:|---:|---|---:|", *(aim.row() for aim in aims)]
    return ["## Aims", "", *textwrap.wrap(AIMS, 118), "", *table, ""]


def _aims_of(metric: str, speed: dict[str, Any]) -> list[Aim]:
    """Return the aims of one metric beside the others."""
    found = speed[metric]
    ours, plain, peer = found["pruneforge"], found["plain"]["seconds"], found.get("llm-compressor")
    floor = _floor(metric, speed) if metric in PASSES else None
    what = f"`{metric}`: time of the plain loop over PruneForge's"
    aims = [Aim(what, True, 3.0, plain / ours["seconds"], plain / floor if floor else None)]
    if floor and metric in OVER_FLOOR:
        aims.append(Aim(f"`{metric}`: time over the floor", False, OVER_FLOOR[metric], ours["seconds"] / floor))
    if floor and peer:
        there, wanted = found["pruneforge on llm-compressor's libraries"], OVER_PEER[metric]
        what = f"`{metric}`: time of llm-compressor over PruneForge's"
        memory = f"`{metric}`: peak memory over llm-compressor's"
        aims += [
            Aim(what, True, wanted, peer["seconds"] / ours["seconds"], peer["seconds"] / floor),
            Aim(f"{what}, same libraries", True, wanted, peer["seconds"] / there["seconds"]),
            Aim(memory, False, 1.0, ours["peak_bytes"] / peer["peak_bytes"]),
            Aim(f"{memory}, same libraries", False, 1.0, there["peak_bytes"] / peer["peak_bytes"]),
        ]
    return aims


def _costs(document: dict[str, Any]) -> list[str]:
    base, passes, compiled = document["base"], document["vit"], document["compiling"]
    lines = [
        "## How it grows",
        "",
        f"{base['samples']} samples of {base['tokens']} tokens, {base['num_hidden_layers']} blocks of width "
        f"{base['hidden_size']}; one of these changes at a time. The last column is how far a straight line misses.",
        "",
        "| metric | against | seconds | largest residual |",
        "|---|---|---|---:|",
    ]
    for name, curve in document["curves"].items():
        metric, axis = name.split(" ")
        points = ", ".join(f"{size}: {seconds:.2f}" for size, seconds in curve["seconds"].items())
        lines.append(f"| `{metric}` | {AXES[axis]} | {points} | {curve['largest_residual_share']:.1%} |")
    lines += ["", "One more run of each for its stages, in seconds:", ""]
    lines += [f"| sparsities at once | {' | '.join(STAGES)} | rest |", f"|---|{'---:|' * (len(STAGES) + 1)}"]
    for name, curve in document["curves"].items():
        for size, stages in curve.get("stages", {}).items():
            lines.append(f"| `{name.split(' ')[0]}`, {size} | {_stages(stages, stages['total'])} |")
    two, wanda = passes["two forward passes"], passes["wanda"]
    eager, quick = compiled["eager batch"], compiled["compiled batch"]
    work = 2 * SAMPLES * TOKENS // 1024 * SHAPE["num_hidden_layers"]
    verdict = f"after {compiled['compile'] / (eager - quick):,.0f} passes of a block" if quick < eager else "never"
    return [
        *lines,
        "",
        "## A vision transformer",
        "",
        f"DeiT-small (random), 512 images of 224 x 224: Wanda {wanda:.1f} s, two bare timm forward passes of the same",
        f"batches {two:.1f} s: {wanda / two:.2f} times.",
        "",
        "## Compiling",
        "",
        f"`torch.compile` of a block takes {compiled['compile']:.1f} s; a batch then takes {quick * 1e3:.1f} ms",
        f"instead of {eager * 1e3:.1f} ms. It pays {verdict}; a calibrated run of the work above has {work:,}.",
        "PruneForge does not compile.",
        "",
        _machine(document),
        "",
    ]


def _machine(document: dict[str, Any]) -> str:
    system, packages, rounds = document["machine"], document["versions"], document.get("rounds")
    times = "" if rounds is None else f"{rounds} round{'s' if rounds > 1 else ''}. "
    return (
        f"{times}Machine: {system['processor']}, {system['cores']} cores, "
        f"{system['threads']} threads, {', '.join(system['accelerators']) or 'no accelerator'}; "
        f"torch {packages['torch']}, transformers {packages['transformers']}, timm {packages['timm']}."
    )
