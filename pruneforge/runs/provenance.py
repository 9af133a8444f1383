"""Where a result comes from: versions, machine, model and data, and which of these determine its bytes."""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pruneforge.interfaces.options import Configurable
from pruneforge.interfaces.recipe import RecoverRecipe
from pruneforge.interfaces.registry import KINDS
from pruneforge.interfaces.run import Run
from pruneforge.interfaces.statistics import Requirement, kind_of
from pruneforge.plugins import DISTRIBUTION, loaded_plugins

if TYPE_CHECKING:
    from pruneforge.data.calibration import Calibration
    from pruneforge.runs.session import Session

PACKAGES = ("pruneforge", "torch", "triton", "transformers", "timm", "datasets", "lm-eval", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that affect a result."""
    packages = {name: _version(DISTRIBUTION if name == "pruneforge" else name) for name in PACKAGES}
    return {"python": platform.python_version(), **packages}


@functools.cache
def _version(distribution: str) -> str:
    """Return an installed version, read once: parsing the metadata of all takes as long as pruning a tiny model."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def machine() -> dict[str, Any]:
    """Return what timings depend on: processor, cores, threads, accelerators, system."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerators": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def fingerprint(module: nn.Module) -> str:
    """Return a hash of a model's parameters: names, shapes, dtypes and up to 4096 values of each."""
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        values = parameter.detach().flatten()
        sample = values[:: max(1, len(values) // 4096)].contiguous().cpu()
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


VERSIONED_FOR_GRADIENTS = ("pruneforge", "torch", "transformers", "timm")
"""Packages whose version may change the gradients of the dense model."""


VERSIONED = (*VERSIONED_FOR_GRADIENTS, "triton")
"""Packages whose version may change the bytes of an output."""


def run_identity(session: Session, run: Run) -> dict[str, Any]:
    """Return everything that determines the bytes of a run's output."""
    data = session.description_of(run)
    streams = {name: stream["fingerprint"] for name, stream in data.get("streams", {}).items()}
    return {
        "recipe": run.recipe.model_dump(mode="json"),
        "plugin file": {path: file_hash(Path(path)) for path in run.recipe.plugins},
        "plugin": {name: plugin["sha256"] for name, plugin in run.plugins.items()},
        "model": {"fingerprint": session.fingerprint},
        "batch size": data.get("batch_size"),
        "calibration data": {"fingerprint": data.get("fingerprint"), **streams},
        "processes": session.group.size,
        "device": device_name(session.device),
        "version of": _versions(VERSIONED),
    }


def recovery_identity(
    recipe: RecoverRecipe,
    plugins: Mapping[str, Mapping[str, str]],
    pruned: str,
    masks: Path,
    data: Mapping[str, Any],
    device: torch.device,
) -> dict[str, Any]:
    """Return everything that determines the bytes of a model that is recovered after pruning.

    Args:
        recipe: What is asked for.
        plugins: The sources of what does it.
        pruned: Fingerprint of the pruned weights.
        masks: The file of their masks.
        data: Description of the calibration data.
        device: Where it is computed.
    """
    return {
        "recipe": recipe.model_dump(mode="json"),
        "plugin file": {path: file_hash(Path(path)) for path in recipe.plugins},
        "plugin": {name: plugin["sha256"] for name, plugin in plugins.items()},
        "model": {"fingerprint": pruned, "masks": file_hash(masks)},
        "batch size": data.get("batch_size"),
        "calibration data": {"fingerprint": data.get("fingerprint")},
        "device": device_name(device),
        "version of": _versions(VERSIONED),
    }


def gradient_identity(session: Session, data: Calibration) -> dict[str, Any]:
    """Return everything that determines the gradients of the dense model: model, data, loss, versions."""
    adapter = session.loaded.adapter
    return {
        "format": 1,
        "model": session.fingerprint,
        "dtype": str(next(session.loaded.module.parameters()).dtype),
        "calibration data": data.description.get("fingerprint"),
        "loss": data.description.get("loss"),
        "adapter": {"name": adapter.name, "options": session.runs[0].recipe.adapter_options},
        **_objective_identity(session),
        "device": device_name(session.device),
        "version of": _versions(VERSIONED_FOR_GRADIENTS),
    }


def _objective_identity(session: Session) -> dict[str, Any]:
    run = next((run for run in session.runs if run.objective is not None), None)
    if run is None or run.objective is None:
        return {}
    described = {"name": run.objective.name, "options": run.objective.options.model_dump(mode="json")}
    packages = sorted({cls.__module__.partition(".")[0] for cls in type(run.objective).__mro__})
    sources = {name: run.plugins[name] for name in packages if name in run.plugins}
    return {"objective": {**described, "sources": sources}}


def plugin_sources(made: Sequence[Configurable], requires: Sequence[Requirement] = ()) -> dict[str, dict[str, str]]:
    """Return distribution, version and a hash of the sources of each package whose classes make a run's method.

    A plugin that was edited between a stop and resuming would go on with another method otherwise.

    Args:
        made: The plugins.
        requires: The statistics that they require.
    """
    parts = _with_parts(made)
    installed = loaded_plugins()
    origins = {plugin.name: (plugin.origin, plugin.version) for plugin in installed.loaded}
    entries = [entry for kind in KINDS for entry in installed.registry.entries(kind)]
    of_module = {entry.module.partition(".")[0]: origins.get(entry.plugin, ("", "")) for entry in entries}
    classes = [cls for part in parts for cls in type(part).__mro__]
    classes += [cls for required in requires for cls in kind_of(required).__mro__]
    sources: dict[str, dict[str, str]] = {}
    for name in sorted({cls.__module__.partition(".")[0] for cls in classes} - _NOT_PLUGINS):
        origin, version = of_module.get(name, ("", ""))
        text = _source(name, [cls for cls in classes if cls.__module__.partition(".")[0] == name], name in of_module)
        sources[name] = {"distribution": origin, "version": version, "sha256": hashlib.sha256(text).hexdigest()}
    return sources


def _with_parts(plugins: Iterable[Configurable]) -> list[Configurable]:
    """Return plugins with those that they are built on: what their attributes hold, alone, in sequences or mappings."""
    found: dict[int, Configurable] = {}
    waiting = list(plugins)
    while waiting:
        plugin = waiting.pop()
        if id(plugin) in found:
            continue
        found[id(plugin)] = plugin
        for value in vars(plugin).values():
            values = (
                value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else [value]
            )
            waiting += [each for each in values if isinstance(each, Configurable)]
    return list(found.values())


_NOT_PLUGINS = frozenset({"abc", "builtins", "pruneforge", "pydantic", "typing"})
"""Where base classes come from whose versions the identity holds otherwise."""


def _source(package: str, classes: Sequence[type], registered: bool) -> bytes:
    """Return the sources of a plugin's whole package; of classes that nobody registered, their modules' or own."""
    file = getattr(sys.modules.get(package), "__file__", None)
    if registered and file is not None and Path(file).name == "__init__.py":
        folder = Path(file).parent
        files = sorted(folder.rglob("*.py"))
        return b"".join(path.relative_to(folder).as_posix().encode() + path.read_bytes() for path in files)
    if package == "__main__":  # a script: what else it does has no say
        return b"".join(_own_source(cls) for cls in dict.fromkeys(classes))
    modules = sorted({cls.__module__ for cls in classes})
    files = [Path(path) for path in (getattr(sys.modules.get(name), "__file__", None) for name in modules) if path]
    return b"".join(path.name.encode() + path.read_bytes() for path in files)


def _own_source(cls: type) -> bytes:
    try:
        return inspect.getsource(cls).encode()
    except (OSError, TypeError):  # typed at a prompt
        return b""


def device_name(device: torch.device) -> str:
    """Return the kind of device, and the model of a GPU, since models round differently."""
    return f"cuda, {torch.cuda.get_device_name(device)}" if device.type == "cuda" else device.type


def _versions(packages: Sequence[str]) -> dict[str, str]:
    return {name: version for name, version in versions().items() if name in packages}


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file, which is read in parts: masks may be large."""
    digest = hashlib.sha256()
    with path.open("rb") as opened:
        while part := opened.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
