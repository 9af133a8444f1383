"""What a process that runs `pruneforge` imports, so that those that are forked from it have it already."""

import importlib
from importlib import metadata

import pruneforge
import pruneforge.cli

for name in pruneforge.__all__:
    getattr(pruneforge, name)
for name in ("prune", "evaluate", "compare", "plugins", "doctor", "demo"):
    importlib.import_module(f"pruneforge.cli.{name}")
for name in ("transformers", "transformers.models.llama.modeling_llama", "timm", "tokenizers", "triton"):
    importlib.import_module(name)
for point in metadata.entry_points(group="pruneforge"):
    if point.name != "lm-eval":  # as long to import as everything else together, and seldom used
        module = point.load()
        for part in ("metric", "adapter", "text", "image", "files", "hub", "evaluator"):
            if importlib.util.find_spec(f"{module.__name__}.{part}") is not None:
                importlib.import_module(f"{module.__name__}.{part}")
importlib.import_module("pruneforge_demo.corpus").documents("calibration")
