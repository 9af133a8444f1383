"""Let a recovery train a whole pruned model, under masks that stay as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn, optim

from pruneforge.checkpoint.state import load_state, save_state
from pruneforge.engine.backward import LOSS_SCALE
from pruneforge.engine.chain import model_losses
from pruneforge.engine.guard import named, seed_for
from pruneforge.engine.residency import moved
from pruneforge.errors import PruneForgeError
from pruneforge.interfaces.adapter import Adapter
from pruneforge.interfaces.batch import Batch
from pruneforge.interfaces.layer import Layer
from pruneforge.interfaces.objective import Objective
from pruneforge.interfaces.recovery import ModelSite, Recovery
from pruneforge.numerics import all_finite, repeatable_gradients
from pruneforge.progress import Progress

PART = 0x5EED
"""Position of recovery among the parts of a run, which gives it random numbers of its own."""

FAILED = "failed"
"""Name of the fact that a recovery failed, and why."""

RESERVED = frozenset(
    {"name", "options", "recipe", "calibration", "versions", "plugins", "identity", "steps", "trained", FAILED}
)
"""What the report says of every recovery."""


@dataclass(frozen=True)
class Recovered:
    """What became of a recovery.

    Attributes:
        changed: Full names of the parameters that it wrote other values of.
        updated: The same as reports name them: layers by their own names, other parameters by full names.
        facts: What the report says of it: steps, how many parameters were trained, and what the recovery adds.
        warnings: Its warnings, one line each.
    """

    changed: frozenset[str]
    updated: frozenset[str]
    facts: dict[str, Any]
    warnings: list[str]


class PrunedModel(ModelSite):
    """The site of a whole model."""

    def __init__(
        self,
        module: nn.Module,
        adapter: Adapter,
        masks: Mapping[str, Tensor],
        batches: Sequence[Batch],
        device: torch.device,
        seed: int = 0,
        objective: Objective | None = None,
        state: Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Describe the model; nothing is changed or moved yet.

        Args:
            module: The pruned model.
            adapter: Its adapter.
            masks: Boolean [out, in] by layer name, on the CPU; layers without one stay dense.
            batches: The calibration data.
            device: Where to compute.
            seed: Seed of every random choice.
            objective: The loss; by default the adapter's.
            state: File that an interrupted recovery goes on from; `None` if it cannot be resumed.
            progress: Shows progress; by default nothing.

        Raises:
            PruneForgeError: The masks are of another model, or a pruned weight is not zero.
        """
        layers = [layer for block in adapter.blocks(module) for layer in block.layers]
        self.module, self.head, self.batch_count = module, adapter.head(module), len(batches)
        self.layers = [layer for layer in layers if layer.name in masks]
        self.progress = progress or Progress()
        self._left_dense = [layer for layer in layers if layer.name not in masks]
        self._adapter, self._objective, self._given = adapter, objective, masks
        self._batches, self._device, self._seed, self._state = batches, device, seed, state
        self._check_masks()
        self._check_zeros("the model")
        pruned = {id(layer.parameter) for layer in self.layers}
        fixed = {id(layer.parameter) for layer in self._left_dense} - pruned
        self._named = {name: p for name, p in module.named_parameters() if id(p) not in fixed}
        self._scale = LOSS_SCALE.get(next(module.parameters()).dtype, 1.0)
        self._who, self._steps, self._trained = "recovery", 0, 0
        self._facts: dict[str, Any] = {}
        self._warnings: list[str] = []
        self._written: set[str] = set()
        self._changed: set[str] = set()

    def recover(self, recovery: Recovery) -> Recovered:
        """Run a recovery.

        Raises:
            PruneForgeError: It fails, changes what is not its to change, or leaves something that is not finite.
        """
        self._who = f"recovery {recovery.name!r}"
        wanted = [(parameter, parameter.requires_grad) for parameter in self.module.parameters()]
        with moved(list(self.module.modules()), self._device):
            kept = [(layer, layer.matrix().clone()) for layer in self._left_dense]
            try:
                for parameter, _ in wanted:
                    parameter.requires_grad_(False)
                self._prepare_masks()
                versions = {name: parameter._version for name, parameter in self._named.items()}
                seed_for(self._seed, "model", self._device, PART)
                with torch.enable_grad():
                    named(self._who, "on the model", lambda: recovery.recover_model(self))
                self._check(versions, kept)
            finally:
                for parameter, wants in wanted:
                    parameter.requires_grad_(wants)
        total = sum(parameter.numel() for parameter in self.module.parameters())
        trained = {"parameters": self._trained, "share": round(self._trained / total, 6)}
        facts = {"steps": self._steps, "trained": trained, **self._facts}
        return Recovered(frozenset(self._changed), self._updated(), facts, list(self._warnings))

    def _updated(self) -> frozenset[str]:
        layers: dict[int, list[str]] = {}  # by parameter, which may hold the weights of several
        for layer in self.layers:
            layers.setdefault(id(layer.parameter), []).append(layer.name)
        return frozenset(part for name in self._changed for part in layers.get(id(self._named[name]), [name]))

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return what may be replaced, by full name."""
        return dict(self._named)

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """Yield batches without end, each pass in another order."""
        generator = torch.Generator().manual_seed(self._seed)
        passed = 0
        while True:
            order = torch.randperm(self.batch_count, generator=generator).tolist()
            for number in order[max(0, start - passed) :]:
                yield self._batches[number].to(self._device)
            passed += self.batch_count

    def losses(self, batch: Batch, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return each sample's loss with some parameters replaced."""
        with torch.enable_grad(), repeatable_gradients(self._device):
            stand_ins = {name: self._masked(name, value) for name, value in parameters.items()}
            with self._replaced(stand_ins):
                return model_losses(self.module, self._adapter, self._objective, batch)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss."""
        if not all_finite(loss.detach()):
            raise PruneForgeError(f"{self._who} met a loss that is not finite; train with smaller steps")
        with repeatable_gradients(self._device):
            (loss * self._scale).backward()

    def step(self, optimizer: optim.Optimizer) -> None:
        """Take one step."""
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._steps, self._trained = self._steps + 1, sum(parameter.numel() for parameter in trained)
        for parameter in trained:
            if parameter.grad is None:
                continue
            parameter.grad /= self._scale
            if not all_finite(parameter.grad):
                dtype = next(self.module.parameters()).dtype
                raise PruneForgeError(f"{self._who} met gradients that are not finite in {dtype}; try another `dtype`")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def write(self, parameters: Mapping[str, Tensor]) -> None:
        """Write new values of parameters."""
        with torch.no_grad():
            for name, value in parameters.items():
                rounded = self._masked(name, value)
                if not all_finite(rounded):
                    raise PruneForgeError(f"{self._who} made {name!r} too large for {rounded.dtype}, or not a number")
                if not torch.equal(self._named[name], rounded):
                    self._named[name].copy_(rounded)
                    self._changed.add(name)
        self._written.update(parameters)

    def checkpoint(self, state: Mapping[str, Any]) -> None:
        """Save what the recovery goes on from."""
        if self._state is None:
            return
        told = {"facts": self._facts, "warnings": self._warnings}
        counts = {"steps": self._steps, "trained": self._trained, **told}
        random = {"cpu": torch.get_rng_state()}
        if self._device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self._device)
        save_state({"recovery": dict(state), **counts, "random": random}, self._state)

    def restored(self) -> dict[str, Any] | None:
        """Return what was saved last, or `None`."""
        saved = load_state(self._state) if self._state is not None else None
        if saved is None:
            return None
        self._steps, self._trained = saved["steps"], saved["trained"]
        self._facts = {**saved["facts"], **self._facts}
        self._warnings = list(dict.fromkeys([*saved["warnings"], *self._warnings]))
        torch.set_rng_state(saved["random"]["cpu"])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(saved["random"]["cuda"], self._device)
        state: dict[str, Any] = saved["recovery"]
        return state

    def report(self, **facts: Any) -> None:
        """Add facts to the report."""
        for name in RESERVED & facts.keys():
            raise PruneForgeError(f"{self._who} reports {name!r}, which every recovery's entry has; name it otherwise")
        self._facts.update(facts)

    def warn(self, text: str) -> None:
        """Add a warning."""
        self._warnings.append(text)

    def _prepare_masks(self) -> None:
        """Note which values of each parameter may change: neither pruned ones, nor those of layers left dense."""
        self._free: dict[int, Tensor] = {}  # by the parameter's id; without an entry all may
        self.masks = {}
        held = {id(layer.parameter) for layer in self.layers}
        for layer in [*self.layers, *(layer for layer in self._left_dense if id(layer.parameter) in held)]:
            free = self._free.setdefault(id(layer.parameter), torch.ones_like(layer.parameter, dtype=torch.bool))
            part = layer.view(free)
            if layer.name in self._given:
                part.copy_(self._given[layer.name])
                self.masks[layer.name] = part.clone()
            else:
                part.fill_(False)

    def _masked(self, name: str, value: Tensor) -> Tensor:
        """Return a new value of a parameter in its dtype, with what may not change as it is in the model.

        Pruned weights are zero there.
        """
        parameter = self._named.get(name)
        if parameter is None:
            raise PruneForgeError(f"{self._who} replaces {name!r}, which is not one of `site.parameters()`")
        if value.shape != parameter.shape:
            shapes = f"{tuple(value.shape)} in place of {tuple(parameter.shape)}"
            raise PruneForgeError(f"{self._who} made {name!r} of shape {shapes}")
        rounded, free = value.to(parameter.dtype), self._free.get(id(parameter))
        return rounded if free is None else torch.where(free, rounded, parameter)

    @contextmanager
    def _replaced(self, stand_ins: Mapping[str, Tensor]) -> Iterator[None]:
        """Have the model use tensors in place of parameters within the context, wherever it uses these."""
        tensors = {id(self._named[name]): tensor for name, tensor in stand_ins.items()}
        places = [
            (part, name, parameter)
            for part in self.module.modules()
            for name, parameter in part._parameters.items()
            if parameter is not None and id(parameter) in tensors
        ]
        try:
            for part, name, parameter in places:
                part._parameters[name] = tensors[id(parameter)]  # type: ignore[assignment]
            yield
        finally:
            for part, name, parameter in places:
                part._parameters[name] = parameter

    def _check_masks(self) -> None:
        """Raise unless every mask is of a layer of the model."""
        shapes = {layer.name: layer.shape for layer in self.layers}
        for name, mask in self._given.items():
            if shapes.get(name) != tuple(mask.shape):
                found = f"of shape {shapes[name]}" if name in shapes else "not in the model"
                raise PruneForgeError(f"the mask of {name!r} is {tuple(mask.shape)}, and the layer is {found}")

    def _check_zeros(self, who: str) -> None:
        """Raise if a pruned weight is not zero."""
        for layer in self.layers:
            matrix = layer.matrix()
            if matrix.masked_fill(self._given[layer.name].to(matrix.device), 0).count_nonzero():
                raise PruneForgeError(f"{who} has weights of layer {layer.name!r} where its mask prunes")

    def _check(self, versions: Mapping[str, int], kept: Sequence[tuple[Layer, Tensor]]) -> None:
        """Raise if something was changed that was not written, or may not change."""
        for name, parameter in self._named.items():
            if parameter._version != versions[name] and name not in self._written:
                raise PruneForgeError(f"{self._who} changed {name!r} in place; it must use `site.write`")
        for layer, weight in kept:
            if not torch.equal(layer.matrix(), weight):
                raise PruneForgeError(f"{self._who} changed layer {layer.name!r}, which is excluded")
        self._check_zeros(self._who)
