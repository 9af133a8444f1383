"""The report of a study as a page: one file that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pruneforge.studies import grids
from pruneforge.studies.curve import curve
from pruneforge.studies.layers import Curves, Layers
from pruneforge.studies.panels import histogram, panel
from pruneforge.studies.plots import Style, styles_of
from pruneforge.studies.results import Row
from pruneforge.studies.study import Study, control_metrics
from pruneforge.studies.tables import Table

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Methods:
    """How a study's methods are shown.

    Attributes:
        baseline: The method that the others are compared with.
        controls: Methods that are a control and nothing else.
        styles: How each is drawn.
    """

    baseline: str
    controls: set[str]
    styles: dict[str, Style]


def shown_methods(study: Study) -> Methods:
    """Return how the methods of a study are shown."""
    plain = [{"metric": name} for name in control_metrics()]
    every = study.all_methods()
    controls = {name for name, method in every.items() if method.model_dump(exclude_defaults=True) in plain}
    return Methods(study.compared_with, controls, styles_of(list(every), controls))


def as_html(study: Study, text: str, rows: Sequence[Row], tables: Sequence[Table], layers: Mapping[str, Layers]) -> str:
    """Return the report as a page.

    Args:
        study: The study.
        text: Its file.
        rows: What its cells found.
        tables: The same, by model and task.
        layers: What is known of the layers of a model, by its name.
    """
    methods = shown_methods(study)
    models = [
        {
            "name": model,
            "tables": [
                _table(table, methods, f"{number}") for number, table in enumerate(tables) if table.model == model
            ],
            "layers": _layers(layers[model], methods, model) if model in layers else None,
        }
        for model in dict.fromkeys(table.model for table in tables)
    ]
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            study=study,
            text=text,
            cells=len({(row["model"], row["method"], row["pattern"], row["seed"]) for row in rows}),
            methods=methods,
            models=models,
            losses=grids.loss_grid(tables, methods.baseline, methods.controls),
            points=grids.points_grid(tables, methods.baseline, methods.controls),
            structure=grids.structure_grid(rows),
            failed=grids.failed_grid(rows),
        )
    )


def _table(table: Table, methods: Methods, name: str) -> dict[str, Any]:
    return {
        "table": table,
        "dense": grids.number(table.dense, table.share),
        "published_dense": grids.number(table.published_dense, table.share),
        "grid": grids.main_grid(table, methods.baseline, methods.controls),
        "differences": grids.differences_grid(table, methods.baseline),
        "recipes": grids.recipes_grid(table),
        "curve": curve(table, methods.styles, f"curve {name}"),
    }


def _layers(layers: Layers, methods: Methods, model: str) -> dict[str, Any]:
    return {
        "pattern": layers.pattern,
        "seed": layers.seed,
        "uniform": layers.uniform,
        "sparsity": [] if layers.uniform else _panels(layers.sparsity, methods, False, f"sparsity {model}"),
        "error": _panels(layers.error, methods, True, f"error {model}"),
        "histograms": [
            (method, histogram(method, list(shown.values()), methods.styles[method], f"scores {model} {method}"))
            for method, shown in layers.histograms.items()
        ],
        "scored": list(dict.fromkeys(name for shown in layers.histograms.values() for name in shown)),
        "pictured": list(dict.fromkeys(picture.layer for picture in layers.pictures)),
        "pictures": layers.pictures,
    }


def _panels(curves: Curves, methods: Methods, log: bool, name: str) -> list[tuple[str, str]]:
    """Return a panel for each role of layers, all with the same ends."""
    values = [value for lines in curves.values() for line in lines.values() for value in line.values()]
    known = [value for value in values if value > 0] if log else values
    if not known:
        return []
    low, high = min(known), max(known)
    ends = (low / 1.3, high * 1.3) if log else (max(0.0, low - 5), min(100.0, high + 5))
    return [(kind, panel(kind, lines, methods.styles, ends, log, f"{name} {kind}")) for kind, lines in curves.items()]


def environment() -> Environment:
    """Return what renders the templates; all that they show is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["pattern"] = grids.pattern_name
    return environment
