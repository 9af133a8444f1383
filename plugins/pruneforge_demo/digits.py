"""The handwritten digits that come with scikit-learn, in three disjoint parts."""

from __future__ import annotations

from typing import Literal

import numpy as np

Part = Literal["training", "calibration", "evaluation"]

SIZE = 8
"""Width and height in pixels."""

_SHARES: dict[Part, tuple[float, float]] = {
    "training": (0.0, 0.6),
    "calibration": (0.6, 0.75),
    "evaluation": (0.75, 1.0),
}


def images(part: Part) -> tuple[np.ndarray, np.ndarray]:
    """Return one part of the 1797 digits, in a fixed random order.

    Args:
        part: `training` (60 %), `calibration` (15 %) or `evaluation` (25 %).

    Returns:
        Grey values uint8 [images, 8, 8], and labels int64 [images].
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    start, stop = (round(share * len(order)) for share in _SHARES[part])
    chosen = order[start:stop]
    pixels = np.round(data.images[chosen] * (255 / 16)).astype(np.uint8)
    return pixels, data.target[chosen].astype(np.int64)
