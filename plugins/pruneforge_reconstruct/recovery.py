"""Block reconstruction: train what is left of a block towards what the dense block puts out."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch.nn import functional as F

from pruneforge import Recovery, Site


class Reconstruct(Recovery):
    """Adam on the mean squared error between a block's output and the dense block's, one batch a step.

    The learning rate falls linearly to zero. By default the dense output is that of the dense model, so a block also
    makes up for what the blocks before it lost.
    """

    class Options(Recovery.Options):
        """Options of the reconstruction."""

        lr: float = Field(1e-3, gt=0, description="learning rate of the first step")
        epochs: int = Field(1, ge=1, description="passes over the calibration data")
        targets: Literal["dense", "pruned"] = Field(
            "dense", description="outputs of the dense block in the dense model, or on the pruned model's inputs"
        )

    options: Options

    @property
    def targets(self) -> Literal["dense", "pruned"]:  # type: ignore[override]
        """What the block's output is compared with."""
        return self.options.targets

    def recover_block(self, site: Site) -> None:
        """Train the block."""
        optimizer = torch.optim.Adam(site.parameters(), lr=self.options.lr)
        steps = self.options.epochs * site.batch_count
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        for _ in range(self.options.epochs):
            for passing in site.batches(shuffle=True):
                site.step(optimizer, F.mse_loss(passing.output(), passing.target))
                schedule.step()
