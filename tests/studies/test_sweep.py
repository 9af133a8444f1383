"""Sweeps: what is in them, where a curve has its knee, what is pruned by component, and alike in several models."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import tiny_llama
from made_up_study import row

import pruneforge
from pruneforge import PruneForgeError
from pruneforge.checkpoint.masks import save_masks
from pruneforge.studies.curve import curve
from pruneforge.studies.folder import StudyFolder
from pruneforge.studies.knee import Rule, knee, knees
from pruneforge.studies.masks import components, similarities
from pruneforge.studies.plan import cells_of
from pruneforge.studies.plots import Style
from pruneforge.studies.report import write_report
from pruneforge.studies.run import run_study
from pruneforge.studies.study import make_study
from pruneforge.studies.sweep import make_sweep, sparsities_between
from pruneforge.studies.sweep_report import write_sweep
from pruneforge.studies.tables import tables_of

TASK = {"task": "perplexity", "options": {"data": "python-docs", "window": 64, "limit": 4}}
DATA = {"calibration": "python-docs", "samples": 4, "seqlen": 64}


def test_sparsities_are_exact_decimals_and_the_dense_model_is_none_of_them():
    assert sparsities_between(0.05, 0.95, 0.05) == [number / 20 for number in range(1, 20)]
    assert sparsities_between(0.1, 0.35, 0.1) == [0.1, 0.2, 0.3]
    assert sparsities_between(0, 0.9, 0.3) == [0.3, 0.6, 0.9]
    assert sparsities_between(0.5, 0.5, 0.1) == [0.5]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ((0.9, 0.5, 0.1), "`start` 0.9 is above `stop` 0.5"),
        ((0.1, 1.0, 0.1), r"`stop` 1.0 is outside \[0, 1\)"),
        ((-0.1, 0.5, 0.1), r"`start` -0.1 is outside \[0, 1\)"),
        ((math.nan, 0.5, 0.1), "`start` nan is outside"),
        ((0.1, 0.5, 0), "`step` 0 must lie between 0 and 1"),
        ((0.1, 0.5, math.inf), "`step` inf must lie"),
        ((0, 0, 0.1), "prunes nothing"),
        ((0, 0.05, 0.1), "prunes nothing"),
    ],
)
def test_a_sweep_without_sparsities_is_refused(asked, said):
    with pytest.raises(PruneForgeError, match=said):
        sparsities_between(*asked)


@pytest.mark.parametrize(
    ("lost", "reached"),
    [
        ({0.1: 0.0, 0.2: 0.5, 0.3: 0.9, 0.4: 1.5, 0.5: 4.0}, 0.3),
        ({0.1: 0.0, 0.2: 1.1, 0.3: 0.2, 0.4: 0.3}, 0.1),  # what comes back does not count
        ({0.3: 0.2, 0.1: 0.9, 0.2: -0.4, 0.4: 2.0}, 0.3),  # in any order; better than dense is within
        ({0.1: 1.01, 0.2: 0.0}, 0.0),
        ({0.1: 1.0, 0.2: 1.0}, 0.2),
        ({0.1: 0.5, 0.2: None, 0.3: 0.5}, 0.1),
        ({0.1: 0.5, 0.2: math.nan, 0.3: 0.5}, 0.1),
        ({0.1: 0.5, 0.2: math.inf}, 0.1),
        ({}, 0.0),
    ],
)
def test_the_knee_is_the_last_sparsity_up_to_which_all_stay_within_the_rule(lost, reached):
    assert knee(lost, 1.0) == reached


def curve_of(values, seeds=(0,), **changes):
    """Rows of one method, by pattern."""
    return [row("a", seed, value, pattern, **changes) for pattern, value in values.items() for seed in seeds]


ACCURACY = {"measure": "top1", "higher_is_better": True, "share": True, "dense": 0.9733}


def test_shares_lose_points_and_losses_a_share_of_themselves():
    rows = curve_of({"0.2": 0.9733, "0.4": 0.9633, "0.6": 0.9632, "2:4": 0.2}, **ACCURACY)
    (table,) = tables_of(rows, "a")
    (found,) = knees([table], rows, [0.2, 0.4, 0.6], Rule())
    assert (found.method, found.sparsity, found.at_end) == ("a", 0.4, False)  # exactly a point is within
    (found,) = knees([table], rows, [0.2, 0.4, 0.6], Rule(points=1.01))
    assert (found.sparsity, found.at_end) == (0.6, True)
    assert Rule().words(table) == "top1 at most 1 percentage point below the dense model's"
    error = curve_of({"0.2": 0.05, "0.4": 0.061}, **{**ACCURACY, "higher_is_better": False, "dense": 0.05})
    (table,) = tables_of(error, "a")
    assert [each.sparsity for each in knees([table], error, [0.2, 0.4], Rule())] == [0.2]
    losses = [
        {**each, "loss_increase": increase}
        for each, increase in zip(curve_of({"0.2": 5.1, "0.4": 5.2, "0.6": 6.0}), (0.01, 0.05, 0.051), strict=True)
    ]
    (table,) = tables_of(losses, "a")
    assert [each.sparsity for each in knees([table], losses, [0.2, 0.4, 0.6], Rule())] == [0.4]
    assert [each.sparsity for each in knees([table], losses, [0.2, 0.4, 0.6], Rule(loss_increase=0))] == [0.0]
    neither = curve_of({"0.2": 5.1, "0.4": 5.2})
    assert knees(tables_of(neither, "a"), neither, [0.2, 0.4], Rule()) == []


def test_draws_count_by_their_mean_and_a_failed_one_ends_the_knee():
    rows = curve_of({"0.2": 0.97, "0.4": 0.96}, (0, 1), **ACCURACY)
    rows[2]["value"] = 0.968  # mean 0.964 at 0.4
    assert [each.sparsity for each in knees(tables_of(rows, "a"), rows, [0.2, 0.4], Rule())] == [0.4]
    failed = {name: rows[2][name] for name in ("model", "method", "pattern")} | {"seed": 2, "failed": "why"}
    rows.append(failed)
    assert [each.sparsity for each in knees(tables_of(rows, "a"), rows, [0.2, 0.4], Rule())] == [0.2]
    assert [each.sparsity for each in knees(tables_of(rows, "a"), rows, [0.1, 0.2, 0.4], Rule())] == [0.0]


def test_a_rule_is_of_numbers_from_0_on():
    for wrong in ({"points": -1}, {"loss_increase": math.nan}, {"points": math.inf}):
        with pytest.raises(PruneForgeError, match="must be a number from 0 on"):
            Rule(**wrong)


def test_the_picture_marks_knees_and_patterns():
    rows = curve_of({"0.2": 0.97, "0.4": 0.9, "2:4": 0.8}, **ACCURACY)
    (table,) = tables_of(rows, "a")
    drawn = table, {"a": Style("#336699", "")}, "curve"
    plain = curve(*drawn)
    marked = curve(*drawn, {"a": 0.2}, "star: knee")
    assert plain.count("2:4") == 1  # the legend
    assert ("star: knee" in plain, "star: knee" in marked) == (False, True)
    assert marked.count("<use") == plain.count("<use") + 1
    assert curve(*drawn, {"a": 0.0}, "star: knee") != marked
    assert marked == curve(*drawn, {"a": 0.2}, "star: knee")


def make(**changes):
    return make_sweep(**{"models": ["demo:text"], "metrics": ["wanda"], "task": TASK, "sparsities": [0.5], **changes})


def test_patterns_are_those_that_fit_and_the_others_are_named(tmp_path):
    assert make().study.patterns == [0.5, "1:4", "2:4", "4:8"]
    assert set(make().study.all_methods()) == {"wanda", "magnitude", "random"}
    assert make(patterns=[]).study.patterns == [0.5]
    chosen = make(options={"scope": "model"})
    assert chosen.study.patterns == chosen.sparsities == [0.5]
    assert chosen.left_out["2:4"] == "scope=model does not go with pattern 2:4, which compares within groups"
    with pytest.raises(PruneForgeError, match="scope=model does not go with pattern 2:4"):
        make(options={"scope": "model"}, patterns=["2:4"])
    narrow = tiny_llama(torch.float32, hidden_size=36, intermediate_size=36, num_attention_heads=2)
    narrow.save_pretrained(tmp_path / "narrow")
    found = make(models=[str(tmp_path / "narrow")])
    assert found.study.patterns == [0.5, "1:4", "2:4"]
    assert "in groups of 8" in found.left_out["4:8"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metrics": ["wandas"]}, "unknown metric 'wandas'; did you mean 'wanda'"),
        ({"metrics": ["wanda", "wanda"]}, "metric 'wanda' is asked for twice"),
        ({"options": {"alpha": 1}}, "unknown option of wanda 'alpha'"),
        ({"models": ["demo:text", "demo:text"]}, "model 'demo:text' is named twice"),
        ({"models": ["nowhere/at/all"]}, "model folder 'nowhere/at/all' does not exist"),
        ({"patterns": ["3:7"]}, "needs inputs in groups of 7"),
        ({"patterns": ["unstructured"]}, "pattern 'unstructured' is not N:M"),
        ({"patterns": ["5:4"]}, "N must lie between 1 and M"),
        ({"sampels": 3}, "sweep: sampels"),
        ({"samples": 0}, "sweep: models.text.samples"),
        ({"exclude": ["*.typo"]}, "matches no layer"),
    ],
)
def test_what_does_not_fit_is_named(changes, said):
    with pytest.raises(PruneForgeError, match=said):
        make(**changes)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A sweep with one threshold for the whole model, and its report."""
    folder = tmp_path_factory.mktemp("sweep") / "out"
    chosen = {"metrics": ["wanda", "magnitude"], "options": {"wanda": {"scope": "model"}}, "controls": False}
    sweep = make(sparsities=[0.3, 0.6], seeds=[0, 1], **chosen, **DATA)
    cells = run_study(sweep.study, folder)
    rows = write_report(sweep.study, cells, folder)
    found, grids = write_sweep(sweep, cells, rows, folder, Rule())
    return sweep, cells, rows, folder, found, grids


