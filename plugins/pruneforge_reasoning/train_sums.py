"""Train a small LLaMA that does sums step by step.

Run `python -m pruneforge_reasoning.train_sums --output DIR`; it takes some minutes on two CPU cores and needs no
network. Each character is a token. The sums have one to six steps, are drawn anew in each batch, and are never
among those that `sums` asks, but for those of one step.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pruneforge_reasoning.sums import ALPHABET, END, worked

CONTEXT = 160
UNKNOWN = "?"


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of the characters that sums are written in."""
    vocabulary = {token: number for number, token in enumerate([END, UNKNOWN, *ALPHABET])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    made.add_special_tokens([END])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END, unk_token=UNKNOWN, model_max_length=CONTEXT)


def train(output: Path, steps: int, batch: int, seed: int) -> None:
    """Train for `steps` steps of `batch` sums each, and save model and tokenizer to `output`."""
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    draw, characters = random.Random(f"training {seed}"), tokenizer()
    config = LlamaConfig(
        vocab_size=len(characters),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        bos_token_id=None,
        eos_token_id=characters.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 100, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
    )
    start = time.perf_counter()
    for step in range(steps):
        ids, labels = _batch(draw, batch, characters)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step} loss {loss.item():.4f} {time.perf_counter() - start:.0f} s", flush=True)
    model.save_pretrained(output)
    characters.save_pretrained(output)


def _batch(draw: random.Random, count: int, characters: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Return token ids and labels of worked sums, int64 [sums, tokens]; only answers are learnt."""
    pairs = [(len(asked), characters(asked + said + END)["input_ids"]) for asked, said in worked(draw, count)]
    longest = max(len(ids) for _, ids in pairs)
    ids = torch.full((count, longest), characters.eos_token_id)
    labels = torch.full((count, longest), -100)
    for row, (asked, tokens) in enumerate(pairs):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        labels[row, asked : len(tokens)] = ids[row, asked : len(tokens)]
    return ids, labels


def positive(text: str) -> int:
    """Return a number of one or more, from the command line."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--steps", type=positive, default=1500)
    parser.add_argument("--batch", type=positive, default=64, help="sums a step")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    train(arguments.output, arguments.steps, arguments.batch, arguments.seed)


if __name__ == "__main__":
    main()
