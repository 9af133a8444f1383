"""The four metrics as plainly as they can be written: for comparison, not for use.

The whole model is run again for every block, one sample at a time, in the dtype of the model given (the
tests give float64). Nothing here comes from the framework. Where the authors prune one weight too many,
exactly k are pruned, equals in index order.
"""

from __future__ import annotations

import copy

import torch
from torch import nn


class LanguageModel:
    """How to run a causal language model of transformers on one sample, and where its blocks are."""

    @staticmethod
    def blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
        return [(f"model.layers.{i}", layer) for i, layer in enumerate(model.model.layers)]

    @staticmethod
    def run(model: nn.Module, sample: dict):
        return model(**sample, use_cache=False)

    @staticmethod
    def loss(model: nn.Module, sample: dict) -> torch.Tensor:
        labels = sample["input_ids"].masked_fill(sample["attention_mask"] == 0, -100)
        return model(**sample, labels=labels, use_cache=False).loss

    @staticmethod
    def counting(sample: dict, tokens: torch.Tensor) -> torch.Tensor:
        """The rows of a layer's input that count, [tokens, in]."""
        return tokens[0][sample["attention_mask"][0].bool()]


class TimmModel:
    """The same for a timm model; a sample is an image [1, channels, height, width] and maybe a label [1]."""

    @staticmethod
    def blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
        if hasattr(model, "blocks"):
            return [(f"blocks.{i}", block) for i, block in enumerate(model.blocks)]
        stage = "layers" if hasattr(model, "layers") else "stages"
        lists = [(f"{stage}.{i}.blocks", part.blocks) for i, part in enumerate(getattr(model, stage))]
        return [(f"{name}.{i}", block) for name, part in lists for i, block in enumerate(part)]

    @staticmethod
    def run(model: nn.Module, sample: dict):
        return model(sample["pixel_values"])

    @staticmethod
    def loss(model: nn.Module, sample: dict) -> torch.Tensor:
        logits = model(sample["pixel_values"])
        return nn.functional.cross_entropy(logits, sample.get("labels", logits.argmax(1)))

    @staticmethod
    def counting(sample: dict, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.reshape(-1, tokens.shape[-1])[sample.get("skip", 0) :]


class TransformersImageModel(TimmModel):
    """The same for an image classifier of transformers."""

    @staticmethod
    def blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
        name, part = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList))
        return [(f"{name}.{i}", block) for i, block in enumerate(part)]

    @staticmethod
    def run(model: nn.Module, sample: dict):
        return model(pixel_values=sample["pixel_values"])

    @staticmethod
    def loss(model: nn.Module, sample: dict) -> torch.Tensor:
        logits = model(pixel_values=sample["pixel_values"]).logits
        return nn.functional.cross_entropy(logits, sample.get("labels", logits.argmax(1)))


def linears(name: str, block: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(f"{name}.{n}", m) for n, m in block.named_modules() if isinstance(m, nn.Linear)]


def layer_inputs(kind, model: nn.Module, layers: list[tuple[str, nn.Linear]], samples: list[dict]) -> dict[str, list]:
    """What each layer receives, one [tokens, in] a sample, padding left out."""
    seen: dict[str, list] = {name: [] for name, _ in layers}
    sample: dict = {}
    handles = []
    for name, module in layers:

        def hook(_module, args, name=name):
            seen[name].append(kind.counting(sample, args[0].detach()))

        handles.append(module.register_forward_pre_hook(hook))
    for sample in samples:
        with torch.no_grad():
            kind.run(model, sample)
    for handle in handles:
        handle.remove()
    return seen


def sample_gradients(kind, model: nn.Module, samples: list[dict]) -> dict[str, list[torch.Tensor]]:
    """Each sample's own gradient of its mean loss, by plain autograd over the whole model."""
    found: dict[str, list] = {name: [] for b in kind.blocks(model) for name, _ in linears(*b)}
    for sample in samples:
        model.zero_grad()
        kind.loss(model, sample).backward()
        for block in kind.blocks(model):
            for name, module in linears(*block):
                found[name].append(module.weight.grad.clone())
    model.zero_grad()
    return found


