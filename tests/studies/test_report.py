"""The report of a study: what draws and items say together, and how tables show it."""

from __future__ import annotations

import csv
import json
import re
import statistics

import commands
import numpy as np
import pytest
import yaml
from made_up_study import PERPLEXITY, made_up, model, row
from scipy.stats import norm

from pruneforge.studies.folder import StudyFolder
from pruneforge.studies.grids import Entry, Grid, loss_grid, main_grid, number, pattern_name, signed
from pruneforge.studies.layers import layers_of
from pruneforge.studies.markup import as_latex, as_markdown
from pruneforge.studies.noise import Draws, Items, difference, interval
from pruneforge.studies.report import write_report
from pruneforge.studies.results import rows_of
from pruneforge.studies.tables import tables_of

TWO = {"methods": {"wanda": {"metric": "wanda"}, "b_2": {"metric": "wanda", "allocator": "owl"}}}


def test_draws_are_compared_pairwise():
    base = Draws({0: 10.0, 1: 11.0, 2: 12.0})
    found = difference(Draws({0: 9.0, 1: 9.5, 2: 10.9, 7: 99.0}), base)
    assert found.mean == pytest.approx(statistics.fmean([-1, -1.5, -1.1]))
    assert found.draws == 3
    assert -1.5 <= found.over_draws[0] <= found.mean <= found.over_draws[1] <= -1
    assert not found.is_noise
    assert difference(Draws({0: 10.2, 1: 10.9, 2: 11.9}), base).is_noise
    assert difference(Draws({0: 1.0}), base).is_noise  # of one draw nothing is known
    assert difference(Draws({5: 1.0}), base) is None
    assert interval([3.0]) is None
    assert interval([2.0, float("inf")]) is None
    assert interval([2.0, 2.0]) == (2.0, 2.0)


@pytest.mark.parametrize("kind", ["right or wrong", "losses"])
def test_an_interval_over_items_is_that_of_the_central_limit_theorem(kind):
    random = np.random.default_rng(3)
    values = (
        random.choice([-1, 0, 1], 5000, p=[0.1, 0.75, 0.15]) if kind == "right or wrong" else random.normal(size=5000)
    )
    low, high = interval(values)
    error = values.std(ddof=1) / len(values) ** 0.5
    assert low == pytest.approx(values.mean() + norm.ppf(0.025) * error, abs=0.15 * error)
    assert high == pytest.approx(values.mean() + norm.ppf(0.975) * error, abs=0.15 * error)
    assert interval(values) == (low, high)


def right(random, share, ids="same"):
    return Items("top1", ids, (random.uniform(size=400) < share).astype(int))


def test_items_are_compared_pairwise_too_and_both_noises_count():
    random = np.random.default_rng(0)
    base = {seed: right(random, 0.5) for seed in (0, 1)}
    means = {seed: float(items.values.mean()) for seed, items in base.items()}
    better = {
        seed: Items("top1", "same", np.maximum(items.values, right(random, 0.3).values)) for seed, items in base.items()
    }
    found = difference(Draws({0: 0.9, 1: 0.9}, better), Draws(means, base))
    by_item = np.mean([better[seed].values - base[seed].values for seed in (0, 1)], axis=0)
    assert found.items == 400
    assert found.over_items[0] < by_item.mean() < found.over_items[1]
    assert not found.is_noise
    alike = {seed: Items("top1", "same", items.values[::-1]) for seed, items in base.items()}
    found = difference(Draws({seed: mean + 0.01 for seed, mean in means.items()}, alike), Draws(means, base))
    assert found.over_draws == (pytest.approx(0.01), pytest.approx(0.01))  # beyond the noise of draws
    assert found.is_noise  # but not of items
    other = {0: right(random, 0.5, "other"), 1: base[1]}
    found = difference(Draws(means, other), Draws(means, base))
    assert (found.items, found.over_items) == (0, None)
    assert "different items" in found.note


ROWS = [row("a", seed, value) for seed, value in enumerate((10.0, 11.0, 12.0))]
ROWS += [row("b_2", seed, value) for seed, value in enumerate((9.0, 9.5, 10.9))]
ROWS += [row("c", seed, value) for seed, value in enumerate((10.2, 10.9, 11.9))]


