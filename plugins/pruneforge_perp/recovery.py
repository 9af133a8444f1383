"""PERP: train a small share of a pruned model's parameters down its own loss."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor, nn

from pruneforge import Layer, ModelSite, PruneForgeError, Recovery

Subset = Literal["biases", "norms", "head", "masklora", "scalelora"]
SUBSETS = get_args(Subset)


class Perp(Recovery):
    """Parameter-efficient retraining.

    Zimmer, Andoni, Spiegel and Pokutta, "PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs", 2023,
    section 3.

    Trained are subsets of the parameters, by AdamW without weight decay, down the model's loss, with a learning rate
    that rises over the first tenth of the steps and then falls linearly to zero:

    - `biases`: the vectors called biases; `norms`: those of normalisations;
    - `masklora`: `W + s (B A) * M` for each pruned layer, with its mask M, A [rank, in], B [out, rank], s = alpha/rank;
    - `scalelora`: `W * (1 + s B A)`, which is HiRA's form (Huang et al., 2025, "HiRA") of the paper's `W * (B A)`. Both
      start at W, but the factors of the paper's form start equal, and so their ranks are never told apart;
    - `head`: ordinary LoRA on the layer that makes the logits. A head that shares its weight is left out, and said so.

    Rank, alpha, the adapters' learning rate and two batches a step are the released code's. It and the paper differ in
    the number of steps, 20 and 1000; that and the learning rate of vectors are chosen here.

    A starts as in LoRA (Hu et al., 2022), B at zero. Everything is merged into the weights: the model keeps its shape
    and its zeros.
    """

    class Options(Recovery.Options):
        """Options of PERP."""

        train: list[Subset] = Field(
            ["biases", "norms", "head", "masklora"],
            min_length=1,
            description="what is trained, of biases, norms, head, masklora and scalelora",
        )
        rank: int = Field(16, ge=1, description="rank of the adapters of layers and head")
        alpha: float = Field(32, gt=0, description="scale of the adapters, times the rank")
        lr: float = Field(5e-4, gt=0, description="learning rate of the adapters")
        vector_lr: float = Field(5e-4, gt=0, description="learning rate of biases and normalisations")
        steps: int = Field(100, ge=1, description="steps; the paper takes 1000")
        accumulate: int = Field(2, ge=1, description="batches a step")
        save_every: int = Field(50, ge=1, description="steps between the states that an interrupted run goes on from")

    options: Options

    def recover_model(self, site: ModelSite) -> None:
        """Train, and merge what was trained."""
        options, trained = self.options, Trained(site, self.options)
        rates = {"vectors": options.vector_lr, "factors": options.lr}
        groups = [{"params": each, "lr": rates[kind]} for kind, each in trained.groups().items() if each]
        if not groups:
            asked = " or ".join(options.train)
            raise PruneForgeError(
                f"{self.name} has nothing to train: the model has no {asked} of its own; add to `train`"
            )
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        peaks = [group["lr"] for group in optimizer.param_groups]
        state, first = site.restored(), 0
        if state is not None:
            first = state["step"]
            trained.load(state["trained"])
            optimizer.load_state_dict(state["optimizer"])
        batches = site.batches(first * options.accumulate)
        for step in site.progress.track(range(first, options.steps), f"steps of {self.name}"):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * rate(step, options.steps)
            together = list(islice(batches, options.accumulate))
            samples = sum(batch.size for batch in together)
            for batch in together:
                site.backward(site.losses(batch, trained.parameters()).sum() / samples)
            site.step(optimizer)
            if (step + 1) % options.save_every == 0:
                site.checkpoint({"step": step + 1, "trained": trained.state(), "optimizer": optimizer.state_dict()})
        with torch.no_grad():
            site.write(trained.parameters())


def rate(step: int, steps: int) -> float:
    """Return the share of the learning rate that a step has, counted from 0: a tenth of warm-up, a linear fall."""
    warm = math.ceil(steps / 10)
    return (step + 1) / warm if step < warm else (steps - step) / (steps - warm)


class Trained:
    """What is trained of a model: copies of vectors, and the factors of each layer's adapters, float32 or better."""

    def __init__(self, site: ModelSite, options: Perp.Options) -> None:
        """Make what the options choose, and report how much of each that is."""
        self._site, self._options = site, options
        self._named = site.parameters()
        self._names = {id(parameter): name for name, parameter in self._named.items()}
        self._vectors: dict[str, nn.Parameter] = {}
        self._factors: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}  # A [rank, in], B [out, rank]
        self._adapted: dict[str, list[tuple[str, str, Layer]]] = {}  # by parameter, which may hold several layers
        counts = {subset: getattr(self, f"_add_{subset}")() for subset in SUBSETS if subset in options.train}
        site.report(subsets=counts)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Return what an optimizer changes: vectors, and factors of adapters."""
        factors = [factor for pair in self._factors.values() for factor in pair]
        return {"vectors": list(self._vectors.values()), "factors": factors}

    def parameters(self) -> dict[str, Tensor]:
        """Return the model's parameters as trained, by name, differentiable."""
        values: dict[str, Tensor] = dict(self._vectors)
        for name, adapted in self._adapted.items():
            parameter = self._named[name].detach()
            value = values[name] = parameter.to(wide(parameter), copy=True)
            for subset, key, layer in adapted:
                a, b = self._factors[key]
                change = self._options.alpha / self._options.rank * (b @ a)
                layer.view(value).add_(change * layer.view(parameter) if subset == "scalelora" else change)
        return values

    def state(self) -> dict[str, Any]:
        """Return all that is trained, as it is now."""
        factors = {key: [factor.detach() for factor in pair] for key, pair in self._factors.items()}
        return {"vectors": {name: each.detach() for name, each in self._vectors.items()}, "factors": factors}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned."""
        with torch.no_grad():
            for name, vector in self._vectors.items():
                vector.copy_(state["vectors"][name])
            for key, pair in self._factors.items():
                for factor, value in zip(pair, state["factors"][key], strict=True):
                    factor.copy_(value)

    def _add_biases(self) -> int:
        return self._add_vectors(
            name
            for name in self._named
            if name.rpartition(".")[2].endswith("bias")  # `q_bias` is one too
        )

    def _add_norms(self) -> int:
        norms = [part for part in self._site.module.modules() if "norm" in type(part).__name__.lower()]
        own = {id(parameter) for part in norms for parameter in part.parameters(recurse=False)}
        return self._add_vectors(name for name, parameter in self._named.items() if id(parameter) in own)

    def _add_vectors(self, names: Iterable[str]) -> int:
        new = [name for name in names if name not in self._vectors and self._named[name].dim() == 1]
        for name in new:
            parameter = self._named[name].detach()
            self._vectors[name] = nn.Parameter(parameter.to(wide(parameter), copy=True))
        return sum(self._named[name].numel() for name in new)

    def _add_head(self) -> int:
        head = self._site.head
        if head is None:
            self._site.warn("the model does not say which layer makes its logits, so no head was trained")
            return 0
        named = self._site.module.named_parameters(remove_duplicate=False)
        shared = [name for name, parameter in named if parameter is head.parameter]
        if len(shared) > 1:
            self._site.warn(f"the head was not trained: {' and '.join(shared)} are one weight of {head.size:,} values")
            return 0
        return self._add_adapters("head", [head])

    def _add_masklora(self) -> int:
        return self._add_adapters("masklora", self._site.layers)

    def _add_scalelora(self) -> int:
        return self._add_adapters("scalelora", self._site.layers)

    def _add_adapters(self, subset: str, layers: Sequence[Layer]) -> int:
        count = 0
        for layer in layers:
            (rows, columns), like, rank = layer.shape, layer.parameter, self._options.rank
            a = nn.Parameter(torch.empty(rank, columns, dtype=wide(like), device=like.device))
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            b = nn.Parameter(torch.zeros(rows, rank, dtype=wide(like), device=like.device))
            key = f"{subset} {layer.name}"
            self._factors[key] = a, b
            self._adapted.setdefault(self._names[id(like)], []).append((subset, key, layer))
            count += a.numel() + b.numel()
        return count


def wide(tensor: Tensor) -> torch.dtype:
    """Return the dtype that a parameter is trained in."""
    return torch.promote_types(tensor.dtype, torch.float32)
