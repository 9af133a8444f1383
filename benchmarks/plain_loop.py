"""Pruning as the research repositories do it: one sample at a time, a statistic for each layer, full sorts.

For comparison of speed and masks only. Nothing is padded, everything is in memory, and the model is a LLaMA.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

BLOCK, DAMPING, ALPHA = 128, 0.01, 100.0


class Squares:
    """Wanda's statistic of one layer: the mean over samples of each column's squared norm."""

    def __init__(self, layer: nn.Linear) -> None:
        self.value = torch.zeros(layer.in_features, dtype=layer.weight.dtype)
        self.samples = 0

    def add(self, inputs: Tensor) -> None:
        """Add one sample's inputs."""
        columns = inputs.reshape(-1, inputs.shape[-1]).t().to(self.value.dtype)
        self.value *= self.samples / (self.samples + 1)
        self.samples += 1
        self.value += torch.norm(columns, p=2, dim=1) ** 2 / self.samples


class Hessian:
    """SparseGPT's statistic of one layer."""

    def __init__(self, layer: nn.Linear) -> None:
        self.value = torch.zeros(layer.in_features, layer.in_features, dtype=layer.weight.dtype)
        self.samples = 0

    def add(self, inputs: Tensor) -> None:
        """Add one sample's inputs."""
        columns = inputs.reshape(-1, inputs.shape[-1]).t()
        self.value *= self.samples / (self.samples + 1)
        self.samples += 1
        columns = (2 / self.samples) ** 0.5 * columns.to(self.value.dtype)
        self.value += columns.matmul(columns.t())


def prune(
    model: Any, metric: str, ids: Tensor, sparsity: float, extra: int = 1, groups: tuple[int, int] | None = None
) -> None:
    """Prune a LLaMA in place.

    Args:
        model: A LLaMA of transformers.
        metric: magnitude, wanda, sparsegpt or gblm.
        ids: Token ids [samples, tokens].
        sparsity: Share of weights to prune.
        extra: How many more than that share are pruned of all that have one threshold: one in the repositories, which
            prune what equals the first score to stay.
        groups: For Wanda, how many of how many consecutive weights to prune, in place of `sparsity`.
    """
    gradients = whole_model_gradients(model, ids) if metric == "gblm" else {}
    with torch.no_grad():
        if metric == "magnitude":
            for layer in layers(model.model).values():
                by_layer(layer.weight.data, sparsity, extra)
            return
        block_by_block(model, metric, ids, sparsity, gradients, extra, groups)


def layers(module: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers of a module by name."""
    return {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}


def block_by_block(
    model: Any,
    metric: str,
    ids: Tensor,
    sparsity: float,
    gradients: dict[int, Tensor],
    extra: int,
    groups: tuple[int, int] | None,
) -> None:
    """Calibrate, prune and propagate one block after the other."""
    hidden, arguments = first_inputs(model, ids)
    outputs = torch.zeros_like(hidden)
    for block in model.model.layers:
        found = layers(block)
        kept = {name: (Hessian if metric == "sparsegpt" else Squares)(layer) for name, layer in found.items()}
        hooks = [
            layer.register_forward_hook(lambda _, inputs, output, statistic=kept[name]: statistic.add(inputs[0]))
            for name, layer in found.items()
        ]
        run(block, hidden, arguments, outputs)
        for hook in hooks:
            hook.remove()
        for name, layer in found.items():
            if metric == "sparsegpt":
                solve(layer.weight.data, kept[name].value, sparsity, extra)
            else:
                score = layer.weight.data.abs() * kept[name].value.sqrt()
                if metric == "gblm":
                    score += ALPHA * layer.weight.data.abs() * gradients[id(layer)]
                if groups:
                    by_group(layer.weight.data, score, *groups)
                else:
                    by_row(layer.weight.data, score, sparsity)
        run(block, hidden, arguments, outputs)
        hidden, outputs = outputs, hidden


def first_inputs(model: Any, ids: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
    """Return the first block's inputs [samples, tokens, hidden], and what it is called with besides."""
    hidden, arguments = [], []

    class Caught(Exception):  # noqa: N818
        pass

    def catch(_: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Any]) -> None:
        hidden.append(inputs[0])
        arguments.append(named)
        raise Caught

    hook = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for sample in ids:
        with suppress(Caught):
            model(sample[None], use_cache=False)
    hook.remove()
    return torch.cat(hidden), arguments


def run(block: nn.Module, hidden: Tensor, arguments: list[dict[str, Any]], outputs: Tensor) -> None:
    """Run a block on every sample, one at a time."""
    for number, named in enumerate(arguments):
        found = block(hidden[number][None], **named)
        outputs[number] = found if isinstance(found, Tensor) else found[0]


def whole_model_gradients(model: Any, ids: Tensor) -> dict[int, Tensor]:
    """Return the sum over samples of each layer's absolute gradient, by the layer's id."""
    found = layers(model.model)
    sums = {id(layer): torch.zeros_like(layer.weight) for layer in found.values()}
    for sample in ids:
        model(sample[None], labels=sample[None], use_cache=False).loss.backward()
        for layer in found.values():
            sums[id(layer)] += layer.weight.grad.abs()
        model.zero_grad()
    return sums


def by_layer(weight: Tensor, sparsity: float, extra: int) -> None:
    """Prune the smallest weights of a layer, found by sorting all of them."""
    sizes = weight.abs()
    threshold = torch.sort(sizes.flatten())[0][int(weight.numel() * sparsity) + extra - 1]
    weight[sizes <= threshold] = 0


def by_row(weight: Tensor, score: Tensor, sparsity: float) -> None:
    """Prune the smallest scores of each row, found by sorting it."""
    order = torch.sort(score, dim=-1, stable=True)[1]
    mask = torch.zeros_like(weight, dtype=torch.bool)
    mask.scatter_(1, order[:, : int(weight.shape[1] * sparsity)], True)
    weight[mask] = 0


def by_group(weight: Tensor, score: Tensor, pruned: int, size: int) -> None:
    """Prune the `pruned` smallest scores of each `size` consecutive ones of a row."""
    mask = torch.zeros_like(weight, dtype=torch.bool)
    for start in range(0, weight.shape[1], size):
        smallest = torch.topk(score[:, start : start + size], pruned, dim=1, largest=False)[1]
        mask.scatter_(1, start + smallest, True)
    weight[mask] = 0


def solve(weight: Tensor, hessian: Tensor, sparsity: float, extra: int) -> None:
    """SparseGPT's updates, column by column (its algorithm 1)."""
    dead = torch.diag(hessian) == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    hessian.diagonal().add_(DAMPING * torch.mean(torch.diag(hessian)))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)
    for start in range(0, weight.shape[1], BLOCK):
        columns = slice(start, min(start + BLOCK, weight.shape[1]))
        part, small = weight[:, columns].clone(), factor[columns, columns]
        scores = part**2 / torch.diag(small) ** 2
        threshold = torch.sort(scores.flatten())[0][int(scores.numel() * sparsity) + extra - 1]
        removed = scores <= threshold
        errors = torch.zeros_like(part)
        for j in range(part.shape[1]):
            kept = part[:, j].clone()
            kept[removed[:, j]] = 0
            errors[:, j] = (part[:, j] - kept) / small[j, j]
            part[:, j:] -= errors[:, j : j + 1].matmul(small[j : j + 1, j:])
            part[:, j] = kept
        weight[:, columns] = part
        weight[:, columns.stop :] -= errors.matmul(factor[columns, columns.stop :])