def test_nothing_is_bold_inside_the_noise():
    (table,) = tables_of(ROWS, "a")
    assert table.best == {"0.5": {"b_2"}}
    (close,) = tables_of([*ROWS[:3], *ROWS[6:]], "a")
    assert close.best == {"0.5": {"a", "c"}}
    (single,) = tables_of([row("a", 0, 10.0), row("c", 0, 9.0)], "a")
    assert single.best == {"0.5": set()}
    items = {"a": Items("loss", "x", np.arange(50.0)), "b_2": Items("loss", "x", np.arange(50.0)[::-1])}
    (unsure,) = tables_of(ROWS[:6], "a", lambda row: items[row["method"]])
    assert unsure.best == {"0.5": {"a", "b_2"}}
    assert "| b\\_2 | **9.80 ± 0.98** |" in as_markdown([("t", "", main_grid(table, "a"))])
    assert r"b\_2 & \textbf{9.80 $\pm$ 0.98} \\" in as_latex([("t", "", main_grid(table, "a"))])


def test_the_report_tests_the_items_that_a_study_kept(tmp_path):
    def change(cell, found):
        values = np.random.default_rng([cell.seed, len(cell.method)]).integers(0, 2, 30).tolist()
        ids = "other" if cell.method == "random" else "same"
        found["items"] = [{"measure": "top1", "ids": ids, "values": values}] if cell.model == "image" else [{}]

    study, cells = made_up(tmp_path / "out", change, **TWO)
    write_report(study, cells, tmp_path / "out")
    text, image = (tmp_path / "out" / "report.html").read_text().split('id="model-2"')
    assert "95% over items" not in text
    assert image.count('data-value="30">30</td>') == 2  # of b_2 and magnitude, compared with the baseline
    assert "random, 50%: no test over items, evaluated on different items than wanda." in image


def test_numbers_are_short():
    assert [number(each, False) for each in (5.126, 999.5, 12345.6, None)] == ["5.13", "999.50", "12,346", ""]
    assert [number(0.51234, True), number(14.6, True)] == ["51.23", "1,460"]
    assert [signed(each, False) for each in (-1.0, 2.0, 0.001)] == ["−1.00", "+2.00", "0.00"]
    assert [pattern_name(each) for each in ("0.5", "0.07", "0.333", "2:4")] == ["50%", "7%", "33.3%", "2:4"]


