"""What tests of the recovery of a whole model share: a small model, data, and a stop in the middle."""

from __future__ import annotations

from pathlib import Path

import torch
from conftest import tiny_llama, tokens
from safetensors.torch import load_file

from pruneforge.engine.model_recovery import PrunedModel

QUICK = {"steps": 6, "save_every": 2, "rank": 4, "lr": 3e-3, "vector_lr": 1e-2}
PERP = {"recover": "perp", "recover_options": QUICK}


def saved(folder: Path) -> Path:
    """Save a LLaMA with biases in several files."""
    tiny_llama(torch.float32, attention_bias=True).save_pretrained(folder, max_shard_size="100KB")
    return folder


def batches():
    return tokens().split(3)


def weights(folder) -> dict[str, torch.Tensor]:
    return {
        name: value for file in sorted(Path(folder).glob("*.safetensors")) for name, value in load_file(file).items()
    }


def stopped_at(monkeypatch, step):
    """Interrupt training once it has taken so many steps."""
    taken = []
    real = PrunedModel.step

    def counted(self, optimizer):
        if len(taken) == step:
            raise KeyboardInterrupt
        taken.append(None)
        real(self, optimizer)

    monkeypatch.setattr(PrunedModel, "step", counted)
