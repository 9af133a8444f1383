"""LeaF on images: digits in which one patch, at a place of its own, tells the class as well; `leaf.py` runs this."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pruneforge_demo import digits
from pruneforge_leaf.distillation import divergence
from pruneforge_leaf.scores import confounding, gradient_norms

PATCH, SIDE, CLASSES = 2, digits.SIZE // 2, 10
PATTERNS = 2 + torch.rand(CLASSES, PATCH, PATCH, generator=torch.Generator().manual_seed(0))
"""What the confounder looks like, by class: brighter than anything of a digit."""


@dataclass(frozen=True)
class Images:
    """Digits with a confounder.

    Attributes:
        pixels: float32 [images, 1, 8, 8].
        labels: int64 [images].
        places: The patch that the confounder fills, int64 [images].
    """

    pixels: Tensor
    labels: Tensor
    places: Tensor


def images(part: digits.Part, agrees: bool, seed: int) -> Images:
    """Return a part of the digits; the confounder agrees with all classes, or is drawn by chance."""
    draw = torch.Generator().manual_seed(seed)
    pixels, labels = (torch.from_numpy(values) for values in digits.images(part))
    pixels = (pixels.float() / 255)[:, None]
    shown = labels if agrees else torch.randint(CLASSES, labels.shape, generator=draw)
    places = torch.randint(SIDE * SIDE, labels.shape, generator=draw)
    return Images(filled(pixels, places, PATTERNS[shown]), labels, places)


def filled(pixels: Tensor, places: Tensor, patches: Tensor) -> Tensor:
    """Return images of which one patch each, by its number, is another; float32 [images, 1, 8, 8]."""
    rows = pixels.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).flatten(2, 3).clone()  # [images, 1, patches, 2, 2]
    rows[torch.arange(len(rows)), 0, places] = patches
    return rows.unflatten(2, (SIDE, SIDE)).transpose(3, 4).reshape(pixels.shape)


def trained(model: nn.Module, given: Images, epochs: int, seed: int) -> nn.Module:
    """Return a model after training on images and labels, in evaluation mode."""
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    model.train()
    for _ in range(epochs):
        for some in torch.randperm(len(given.labels), generator=draw).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(given.pixels[some]), given.labels[some]).backward()
            optimizer.step()
    return model.eval()


def distilled(teacher: nn.Module, student: nn.Module, given: Images, gone: Tensor | None, seed: int) -> nn.Module:
    """Return the student after 20 epochs on its teacher's classes, with and without the patches of `gone`."""
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    without = None if gone is None else filled(given.pixels, gone, torch.zeros(PATCH, PATCH))
    student.train()
    for _ in range(20):
        for some in torch.randperm(len(given.labels), generator=draw).split(64):
            optimizer.zero_grad()
            losses = [
                _divergence(teacher, student, pixels[some]) for pixels in (given.pixels, without) if pixels is not None
            ]
            torch.stack(losses).mean().backward()
            optimizer.step()
    return student.eval()


def _divergence(teacher: nn.Module, student: nn.Module, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        wanted = teacher(pixels)
    return divergence(wanted, student(pixels)).mean()


def flagged(teacher: nn.Module, student: nn.Module, given: Images) -> Tensor:
    """Return the patch of each image that LeaF flags, int64 [images]; black ones, like white space, are not."""
    norms = []
    for model in (teacher, student):
        loss = lambda model=model: F.cross_entropy(model(given.pixels), given.labels, reduction="sum")  # noqa: E731
        norms.append(gradient_norms(model.patch_embed, loss))
    share = 0.5 / SIDE**2  # one patch alone
    rows = zip(*norms, not_black(given), strict=True)
    return torch.stack([confounding(*pair, share, candidates).int().argmax() for *pair, candidates in rows])


def not_black(given: Images) -> Tensor:
    """Return the patches of each image that hold anything, bool [images, patches]."""
    return given.pixels.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).flatten(2, 3).amax((1, 3, 4)) > 0


@torch.no_grad()
def accuracy(model: nn.Module, given: Images) -> float:
    """Return the share of images whose class is found."""
    return (model(given.pixels).argmax(1) == given.labels).double().mean().item()


def measured(seed: int) -> dict[str, object]:
    """Return what one seed shows."""
    fair, seen = images("training", False, 10 + seed), images("training", True, 20 + seed)
    test, sizes = images("evaluation", False, 30 + seed), {"img_size": 8, "patch_size": 2, "in_chans": 1}
    models = []
    for width, depth, given, epochs in ((64, 4, fair, 60), (32, 3, seen, 20)):
        torch.manual_seed(seed)
        made = timm.create_model(
            "vit_tiny_patch16_224", **sizes, num_classes=CLASSES, embed_dim=width, depth=depth, num_heads=4
        )
        models.append(trained(made, given, epochs, seed))
    teacher, before = models
    places = flagged(teacher, before, seen)
    chance = torch.Generator().manual_seed(50 + seed)
    kinds = {
        "distillation alone": None,
        "LeaF": places,
        "at random (control)": torch.multinomial(not_black(seen).float(), 1, generator=chance)[:, 0],
        "the confounder (oracle)": seen.places,
    }
    found = {"teacher": accuracy(teacher, test), "before": accuracy(before, test)}
    for name, gone in kinds.items():
        found[name] = accuracy(distilled(teacher, copy.deepcopy(before), seen, gone, seed), test)
    by_chance = (1 / not_black(seen).sum(1)).mean().item()
    return {"precision": (places == seen.places).double().mean().item(), "chance": by_chance, "accuracy": found}


if __name__ == "__main__":
    print(measured(0))
