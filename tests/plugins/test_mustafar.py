"""Pruned key-value caches: what is kept, decoding equals the one-shot form, the bitmap format, and what it costs."""

from __future__ import annotations

import pytest
import torch
import transformers
from conftest import CHECKPOINT, tiny_llama, tokens
from test_llama import FAMILIES, tiny

import pruneforge
from pruneforge import PruneForgeError
from pruneforge_mustafar.attention import OneShot, attention
from pruneforge_mustafar.bitmap import TILE, compress
from pruneforge_mustafar.cache import PrunedCache
from pruneforge_mustafar.rules import Pruning


def states(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.7, 0.95])
def test_the_smallest_entries_of_each_token_go(sparsity):
    given = states(2, 3, 8, 32)
    pruned = Pruning(sparsity).prune(given)
    for before, after in zip(given.reshape(-1, 32), pruned.reshape(-1, 32), strict=True):
        order = sorted(range(32), key=lambda place: abs(before[place]))
        gone = set(order[: int(32 * sparsity)])
        assert all(after[place] == (0 if place in gone else before[place]) for place in range(32))


def test_rules_of_groups_compare_within_a_channel_or_prune_whole_channels():
    given = states(1, 2, 16, 10)
    by_channel = Pruning(0.5, "channel", 8).prune(given)
    for head, group, channel in [(0, 0, 0), (1, 1, 7)]:
        before = given[0, head, 8 * group : 8 * group + 8, channel]
        after = by_channel[0, head, 8 * group : 8 * group + 8, channel]
        assert set(after.nonzero().flatten().tolist()) == set(before.abs().topk(4).indices.tolist())
    structured = Pruning(0.3, "structured", 8).prune(given)
    for head in range(2):
        for group in range(2):
            part = slice(8 * group, 8 * group + 8)
            norms = given[0, head, part].square().sum(0)
            gone = set(norms.topk(3, largest=False).indices.tolist())
            assert {c for c in range(10) if not structured[0, head, part, c].any()} == gone


