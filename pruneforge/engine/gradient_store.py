"""Keep gradient statistics until their block is pruned: in memory, or in files that later runs reuse."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from pruneforge.checkpoint.durable import write_tensors, writing
from pruneforge.checkpoint.tensors import read_header, read_tensor
from pruneforge.errors import PruneForgeError, UnfinishedError
from pruneforge.interfaces.adapter import Block
from pruneforge.interfaces.statistics import GradientStatistic
from pruneforge.numerics import accumulation_dtype

Kind = type[GradientStatistic]
BlockGradients = dict[str, dict[Kind, GradientStatistic]]
"""Gradient statistics of a block's layers, by layer name and class."""

FOLDER = "folder of gradient statistics"
"""What error messages call the folder."""

HOST = torch.device("cpu")


class GradientStore(Protocol):
    """Keeps the statistics of each block from the gradient sweep until the block is pruned.

    Attributes:
        shared: Whether all processes of a run use the same store, so that only the first one writes.
    """

    shared: bool

    def missing(self, block: Block, kinds: Sequence[Kind]) -> list[Kind]:
        """Return the kinds that the store lacks for some layer of the block."""

    def put(self, block: Block, statistics: BlockGradients) -> None:
        """Store the statistics of a block."""

    def get(self, block: Block, kinds: Sequence[Kind], device: torch.device) -> BlockGradients:
        """Return the statistics of a block with their sums on `device`."""


class InMemoryGradientStore:
    """Keeps statistics in host memory."""

    shared = False

    def __init__(self) -> None:
        self._statistics: BlockGradients = {}

    def missing(self, block: Block, kinds: Sequence[Kind]) -> list[Kind]:
        """Return the kinds that the store lacks for some layer of the block."""
        known = [self._statistics.get(layer.name, {}) for layer in block.layers]
        return [kind for kind in kinds if not all(kind in of_layer for of_layer in known)]

    def put(self, block: Block, statistics: BlockGradients) -> None:
        """Store the statistics of a block, whose sums are moved to the CPU."""
        for of_layer in statistics.values():
            for statistic in of_layer.values():
                statistic.to(HOST)
        self._statistics.update(statistics)

    def get(self, block: Block, kinds: Sequence[Kind], device: torch.device) -> BlockGradients:
        """Return the statistics of a block with their sums on `device`."""
        return {
            layer.name: {kind: _on(self._statistics[layer.name][kind], layer.shape, device) for kind in kinds}
            for layer in block.layers
        }


