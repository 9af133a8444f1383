"""The ridge step: the weights that a mask keeps take over what the pruned ones gave."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from pruneforge import Covariance, Recovery, Site

VALUES_AT_A_TIME = 1 << 24
"""Values of the systems that are solved together: 64 MB in float32."""


class Ridge(Recovery):
    """Least squares of each row's remaining weights against the dense row, in closed form.

    With the kept columns K and the pruned ones P of a row, `W_K += W_P R`, `R = C_PK (C_KK + lam I)^-1`. For a layer
    with a bias, C is the covariance of its inputs, and the bias becomes `b + (W - W') m` with their mean m, which is
    FLAP's where R is zero; for one without, C is the covariance plus `m m^T`, which is `X^T X` over the tokens. lam is
    `damping` times the mean of C's diagonal. W is the dense weight, whatever a metric made of it.
    """

    requires = (Covariance,)

    class Options(Recovery.Options):
        """Options of the ridge step."""

        damping: float = Field(0.01, gt=0, description="added to the diagonal, as a share of its mean")

    options: Options

    def recover_block(self, site: Site) -> None:
        """Solve for each layer."""
        for layer in site.layers:
            inputs, mask = site.stats[layer.name][Covariance], site.masks[layer.name]
            dense, bias, mean = site.dense[layer.name], site.bias(layer), inputs.mean()
            covariance = inputs.matrix()
            if bias is None:  # nothing can take over what the mean gives
                covariance = covariance.addr(mean, mean)
            # A layer whose inputs are all zero has nothing to solve, but its system must not be singular.
            damping = (self.options.damping * covariance.diagonal().mean()).clamp_min(1e-12)
            damped = covariance + torch.diag(damping.expand(len(covariance)))
            layer.write(mask, least_squares(dense, mask, damped))
            if bias is not None:
                bias.data += (dense - layer.weight) @ mean


def least_squares(dense: Tensor, mask: Tensor, damped: Tensor) -> Tensor:
    """Return the weights under a mask that are nearest to the dense ones, in the norm of a damped covariance.

    Each row has a system of its own kept columns. Rows are solved together, with their columns gathered; shorter ones
    are filled with rows of the identity.

    Args:
        dense: [out, in].
        mask: Boolean [out, in], `True` keeps.
        damped: Positive definite, symmetric [in, in].
    """
    kept = mask.sum(1)
    most = int(kept.max()) if len(kept) else 0
    result = dense * mask
    lost = (dense * ~mask) @ damped  # of pruned columns, so that the damping on the diagonal has no part in it
    step = max(1, VALUES_AT_A_TIME // max(most * most, 1))
    order = torch.argsort(mask.to(torch.uint8), dim=1, descending=True, stable=True)[:, :most]  # kept columns first
    for start in range(0, len(dense), step):
        rows = slice(start, start + step)
        columns = order[rows]
        real = mask[rows].gather(1, columns)
        systems = damped[columns[:, :, None], columns[:, None, :]] * (real[:, :, None] & real[:, None, :])
        systems += torch.diag_embed((~real).to(systems.dtype))
        right = (lost[rows].gather(1, columns) * real)[:, :, None]
        change = torch.cholesky_solve(right, torch.linalg.cholesky(systems))[:, :, 0]
        result[rows] = result[rows].scatter_add(1, columns, change * real)
    return result
