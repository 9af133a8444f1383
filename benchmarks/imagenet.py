"""Images a second of the ImageNet evaluator against bare timm loops, and calibration end to end.

    python benchmarks/imagenet.py --data imagenet-samples.zip

A randomly initialised `deit_tiny_patch16_224` is calibrated, pruned and evaluated over real images. Three rates
are measured in turns, each several times: a timm forward over images that are already in memory, a timm
forward behind a plain PyTorch loader with the same worker processes, and the evaluator. Writes
`benchmarks/results/imagenet.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf

import pruneforge
from pruneforge.data.images import image_processor
from pruneforge.interfaces.source import create_source
from pruneforge.plugins import loaded_plugins
from pruneforge.runs.loading import load_model
from pruneforge.runs.provenance import machine, versions

ROOT = Path(__file__).parents[1]
NAME = "deit_tiny_patch16_224"
BATCH = 64
WORKERS = max(1, (os.cpu_count() or 1) - 1)


class _Images(torch.utils.data.Dataset):
    def __init__(self, images: Any, processor: Any) -> None:
        self.images, self.processor = images, processor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.processor.transform(self.images.open(index).convert("RGB"))


@torch.inference_mode()
def forward_rate(model: torch.nn.Module, batches: Any) -> float:
    """Return images a second of `model` over `batches`."""
    start, count = time.perf_counter(), 0
    for pixels in batches:
        model(pixels).topk(5, dim=1)
        count += len(pixels)
    return count / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder or archive of images by WordNet id")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        model = timm.create_model(NAME).eval()
        save_for_hf(model, folder, safe_serialization=True)
        loaded = load_model(folder, "auto", None, loaded_plugins().registry)
        processor = image_processor(loaded.processor)
        images = create_source(arguments.data, {}, loaded_plugins().registry).images("evaluation")  # type: ignore[attr-defined]
        preprocessed = _Images(images, processor)
        loader = torch.utils.data.DataLoader(preprocessed, BATCH, num_workers=WORKERS)
        memory = [torch.stack([preprocessed[i + j] for j in range(BATCH)]) for i in (0, 64, 128)]
        rates: dict[str, list[float]] = {"forward alone": [], "forward behind a loader": [], "evaluator": []}
        for _ in range(arguments.rounds):
            rates["forward alone"].append(forward_rate(model, memory))
            rates["forward behind a loader"].append(forward_rate(model, loader))
            found = pruneforge.evaluate(folder, "imagenet", data=arguments.data, batch_size=BATCH)
            rates["evaluator"].append(found["images_per_second"])
        pruned = {
            metric: pruneforge.prune(folder, metric, 0.5, None, arguments.data, samples=64)
            for metric in ("magnitude", "wanda", "sparsegpt", "gblm")
        }
    results = {
        "model": NAME,
        "images": found["images"],
        "images_per_second": {name: {"median": statistics.median(v), "all": v} for name, v in rates.items()},
        "workers": WORKERS,
        "prune_seconds_64_images": {m: r.report["measured"]["seconds"]["total"] for m, r in pruned.items()},
        "machine": machine(),
        "versions": versions(),
    }
    (ROOT / "benchmarks" / "results" / "imagenet.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
