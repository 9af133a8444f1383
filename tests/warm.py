"""What a process that runs `pruneforge` imports, so that those that are forked from it have it already.

But for the command line itself, which asks for the width of the terminal when it is imported.
"""

import importlib.util
from importlib import metadata

import pruneforge

for name in pruneforge.__all__:
    getattr(pruneforge, name)
for name in ("transformers", "transformers.models.llama.modeling_llama", "timm", "tokenizers", "triton"):
    importlib.import_module(name)
for point in metadata.entry_points(group="pruneforge"):
    if point.name != "lm-eval":  # as long to import as everything else together, and seldom used
        module = point.load()
        for part in ("metric", "adapter", "text", "image", "files", "hub", "evaluator"):
            if importlib.util.find_spec(f"{module.__name__}.{part}") is not None:
                importlib.import_module(f"{module.__name__}.{part}")
importlib.import_module("pruneforge_demo.corpus")
