"""Tiny random image classifiers of the shapes that the adapter takes, for checks."""

from __future__ import annotations

import torch

from pruneforge import Example
from pruneforge_vit.adapter import image_processor

SIDE, CLASSES = 32, 7

SIZE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 8,
    "num_labels": CLASSES,
    "initializer_range": 0.1,
}

MODELS = {"vit": "ViTForImageClassification", "deit": "DeiTForImageClassification"}
"""Class of each kind of model."""


def examples() -> list[Example]:
    """Return a model of each kind, with labelled random images."""
    import transformers

    native = transformers.ViTImageProcessor(size={"height": SIDE, "width": SIDE})
    generator = torch.Generator().manual_seed(1)
    data = [
        {"pixel_values": torch.randn(size, 3, SIDE, SIDE, generator=generator), "labels": torch.arange(size)}
        for size in (3, 2)
    ]
    found = []
    for kind, architecture in MODELS.items():
        config = transformers.AutoConfig.for_model(kind, architectures=[architecture], **SIZE)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = transformers.AutoModelForImageClassification.from_config(config).eval()
        found.append(Example(kind, module, image_processor(native, config), data))
    return found
