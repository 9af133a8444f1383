"""Checkpoints of transformers: what adapters of its models share in loading and saving them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pruneforge.errors import PruneForgeError


def skeleton(reference: str, auto: str) -> nn.Module:
    """Return a model without weights, on the meta device, built from its configuration.

    Args:
        reference: A folder or hub id.
        auto: Name of the transformers class that builds it, such as `AutoModelForCausalLM`.

    Raises:
        PruneForgeError: There is no such configuration, it is of another kind, or the checkpoint is quantised.
    """
    import transformers

    folder = Path(reference)
    if folder.exists() and not (folder / "config.json").is_file():
        raise PruneForgeError("the folder has no config.json")
    try:
        config = transformers.AutoConfig.from_pretrained(reference, trust_remote_code=False)
        with torch.device("meta"):
            model = getattr(transformers, auto).from_config(config, trust_remote_code=False)
    except Exception as error:  # configurations fail in as many ways as there are architectures
        raise PruneForgeError(first_line(error)) from error
    if getattr(config, "quantization_config", None) is not None:
        raise PruneForgeError("the checkpoint is quantised; prune the original and quantise afterwards")
    return model


def load_pretrained(reference: str, auto: str, dtype: torch.dtype | None) -> Any:
    """Return the model with its weights, on the CPU, in the checkpoint's dtype unless another is asked for.

    Raises:
        PruneForgeError: It cannot be loaded, or weights are missing.
    """
    import transformers

    try:
        model, info = getattr(transformers, auto).from_pretrained(
            reference, dtype=dtype or "auto", output_loading_info=True, trust_remote_code=False
        )
    except Exception as error:  # hub, file formats and configurations each raise their own
        raise PruneForgeError(f"model {reference!r} cannot be loaded: {first_line(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise PruneForgeError(
            f"model {reference!r} lacks {len(missing)} weights, such as {missing[0]!r}; the checkpoint is damaged"
        )
    return model.eval()


def save_pretrained(module: Any, processor: Any, folder: Path) -> None:
    """Write a model and its tokenizer or image processor, if there is one, as `from_pretrained` loads them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, shortened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
