"""The hooks a plugin may implement.

pluggy does two things here: registration, and observation of a run. It is never in the inner loop:
numerics go through the classes a plugin registers. Implement a hook as a function of the same name
in the plugin's module, marked with `pruneforge.hookimpl`; take only the arguments you need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from pruneforge.interfaces.registry import Registry
    from pruneforge.interfaces.run import BlockResult, Run

hookspec = pluggy.HookspecMarker("pruneforge")
hookimpl = pluggy.HookimplMarker("pruneforge")


@hookspec
def pruneforge_register(registry: Registry) -> None:
    """Register the plugin's metrics, allocators, refiners, recoveries, objectives, adapters, observers and so on.

    Called once, when plugins are discovered. Give names and `"module:Class"` targets; the module is
    imported when somebody asks for the name, so a plugin's own package stays cheap to import.
    """


@hookspec
def pruneforge_run_started(run: Run) -> None:
    """Observe that a run starts, before the first block is calibrated.

    `run` names the metric, the pattern, the blocks and their layers. Return nothing.
    """


@hookspec
def pruneforge_block_pruned(run: Run, result: BlockResult) -> None:
    """Observe that a block has its masks, before the next block is calibrated.

    `result` holds the block's name and position, the mask of each of its layers, and the metric's notes; the block's
    weights are there while this is called, and a streamed run may still be writing them. Called once a block (and
    pattern, if a run has several), in the order of the model, but not for blocks that an earlier process of a resumed
    run has finished; in each process of several. Return nothing, and treat masks and weights as read only.
    """


@hookspec
def pruneforge_run_finished(run: Run, report: dict[str, Any]) -> None:
    """Observe that a run is over and its report is complete, before it is written.

    `report` is what `pruneforge.json` will hold. Return nothing.
    """
