"""Where gradient statistics wait for their block: in memory, or in files that later runs find again."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from pruneforge.checkpoint.durable import write_tensors, writing
from pruneforge.checkpoint.shards import read_header, read_tensor
from pruneforge.errors import PruneForgeError, UnfinishedError
from pruneforge.interfaces.adapter import Block
from pruneforge.interfaces.statistics import GradientStatistic
from pruneforge.numerics import accumulation_dtype

Kind = type[GradientStatistic]
Gradients = dict[str, dict[Kind, GradientStatistic]]
"""Statistics of a block's layers, by layer name and class."""

FOLDER = "folder of gradient statistics"

HOST = torch.device("cpu")


class GradientStore(Protocol):
    """Keeps the statistics of each block from the sweep that makes them to the block's own turn.

    Attributes:
        shared: Whether all processes of a run look into the same one.
    """

    shared: bool

    def missing(self, block: Block, kinds: Sequence[Kind]) -> list[Kind]:
        """Return the kinds that are not there for every layer of the block."""

    def put(self, block: Block, found: Gradients) -> None:
        """Keep the statistics of a block."""

    def get(self, block: Block, kinds: Sequence[Kind], device: torch.device) -> Gradients:
        """Return the statistics of a block with their sums on `device`."""


class InMemoryGradients:
    """Holds statistics in host memory."""

    shared = False

    def __init__(self) -> None:
        self._found: Gradients = {}

    def missing(self, block: Block, kinds: Sequence[Kind]) -> list[Kind]:
        """Return the kinds that are not there for every layer of the block."""
        known = [self._found.get(layer.name, {}) for layer in block.layers]
        return [kind for kind in kinds if not all(kind in found for found in known)]

    def put(self, block: Block, found: Gradients) -> None:
        """Keep the statistics of a block."""
        for statistics in found.values():
            for statistic in statistics.values():
                statistic.to(HOST)
        self._found.update(found)

    def get(self, block: Block, kinds: Sequence[Kind], device: torch.device) -> Gradients:
        """Return the statistics of a block with their sums on `device`."""
        return {
            layer.name: {kind: _on(self._found[layer.name][kind], layer.shape, device) for kind in kinds}
            for layer in block.layers
        }


class GradientFiles:
    """Keeps statistics in a folder of their own for each model, data and loss: one file a layer and kind.

    Attributes:
        folder: The folder.
        reused: How many statistics an earlier run had left there.
        written: How many bytes this run has added.
    """

    shared = True

    def __init__(self, root: Path, identity: Mapping[str, Any]) -> None:
        """Find or name the folder.

        Args:
            root: Holds a folder for each identity.
            identity: What the gradients depend on, of types that JSON holds.
        """
        text = json.dumps(identity, sort_keys=True)
        self.folder = root / hashlib.sha256(text.encode()).hexdigest()[:32]
        self._identity = text
        self.reused = 0
        self.written = 0

    def missing(self, block: Block, kinds: Sequence[Kind]) -> list[Kind]:
        """Return the kinds that are not there for every layer of the block."""
        found = [kind for kind in kinds if not all(self._path(la.name, kind).is_file() for la in block.layers)]
        self.reused += (len(kinds) - len(found)) * len(block.layers)
        return found

    def put(self, block: Block, found: Gradients) -> None:
        """Write the statistics of a block, each file whole or not at all."""
        with writing(self.folder, FOLDER):
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "identity.json").write_text(self._identity + "\n", encoding="utf-8")
        for name, statistics in found.items():
            for kind, statistic in statistics.items():
                state = statistic.state_dict()
                tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
                others = {key: value for key, value in state.items() if key not in tensors}
                write_tensors(self._path(name, kind), tensors, {"state": json.dumps(others)}, FOLDER)
                self.written += sum(tensor.nbytes for tensor in tensors.values())

    def get(self, block: Block, kinds: Sequence[Kind], device: torch.device) -> Gradients:
        """Read the statistics of a block."""
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
        tensors = {stored.name: read_tensor(path, stored) for stored in read_header(path)}
        statistic = kind((0, 0), torch.float32, HOST)
        statistic.load_state_dict({**state, **tensors})
        if tuple(statistic.total.shape) != shape:
            raise PruneForgeError(f"gradient statistics {str(path)!r} are of another model; delete that folder")
        statistic.to(device)
        return statistic

    def _path(self, name: str, kind: Kind) -> Path:
        return self.folder / f"{name}.{kind.__qualname__}-{_source(kind)}.safetensors"


@cache
def _source(kind: Kind) -> str:
    """Return a hash of the file that defines a statistic, so that another or changed one is not taken for it."""
    file = inspect.getsourcefile(kind)
    text = Path(file).read_bytes() if file else b""
    return hashlib.sha256(kind.__module__.encode() + text).hexdigest()[:12]


def cache_folder() -> Path:
    """Return where gradient statistics are kept by default: `$PRUNEFORGE_CACHE`, or the user's cache."""
    root = os.environ.get("PRUNEFORGE_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() if root else Path(home).expanduser() / "pruneforge" / "gradients"


def _on(statistic: GradientStatistic, shape: tuple[int, int], device: torch.device) -> GradientStatistic:
    if statistic.total.device == device:
        return statistic
    copy = type(statistic)(shape, accumulation_dtype(statistic.total.dtype), device)
    copy.load_state_dict({**statistic.state_dict(), "total": statistic.total.to(device)})
    return copy
