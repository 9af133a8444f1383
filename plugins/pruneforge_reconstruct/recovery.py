"""Block reconstruction: train what is left of a block towards what the dense block puts out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pruneforge import Layer, Passing, Recovery, Site

SMALLEST = 1e-3
"""Size that a parameter is taken to have at least, so that biases which are zero can move."""


class Reconstruct(Recovery):
    """Adam on the mean squared error between a block's output and the dense block's, one batch a step.

    Steps are relative to the size of what they change, as in Adafactor (Shazeer and Stern, 2018, section 8): a
    parameter's learning rate is `lr` times the root mean square of its remaining values, at least a thousandth, so that
    models of any size can have the same. It falls linearly to zero. By default the dense output is that of the dense
    model, so a block also makes up for what the blocks before it lost.

    With `train=masklora` each layer computes with `W + (alpha / r) (B A) * M`, where M is the mask, A [r, in] begins
    uniform as a linear layer's weight and B [out, r] at zero. A and B alone are trained, with steps relative to A's
    size, and merged at the end, which keeps zeros and changes nothing (Zimmer, Andoni, Spiegel and Pokutta, "PERP:
    Rethinking the Prune-Retrain Paradigm in the Era of LLMs", 2023: MaskLoRA).
    """

    class Options(Recovery.Options):
        """Options of the reconstruction."""

        lr: float = Field(0.01, gt=0, description="size of the first steps, relative to the parameters'")
        epochs: int = Field(1, ge=1, description="passes over the calibration data")
        train: Literal["all", "weights", "masklora"] = Field(
            "all", description="what is trained: all parameters, the layers' weights, or low-rank terms of these"
        )
        rank: int = Field(16, ge=1, description="with masklora, rank r of B A")
        alpha: float = Field(32.0, gt=0, description="with masklora, the scale s is alpha / r")
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
        if self.options.train == "masklora":
            terms = {layer.name: MaskLoRA(layer, site.masks[layer.name], self.options) for layer in site.block.layers}
            # B begins at zero, so it moves by what A's size says.
            sizes = [(each, size(term.a)) for term in terms.values() for each in (term.a, term.b)]
            self._train(site, sizes, terms)
            for layer in site.block.layers:
                layer.write(site.masks[layer.name], terms[layer.name].weight().detach())
            return
        weights = {id(layer.parameter) for layer in site.block.layers}
        only = self.options.train == "weights"
        self._train(site, [(each, size(each)) for each in site.parameters() if not only or id(each) in weights], {})

    def _train(self, site: Site, sizes: list[tuple[nn.Parameter, float]], terms: Mapping[str, MaskLoRA]) -> None:
        """Train parameters, each with steps relative to its size, while layers with a term compute with its weight."""
        groups = [{"params": [each], "lr": self.options.lr * max(SMALLEST, own)} for each, own in sizes]
        optimizer = torch.optim.Adam(groups)
        steps = self.options.epochs * site.batch_count
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        for _ in range(self.options.epochs):
            for passing in site.batches(shuffle=True):
                with site.substituted({name: term.weight() for name, term in terms.items()}):
                    loss = distance(passing)
                site.step(optimizer, loss)
                schedule.step()


class MaskLoRA:
    """The low-rank term of a layer under its mask.

    Attributes:
        a: A [r, in].
        b: B [out, r].
    """

    def __init__(self, layer: Layer, mask: Tensor, options: Reconstruct.Options) -> None:
        self._start, self._mask, self._scale = layer.weight.clone(), mask, options.alpha / options.rank
        bound = layer.shape[1] ** -0.5
        start = self._start.new_empty(options.rank, layer.shape[1]).uniform_(-bound, bound)
        self.a = nn.Parameter(start)
        self.b = nn.Parameter(self._start.new_zeros(layer.shape[0], options.rank))

    def weight(self) -> Tensor:
        """Return W + s (B A) * M [out, in], differentiable in A and B."""
        return self._start + self._scale * (self.b @ self.a) * self._mask


def distance(passing: Passing) -> Tensor:
    """Return the mean squared difference between a block's output and its target, padding left out."""
    output, target, valid = passing.output(), passing.target, passing.batch.valid
    return F.mse_loss(output, target) if valid is None else F.mse_loss(output[valid], target[valid])


def size(parameter: Tensor) -> float:
    """Return the root mean square of a parameter's values that are not zero."""
    values = parameter.detach()
    return float((values.square().sum() / values.count_nonzero().clamp_min(1)).sqrt())
