"""One pruning run by PruneForge, by llm-compressor, or by a plain loop, in a process of its own.

    python benchmarks/contenders.py WHO METRIC MODEL OUTPUT

`benchmarks/speed.py` runs these in turn. WHO is pruneforge, llm-compressor or plain. Prints seconds, from the model's
folder to pruned weights (PruneForge's are on disk by then, the others' in memory), and bytes of host memory: the peak,
and what was held when the libraries were imported; and PruneForge's seconds by stage. OUTPUT receives the weights, to
compare masks.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from workload import token_ids

SPARSITY = 0.5
Run = Callable[[], Callable[[], None]]
"""Imports and prepares nothing else; calling it runs, and returns what writes the weights."""


def pruneforge(metric: str, model: Path, output: Path) -> Run:
    """PruneForge as its users call it."""
    import pruneforge as pf
    import pruneforge.runs.job

    def run() -> Callable[[], None]:
        batches = token_ids().split(2)
        pf.prune(model, metric, SPARSITY, None, batches, output=output, gradient_cache=output.with_suffix(".cache"))
        return lambda: None

    return run


def llm_compressor(metric: str, model: Path, output: Path) -> Run:
    """llm-compressor's modifiers with their defaults."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from transformers import AutoModelForCausalLM

    modifier = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[metric]

    def run() -> Callable[[], None]:
        ids = token_ids()
        data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
        oneshot(
            model=loaded,
            dataset=data,
            recipe=[modifier(sparsity=SPARSITY, mask_structure="0:0", targets=["Linear"], ignore=["lm_head"])],
            num_calibration_samples=len(ids),
            max_seq_length=ids.shape[1],
            shuffle_calibration_samples=False,
        )
        return lambda: save(loaded, output)

    return run


def plain(metric: str, model: Path, output: Path) -> Run:
    """The loop of the research repositories."""
    import plain_loop
    from transformers import AutoModelForCausalLM

    def run() -> Callable[[], None]:
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype="float32").eval()
        plain_loop.prune(loaded, metric, token_ids(), SPARSITY)
        return lambda: save(loaded, output)

    return run


def save(model: nn.Module, output: Path) -> None:
    """Write the weights of the blocks' layers."""
    from safetensors.torch import save_file

    output.mkdir(parents=True)
    tensors: dict[str, Tensor] = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, output / "model.safetensors")


def peak_bytes() -> int:
    """Return the most that this process held in memory so far; `getrusage` would count the parent's too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def main() -> None:
    who, metric, model, output = sys.argv[1:]
    make = {"pruneforge": pruneforge, "llm-compressor": llm_compressor, "plain": plain}
    run = make[who](metric, Path(model), Path(output))
    importlib.import_module("transformers.models.llama.modeling_llama")  # each needs it when it loads the model
    imported = peak_bytes()
    start = time.perf_counter()
    write = run()
    seconds = time.perf_counter() - start
    peak = peak_bytes()
    write()
    report = Path(output) / "pruneforge.json"
    stages = json.loads(report.read_text())["measured"]["seconds"] if report.exists() else {}
    print(json.dumps({"seconds": seconds, "peak_bytes": peak, "imported_bytes": imported, "stages": stages}))


if __name__ == "__main__":
    main()