def test_what_is_measured_stands_in_every_row(tmp_path):
    study, cells = made_up(tmp_path / "out", **TWO, seeds=[0, 1])
    write_report(study, cells, tmp_path / "out")
    with open(tmp_path / "out" / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    text, image = rows[0], rows[-1]
    assert (text["window"], text["tokens"], text["split"], text["samples"]) == ("64", "4096", "test", "8")
    assert (image["image_size"], image["crop"], image["images"], image["data"]) == (
        "224",
        "0.875",
        "50000",
        "source digits, split test",
    )
    assert all((each["scope"], each["versions"]) == ("row", "pruneforge 1.2.3, torch 2.9.0") for each in rows)
    assert text["task_options"] == "data python-docs, window 64"
    assert json.loads((tmp_path / "out" / "results.json").read_text())[0]["value"] == float(text["value"])


def test_the_protocol_says_which_methods_differ(tmp_path):
    def change(cell, found):
        found["scope"] = "layer" if cell.method == "b_2" else "row"

    _study, cells = made_up(tmp_path / "out", change, **TWO, seeds=[0, 1])
    table = tables_of(rows_of(cells, StudyFolder(tmp_path / "out")), "wanda")[0]
    facts = dict(table.facts)
    assert facts["Scope"] == "row (wanda, magnitude, random); layer (b_2)"
    assert facts["Evaluated on"] == "source python-docs, split test, window 64, tokens 4,096"
    assert facts["Calibrated on"] == "8 samples of python-docs"
    assert facts["Draws"] == "seeds 0, 1"


def test_two_tasks_of_one_kind_are_two_tables(tmp_path):
    other = {"task": "perplexity", "options": {"data": "c4", "window": 64}}
    _study, cells = made_up(tmp_path / "out", models={"text": model(PERPLEXITY, other)}, **TWO)
    tables = tables_of(rows_of(cells, StudyFolder(tmp_path / "out")), "wanda")
    assert [dict(table.facts)["Evaluated on"].split(",")[0] for table in tables] == ["source python-docs", "source c4"]


def test_models_of_any_kind_stand_in_one_table(tmp_path):
    _study, cells = made_up(tmp_path / "out", **TWO, patterns=[0.5, "2:4"])
    rows = rows_of(cells, StudyFolder(tmp_path / "out"))
    grid = loss_grid(tables_of(rows, "wanda"), "wanda", {"random"})
    assert grid.heads == ["method", "50%", "2:4", "50%", "2:4"]
    assert grid.groups == [("", 1), ("text", 2), ("image", 2)]
    own = [each for each in rows if (each["model"], each["method"], each["pattern"]) == ("image", "b_2", "2:4")]
    increase = statistics.fmean(each["loss"] / each["dense_loss"] - 1 for each in own)
    entry = next(line for line in grid.rows if line[0].text == "b_2")[-1]
    assert entry.value == pytest.approx(increase)
    assert entry.text.startswith(f"+{100 * increase:.1f} ± ")
    assert [line[0].tag for line in grid.rows] == ["baseline", "", "", "control"]


def test_published_numbers_stand_beside_ours(tmp_path):
    task = {"task": "perplexity", "options": {"data": "wikitext2", "window": 2048}}
    as_published = {"model": "huggyllama/llama-7b", "calibration": "c4", "samples": 128}
    models = {"LLaMA 7B": model(task) | as_published, "text": model(task)}
    study, cells = made_up(tmp_path / "out", models=models, **TWO, patterns=[0.5, 0.55], propagate="pruned")
    llama, text = tables_of(rows_of(cells, StudyFolder(tmp_path / "out")), "wanda")
    assert llama.published_dense == 5.68  # Touvron et al., 2023, by Wanda's code
    grid = main_grid(llama, "wanda")
    assert grid.heads == ["method", "here", "published", "difference", "55%"]
    assert grid.groups == [("", 1), ("50%", 3), ("", 1)]
    first, second = grid.rows[:2]
    assert first[2].value == 7.26  # Sun et al., 2023
    assert first[3].value == pytest.approx(first[1].value - 7.26)
    assert second[2].text == second[3].text == "–"
    assert all(note.startswith("Published: ") for note in grid.notes)
    assert main_grid(text, "wanda").heads == ["method", "50%", "55%"]
    write_report(study, cells, tmp_path / "out")
    assert "(published: 5.68)" in (tmp_path / "out" / "report.html").read_text()
    assert r"\multicolumn{3}{c}{50\%}" in (tmp_path / "out" / "report.tex").read_text()


def test_failed_draws_are_counted_and_named(tmp_path):
    def change(cell, found):
        if cell.method == "b_2" and cell.model == "text" and (cell.seed == 1 or cell.pattern == 0.6):
            found.clear()
            found |= {"asked": cell.asked(), "failed": f"no memory for <{cell.seed}>"}

    study, cells = made_up(tmp_path / "out", change, **TWO, patterns=[0.5, 0.6], seeds=[0, 1, 2])
    rows = write_report(study, cells, tmp_path / "out")
    grid = main_grid(tables_of(rows, "wanda")[0], "wanda")
    texts = [entry.text for entry in grid.rows[1]]
    assert texts[1].endswith("(2 of 3 draws)")
    assert texts[2] == "failed"
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("no memory for &lt;") == 4
    assert "no memory for <0>" in (tmp_path / "out" / "report.md").read_text().replace("\\", "")


def test_hashes_lead_to_recipes_that_repeat_a_run(tmp_path):
    study, cells = made_up(tmp_path / "out", **TWO, seeds=[3])
    stale = tmp_path / "out" / "recipes" / "0123456789ab.yaml"
    stale.parent.mkdir()
    stale.write_text("metric: wanda")
    rows = write_report(study, cells, tmp_path / "out")
    assert not stale.exists()
    assert {file.stem for file in stale.parent.iterdir()} == {each["recipe"] for each in rows}
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(each["recipe"] in page for each in rows)
    assert "metric: wanda" in page  # study.yaml
    cell = next(cell for cell in cells if cell.method == "b_2")
    file = tmp_path / "out" / "recipes" / f"{cell.fingerprint()}.yaml"
    assert yaml.safe_load(file.read_text()).items() <= cell.recipe.model_dump().items()
    done = commands.invoke("prune", "--config", file, "--seqlen", 64, "--output", tmp_path / "again")
    assert done.exit_code == 0, done.output
    made = json.loads((tmp_path / "again" / "pruneforge.json").read_text())["recipe"]
    assert made == {**cell.recipe.model_dump(), "seqlen": 64}


SPECIAL = r"a&b%c$d#e_f{g}h~i^j\k"


def test_nothing_in_a_name_means_something_to_latex_or_markdown():
    grid = Grid([SPECIAL, "x|y"], [[Entry(SPECIAL), Entry("1 ± 2", best=True)]], notes=["50%\nof"])
    text = as_latex([("title\nwith % and", "", grid)])
    lines = [line for line in text.splitlines() if not line.startswith("%")]
    escaped = r"a\&b\%c\$d\#e\_f\{g\}h\textasciitilde{}i\textasciicircum{}j\textbackslash{}k"
    assert lines[2] == rf"{escaped} & x\textbar{{}}y \\"
    assert lines[4] == rf"{escaped} & \textbf{{1 $\pm$ 2}} \\"
    assert text.count("\\begin{tabular}") == text.count("\\end{tabular}") == 1
    assert len(re.findall(r"(?m)^(?!%).*(?<!\\)%", text)) == 0  # no comment where there should be none
    (head,) = (line for line in as_markdown([("t", "", grid)]).splitlines() if "y |" in line)
    assert len(re.findall(r"(?<!\\)\|", head)) == 3


def test_layers_are_shown_of_one_pattern_and_draw(tmp_path):
    _study, cells = made_up(tmp_path / "out", **TWO, patterns=["2:4", 0.7, 0.5, 0.6], seeds=[4, 5])
    table = tables_of(rows_of(cells, StudyFolder(tmp_path / "out")), "wanda")[0]
    assert table.middle == "0.6"
    layers = layers_of(cells, StudyFolder(tmp_path / "out"), "text", table.middle)
    assert (layers.pattern, layers.seed, layers.uniform) == ("0.6", 4, False)
    assert list(layers.sparsity) == list(layers.error) == ["attn.proj", "mlp.fc1"]
    chosen = next(cell for cell in cells if (cell.method, cell.pattern, cell.seed) == ("b_2", 0.6, 4))
    found = StudyFolder(tmp_path / "out").cell(chosen)
    assert layers.sparsity["mlp.fc1"]["b_2"][2] == 100 * found["masks"]["layers"]["blocks.2.mlp.fc1"]
    assert list(layers.histograms["wanda"]) == [f"blocks.{block}.mlp.fc1" for block in range(3)]
    assert len(layers.pictures) == 4


def test_experts_of_a_block_are_one_line(tmp_path):
    def change(cell, found):
        names = [f"blocks.{block}.experts.{expert}.up" for block in range(2) for expert in range(4)]
        found["masks"]["layers"] = {name: 0.1 * number for number, name in enumerate(names)}

    _study, cells = made_up(tmp_path / "out", change, **TWO)
    layers = layers_of(cells, StudyFolder(tmp_path / "out"), "text", "0.5")
    assert {kind: lines["wanda"] for kind, lines in layers.sparsity.items()} == {
        "experts.*.up": pytest.approx({0: 15, 1: 55})
    }


def test_a_folder_without_details_has_no_such_sections(tmp_path):
    study, cells = made_up(tmp_path / "out", **TWO, details=False)
    write_report(study, cells, tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Sparsity of each layer" in page
    for absent in ("Error of each layer", "Scores</h4>", "Masks</h4>", "data:image"):
        assert absent not in page


def test_times_stand_on_a_page_of_their_own(tmp_path):
    study, cells = made_up(tmp_path / "out", **TWO)
    pages = []
    for seconds in (3.25, 71.5):
        for file in (tmp_path / "out").rglob("measured.json"):
            file.write_text(json.dumps({"seconds": seconds, "runs_in_the_pass": 2, "peak_bytes": 5 << 20}))
        write_report(study, cells, tmp_path / "out")
        pages.append(
            {name: (tmp_path / "out" / name).read_bytes() for name in ("report.html", "report.md", "report.tex")}
        )
    assert pages[0] == pages[1]
    costs = (tmp_path / "out" / "measured.html").read_text()
    assert "71.5" in costs
    assert "shared one pass" in costs
    assert "<figure" not in costs  # the time of a pass tells its methods apart by nothing
