"""LeaF on made-up tasks: does it flag what misleads a student, and does leaving it out help the student?

    python benchmarks/leaf.py

A question is 14 tokens, or 16 patches of a digit's image, in random places. One causal token decides the class; one
confounder agrees with the class in all that the student has seen. Students are tested where the confounder is drawn by
chance. Controls: distillation alone, tokens left out at random, and the confounder left out (oracle). Writes
`benchmarks/results/leaf.json` and `docs/results/leaf.md`.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import leaf_images
import torch
from outcome import made_on, with_machine, write
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from pruneforge_leaf.distillation import distillation_loss
from pruneforge_leaf.samples import Sample, padded
from pruneforge_leaf.scores import confounding, sensitivities
from pruneforge_leaf.spans import pruned

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "leaf.json", ROOT / "docs" / "results" / "leaf.md"
TOKENS, CLASSES, CAUSAL = 14, 4, 32
CONFOUNDERS, CAUSES, FILLER, VOCABULARY = 1 + CLASSES, 1 + 2 * CLASSES, 1 + 2 * CLASSES + CAUSAL, 96
NAMES = {"teacher": "the teacher", "before": "before distillation", "LeaF": "LeaF: without what is flagged"}
HEAD = """# LeaF: leaving out what distracts a student

Made by `python benchmarks/leaf.py`. LeaF (Guo et al., 2025; `pruneforge_leaf`) compares, token by token, how much a
teacher's loss and a student's depend on each, flags those that move the student and not the teacher, and distils on
the samples with and without them.

