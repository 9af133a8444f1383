"""What `pruneforge new` writes; `$name`, `$title`, `$package`, `$kind` and `$try` are filled in."""

METHODS = {
    "metric": '''from pydantic import Field
from pruneforge import ColumnSquares, Metric


class $title(Metric):
    """`|W_ij|^power * ||X_j||_2`, compared within each output row."""

    requires = (ColumnSquares,)
    scope = "row"

    class Options(Metric.Options):
        """Options of $name."""

        power: float = Field(1.0, gt=0, description="exponent of the weight")

    options: Options

    def score(self, layer, stats):
        """Return one number for each weight [out, in]; higher is more important."""
        norm = stats[ColumnSquares].per_sample().sqrt()
        return layer.weight.abs() ** self.options.power * norm
''',
    "allocator": '''from pydantic import Field
from pruneforge import Allocator


class $title(Allocator):
    """The deeper a block, the more of its weights are pruned."""

    class Options(Allocator.Options):
        """Options of $name."""

        slope: float = Field(0.1, ge=0, le=1, description="sparsity of the last block beyond the first")

    options: Options

    def allocate(self, measures, sizes, sparsity):
        """Return a sparsity for each layer, by name; the engine brings their mean to `sparsity`."""
        last = max(len(sizes) - 1, 1)
        return {
            name: min(max(sparsity + self.options.slope * (depth / last - 0.5), 0.0), 1.0)
            for depth, layers in enumerate(sizes.values())
            for name in layers
        }
''',
    "refiner": '''import torch
from pydantic import Field
from pruneforge import ColumnSquares, Pruned, Refiner


class $title(Refiner):
    """Select again, on scores that favour what the mask kept by a margin."""

    requires = (ColumnSquares,)

    class Options(Refiner.Options):
        """Options of $name."""

        margin: float = Field(0.1, ge=0, description="how much higher the score of a kept weight counts")

    options: Options

    def refine(self, layer, stats, pruned, pattern):
        """Return a mask [out, in] that fits the pattern."""
        score = layer.weight.abs() * stats[ColumnSquares].per_sample().sqrt()
        return Pruned(pattern.select(score * torch.where(pruned.mask, 1 + self.options.margin, 1.0)), pruned.weight)
''',
    "recovery": '''from pydantic import Field
from pruneforge import Gram, Recovery


class $title(Recovery):
    """Scale each row of remaining weights to the least squared error of its output, in closed form."""

    requires = (Gram,)

    class Options(Recovery.Options):
        """Options of $name."""

        strength: float = Field(1.0, ge=0, le=1, description="how far to go towards the best scale")

    options: Options

    def recover_block(self, site):
        """Change the remaining weights of a pruned block; pruned ones stay zero."""
        for layer in site.layers:
            dense, weight = site.dense[layer.name], layer.weight
            products = weight @ site.stats[layer.name][Gram].total
            best = (dense * products).sum(1) / (weight * products).sum(1).clamp_min(1e-12)
            scale = 1 + self.options.strength * (best - 1)
            layer.write(site.masks[layer.name], weight * scale[:, None])
''',
    "objective": '''from pydantic import Field
from pruneforge import Objective


class $title(Objective):
    """The mean entropy of what the model predicts, which needs no labels."""

    class Options(Objective.Options):
        """Options of $name."""

        temperature: float = Field(1.0, gt=0, description="what logits are divided by")

    options: Options

    def losses(self, output, batch):
        """Return one loss for each sample [samples], differentiable."""
        logits = getattr(output, "logits", output).float() / self.options.temperature
        entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
        if entropy.dim() == 1:  # one prediction for each sample, as of an image
            return entropy
        if batch.valid is None:
            return entropy.mean(1)
        return (entropy * batch.valid).sum(1) / batch.valid.sum(1)
''',
    "observer": '''import json
from pathlib import Path

from pydantic import Field
from pruneforge import Observer


class $title(Observer):
    """Appends a line of JSON for each thing that happens to a file."""

    class Options(Observer.Options):
        """Options of $name."""

        file: Path = Field(Path("runs.jsonl"), description="file to write to")

    options: Options

    def start(self, name, config):
        """Begin the log of a run."""
        self._run = name
        self._write(config=dict(config))

    def log(self, step, values):
        """Log a pruned block."""
        self._write(step=step, values=dict(values))

    def close(self, summary):
        """End the log; without a summary the run failed."""
        self._write(summary=None if summary is None else dict(summary))

    def _write(self, **entry):
        with open(self.options.file, "a", encoding="utf-8") as file:
            file.write(json.dumps({"run": self._run, **entry}) + "\\n")
''',
    "source": '''from pydantic import Field
from pruneforge import TextSource


class $title(TextSource):
    """Multiplication tables; return texts of your own from `documents`."""

    class Options(TextSource.Options):
        """Options of $name."""

        largest: int = Field(40, ge=2, description="largest factor")

    options: Options

    def documents(self, part):
        """Return the texts: tables of odd numbers for calibration, of even ones for evaluation."""
        largest = self.options.largest
        first = 1 if part == "calibration" else 2
        return [
            ", ".join(f"{one} times {two} is {one * two}" for two in range(1, largest + 1))
            for one in range(first, largest + 1, 2)
        ]

    def describe(self, part):
        """Return what identifies the texts in a report."""
        return {"largest": self.options.largest, "part": part}
''',
    "evaluator": '''from pydantic import Field
from pruneforge import Evaluator


class $title(Evaluator):
    """The share of weights that are zero, in all prunable layers and in each block."""

    class Options(Evaluator.Options):
        """Options of $name."""

        smallest: int = Field(0, ge=0, description="leave out layers with fewer weights")

    options: Options

    def evaluate(self, subject):
        """Return the results, of types that JSON holds."""
        counts = {}
        for block in subject.model.adapter.blocks(subject.model.module):
            weights = [la.matrix() for la in block.layers if la.size >= self.options.smallest]
            counts[block.name] = sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)
        zeros, total = (sum(each) for each in zip(*counts.values()))
        blocks = {name: zero / max(size, 1) for name, (zero, size) in counts.items()}
        return {"zeros": zeros / max(total, 1), "weights": total, "blocks": blocks}
''',
    "adapter": '''import json
from pathlib import Path

import torch
from pruneforge import Adapter, Batch, Block, Example, PruneForgeError, Skeleton, find_layers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F


class Layers(nn.Module):
    """A block of the stand-in; it maps hidden states to those of the next block."""

    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, hidden):
        return hidden + self.down(F.gelu(self.up(hidden)))


class Model(nn.Module):
    """A stand-in for the architecture: an embedding, blocks, and a head. Import yours instead."""

    def __init__(self, vocabulary=64, width=32, depth=2):
        super().__init__()
        self.config = {"architecture": "$name", "vocabulary": vocabulary, "width": width, "depth": depth}
        self.stem = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Layers(width) for _ in range(depth))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids):
        hidden = self.stem(ids)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


class $title(Adapter):
    """How $name is loaded, split into blocks and layers, run and saved, and its loss."""

    def declines(self, reference):
        """Return why a folder is of another architecture, or None."""
        try:
            self._config(reference)
        except PruneForgeError as error:
            return str(error)
        return None

    def declines_module(self, module):
        """Return why a model is of another architecture, or None."""
        return None if isinstance(module, Model) else f"{type(module).__name__} is no $name"

    def load(self, reference, dtype):
        """Return the model, and its tokenizer or image transform if it has one."""
        model = Model(**self._config(reference))
        model.load_state_dict(load_file(Path(reference) / "model.safetensors"))
        return model.eval().to(dtype or torch.float32), None

    def skeleton(self, reference, dtype):
        """Return the model without its weights, so that it is pruned without loading it whole."""
        with torch.device("meta"):
            model = Model(**self._config(reference))
        return Skeleton(model.eval().to(dtype or torch.float32), None, Path(reference))

    def save(self, module, processor, folder):
        """Write what `load` reads."""
        (folder / "config.json").write_text(json.dumps(module.config), encoding="utf-8")
        save_file(module.state_dict(), folder / "model.safetensors", {"format": "pt"})

    def blocks(self, module):
        """Return the blocks in the order they run, each with its layers."""
        named = [(f"blocks.{index}", block) for index, block in enumerate(module.blocks)]
        return [Block(name, block, tuple(find_layers(block, name))) for name, block in named]

    def batch(self, data, module):
        """Return a batch of token ids, int64 [samples, tokens]."""
        ids = data if isinstance(data, torch.Tensor) else data.get("input_ids")
        if ids is None or ids.dim() != 2 or ids.is_floating_point():
            raise PruneForgeError("a batch of $name must hold token ids, int64 [samples, tokens]")
        return Batch({"ids": ids}, len(ids), loss="mean cross-entropy of the next token", tokens=ids.shape[1])

    def forward(self, module, batch):
        """Run the model."""
        return module(batch.inputs["ids"])

    def losses(self, output, batch):
        """Return one loss for each sample [samples], differentiable."""
        logits, targets = output[:, :-1].transpose(1, 2), batch.inputs["ids"][:, 1:]
        return F.cross_entropy(logits, targets, reduction="none").mean(1)

    def logits(self, output):
        """Return the logits [samples, tokens, vocabulary], for evaluators that compare what models predict."""
        return output

    def logits_a_token(self, module):
        """Return the size of the vocabulary, for which memory is planned."""
        return module.head.out_features

    def context_length(self, module):
        """Return the longest sequence that the model takes, or None if there is no limit."""
        return None

    def examples(self):
        """Return tiny models with data, on which the checks run."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = Model().eval()
        ids = torch.randint(64, (4, 12), generator=torch.Generator().manual_seed(1))
        return [Example("$name", model, None, list(ids.split(2)))]

    def _config(self, reference):
        file = Path(reference) / "config.json"
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if config.pop("architecture", None) != "$name":
            raise PruneForgeError("there is no config.json of $name")
        return config
''',
}
"""A method of each kind that works."""

