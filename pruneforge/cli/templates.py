"""What `pruneforge new` writes; `$name`, `$title`, `$package`, `$kind` and `$base` are filled in."""

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
}
"""A method of each kind that works."""

INIT = '''"""The $kind $name, a plugin of PruneForge."""

from pruneforge import hookimpl


@hookimpl
def pruneforge_register(registry):
    """Register the $kind; its module is imported when it is used."""
    registry.$kind("$name", "$package.$kind:$title")
'''

TEST = '''"""The $kind keeps the promises that every $kind makes."""

from $package.$kind import $title
from pruneforge.testing import parametrize_with_checks


@parametrize_with_checks([$title()])
def test_$name(check):
    check.run()
'''

PYPROJECT = """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "$distribution"
version = "0.1.0"
description = "The $kind $name for PruneForge."
requires-python = ">=3.10"
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
    pruneforge check $name
    python -m pytest
"""
