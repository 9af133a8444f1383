"""Image classifiers of timm (Wightman, 2019) that consist of repeated blocks.

In timm the repeated part of a model is called `blocks`, once (ViT, DeiT, BEiT, EVA, Mixer) or in each stage (Swin,
ConvNeXt). A block's layers are its linear modules and 1x1 convolutions: `qkv`, `proj`, `fc1`, `fc2` in a ViT.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from pruneforge import Batch, Block, Example, ImageClassifier, ImageProcessor, PruneForgeError, Skeleton, find_layers

PREFIX = "timm:"
"""Prefix of the name of a pretrained model; `hf-hub:` is the prefix of a repository, as in timm itself."""

POSITIONAL = ("cpb_mlp", "meta_mlp", "rel_pos")
"""Small networks within a block that compute position biases. They receive coordinates, not tokens."""


class Timm(ImageClassifier):
    """timm models whose blocks hold linear modules or 1x1 convolutions."""

    def declines(self, reference: str) -> str | None:
        """Build the model without weights and check its blocks."""
        try:
            with torch.device("meta"):
                return self.declines_module(_create(reference, pretrained=False))
        except Exception as error:  # each architecture fails in its own way on a bad configuration
            return " ".join(str(error).split())[:200] or type(error).__name__

    def declines_module(self, module: Any) -> str | None:
        """Check for lists called `blocks`, of blocks that have layers and no batch normalisation."""
        if not hasattr(module, "pretrained_cfg") or not hasattr(module, "num_classes"):
            return f"{type(module).__name__} is not a timm model"
        if module.num_classes == 0:
            return f"{type(module).__name__} has no classifier head"
        blocks = self.blocks(module)
        if not blocks:
            return f"{type(module).__name__} has no blocks"
        for block in blocks:
            if any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in block.module.modules()):
                return f"block {block.name} ({type(block.module).__name__}) has batch normalisation"
            if not block.layers:
                return f"block {block.name} ({type(block.module).__name__}) has no linear layer"
        return None

    def load(self, reference: str, dtype: torch.dtype | None) -> tuple[nn.Module, Any]:
        """Load with timm: `timm:NAME`, `hf-hub:OWNER/NAME`, or a folder in timm's layout."""
        try:
            model = _create(reference, pretrained=True)
        except PruneForgeError:
            raise
        except Exception as error:  # hub, file formats and mismatched weights raise many kinds of errors
            raise PruneForgeError(
                f"model {reference!r} cannot be loaded: {' '.join(str(error).split())[:300]}"
            ) from error
        _check_shapes(model, Path(reference))
        model = model.eval()
        return (model if dtype is None else model.to(dtype)), self.processor(model)

    def skeleton(self, reference: str, dtype: torch.dtype | None) -> Skeleton | None:
        """Build the model of a local folder without its weights; float32 by default, as timm loads it."""
        from accelerate import init_empty_weights

        folder = Path(reference)
        if not (folder / "model.safetensors").is_file():
            return None
        with init_empty_weights(include_buffers=False):
            model = _create(reference, pretrained=False)
        part: Any
        for part in model.modules():
            on_meta = [name for name, value in part._buffers.items() if value is not None and value.is_meta]
            # timm's own way to compute buffers after a model was created on the meta device.
            if on_meta and hasattr(part, "init_non_persistent_buffers"):
                for name in on_meta:
                    part._buffers[name] = torch.empty_like(part._buffers[name], device="cpu")
                part.init_non_persistent_buffers()
        if any(value.is_meta for value in model.buffers()):  # a skeleton needs real buffers
            return None
        model = model.eval() if dtype is None else model.eval().to(dtype)
        return Skeleton(model, self.processor(model), folder)

    def processor(self, module: Any) -> ImageProcessor:
        """Return the checkpoint's own evaluation preprocessing."""
        import timm.data
        from timm.data.model_config import resolve_input_data_config

        config = resolve_input_data_config(module)
        transform = timm.data.create_transform(**config, is_training=False)
        mode = "L" if config["input_size"][0] == 1 else "RGB"
        size = tuple(config["input_size"][1:])
        names, aliases = _class_names(module)
        return ImageProcessor(
            transform, mode, module.num_classes, names, aliases, image_size=size, crop=config["crop_pct"]
        )

    def save(self, module: Any, processor: Any, folder: Path) -> None:
        """Write timm's layout: `config.json` and `model.safetensors`."""
        from timm.models import save_for_hf

        save_for_hf(module, str(folder), safe_serialization=True)

    def blocks(self, module: nn.Module) -> list[Block]:
        """Return the items of every outermost list called `blocks`, in the order in which they run."""
        blocks: list[Block] = []
        for name, part in module.named_modules():
            inside = any(name.startswith(f"{block.name}.") for block in blocks)
            is_list = isinstance(part, nn.Sequential | nn.ModuleList) and name.rpartition(".")[2] == "blocks"
            if is_list and not inside:
                for key, block in part.named_children():
                    full = f"{name}.{key}"
                    layers = [la for la in find_layers(block, full) if not any(p in la.name for p in POSITIONAL)]
                    blocks.append(Block(full, block, tuple(layers)))
        return blocks

    def forward(self, module: nn.Module, batch: Batch) -> Any:
        """Run the model."""
        return module(batch.inputs["pixel_values"])

    def classes(self, module: Any) -> int:
        """Return the size of the head."""
        return int(module.num_classes)

    def logits(self, output: Any) -> Tensor:
        """Return the output, or the first of several (distilled models in training mode return two)."""
        return output if isinstance(output, Tensor) else output[0]

    def check_images(self, pixels: Tensor, module: Any) -> None:
        """Compare with the size of the patch embedding, or check that patches divide the image."""
        embed: Any = getattr(module, "patch_embed", None) or getattr(module, "stem", None)
        first = module.pretrained_cfg.get("first_conv")
        channels = module.get_submodule(first).in_channels if isinstance(first, str) else pixels.shape[1]
        size: Any = getattr(embed, "img_size", None)
        patch: Any = getattr(embed, "patch_size", None)
        if pixels.shape[1] != channels:
            raise PruneForgeError(f"a batch's images have {pixels.shape[1]} channels, and the model takes {channels}")
        height, width = pixels.shape[2:]
        if size is not None and getattr(embed, "strict_img_size", True) and (height, width) != tuple(size):
            raise PruneForgeError(f"a batch's images are {height}x{width}, and the model takes {size[0]}x{size[1]}")
        padded = getattr(embed, "dynamic_img_pad", False) or patch is None
        if not padded and (height % patch[0] or width % patch[1]):
            raise PruneForgeError(
                f"a batch's images are {height}x{width}, which patches of {patch[0]}x{patch[1]} do not divide"
            )

    def tokens(self, pixels: Tensor, module: Any) -> tuple[int, int]:
        """Return the number of class, distillation and register tokens, and that number plus the patches."""
        prefix = int(getattr(module, "num_prefix_tokens", 0))
        if not prefix:
            return 0, 0
        patch = module.patch_embed.patch_size
        return prefix, prefix + (pixels.shape[2] // patch[0]) * (pixels.shape[3] // patch[1])

    def examples(self) -> Sequence[Example]:
        """Return a DeiT, which has two prefix tokens, windows, and stages of 1x1 convolutions."""
        from pruneforge_timm.examples import examples

        return examples(self)


def _create(reference: str, pretrained: bool) -> nn.Module:
    """Create a model by timm's name, hub name or folder.

    Raises:
        PruneForgeError: The reference is not one that timm knows.
    """
    import timm

    folder = Path(reference)
    if folder.is_dir():
        config = folder / "config.json"
        if not config.is_file() or '"architecture"' not in config.read_text(encoding="utf-8"):
            raise PruneForgeError("the folder has no config.json that names a timm architecture")
        name = f"local-dir:{reference}"
    elif reference.startswith((PREFIX, "hf-hub:")):
        name = reference.removeprefix(PREFIX)
    else:
        raise PruneForgeError(f"it is not a folder and does not begin with {PREFIX} or hf-hub:")
    try:
        return timm.create_model(name, pretrained=pretrained)
    except RuntimeError as error:
        if "Unknown model" in str(error) or "Invalid pretrained tag" in str(error):
            raise PruneForgeError(f"timm has no model {name!r}; timm.list_models() lists them") from error
        raise


def _check_shapes(model: nn.Module, folder: Path) -> None:
    """Raise if weights of a local checkpoint differ from the model in shape.

    timm would silently load the model without such a head.
    """
    file = folder / "model.safetensors"
    if not file.is_file():
        return
    with safe_open(file, "pt") as weights:
        stored = {name: list(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    for name, value in model.state_dict().items():
        if stored.get(name, list(value.shape)) != list(value.shape):
            raise PruneForgeError(
                f"model {str(folder)!r}: {name} is {stored[name]} in the weights and {list(value.shape)} by config.json"
            )


def _class_names(module: Any) -> tuple[list[str] | None, list[list[str]]]:
    """Return the configuration's class names, or an ImageNet head's WordNet ids, and other names of the classes."""
    import timm.data

    names = module.pretrained_cfg.get("label_names")
    if names:
        return list(names), []
    subset = timm.data.infer_imagenet_subset(module)
    if not subset:
        return None, []
    info = timm.data.ImageNetInfo(subset)
    return info.label_names(), [list(info.label_descriptions())]
