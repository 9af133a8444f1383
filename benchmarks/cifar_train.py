"""Train the small vision transformer that `benchmarks/cifar.py` prunes.

    python benchmarks/cifar_train.py --data cifar10.zip --output runs/cifar-vit

The archive holds `train/CLASS/*.jpg` and `test/CLASS/*.jpg`. The checkpoint is written in timm's layout.
"""

from __future__ import annotations

import argparse
import io
import time
import zipfile
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from timm.models import save_for_hf
from torch.nn import functional as F

SIZE = 32
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
"""Names of CIFAR-10's classes, in the order of the head."""

MODEL_ARGS = {
    "img_size": SIZE,
    "patch_size": 4,
    "num_classes": 10,
    "embed_dim": 128,
    "depth": 6,
    "num_heads": 4,
}
PREPROCESSING = {
    "input_size": [3, SIZE, SIZE],
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "mean": [0.4914, 0.4822, 0.4465],
    "std": [0.2470, 0.2435, 0.2616],
    "num_classes": 10,
}


def read(archive: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return normalised images [n, 3, 32, 32] float32 and labels [n], classes in alphabetical order."""
    pixels, labels = [], []
    with zipfile.ZipFile(archive) as file:
        names = sorted(name for name in file.namelist() if f"/{split}/" in name and name.endswith(".jpg"))
        for name in names:
            with Image.open(io.BytesIO(file.read(name))) as image:
                pixels.append(np.asarray(image.convert("RGB")))
            labels.append(CLASSES.index(name.split("/")[-2]))
    values = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(PREPROCESSING[key])[:, None, None] for key in ("mean", "std"))
    return (values - mean) / std, torch.tensor(labels)


def augment(images: torch.Tensor) -> torch.Tensor:
    """Mirror each image with probability a half, and shift it by up to four pixels."""
    flip = torch.rand(len(images)) < 0.5
    images = torch.where(flip[:, None, None, None], images.flip(3), images)
    padded = F.pad(images, (4, 4, 4, 4))
    down, right = (torch.randint(0, 9, (len(images), 1, 1, 1)) for _ in range(2))
    rows = (torch.arange(SIZE)[None, None, :, None] + down).expand(-1, 3, -1, SIZE + 8)
    columns = (torch.arange(SIZE)[None, None, None, :] + right).expand(-1, 3, SIZE, -1)
    return padded.gather(2, rows).gather(3, columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="zip of CIFAR-10 as an image folder")
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    images, labels = read(arguments.data, "train")
    test, truth = read(arguments.data, "test")
    model = timm.create_model("vit_tiny_patch16_224", **MODEL_ARGS, drop_path_rate=0.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    steps = arguments.epochs * -(-len(images) // arguments.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.15)
    start = time.perf_counter()
    for epoch in range(arguments.epochs):
        model.train()
        for chosen in torch.randperm(len(images)).split(arguments.batch):
            loss = F.cross_entropy(model(augment(images[chosen])), labels[chosen], label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        model.eval()
        with torch.no_grad():
            right = sum(
                (model(x).argmax(1) == y).sum().item() for x, y in zip(test.split(500), truth.split(500), strict=True)
            )
        seconds = time.perf_counter() - start
        print(f"epoch {epoch + 1} loss {loss.item():.3f} test {right / len(truth):.1%} {seconds:.0f} s", flush=True)
    config = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": PREPROCESSING, "label_names": CLASSES}
    save_for_hf(model, arguments.output, model_config=config, model_args=MODEL_ARGS, safe_serialization=True)


if __name__ == "__main__":
    main()