def test_components_are_what_masks_prune_of_them(swept):
    _, _, _, _, found, _ = swept
    (own,) = found["components"]  # magnitude prunes each layer alike
    assert (own["model"], own["method"]) == ("text", "wanda")
    shares = []
    for seed in (0, 1):
        masks = pruneforge.prune(
            "demo:text", "wanda", 0.6, seed=seed, options={"scope": "model"}, propagate="dense", **DATA
        ).masks
        of_role = torch.cat([mask.flatten() for name, mask in masks.items() if name.endswith(".mlp.down_proj")])
        shares.append(1 - float(of_role.double().mean()))
    assert own["shares"]["0.6"]["mlp.down_proj"] == pytest.approx(sum(shares) / 2)
    assert own["shares"]["0.6"]["all"] == pytest.approx(0.6, abs=1e-6)
    assert list(own["shares"]["0.3"])[-1] == "all"


def test_an_allocators_shares_are_shown_by_component_too(tmp_path):
    sweep = make(metrics=["magnitude"], patterns=[], controls=False, allocator="owl", **DATA)
    cells = run_study(sweep.study, tmp_path / "out")
    (found,) = components(cells, StudyFolder(tmp_path / "out"), sweep.shapes)
    assert found.shares["0.5"]["all"] == pytest.approx(0.5, abs=1e-3)


