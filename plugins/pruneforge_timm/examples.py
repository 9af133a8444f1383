"""Tiny random image classifiers of the shapes that the adapter takes, for checks."""

from __future__ import annotations

from typing import Any

import torch

from pruneforge import Adapter, Example

SIDE, CLASSES = 32, 7

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "deit": (
        "deit_tiny_distilled_patch16_224",
        {"img_size": SIDE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 1.5},
    ),
    "windows": (
        "swin_tiny_patch4_window7_224",
        {"img_size": SIDE, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4},
    ),
    "convolutions": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 32)}),
}
"""By what messages call it: timm's name of a model, and what makes it tiny."""


def examples(adapter: Adapter) -> list[Example]:
    """Return the models, with labelled random images."""
    import timm

    generator = torch.Generator().manual_seed(1)
    data = [
        {"pixel_values": torch.randn(size, 3, SIDE, SIDE, generator=generator), "labels": torch.arange(size)}
        for size in (3, 2)
    ]
    found = []
    for kind, (name, size) in MODELS.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = timm.create_model(name, num_classes=CLASSES, **size).eval()
            for parameter in module.parameters():  # trained models have no zero biases and no tiny layer scales
                parameter.data += 0.05 * torch.randn(parameter.shape)
        found.append(Example(kind, module, adapter.processor(module), data))
    return found
