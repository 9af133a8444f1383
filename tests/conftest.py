"""Tiny real models, batches and data that the tests share."""

from __future__ import annotations

import json
import os
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the libraries below are imported
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("PRUNEFORGE_QUIET", "1")  # messages are compared without the lines that tell of progress
# What commands write is compared, and where plugin files lie is Python's own cache of them not their doing.
os.environ["PYTHONDONTWRITEBYTECODE"], sys.dont_write_bytecode = "1", True
os.environ.setdefault("COLUMNS", "200")  # tables are as wide as the terminal was when the console was made
# Tiny models gain nothing from threads, which wait for one another as soon as something else runs on the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Processes that tests start find the modules beside this one too.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pruneforge import Block, Metric, hookimpl
from pruneforge.interfaces.recipe import PruneRecipe
from pruneforge.interfaces.run import Run
from pruneforge.plugins import loaded_plugins
from pruneforge.runs.method import Method

DATA = Path(os.environ.get("PRUNEFORGE_DATA", Path(__file__).parents[2] / "shared" / "data"))
CHECKPOINT = Path(__file__).parents[1] / "plugins" / "pruneforge_demo" / "checkpoints" / "text"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of pretrained models and real text that is not part of the repository."""
    if not (DATA / "stories260K").is_dir():
        pytest.skip(f"no stories260K in {DATA}; set PRUNEFORGE_DATA to a folder that has it")
    return DATA


@pytest.fixture(scope="session", autouse=True)
def demo_text(request, tmp_path_factory) -> Iterator[Path]:
    """Where the demo keeps its text, which takes seconds to parse, for all tests and those of the next time."""
    kept = getattr(request.config, "cache", None)  # missing with `-p no:cacheprovider`
    folder = kept.mkdir("python-docs") if kept else tmp_path_factory.mktemp("demo") / "python-docs"
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PRUNEFORGE_CACHE", str(folder.parent))  # for fixtures that several tests share
        yield folder


@pytest.fixture(scope="session")
def little_text(tmp_path_factory, demo_text) -> Path:
    """The same with 40 KB of text for evaluation in place of 160."""
    from pruneforge_demo import corpus

    library = Path(sysconfig.get_path("stdlib"))
    sources = list(corpus._sources(library))
    parts = dict(corpus._parts())
    sizes = accumulate(map(len, parts["evaluation"]))
    parts["evaluation"] = tuple(text for text, size in zip(parts["evaluation"], sizes, strict=True) if size < 40_000)
    folder = tmp_path_factory.mktemp("little")
    corpus._write(folder / corpus.cache_file().name, corpus._key(library, sources), parts)
    return folder


@pytest.fixture(autouse=True)
def gradient_cache(tmp_path_factory, monkeypatch, demo_text) -> Path:
    """A place of its own for the gradient statistics of each test."""
    folder = tmp_path_factory.mktemp("cache")
    (folder / "python-docs").symlink_to(demo_text)
    monkeypatch.setenv("PRUNEFORGE_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory, demo_text) -> Path:
    """The folder of the small study that ran at one go, which others are compared with."""
    from small_study import values

    from pruneforge.studies.report import write_report
    from pruneforge.studies.run import run_study
    from pruneforge.studies.study import make_study

    folder = tmp_path_factory.mktemp("study") / "out"
    study = make_study(values())
    write_report(study, run_study(study, folder), folder)
    return folder


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Two threads in place of one, in this process, for what may depend on them."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_plugin_files_stay() -> Iterator[None]:
    """Plugins that a test loaded from files are there for that test alone."""
    yield
    if any(plugin.from_file for plugin in loaded_plugins().loaded):
        loaded_plugins.cache_clear()


@pytest.fixture
def checkpoint() -> Path:
    """The demo's checkpoint: a small trained model with its tokenizer."""
    return CHECKPOINT


def tiny_llama(dtype: torch.dtype = torch.float64, seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """A random LLaMA with grouped-query attention, wide enough for several blocks of 128 columns."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": 96,
            "hidden_size": 64,
            "intermediate_size": 160,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "initializer_range": 0.1,
            "bos_token_id": 0,
            "eos_token_id": 1,
            **changes,
        }
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def tokens(samples: int = 6, length: int = 24, seed: int = 1, vocabulary: int = 96) -> torch.Tensor:
    """Random token ids [samples, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (samples, length), generator=generator)


def run_of(metric: Metric, blocks: list[Block], **settings: object) -> Run:
    """A run of a metric at 50 %, as `prune` plans it, for the blocks of a model."""
    return replace(
        Method(metric, None, ()).run(PruneRecipe(model="tiny", metric=metric.name, **settings), None), blocks=blocks
    )


@contextmanager
def interrupted_after(block: int) -> Iterator[None]:
    """Runs in this process are interrupted, as by Ctrl-C, once they have pruned a block, which the context expects."""

    class Interrupted:
        @hookimpl
        def pruneforge_block_pruned(self, result):
            if result.index == block:
                raise KeyboardInterrupt

    observer = Interrupted()
    loaded_plugins().register(observer)
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        loaded_plugins().unregister(observer)


def outcome(folder: Path) -> dict[str, object]:
    """Every file of an output, the report without what was measured."""
    found: dict[str, object] = {path.name: path.read_bytes() for path in folder.iterdir()}
    report = json.loads(found["pruneforge.json"])
    del report["measured"]
    return {**found, "pruneforge.json": report}
