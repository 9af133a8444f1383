"""Train the small vision transformer that `pruneforge demo` prunes.

Run `python -m pruneforge_demo.train_images --output DIR`; it takes a few minutes on two CPU cores and needs
no network. The images are the training part of scikit-learn's handwritten digits.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from torch.nn import functional as F

from pruneforge_demo import digits

MODEL_ARGS: dict[str, Any] = {
    "img_size": digits.SIZE,
    "patch_size": 2,
    "in_chans": 1,
    "num_classes": 10,
    "embed_dim": 64,
    "depth": 4,
    "num_heads": 4,
}
PREPROCESSING: dict[str, Any] = {
    "input_size": [1, digits.SIZE, digits.SIZE],
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "mean": [0.3],
    "std": [0.38],
    "num_classes": 10,
}


def train(output: Path, epochs: int, batch: int, seed: int) -> None:
    """Train for `epochs` passes over the training part, and save the model to `output` in timm's layout."""
    torch.manual_seed(seed)
    images, labels = _part("training")
    held_out, truth = _part("calibration")
    model = timm.create_model("vit_tiny_patch16_224", **MODEL_ARGS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    steps = epochs * math.ceil(len(images) / batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for epoch in range(epochs):
        model.train()
        for chosen in torch.randperm(len(images)).split(batch):
            loss = F.cross_entropy(model(_shifted(images[chosen])), labels[chosen], label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        if epoch % 10 == 9 or epoch == epochs - 1:
            model.eval()
            with torch.no_grad():
                accuracy = (model(held_out).argmax(1) == truth).float().mean().item()
            print(f"epoch {epoch + 1} loss {loss.item():.3f} held out {accuracy:.1%}", flush=True)
    config = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": PREPROCESSING}
    save_for_hf(model, str(output), model_config=config, model_args=MODEL_ARGS, safe_serialization=True)


def _part(part: digits.Part) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the normalised images, float32 [images, 1, height, width], and labels of one part."""
    pixels, labels = digits.images(part)
    values = torch.from_numpy(pixels).float().unsqueeze(1) / 255
    mean, std = PREPROCESSING["mean"], PREPROCESSING["std"]
    return (values - torch.tensor(mean)) / torch.tensor(std), torch.from_numpy(labels)


def _shifted(images: torch.Tensor) -> torch.Tensor:
    """Shift a batch by up to one pixel, to augment the thousand images."""
    down, right = torch.randint(-1, 2, (2,)).tolist()
    return torch.roll(images, (down, right), dims=(2, 3))


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--batch", type=int, default=64, help="images a step")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    train(arguments.output, arguments.epochs, arguments.batch, arguments.seed)


if __name__ == "__main__":
    main()
