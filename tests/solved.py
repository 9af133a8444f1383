"""What tests of metrics that solve for a layer's weights share."""

from __future__ import annotations

from pruneforge import Pruned
from pruneforge.plugins import loaded_plugins


def pruned_by(name, made, pattern, **options) -> Pruned:
    metric = loaded_plugins().registry.create("metric", name, options)
    return metric.prune_layer(made.layer(), made.statistics(metric.requires), pattern)


def layer_error(made, pruned) -> float:
    difference = made.weight.double() - pruned.weight.double() * pruned.mask
    return (made.inputs.double().flatten(0, 1) @ difference.T).square().sum().item()
