"""Vision transformers of the transformers library with a classification head: ViT, DeiT and others of their shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageNetInfo
from torch import Tensor, nn

from pruneforge import Batch, Block, Example, ImageClassifier, ImageProcessor, PruneForgeError, Skeleton, find_layers
from pruneforge_transformers.checkpoints import (
    first_line,
    load_pretrained,
    save_pretrained,
    skeleton_from_checkpoint,
    skeleton_from_config,
)

AUTO = "AutoModelForImageClassification"


class ViT(ImageClassifier):
    """transformers image classifiers whose encoder is one list of blocks of linear layers."""

    def declines(self, reference: str) -> str | None:
        """Build the model without weights from its configuration and check its shape."""
        try:
            return self.declines_module(skeleton_from_config(reference, AUTO))
        except PruneForgeError as error:
            return str(error)

    def declines_module(self, module: Any) -> str | None:
        """Check for one list of blocks whose weights all belong to linear layers."""
        if not hasattr(module, "config") or getattr(module, "main_input_name", None) != "pixel_values":
            return f"{type(module).__name__} is not a transformers image model"
        if not hasattr(module, "classifier") and not hasattr(module, "cls_classifier"):
            return f"{type(module).__name__} has no classification head"
        blocks = self.blocks(module)
        if not blocks:
            return f"{type(module).__name__} has no list of blocks"
        for block in blocks:
            inside = {id(layer.parameter) for layer in block.layers}
            for name, parameter in block.module.named_parameters():
                if parameter.dim() > 1 and id(parameter) not in inside:
                    return (
                        f"block {block.name} has a weight {name} {list(parameter.shape)} that is not in a linear layer"
                    )
        return None

    def load(self, reference: str, dtype: torch.dtype | None) -> tuple[nn.Module, Any]:
        """Load the model and its image processor."""
        model = load_pretrained(reference, AUTO, dtype)
        return model, _processor(reference, model.config)

    def skeleton(self, reference: str, dtype: torch.dtype | None) -> Skeleton | None:
        """Build the model without weights from its configuration."""
        built = skeleton_from_checkpoint(reference, AUTO, dtype)
        if built is None:
            return None
        model: Any = built[0]
        return Skeleton(model, _processor(reference, model.config), built[1])

    def save(self, module: Any, processor: Any, folder: Path) -> None:
        """Write the layout that `AutoModelForImageClassification.from_pretrained` loads."""
        save_pretrained(module, processor.native if isinstance(processor, ImageProcessor) else None, folder)

    def blocks(self, module: nn.Module) -> list[Block]:
        """Return the items of the first `ModuleList`."""
        for name, part in module.named_modules():
            if isinstance(part, nn.ModuleList) and len(part):
                named = [(f"{name}.{key}", block) for key, block in part.named_children()]
                return [Block(full, block, tuple(find_layers(block, full))) for full, block in named]
        return []

    def forward(self, module: nn.Module, batch: Batch) -> Any:
        """Run the model."""
        return module(pixel_values=batch.inputs["pixel_values"])

    def classes(self, module: Any) -> int:
        """Return the size of the head."""
        return int(module.config.num_labels)

    def logits(self, output: Any) -> Tensor:
        """Return the logits of the output."""
        return output.logits

    def check_images(self, pixels: Tensor, module: Any) -> None:
        """Compare with the image size in the configuration."""
        side, channels = module.config.image_size, module.config.num_channels
        expected = (channels, side, side) if isinstance(side, int) else (channels, *side)
        if tuple(pixels.shape[1:]) != expected:
            raise PruneForgeError(
                f"a batch's images are {'x'.join(str(n) for n in pixels.shape[1:])}, "
                f"and the model takes {'x'.join(str(n) for n in expected)}"
            )

    def tokens(self, pixels: Tensor, module: Any) -> tuple[int, int]:
        """Return the number of class, distillation and register tokens, and that number plus the patches."""
        config = module.config
        distilled = any(name.endswith("distillation_token") for name, _ in module.named_parameters())
        prefix = 1 + distilled + getattr(config, "num_register_tokens", 0)
        patch = config.patch_size
        return prefix, prefix + (pixels.shape[2] // patch) * (pixels.shape[3] // patch)

    def examples(self) -> Sequence[Example]:
        """Return a ViT, and a DeiT, which has two prefix tokens."""
        from pruneforge_vit.examples import examples

        return examples()


def _processor(reference: str, config: Any) -> ImageProcessor:
    """Load the checkpoint's image processor."""
    import transformers

    try:
        native = transformers.AutoImageProcessor.from_pretrained(reference, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise PruneForgeError(f"model {reference!r} has no image processor: {first_line(error)}") from error
    return image_processor(native, config)


def image_processor(native: Any, config: Any) -> ImageProcessor:
    """Return the processor of transformers with what the model's configuration says of its classes."""
    mode = "L" if config.num_channels == 1 else "RGB"
    resized, cropped = (_side(getattr(native, name, None)) for name in ("size", "crop_size"))
    crops = bool(getattr(native, "do_center_crop", False)) and cropped is not None
    size = cropped if crops else resized
    crop = min(1.0, cropped[0] / resized[0]) if crops and cropped and resized else 1.0
    return ImageProcessor(
        _Transform(native), mode, config.num_labels, *_class_names(config), native, image_size=size, crop=crop
    )


def _side(size: Any) -> tuple[int, int] | None:
    """Return height and width of a size as transformers writes it; of a shortest edge, a square."""
    known = dict(size or {})
    edge = known.get("shortest_edge")
    height, width = known.get("height", edge), known.get("width", edge)
    return (int(height), int(width)) if height and width else None


def _class_names(config: Any) -> tuple[list[str], list[list[str]]]:
    """Return the configuration's class names, for an ImageNet head WordNet ids, and other names of the classes."""
    names = [config.id2label[index] for index in range(config.num_labels)]
    info = ImageNetInfo()
    described = list(info.label_descriptions())
    if len(names) != len(described):
        return names, []
    # Some spell a class otherwise. None has the name of another class: its head would be in another order.
    agree = sum(name == known for name, known in zip(names, described, strict=True))
    others = sum(name in described for name in names) - agree
    return (info.label_names(), [names, described]) if agree > len(names) // 2 and not others else (names, [])


@dataclass(frozen=True)
class _Transform:
    """Preprocesses one image. A class, not a closure, so that worker processes can unpickle it."""

    native: Any

    def __call__(self, image: Any) -> Tensor:
        return self.native(images=image, return_tensors="pt")["pixel_values"][0]