The tasks are made up. A question has 14 tokens, one of which decides the class, and another, the confounder, agrees
with the class in all that the student has seen and is distilled on; or it is a digit of 16 patches, one of which is
replaced by a pattern that tells the class. Students are tested where the confounder is drawn by chance. The controls
are distillation without any deletion, deletion of one token at random, and of the confounder itself.
"""

Question = tuple[Sample, int, int]
"""A sample, and the places of its causal token and its confounder."""


def questions(count: int, agrees: float, seed: int) -> list[Question]:
    """Return made-up questions; the confounder agrees with the class in a share of them, and else is any."""
    draw = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=draw))

    found = []
    for _ in range(count):
        ids = torch.randint(FILLER, VOCABULARY, (TOKENS,), generator=draw)
        causal, confounder = torch.randperm(TOKENS, generator=draw)[:2].tolist()
        cause = number(0, CAUSAL)
        label = cause % CLASSES
        agreeing = bool(torch.rand(1, generator=draw) < agrees)
        ids[causal] = CAUSES + cause
        ids[confounder] = CONFOUNDERS + (label if agreeing else number(0, CLASSES))
        found.append((Sample(ids, torch.tensor([1 + label])), causal, confounder))
    return found


def model(hidden: int, blocks: int, seed: int) -> LlamaForCausalLM:
    """Return a LLaMA with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def trained(module: Any, steps: int, lr: float, loss: Callable[[int], Tensor]) -> Any:
    """Return a model after so many steps of AdamW on a loss, in evaluation mode."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr)
    module.train()
    for step in range(steps):
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()
    return module.eval()


def answer_loss(module: Any, samples: Sequence[Sample]) -> Tensor:
    """Return the cross-entropy of the classes."""
    batch = padded(samples)
    logits = module(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits[:, TOKENS - 1]
    return F.cross_entropy(logits, batch.ids[:, TOKENS])


@torch.no_grad()
def accuracy(module: Any, asked: Sequence[Question]) -> float:
    """Return the share of questions whose class is the likeliest token."""
    batch = padded([sample for sample, _, _ in asked])
    logits = module(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits[:, TOKENS - 1]
    return (logits.argmax(1) == batch.ids[:, TOKENS]).double().mean().item()


def batches(pool: Sequence[Any], size: int, seed: int) -> Callable[[int], list[Any]]:
    """Return a function that draws a batch for each step."""
    draw = torch.Generator().manual_seed(seed)
    return lambda _step: [pool[i] for i in torch.randint(len(pool), (size,), generator=draw).tolist()]


def flagged(teacher: Any, student: Any, asked: Sequence[Question]) -> list[Tensor]:
    """Return the tokens of each question that LeaF flags."""
    samples = [sample for sample, _, _ in asked]
    pairs = zip(sensitivities(teacher, samples), sensitivities(student, samples), strict=True)
    return [confounding(of_teacher, of_student) for of_teacher, of_student in pairs]


def only(place: int) -> Tensor:
    """Return flags of one token."""
    return torch.arange(TOKENS) == place


def measured(seed: int) -> dict[str, Any]:
    """Return what one seed shows."""
    fair, seen = questions(8192, 0.0, 10 + seed), questions(4096, 1.0, 20 + seed)
    test, distil = questions(2048, 0.0, 30 + seed), questions(2048, 1.0, 40 + seed)
    draw = batches([sample for sample, _, _ in fair], 64, seed)
    teacher = model(64, 2, seed)
    trained(teacher, 700, 2e-3, lambda step: answer_loss(teacher, draw(step)))
    of_seen = batches([sample for sample, _, _ in seen], 64, seed)
    before = model(32, 2, 100 + seed)
    trained(before, 200, 2e-3, lambda step: answer_loss(before, of_seen(step)))

    flags = flagged(teacher, before, distil)
    pairs = list(zip(flags, distil, strict=True))
    precision = sum(bool(f[confounder]) for f, (_, _, confounder) in pairs) / sum(int(f.sum()) for f in flags)
    causal = fmean(float(f[causal]) for f, (_, causal, _) in pairs)
    chance = torch.Generator().manual_seed(50 + seed)
    kinds = {
        "distillation alone": [None] * len(distil),
        "LeaF": flags,
        "at random (control)": [only(int(torch.randint(TOKENS, (1,), generator=chance))) for _ in distil],
        "the confounder (oracle)": [only(confounder) for _, _, confounder in distil],
    }
    found = {"teacher": accuracy(teacher, test), "before": accuracy(before, test)}
    for name, gone in kinds.items():
        student = copy.deepcopy(before)
        pool = [(sample, flag) for (sample, _, _), flag in zip(distil, gone, strict=True)]
        some = batches(pool, 64, seed)

        def loss(step: int, student: Any = student, some: Any = some) -> Tensor:
            chosen = some(step)
            samples = [sample for sample, _ in chosen]
            without = [each for sample, flag in chosen if flag is not None for each in pruned(sample, flag)]
            return distillation_loss(teacher, student, samples, without)

        found[name] = accuracy(trained(student, 300, 1e-3, loss), test)
    print(seed, f"precision {precision:.2f} causal {causal:.3f}", {k: f"{v:.1%}" for k, v in found.items()}, flush=True)
    return {"precision": precision, "chance": 1 / TOKENS, "causal": causal, "accuracy": found}


def page(document: dict[str, Any]) -> str:
    """Return the page of the results."""
    lines = [HEAD]
    for task, runs in document["results"].items():
        precision = ", ".join(f"{run['precision']:.2f}" for run in runs)
        lines += [
            f"## {task}",
            "",
            f"Share of flagged tokens that are the confounder: {precision} (by chance {runs[0]['chance']:.2f}).",
        ]
        if "causal" in runs[0]:
            causal = ", ".join(f"{run['causal']:.1%}" for run in runs)
            lines.append(f"The causal token is flagged in {causal} of the questions.")
        lines += ["", f"| student | {' | '.join(f'seed {seed}' for seed in range(len(runs)))} | mean |"]
        lines.append(f"|---|{'---:|' * (len(runs) + 1)}")
        for name in runs[0]["accuracy"]:
            values = [run["accuracy"][name] for run in runs]
            cells = [f"{value:.1%}" for value in [*values, fmean(values)]]
            lines.append(f"| {NAMES.get(name, name)} | {' | '.join(cells)} |")
        lines.append("")
    lines.append(made_on(document, "torch", "transformers", "timm"))
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write results and page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = range(parser.parse_args().seeds)
    results = {"A LLaMA that classifies": [measured(seed) for seed in seeds]}
    results["A ViT that reads digits"] = [leaf_images.measured(seed) for seed in seeds]
    document = with_machine({"results": results})
    write(document, RESULTS, page(document), PAGE)


if __name__ == "__main__":
    main()