class FileGradientStore:
    """Keeps statistics on disk: one folder for each model, data and loss, one file for each layer and kind.

    Attributes:
        folder: The folder.
        reused: Number of statistics that an earlier run had written.
        written: Number of bytes that this run has written.
    """

    shared = True

    def __init__(self, gradient_folder: Path, identity: Mapping[str, Any]) -> None:
        """Choose the folder; it is created by the first `put`.

        Args:
            gradient_folder: Holds a folder for each identity.
            identity: Everything the gradients depend on; JSON-serialisable.
        """
        text = json.dumps(identity, sort_keys=True)
        self.folder = gradient_folder / hashlib.sha256(text.encode()).hexdigest()[:32]
        self._identity = text
        self.reused = 0
        self.written = 0

    def missing(self, block: Block, kinds: Sequence[Kind]) -> list[Kind]:
        """Return the kinds that the store lacks for some layer of the block; the others count as reused."""
        missing = [kind for kind in kinds if not all(self._path(la.name, kind).is_file() for la in block.layers)]
        self.reused += (len(kinds) - len(missing)) * len(block.layers)
        return missing

    def put(self, block: Block, statistics: BlockGradients) -> None:
        """Write the statistics of a block, each file completely or not at all.

        Raises:
            UnfinishedError: The folder cannot be written.
        """
        with writing(self.folder, FOLDER):
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "identity.json").write_text(self._identity + "\n", encoding="utf-8")
        for name, of_layer in statistics.items():
            for kind, statistic in of_layer.items():
                state = statistic.state_dict()
                tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
                others = {key: value for key, value in state.items() if key not in tensors}
                write_tensors(self._path(name, kind), tensors, {"state": json.dumps(others)}, FOLDER)
                self.written += sum(tensor.nbytes for tensor in tensors.values())

    def get(self, block: Block, kinds: Sequence[Kind], device: torch.device) -> BlockGradients:
        """Read the statistics of a block, with their sums on `device`.

        Raises:
            UnfinishedError: A file cannot be read.
            PruneForgeError: A file belongs to another model.
        """
        return {
            layer.name: {kind: self._read(layer.name, layer.shape, kind, device) for kind in kinds}
            for layer in block.layers
        }

    def _read(self, name: str, shape: tuple[int, int], kind: Kind, device: torch.device) -> GradientStatistic:
        path = self._path(name, kind)
        try:
            with open(path, "rb") as file:
                described = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            state = json.loads(described["__metadata__"]["state"])
        except (OSError, ValueError, KeyError) as error:
            raise UnfinishedError(
                f"gradient statistics {str(path)!r} cannot be read; delete that folder, and go on with `resume`"
            ) from error
        tensors = {location.name: read_tensor(path, location) for location in read_header(path)}
        statistic = kind((0, 0), torch.float32, HOST)  # empty: `load_state_dict` replaces the sums
        statistic.load_state_dict({**state, **tensors})
        if tuple(statistic.total.shape) != shape:
            raise PruneForgeError(f"gradient statistics {str(path)!r} belong to another model; delete that folder")
        statistic.to(device)
        return statistic

    def _path(self, name: str, kind: Kind) -> Path:
        readable = re.sub(r"[^\w.=,()-]", "", kind.__qualname__)[:80]
        return self.folder / f"{name}.{readable}-{_source(kind)}.safetensors"


@cache
def _source(kind: Kind) -> str:
    """Return a hash of what defines a statistic, so that files of another definition are not reused.

    That is the files of its class and of those it inherits from, its parameters, and the values that a class made by a
    function has from there: an option, say.
    """
    digest = hashlib.sha256(f"{kind.__module__}{kind.__qualname__}{sorted(kind.parameters.items())}".encode())
    for file in sorted({_file(cls) for cls in kind.__mro__ if cls.__module__ not in ("abc", "builtins")}):
        digest.update(Path(file).read_bytes() if file else b"")
    digest.update(repr(_values(kind)).encode())
    return digest.hexdigest()[:12]


def _file(cls: type) -> str:
    """Return the file that a class is in; an empty text for one that was typed at a prompt."""
    return getattr(sys.modules.get(cls.__module__), "__file__", None) or ""


def _values(kind: Kind) -> list[tuple[str, str]]:
    """Return the plain values among a class's attributes, and those that its functions refer to outside of them."""
    values: list[tuple[str, str]] = []
    for cls in kind.__mro__:
        if "<locals>" not in cls.__qualname__:
            continue
        for name, value in sorted(vars(cls).items()):
            if inspect.isfunction(value):
                outside = inspect.getclosurevars(value).nonlocals
                values += [(f"{name}.{inner}", repr(held)) for inner, held in sorted(outside.items()) if _plain(held)]
            elif _plain(value) and not name.startswith("__"):
                values.append((name, repr(value)))
    return values


def _plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool | tuple | dict | frozenset | None)


def cache_folder() -> Path:
    """Return the default gradient folder: `$PRUNEFORGE_CACHE`, or one in the user's cache."""
    root = os.environ.get("PRUNEFORGE_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() if root else Path(home).expanduser() / "pruneforge" / "gradients"


def _on(statistic: GradientStatistic, shape: tuple[int, int], device: torch.device) -> GradientStatistic:
    """Return a statistic with its sums on `device`."""
    if statistic.total.device == device:
        return statistic
    # A copy, so that the store's own stays in host memory.
    copy = type(statistic)(shape, accumulation_dtype(statistic.total.dtype), device)
    copy.load_state_dict({**statistic.state_dict(), "total": statistic.total.to(device)})
    return copy