def decoded(model, ids, cache, prompt):
    """Return the logits after `prompt` tokens, of tokens that come one after another."""
    found = []
    with torch.no_grad():
        model(input_ids=ids[:, :prompt], past_key_values=cache)
        for place in range(prompt, ids.shape[1]):
            found.append(model(input_ids=ids[:, place : place + 1], past_key_values=cache).logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize(
    ("keys", "values"),
    [
        (Pruning(0.7), Pruning(0.7)),
        (Pruning(0.5, "output"), Pruning(0.0)),
        (Pruning(0.5, "channel", 4), Pruning(0.75, "channel", 4)),
        (Pruning(0.6, "structured", 4), Pruning(0.5, "channel", 4)),
    ],
    ids=["token", "output", "channel", "structured"],
)
def test_decoding_gives_what_the_one_shot_form_gives(keys, values):
    model, ids, window = tiny_llama(max_position_embeddings=128), tokens(2, 60), 5
    with torch.no_grad(), attention(model, OneShot(keys, values, window)):
        expected = model(input_ids=ids, use_cache=False).logits
    cache = PrunedCache(keys, values, window)
    with cache.watching(model):
        found = decoded(model, ids, cache, prompt=window)
    torch.testing.assert_close(found, expected[:, window:], rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        dense = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(expected[:, :window], dense[:, :window], rtol=1e-9, atol=1e-9)
    assert (expected[:, -1] - dense[:, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_and_without_sparsity_nothing_changes(family):
    model, ids = tiny(family), tokens(2, 20, vocabulary=96)
    with torch.no_grad():
        dense = model(input_ids=ids, use_cache=False).logits
        with attention(model, OneShot(Pruning(0.0), Pruning(0.0), 1)):
            torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, dense, rtol=1e-5, atol=1e-6)
        with attention(model, OneShot(Pruning(0.7), Pruning(0.7), 4)):
            expected = model(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, dense, rtol=0, atol=0)
    found = decoded(model, ids, PrunedCache(Pruning(0.7), Pruning(0.7), 4), prompt=4)
    torch.testing.assert_close(found, expected[:, 4:], rtol=1e-5, atol=1e-6)


def test_a_prompt_is_seen_whole_and_pruned_when_the_next_token_comes():
    model, ids = tiny_llama(), tokens(1, 21)
    cache = PrunedCache(Pruning(0.5), Pruning(0.5), 4)
    with torch.no_grad():
        first = model(input_ids=ids[:, :20], past_key_values=cache).logits
        assert torch.equal(first, model(input_ids=ids[:, :20], past_key_values=transformers.DynamicCache()).logits)
        model(input_ids=ids[:, 20:], past_key_values=cache)
    keys = cache.layers[0].keys
    assert (keys[:, :, :17] == 0).float().mean() == 0.5
    assert (keys[:, :, 17:] != 0).all()


def test_models_generate_with_it():
    model = transformers.AutoModelForCausalLM.from_pretrained(CHECKPOINT)
    ids = torch.tensor([[5, 80, 200, 33]])
    for beams in (1, 2):
        settings = {"max_new_tokens": 40, "do_sample": False, "num_beams": beams}
        plainly = model.generate(ids, **settings)
        without = model.generate(ids, past_key_values=PrunedCache(Pruning(0.0), Pruning(0.0), 4), **settings)
        assert torch.equal(plainly, without)
        cache = PrunedCache(Pruning(0.5, "output"), Pruning(0.5), 4)
        with cache.watching(model):
            assert model.generate(ids, past_key_values=cache, **settings).shape[1] > 4


@pytest.mark.parametrize(
    ("along", "shape"), [(2, (2, 2, 128, 24)), (3, (2, 2, 10, 128)), (3, (1, 1, 3, 40)), (2, (1, 2, 70, 5))]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_bitmap_format_comes_back_exactly(along, shape, dtype):
    given = Pruning(0.7).prune(states(*shape)).to(dtype)
    packed = compress(given, along)
    assert torch.equal(packed.decompress(), given)
    tiles = torch.nn.functional.pad(given.movedim(along, -1), (0, -shape[along] % TILE)).reshape(-1, TILE)
    for number, tile in enumerate(tiles.tolist()):
        bits = sum(1 << (TILE - 1 - place) for place, value in enumerate(tile) if value)
        assert packed.bitmaps[number].item() % (1 << 64) == bits
        begin = 2 * packed.offsets[number].item()
        there = [value for value in tile if value]
        assert packed.values[begin : begin + len(there)].tolist() == there
        assert begin % 8 == 0


@pytest.mark.parametrize("along", [2, 3])
def test_at_70_percent_it_takes_45_percent_of_the_bytes(along):
    given = Pruning(0.7).prune(states(1, 8, 256, 128)).half()
    assert compress(given, along).nbytes / given.nbytes == pytest.approx(0.45, abs=0.01)


def test_a_cache_counts_its_bytes():
    model, ids = tiny_llama(torch.float16), tokens(1, 60)
    cache = PrunedCache(Pruning(0.0), Pruning(0.0), 4)
    decoded(model.float(), ids, cache, 4)
    packed, dense = cache.nbytes()
    assert dense == 3 * 2 * 2 * 60 * 16 * 4  # layers, keys and values, heads, tokens, channels, bytes
    assert packed > dense  # nothing is pruned, and each tile has a bitmap


def test_perplexity_falls_little_by_token_and_much_by_chance():
    asked = {"data": "python-docs", "window": 128, "limit": 24, "recent": 8, "dtype": "float32"}
    dense = pruneforge.evaluate(CHECKPOINT, "perplexity", data="python-docs", window=128, limit=24, dtype="float32")
    same = pruneforge.evaluate(CHECKPOINT, "kv-perplexity", keys=0.0, values=0.0, **asked)
    assert same["perplexity"] == pytest.approx(dense["perplexity"], rel=1e-5)
    rules = {"token": {}, "random": {"key_rule": "random", "value_rule": "random"}}
    found = {rule: pruneforge.evaluate(CHECKPOINT, "kv-perplexity", **asked, **more) for rule, more in rules.items()}
    rise = {rule: each["perplexity"] / dense["perplexity"] - 1 for rule, each in found.items()}
    assert 0 < rise["token"] < rise["random"] / 3
    assert found["token"]["cache"] == {
        "keys": 0.7, "key_rule": "token", "values": 0.7, "value_rule": "token", "recent": 8,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"recent": 0}, "recent"),
        ({"keys": 1.0}, "keys"),
        ({"value_rule": "output"}, "the rule 'output' is for keys"),
        ({"key_rule": "no"}, "key_rule"),
    ],
)
def test_bad_options_are_one_line(options, said):
    with pytest.raises(PruneForgeError, match=said) as error:
        pruneforge.evaluate(CHECKPOINT, "kv-perplexity", data="python-docs", **options)
    assert "\n" not in str(error.value)


def test_a_cache_says_what_it_cannot_do():
    with pytest.raises(PruneForgeError, match="holds no token"):
        PrunedCache(Pruning(0.5), Pruning(0.5), 0)
    model, cache = tiny_llama(), PrunedCache(Pruning(0.5, "output"), Pruning(0.5), 2)
    with pytest.raises(PruneForgeError, match=r"within cache\.watching"):
        decoded(model, tokens(1, 8), cache, 4)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "bloom", "gptj", "opt", "falcon", "mpt"])
def test_other_models_are_pruned_or_refused_and_never_left_alone(kind):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
    own = {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "d_model": 32, "n_layers": 2, "n_heads": 4}
    more = own if kind in ("gptj", "mpt") else {"word_embed_proj_dim": 32}
    config = transformers.AutoConfig.for_model(kind, **sizes, **more)
    model, ids = transformers.AutoModelForCausalLM.from_config(config).eval(), tokens(2, 20)
    refused = None
    with torch.no_grad():
        dense = model(input_ids=ids, use_cache=False).logits
        try:
            with attention(model, OneShot(Pruning(0.7), Pruning(0.7), 4)):
                found = model(input_ids=ids, use_cache=False).logits
        except PruneForgeError as error:
            refused = str(error)
    if refused is None:
        assert (found[:, -1] - dense[:, -1]).abs().max() > 1e-6
    else:
        assert "cannot be replaced" in refused


def test_models_without_text_are_refused_in_one_line():
    with pytest.raises(PruneForgeError, match="cannot be replaced") as error:
        pruneforge.evaluate("demo:image", "kv-perplexity", data="python-docs")
    assert "\n" not in str(error.value)
