"""The groups in which the help shows options."""

from __future__ import annotations

from typing import Any

PANELS = {
    "Method": (
        "metric sparsity pattern options exclude propagate allocator allocator_options refine refine_options recover "
        "recover_options objective objective_options controls seeds"
    ),
    "Calibration": "calibration samples seqlen source_options streams",
    "Evaluation": "task task_options dense points loss_increase",
    "Model": "adapter_options dtype revision",
    "Output": "output items force as_json dry_run details profile observe observe_options quiet",
    "Resources": "device batch_size memory_budget device_memory_budget gradient_cache resume executor workers address "
    "num_cpus num_gpus",
    "Other": "seed config plugins trust debug help",
}
"""Names of the options of each group, in the order of the help."""

_PANEL_OF = {name: panel for panel, names in PANELS.items() for name in names.split()}
_ORDER = {name: place for place, name in enumerate(_PANEL_OF)}


def arranged(parameters: list[Any]) -> list[Any]:
    """Return parameters in the order of their groups, each with its group."""
    for parameter in parameters:
        if parameter.param_type_name != "option":
            continue
        if parameter.rich_help_panel is None:
            parameter.rich_help_panel = _PANEL_OF.get(parameter.name)
        if parameter.is_flag:
            parameter.metavar = ""  # it takes no value
    return sorted(parameters, key=_place)


def _place(parameter: Any) -> int:
    if parameter.param_type_name == "argument":
        return -1
    if parameter.rich_help_panel not in (None, *PANELS):
        return len(_ORDER) + 1  # a plugin's options come last
    return _ORDER.get(parameter.name, len(_ORDER))
