"""Load a model, with the adapter that knows its architecture."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pruneforge.checkpoint.reader import Checkpoint, check_within
from pruneforge.checkpoint.skeleton import make_skeleton, missing_parameters
from pruneforge.engine.guard import named
from pruneforge.errors import PruneForgeError, unknown_name
from pruneforge.interfaces.adapter import Adapter, LoadedModel
from pruneforge.interfaces.registry import Registry
from pruneforge.runs.places import check_place, download, split_revision

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}

DEMO = "demo:"
"""Before the name of a demo, in place of a folder or hub id."""


def load_model(
    model: str | Path | nn.Module,
    dtype: str,
    processor: Any,
    registry: Registry,
    adapter_options: Mapping[str, Any] | None = None,
    on_disk: bool = False,
) -> LoadedModel:
    """Load a folder, hub id or file, or wrap a model that is already in memory.

    Args:
        model: What to load or wrap; `demo:NAME` is the checkpoint of a demo, and `OWNER/NAME@REVISION` a hub model at
            a branch, tag or commit.
        dtype: `auto` keeps the checkpoint's dtype, else a name of `DTYPES`.
        processor: Tokenizer or image transform of a model given from Python; `None` looks for the one it
            was loaded with.
        registry: The adapters to try.
        adapter_options: Options of the adapter that takes the model.
        on_disk: Whether weights stay on disk, where the adapter and the checkpoint allow it.

    Raises:
        PruneForgeError: No adapter takes the model; the message gives each one's reason.
    """
    target = parse_dtype(dtype)
    reference = type(model).__name__ if isinstance(model, nn.Module) else str(model)
    if not isinstance(model, nn.Module) and reference.startswith(DEMO):
        reference = str(registry.create("demo", reference.removeprefix(DEMO)).checkpoint())
    if not isinstance(model, nn.Module):
        check_place(reference)
        if Path(reference).is_dir():
            check_within(Path(reference))
    asked = reference
    repository, revision = split_revision(reference)
    if revision is not None and not isinstance(model, nn.Module):
        reference = str(download(repository, revision))
    reasons: dict[str, list[str]] = {}  # with the adapters that give each
    for entry in registry.entries("adapter"):
        try:
            adapter: Adapter = registry.create("adapter", entry.name)
        except PruneForgeError as error:
            reasons.setdefault(str(error), []).append(entry.name)
            continue
        declined = adapter.declines_module(model) if isinstance(model, nn.Module) else adapter.declines(reference)
        if declined is not None:
            reasons.setdefault(declined, []).append(entry.name)
            continue
        if adapter_options:
            adapter = registry.create("adapter", entry.name, adapter_options)
        if isinstance(model, nn.Module):
            _cast(model, target)
            return LoadedModel(model, adapter, processor or adapter.processor(model), reference)
        return replace(_load(adapter, reference, target, processor, on_disk), reference=asked)
    said = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items()) or "none is installed"
    if Path(reference).is_file():
        raise PruneForgeError(
            f"{reference!r} is a file, which no adapter takes; a model is a folder, a hub id or its own file ({said})"
        )
    raise PruneForgeError(f"no adapter takes {reference!r}: {said}")


def _load(adapter: Adapter, reference: str, dtype: torch.dtype | None, processor: Any, on_disk: bool) -> LoadedModel:
    note = None
    if on_disk:
        skeleton = adapter.skeleton(reference, dtype)
        note = f"adapter {adapter.name!r} cannot stream it, so the model was loaded whole"
        if skeleton is not None:
            checkpoint = Checkpoint(skeleton.folder, skeleton.prefix)
            missing = missing_parameters(skeleton.module, checkpoint)
            if not missing:
                make_skeleton(skeleton.module)
                return LoadedModel(skeleton.module, adapter, processor or skeleton.processor, reference, checkpoint)
            note = f"the checkpoint has no tensor {missing[0]!r}, so the model was loaded whole"
    module, own_processor = adapter.load(reference, dtype)
    who = f"adapter {adapter.name!r}"
    remarks = named(who, "on what it has to say of a checkpoint", lambda: list(adapter.remarks(reference)))
    return LoadedModel(module, adapter, processor or own_processor, reference, None, note, remarks)


def parse_dtype(name: str) -> torch.dtype | None:
    """Return the dtype of a name, or `None` for `auto`.

    Raises:
        PruneForgeError: The name is not a dtype that weights can have here.
    """
    if name != "auto" and name not in DTYPES:
        raise unknown_name("dtype", name, ["auto", *DTYPES])
    return DTYPES.get(name)


def parse_device(name: str) -> torch.device:
    """Return the device of a name; `auto` is CUDA where there is one.

    Raises:
        PruneForgeError: The name is not a device, or torch does not see the device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # one device for each process that torchrun started
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", name):
        raise PruneForgeError(f"device {name!r} is not one of auto, cpu, cuda, cuda:N")
    device = torch.device(name)
    if device.type == "cpu":
        return device
    if (device.index or 0) >= torch.cuda.device_count():
        raise PruneForgeError(
            f"there is no device {name!r}: torch sees {torch.cuda.device_count()} CUDA devices; use `device` cpu"
        )
    # With its index, as the tensors on it will have it; asking for the current one also initialises CUDA.
    current = torch.cuda.current_device()
    return torch.device("cuda", current if device.index is None else device.index)


@contextmanager
def in_evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Hold a model in evaluation mode within the context; each part then returns to its own mode."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _cast(module: nn.Module, dtype: torch.dtype | None) -> None:
    # Parameters alone, as loading in that dtype does: buffers such as rotary frequencies keep their precision.
    for parameter in module.parameters():
        if dtype is not None and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
