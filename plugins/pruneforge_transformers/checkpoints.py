"""Load and save checkpoints of the transformers library, for the adapters of its models."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pruneforge import Checkpoint, PruneForgeError
from pruneforge_transformers.gguf_files import (
    config_of_gguf,
    forget_quantization,
    is_gguf,
    source,
    unpacked,
    what_lies_in,
)

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def skeleton_from_config(reference: str, auto: str) -> nn.Module:
    """Return a model without weights, on the meta device, built from its configuration.

    Args:
        reference: A folder, hub id or GGUF file.
        auto: Name of the transformers class that builds it, such as `AutoModelForCausalLM`.

    Raises:
        PruneForgeError: There is no configuration, it is of another kind of model, or the checkpoint is quantised.
    """
    import transformers

    config = config_of(reference)
    try:
        with torch.device("meta"):
            model = getattr(transformers, auto).from_config(config, trust_remote_code=False)
    except Exception as error:  # each architecture fails in its own way on a bad configuration
        raise PruneForgeError(first_line(error)) from error
    if getattr(config, "quantization_config", None) is not None:
        raise PruneForgeError("the checkpoint is quantised; prune the original and quantise afterwards")
    return model


def config_of(reference: str) -> Any:
    """Return the configuration of a folder, hub id or GGUF file.

    Raises:
        PruneForgeError: There is none that can be read.
    """
    import transformers

    folder = Path(reference)
    if folder.is_file() and not is_gguf(reference):
        raise PruneForgeError("the file is not GGUF")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise PruneForgeError(f"the folder has no config.json{what_lies_in(folder)}")
    try:
        if is_gguf(reference):
            return config_of_gguf(reference)
        return transformers.AutoConfig.from_pretrained(reference, trust_remote_code=False)
    except Exception as error:  # hub, network and configurations raise many kinds of errors
        raise PruneForgeError(first_line(error)) from error


def load_pretrained(reference: str, auto: str, dtype: torch.dtype | None) -> Any:
    """Return the model with its weights on the CPU, in `dtype` or by default the checkpoint's.

    Raises:
        PruneForgeError: It cannot be loaded, or weights are missing.
    """
    import transformers

    more = unpacked() if is_gguf(reference) else {}
    try:
        with _without_bars(), source(reference) as arguments:
            model, info = getattr(transformers, auto).from_pretrained(
                **arguments, **more, dtype=dtype or "auto", output_loading_info=True, trust_remote_code=False
            )
    except Exception as error:  # hub, file formats and configurations raise many kinds of errors
        raise PruneForgeError(f"model {reference!r} cannot be loaded: {first_line(error)}") from error
    if is_gguf(reference):
        forget_quantization(model)
    missing = sorted(info["missing_keys"])
    if missing:
        raise PruneForgeError(
            f"model {reference!r} lacks {len(missing)} weights, such as {missing[0]!r}; the checkpoint is damaged"
        )
    return model.eval()


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep transformers' own bars off within the context; those of downloads stay."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    if not logging.is_progress_bar_enabled():
        yield
        return
    downloads = not are_progress_bars_disabled()
    logging.disable_progress_bar()  # and the Hub's with them
    if downloads:
        enable_progress_bars()
    try:
        yield
    finally:
        logging.enable_progress_bar()
        if not downloads:
            disable_progress_bars()


def skeleton_from_checkpoint(reference: str, auto: str, dtype: torch.dtype | None) -> tuple[nn.Module, Path] | None:
    """Return the model with its parameters on the meta device, and the folder of its safetensors files.

    Args:
        reference: A folder or hub id.
        auto: Name of the transformers class that builds it.
        dtype: Dtype of the parameters; by default the configuration's, or else that of the first weight.

    Returns:
        `None` if the checkpoint has no safetensors files.

    Raises:
        PruneForgeError: The checkpoint cannot be downloaded.
    """
    import transformers
    from accelerate import init_empty_weights

    folder = local_safetensors(reference)
    if folder is None:
        return None
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if dtype is None:
        stored = Checkpoint(folder).tensors.values()
        dtype = config.dtype or next(s.dtype for s in stored if s.dtype.is_floating_point)
    # Buffers stay real: rotary frequencies, for example, are computed here and not stored in checkpoints.
    with init_empty_weights(include_buffers=False):
        model = getattr(transformers, auto).from_config(config, dtype=dtype, trust_remote_code=False)
    model.tie_weights()
    return model.eval(), folder


def local_safetensors(reference: str) -> Path | None:
    """Return the folder of a model's safetensors files, downloaded if needed, or `None` if it has no such files.

    Raises:
        PruneForgeError: The model cannot be downloaded.
    """
    if is_gguf(reference):
        return None
    folder = Path(reference)
    if folder.is_dir():
        return folder if any((folder / name).is_file() for name in (SINGLE, INDEX)) else None
    from huggingface_hub import snapshot_download

    others = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.md"]
    try:
        weights = _weight_files(reference)
        if weights is None:
            return None
        return Path(snapshot_download(reference, allow_patterns=[*weights, *others], ignore_patterns=["*/*"]))
    except Exception as error:  # hub, network and cache raise many kinds of errors
        raise PruneForgeError(f"model {reference!r} cannot be downloaded: {first_line(error)}") from error


def _weight_files(reference: str) -> list[str] | None:
    """Return the names of a hub model's safetensors files, or `None`; without a network, from the cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    for name in (SINGLE, INDEX):
        try:
            path = Path(hf_hub_download(reference, name))
        except EntryNotFoundError:
            continue
        if name == SINGLE:
            return [SINGLE]
        return [INDEX, *sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))]
    return None


def save_pretrained(module: Any, processor: Any, folder: Path) -> None:
    """Write a model and its tokenizer or image processor, if there is one, for `from_pretrained`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, at most 200 characters, or its class name if it has no text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