def test_the_report_says_the_same_everywhere_and_holds_everything(swept):
    sweep, cells, rows, folder, found, grids = swept
    rule = "a loss at most 5% above the dense model"
    page, text = (folder / "sweep.html").read_text(), (folder / "sweep.md").read_text()
    picture = (folder / "sweep-text-perplexity.svg").read_text()
    assert all(rule in shown for shown in (page, text, picture))
    assert picture.startswith("<svg")
    assert picture in page
    assert "(sweep-text-perplexity.svg)" in text
    assert "2:4 is left out: scope=model" in text
    assert "2:4 is left out: scope=model" in page
    bends = {each["method"]: each for each in found["knees"]}
    assert set(bends) == {"wanda", "magnitude"}
    for method, bend in bends.items():
        losses = {
            pattern: sum(
                each["loss_increase"] for each in rows if (each["method"], each["pattern"]) == (method, pattern)
            )
            for pattern in ("0.3", "0.6")
        }
        within = [float(pattern) for pattern, total in losses.items() if total / 2 <= 0.05]
        assert bend["sparsity"] == max(within, default=0)
    assert grids[0].lines[-1][0] == "knee"
    assert json.loads((folder / "sweep.json").read_text())["knees"] == found["knees"]
    files = ("sweep.html", "sweep.md", "sweep.json", "sweep-text-perplexity.svg")
    before = [(folder / name).read_bytes() for name in files]
    write_sweep(sweep, cells, rows, folder, Rule())
    assert [(folder / name).read_bytes() for name in files] == before