def mask_by_sorting(scores: torch.Tensor, sparsity: float, pattern: tuple[int, int] | None, scope: str) -> torch.Tensor:
    """Keep-mask by stable sorts."""
    if pattern:
        n, m = pattern
        groups, count = scores.reshape(-1, m), m - n
    else:
        groups = scores if scope == "row" else scores.reshape(1, -1)
        count = int(groups.shape[1] * sparsity + 1e-9)
    order = torch.sort(groups, dim=1, stable=True).indices[:, :count]
    return torch.ones_like(groups, dtype=torch.bool).scatter(1, order, False).view_as(scores)


def sparsegpt_layer(weight, inputs, sparsity, pattern, damping=0.01, blocksize=128):
    """The authors' fasterprune, with three factorisations and one column at a time."""
    w = weight.clone()
    x = torch.cat(inputs)
    h = 2 / len(inputs) * x.T @ x
    dead = torch.diag(h) == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    h += damping * torch.diag(h).mean() * torch.eye(len(h), dtype=h.dtype)
    hinv = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    mask = torch.ones_like(w, dtype=torch.bool)
    columns = w.shape[1]
    for i1 in range(0, columns, blocksize):
        i2 = min(i1 + blocksize, columns)
        if not pattern:
            scores = w[:, i1:i2] ** 2 / torch.diag(hinv)[i1:i2] ** 2
            mask[:, i1:i2] = mask_by_sorting(scores, sparsity, None, "layer")
        for i in range(i1, i2):
            if pattern and i % pattern[1] == 0:
                group = slice(i, i + pattern[1])
                scores = w[:, group] ** 2 / torch.diag(hinv)[group] ** 2
                mask[:, group] = mask_by_sorting(scores, sparsity, pattern, "row")
            q = w[:, i] * mask[:, i]
            err = (w[:, i] - q) / hinv[i, i]
            w[:, i + 1 :] -= torch.outer(err, hinv[i, i + 1 :])
            w[:, i] = q
    return mask, w


def prune(
    model,
    metric,
    samples,
    sparsity=0.5,
    pattern=None,
    scope=None,
    alpha=100.0,
    norm="l1",
    propagate="pruned",
    kind=LanguageModel,
):
    """Prune a copy of a model; return the copy and its masks by layer name.

    `samples` are what `kind` runs a model on, one sequence or image each.
    """
    dense = copy.deepcopy(model)
    model = copy.deepcopy(model)
    scope = scope or {"magnitude": "layer", "wanda": "row", "gblm": "row", "sparsegpt": None}[metric]
    gradients = sample_gradients(kind, dense, samples) if metric == "gblm" else {}
    masks = {}
    for (name, block), (_, dense_block) in zip(kind.blocks(model), kind.blocks(dense), strict=True):
        seen_by = (model, block) if propagate == "pruned" else (dense, dense_block)
        inputs = layer_inputs(kind, seen_by[0], linears(name, seen_by[1]), samples)
        for layer, module in linears(name, block):
            weight = module.weight.data
            if metric == "sparsegpt":
                masks[layer], updated = sparsegpt_layer(weight, inputs[layer], sparsity, pattern)
                weight.copy_(updated)
                continue
            squares = torch.cat(inputs[layer]).square().sum(0) / len(samples)
            scores = weight.abs()
            if metric != "magnitude":
                scores = weight.abs() * squares.sqrt()
            if metric == "gblm":
                stacked = torch.stack(gradients[layer])
                g = stacked.abs().sum(0) if norm == "l1" else stacked.square().sum(0).sqrt()
                scores = scores + alpha * weight.abs() * g
            masks[layer] = mask_by_sorting(scores, sparsity, pattern, scope)
            weight.mul_(masks[layer])
    return model, masks


def perplexity(model, ids: torch.Tensor, window: int) -> float:
    """exp of the mean loss of consecutive windows of ids [tokens]."""
    losses = []
    for i in range(len(ids) // window):
        part = ids[None, i * window : (i + 1) * window]
        with torch.no_grad():
            losses.append(model(input_ids=part, labels=part, use_cache=False).loss.double())
    return torch.stack(losses).mean().exp().item()