INIT = '''"""The $kind $name, a plugin of PruneForge."""

from pruneforge import hookimpl


@hookimpl
def pruneforge_register(registry):
    """Register the $kind; its module is imported when it is used."""
    registry.$kind("$name", "$package.$kind:$title")
'''

CHECKED = '''"""The $kind keeps the promises that every $kind makes."""

from $package.$kind import $title
from pruneforge.testing import parametrize_with_checks


@parametrize_with_checks([$title()])
def test_$name(check):
    check.run()
'''

OBJECTIVE = '''"""The objective gives each sample a loss of its own."""

import torch
from $package.$kind import $title
from pruneforge import Batch


def test_$name():
    logits = torch.randn(3, 5, 7, requires_grad=True)
    batch = Batch({}, 3, valid=torch.arange(5) < torch.tensor([[5], [3], [4]]))
    losses = $title().losses(logits, batch)
    losses.sum().backward()
    assert losses.shape == (3,)
    assert logits.grad.isfinite().all()
    assert torch.allclose($title().losses(logits[1:2], batch.part(slice(1, 2))), losses[1:2])
'''

OBSERVER = '''"""The observer writes what it is given."""

import json

from $package.$kind import $title


def test_$name(tmp_path):
    observer = $title(file=tmp_path / "log")
    observer.start("mine", {"metric": "magnitude"})
    observer.log(0, {"block/sparsity": 0.5})
    observer.close(None)
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [line["run"] for line in lines] == ["mine"] * 3
    assert lines[1]["values"] == {"block/sparsity": 0.5}
'''

UNCHECKED = {"objective": OBJECTIVE, "observer": OBSERVER}
"""Tests of the kinds that the kit has no checks of."""

TESTS = {kind: UNCHECKED.get(kind, CHECKED) for kind in METHODS}
"""Tests of each kind."""

PYPROJECT = """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "$distribution"
version = "0.1.0"
description = "The $kind $name for PruneForge."
requires-python = ">=3.11"
dependencies = []  # PruneForge itself is installed from its clone or wheel

[project.entry-points.pruneforge]
$name = "$package"

[tool.hatch.build.targets.wheel]
packages = ["$package"]
"""

README = """# $distribution

The $kind `$name` for PruneForge.

    pip install -e .
    pruneforge plugins $name
    $try
    python -m pytest
"""
