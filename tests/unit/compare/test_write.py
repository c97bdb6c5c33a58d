import json
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image

from pipeline.compare.curves import Course
from pipeline.compare.figures import _draw_chance, _shown, draw_curves, draw_pareto
from pipeline.compare.group import group_runs
from pipeline.compare.measure import Comparison, Spread, compare
from pipeline.compare.write import config_table, headed, say, say_drawn, say_time, write_files
from tests.unit.compare.runs import RECALL, course, tracked

CHANCE = "eval/retrieval/text_to_image_chance_at_1"


@pytest.fixture
def comparison() -> Comparison:
    ways = {
        "a0": course(1.0, 0.1, 0.2, 0.3, 0.4),
        "a1": course(1.0, 0.1, 0.3, 0.4, 0.6),
        "b0": course(0.5, 0.1, 0.2, 0.2, 0.25),
        "b1": course(0.5, 0.3),
    }
    runs = [
        tracked(
            name,
            int(name[1]),
            status="KILLED" if name == "b1" else "FINISHED",
            metrics={RECALL: way.points[RECALL][-1][1], CHANCE: 1 / 3},
            loss__kind=name[0],
            data__train="/a|b",
        )
        for name, way in ways.items()
    ]
    courses = {run.ref.run_id: ways[run.name] for run in runs}
    return compare(group_runs(runs), [RECALL], courses)


def test_cells_say_mean_spread_and_how_many_if_not_all() -> None:
    assert say(RECALL, Spread(0.5, 0.0123, 3), 3) == "50.0 ± 1.2"
    assert say(RECALL, Spread(0.5, None, 1), 3) == "50.0 (1)"
    assert say("train/loss", Spread(1.5, 0.25, 2), 2) == "1.5000 ± 0.2500"
    assert say("train/loss", None, 2) == "-"
    assert say("eval/rows", Spread(1048576.0, 0.0, 2), 2) == "1,048,576 ± 0"
    assert say_time(Spread(7200.0, 60.0, 2)) == "120.0 ± 1.0 minutes"
    assert say_time(Spread(36000.0, None, 1), "worker-") == "10.0 worker-hours"
    assert say_time(None) == "-"


def test_the_files_have_all_numbers_and_all_runs(comparison: Comparison, tmp_path: Path) -> None:
    write_files(comparison, ["curves.png"], tmp_path)
    text = (tmp_path / "comparison.md").read_text()
    assert text.startswith("# 4 run(s) of 2 config(s)\n")
    for line in (
        "| what differs | A | B |",
        "| loss.kind | a | b |",
        "| A: loss.kind=a | 2 | 4.0 ± 0.0 seconds | 4.0 ± 0.0 worker-seconds |",
        f"**{RECALL}, % (chance 33.3 %)**",
        "| A (2) | 50.0 ± 14.1 | 50.0 ± 14.1 | 50.0 ± 14.1 | 25.0 ± 7.1 | yes |",
        "| B (1 of 2) | 25.0 | 25.0 | 25.0 | 25.0 | yes |",
        "| B | b1 | 1 | stopped, at 10 samples | 10 | 30.0 | id-of-b1 |",
        "![curves](curves.png)",
    ):
        assert line in text
    facts = json.loads((tmp_path / "comparison.json").read_text())
    first = facts["groups"][0]
    final = first["metrics"][RECALL]["final"]
    assert final == {"mean": 0.5, "sd": pytest.approx(0.2 / 2**0.5), "n": 2}
    assert [run["metrics"][RECALL]["final"] for run in first["runs"]] == [0.4, 0.6]
    assert first["runs"][1]["metrics"][RECALL]["best"] == {"value": 0.6, "samples": 40}
    assert facts["metrics"][RECALL]["pareto_front"] == ["A", "B"]
    assert facts["metrics"][RECALL]["chance"] == pytest.approx(1 / 3)
    assert facts["differs"] == {"loss.kind": ["a", "b"]}


def test_a_chance_that_is_small_can_be_read(comparison: Comparison) -> None:
    small = replace(comparison, chance={RECALL: 1 / 4096})
    assert headed(small, RECALL) == f"{RECALL}, % (chance 0.0244 %)"
    assert headed(small, "train/loss") == "train/loss"


def test_of_more_metrics_than_pictures_show_that_is_said(
    comparison: Comparison, tmp_path: Path
) -> None:
    names = [RECALL, *(f"eval/zero_shot/{n}/accuracy" for n in range(3))]
    runs = [member.run for each in comparison.groups for member in each.members]
    points = {**{name: [] for name in names}, **course(1.0, 0.1).points}
    found = compare(group_runs(runs), names, {r.ref.run_id: Course(points=points) for r in runs})
    said = "Pictures: the first 3 of 4 metrics; others with gammaray compare --metric NAME."
    assert (say_drawn(found), say_drawn(comparison)) == (said, "")
    write_files(found, ["curves.png"], tmp_path)
    assert f"\n\n{said}\n\n![curves]" in (tmp_path / "comparison.md").read_text()
    write_files(found, [], tmp_path)
    assert said not in (tmp_path / "comparison.md").read_text()


@pytest.mark.parametrize(
    ("chance", "lines", "top"),
    [(None, 1, 0.4), (0.1, 1, 0.4), (0.3, 2, 0.4), (0.8, 2, 0.84)],
)
def test_chance_is_a_line_where_it_is_near(chance: float | None, lines: int, top: float) -> None:
    axes = Figure().subplots()
    axes.plot([0, 1], [0.2, 0.4])
    axes.set_ylim(0.2, 0.4)
    assert _draw_chance(axes, chance) == (lines == 2)
    assert len(axes.lines) == lines
    assert axes.get_ylim() == pytest.approx((0.2, top))


def test_figures_are_drawn_where_there_is_something_to_draw(
    comparison: Comparison, tmp_path: Path
) -> None:
    for draw in (draw_curves, draw_pareto):
        path = tmp_path / f"{draw.__name__}.png"
        assert draw(comparison, path)
        with Image.open(path) as image:
            assert image.size[0] > 600
            assert len(image.convert("RGB").getcolors(1 << 20) or []) > 10
    run = tracked("a")
    nothing = Course(points={name: [] for name in course(1.0).points})
    empty = compare(group_runs([run]), [], {run.ref.run_id: nothing})
    assert not draw_curves(empty, tmp_path / "none.png")
    assert not draw_pareto(empty, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_of_many_groups_each_has_a_row_and_the_best_are_drawn(tmp_path: Path) -> None:
    """The legend of all would be higher than an image can be."""
    ways = {f"r{n}": course(1.0 + n, n / 900) for n in range(900)}
    runs = [
        tracked(name, metrics={RECALL: way.points[RECALL][-1][1]}, optim__lr=name, loss__kind="a")
        for name, way in ways.items()
    ]
    found = compare(group_runs(runs), [RECALL], {run.ref.run_id: ways[run.name] for run in runs})
    titles, rows = config_table(found)
    assert (titles, rows[:2]) == (["group", "optim.lr"], [["A", "r0"], ["B", "r1"]])
    assert [each.group.config["optim.lr"] for each in _shown(found)][:2] == ["r899", "r898"]
    for draw in (draw_curves, draw_pareto):
        assert draw(found, tmp_path / "many.png")
        with Image.open(tmp_path / "many.png") as image:
            assert image.size[1] < 2000
