"""Block reconstruction: train what is left of a block towards what the dense block puts out."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from pruneforge import Passing, Recovery, Site

SMALLEST = 1e-3
"""Size that a parameter is taken to have at least, so that biases which are zero can move."""


class Reconstruct(Recovery):
    """Adam on the mean squared error between a block's output and the dense block's, one batch a step.

    Steps are relative to the size of what they change, as in Adafactor (Shazeer and Stern, 2018, section 8): a
    parameter's learning rate is `lr` times the root mean square of its remaining values, at least a thousandth, so that
    models of any size can have the same. It falls linearly to zero. By default the dense output is that of the dense
    model, so a block also makes up for what the blocks before it lost.
    """

    class Options(Recovery.Options):
        """Options of the reconstruction."""

        lr: float = Field(0.01, gt=0, description="size of the first steps, relative to the parameters'")
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
        groups = [{"params": [each], "lr": self.options.lr * max(SMALLEST, size(each))} for each in site.parameters()]
        optimizer = torch.optim.Adam(groups)
        steps = self.options.epochs * site.batch_count
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        for _ in range(self.options.epochs):
            for passing in site.batches(shuffle=True):
                site.step(optimizer, distance(passing))
                schedule.step()


def distance(passing: Passing) -> Tensor:
    """Return the mean squared difference between a block's output and its target, padding left out."""
    output, target, valid = passing.output(), passing.target, passing.batch.valid
    return F.mse_loss(output, target) if valid is None else F.mse_loss(output[valid], target[valid])


def size(parameter: Tensor) -> float:
    """Return the root mean square of a parameter's values that are not zero."""
    values = parameter.detach()
    return float((values.square().sum() / values.count_nonzero().clamp_min(1)).sqrt())
