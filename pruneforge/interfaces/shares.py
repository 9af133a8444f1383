"""From numbers that say how layers or blocks compare to their shares of the weights, for allocators."""

from __future__ import annotations

from collections.abc import Mapping


def proportional(weights: Mapping[str, float], sizes: Mapping[str, int], mean: float) -> dict[str, float]:
    """Return shares in proportion to `weights`, of which none is above 1.

    The factor is such that the shares' mean over all parameters is `mean`; a share that would be above 1 is 1, and the
    others make up for it.

    Args:
        weights: What the shares are proportional to, at least 0, by name of a layer.
        sizes: Number of parameters of each layer, by name.
        mean: Mean of the shares, from 0 to 1.
    """
    full: set[str] = set()
    while True:
        rest = weights.keys() - full
        room = mean * sum(sizes[name] for name in weights) - sum(sizes[name] for name in full)
        total = sum(weights[name] * sizes[name] for name in weights if name in rest)
        factor = max(room, 0.0) / total if total > 0 else 0.0
        over = {name for name in rest if factor * weights[name] > 1}
        if not over:
            return {name: 1.0 if name in full else factor * weight for name, weight in weights.items()}
        full |= over


def spread(values: Mapping[str, float], mean: float, width: float) -> dict[str, float]:
    """Return shares from 0 to 1 that rise linearly with `values`, `2 * width` from the least to the most.

    They are shifted so that their mean is `mean`, whatever the sizes of layers; equal values all have it.

    Args:
        values: What the shares rise with, by name of a layer or a block.
        mean: Mean of the shares, before those below 0 or above 1 are cut.
        width: Half of the distance between the least and the largest share.
    """
    if not values:
        return {}
    low, high = min(values.values()), max(values.values())
    slope = 2 * width / (high - low) if high > low else 0.0
    middle = sum(values.values()) / len(values)
    return {name: min(max(mean + slope * (value - middle), 0.0), 1.0) for name, value in values.items()}
