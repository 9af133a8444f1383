"""Train the small language model that `pruneforge demo` prunes.

Run `python -m pruneforge_demo.train_text --output DIR`; it takes about a quarter of an hour on two
CPU cores and needs no network. The tokenizer and the weights are trained only on the training part of
`pruneforge_demo.corpus`.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pruneforge_demo import corpus

CONTEXT = 256


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with `vocabulary` entries, trained on `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=CONTEXT
    )


def train(output: Path, steps: int, batch: int, vocabulary: int, seed: int) -> None:
    """Train for `steps` steps of `batch` windows each, and save model and tokenizer to `output`."""
    torch.manual_seed(seed)
    texts = corpus.documents("training")
    tokenizer = train_tokenizer(texts, vocabulary)
    ids = torch.tensor(tokenizer("</s>".join(texts), verbose=False)["input_ids"])
    held_out = torch.tensor(tokenizer("\n\n".join(corpus.documents("evaluation")), verbose=False)["input_ids"])
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(ids):,} training tokens", flush=True)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=3e-3,
        betas=(0.9, 0.95),
    )
    warmup = 100
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps))),
    )
    start = time.perf_counter()
    for step in range(steps):
        offsets = torch.randint(len(ids) - CONTEXT, (batch,)).tolist()
        window = torch.stack([ids[i : i + CONTEXT] for i in offsets])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=window, labels=window, use_cache=False).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            seconds = time.perf_counter() - start
            print(
                f"step {step} loss {loss.item():.3f} held out {_loss(model, held_out):.3f} {seconds:.0f} s",
                flush=True,
            )
    model.bfloat16().save_pretrained(output)
    tokenizer.save_pretrained(output)


@torch.no_grad()
def _loss(model: LlamaForCausalLM, ids: torch.Tensor) -> float:
    """Return the mean loss on the first 32 windows of held-out text."""
    windows = ids[: 32 * CONTEXT].view(32, CONTEXT)
    return model(input_ids=windows, labels=windows, use_cache=False).loss.item()


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=16, help="windows a step")
    parser.add_argument("--vocabulary", type=int, default=1536)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    train(arguments.output, arguments.steps, arguments.batch, arguments.vocabulary, arguments.seed)


if __name__ == "__main__":
    main()