def test_models_of_different_shapes_and_the_same_name(tmp_path):
    for name, blocks in (("one/model", 2), ("two/model", 2), ("three", 3)):
        tiny_llama(torch.float32, num_hidden_layers=blocks).save_pretrained(tmp_path / name)
    with pytest.raises(PruneForgeError, match="models 'model' and 'three' cannot be swept together: layer"):
        make(models=[str(tmp_path / "one/model"), str(tmp_path / "three")])
    study = make(models=[str(tmp_path / name) for name in ("one/model", "two/model")]).study
    assert study.keep_masks
    first, second = study.models
    assert first == "model"
    assert second.endswith("two-model")


def test_similarity_is_what_two_masks_have_in_common(tmp_path):
    tuned = tiny_llama(torch.float32)
    tuned.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    tuned.save_pretrained(tmp_path / "tuned")
    names = ("base", "tuned")
    study = make_study(
        {
            "models": {name: {"model": str(tmp_path / name), "tasks": [TASK]} for name in names},
            "methods": {"magnitude": {"metric": "magnitude"}},
            "patterns": [0.25, "2:4", 0.9],
            "seeds": [0],
        }
    )
    cells = [cell for cell in cells_of(study, []) if cell.method == "magnitude"]
    held, masks = StudyFolder(tmp_path / "out"), {}
    for cell in cells:
        folder = held.path / "cells" / cell.key
        folder.mkdir(parents=True)
        failed = cell.model == "tuned" and cell.pattern == 0.9
        (folder / "cell.json").write_text(json.dumps({"failed": "why"} if failed else {}))
        masks[cell.model, cell.pattern] = pruneforge.prune(**cell.recipe.model_dump(exclude={"plugins"})).masks
        save_masks(masks[cell.model, cell.pattern], folder, {})
    found = list(similarities(cells, held))
    assert [(each.models, each.method, each.pattern) for each in found] == [
        (names, "magnitude", "0.25"),
        (names, "magnitude", "2:4"),
    ]
    for each, pattern, sparsity in zip(found, (0.25, "2:4"), (0.25, 0.5), strict=True):
        lost = [
            {(layer, *place) for layer, mask in masks[name, pattern].items() for place in (~mask).nonzero().tolist()}
            for name in names
        ]
        weights = sum(mask.numel() for mask in masks["base", pattern].values())
        assert each.jaccard == pytest.approx(len(lost[0] & lost[1]) / len(lost[0] | lost[1]))
        assert each.same == pytest.approx(1 - len(lost[0] ^ lost[1]) / weights)
        assert each.chance == pytest.approx(sparsity / (2 - sparsity))  # of two independent masks
        assert each.chance < each.jaccard < 1
