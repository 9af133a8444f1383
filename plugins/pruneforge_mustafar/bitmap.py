"""The bitmap format of pruned keys and values: which of 64 entries are there, and these entries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

TILE = 64
"""Entries of a tile."""

ALIGNED = 8
"""Entries, of which each tile takes a multiple."""


@dataclass(frozen=True)
class Compressed:
    """Tiles of 64 entries, as Mustafar's kernels read them.

    Attributes:
        bitmaps: Which entries of each tile are there, the first as the highest bit; int64 [tiles].
        values: Those entries, each tile's filled up with zeros to a multiple of 8.
        offsets: Where each tile's entries begin in `values`, halved; int32 [tiles].
        shape: Of the states, without what fills up their last tiles.
        along: Dimension that tiles lie along.
    """

    bitmaps: Tensor
    values: Tensor
    offsets: Tensor
    shape: tuple[int, ...]
    along: int

    @property
    def nbytes(self) -> int:
        """Bytes of all three."""
        return self.bitmaps.nbytes + self.values.nbytes + self.offsets.nbytes

    def decompress(self) -> Tensor:
        """Return the states."""
        there = (self.bitmaps[:, None] >> _shifts(self.bitmaps.device)) & 1 == 1
        tiles = torch.zeros(there.shape, dtype=self.values.dtype, device=self.values.device)
        tiles[there] = self.values[_places(there, self.offsets.long() * 2)]
        moved = [size for place, size in enumerate(self.shape) if place != self.along]
        states = tiles.reshape(*moved, -1).movedim(-1, self.along)
        return states.narrow(self.along, 0, self.shape[self.along]).contiguous()


def compress(states: Tensor, along: int) -> Compressed:
    """Return states [samples, heads, tokens, channels] in tiles of 64.

    Args:
        states: The states; zeros are left out.
        along: Dimension that tiles lie along: 2 for keys, 3 for values. What does not fill the last tile of a row is
            filled up with zeros.
    """
    lines = states.movedim(along, -1)
    tiles = F.pad(lines, (0, -lines.shape[-1] % TILE)).reshape(-1, TILE)
    there = tiles != 0
    bitmaps = (there.long() << _shifts(tiles.device)).sum(1)
    room = (there.sum(1) + ALIGNED - 1) // ALIGNED * ALIGNED
    offsets = room.cumsum(0) - room
    values = torch.zeros(int(room.sum()), dtype=states.dtype, device=states.device)
    values[_places(there, offsets)] = tiles[there]
    return Compressed(bitmaps, values, (offsets // 2).int(), tuple(states.shape), along)


def _shifts(device: torch.device) -> Tensor:
    """Return by how many bits each entry of a tile is shifted, [64]; the first is the highest bit."""
    return torch.arange(TILE - 1, -1, -1, device=device)


def _places(there: Tensor, offsets: Tensor) -> Tensor:
    """Return where each entry that is there stands among the values."""
    return (offsets[:, None] + there.cumsum(1) - 1)[there]
