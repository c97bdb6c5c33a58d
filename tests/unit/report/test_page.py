"""The page as a browser has it: whole, of itself, and safe."""

import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.report import page
from pipeline.report.charts import draw_curves, draw_times
from pipeline.report.events import events
from pipeline.report.record import Record
from pipeline.tracking.tracker import RunRef
from tests.unit.report.runs import curve, picture, record, trained

EVIL = "<script>alert('x')</script> & <img src=http://evil/x.png>"
FILES: dict[str, str | bytes] = {
    "text_to_image.png": picture(), "image_to_text.png": picture(), "answers.png": picture(),
    "zero_shot_shape.png": picture(), "suite/zero_shot_colour.png": picture(1300, 9),
    "suite/text_to_image.png": picture(), "projection.png": picture(),
    "contact_sheet.png": picture(),
    "confusion_shape.json": json.dumps(
        {"column": EVIL, "classes": [EVIL, "b"], "counts": [[0, 1, 2], [1, 1, 2]]}
    ),
    "config.yaml": f"name: {EVIL}\n", "plan.txt": EVIL, "versions.txt": "torch==2.13.0\n",
    "dropped_rows.tsv": f"a:0:1\t{EVIL}\n",
    "stalls/step-00000012-rank-00003.txt": f"{EVIL}\n\n{EVIL}",
}  # fmt: skip


class _Reader(HTMLParser):
    """All tags with what they have, and the text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.said: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.said.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [found for name, found in self.tags if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.said).split())


def _full() -> Record:
    tags = {
        "gammaray.event.20231114T221330Z.failed": EVIL,
        "gammaray.event.20231114T221340Z.started": "attempt 2 from step 4 with 3 worker(s)",
    }
    workers = {"train/world_size": curve((100, 30, 2), (200, 55, 3))}
    return trained(name=EVIL, tags=tags, points=workers, files=FILES)


def test_the_page_asks_nothing_of_any_network() -> None:
    text = page.render(_full())
    read = _Reader(text)
    for tag, has in read.tags:
        for name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
            value = has.get(name)
            assert value is None or value.startswith(("data:image/", "#")), (tag, name, value)
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in read.tags}
    assert not re.search(r"@import|url\((?!#)", text)
    images = read.all("img")
    assert len(images) == 7
    assert all((each["src"] or "").startswith("data:image/png;base64,") for each in images)
    (policy,) = [each for each in read.all("meta") if "http-equiv" in each]
    assert policy["content"] == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_what_users_wrote_is_text() -> None:
    text = page.render(_full())
    assert "<script" not in text
    assert "<img src=http" not in text
    said = _Reader(text).text
    assert said.count(EVIL) >= 8, "name, events, stalls, classes, config, plan, rows"


def test_a_full_run_lacks_nothing() -> None:
    read = _Reader(page.render(_full()))
    assert not [each for _, each in read.tags if each.get("class") == "note"]
    headings = [each["id"] for each in read.all("section")]
    assert headings == ["worked", "next", "curves", "speed", "events", "data", "cases",
                        "confusion", "geometry", "config"]  # fmt: skip
    links = [each["href"] for each in read.all("a")]
    assert links == [f"#{heading}" for heading in headings]
    assert "0.250" in read.text, "of the modality gap"
    assert "torch==2.13.0" in read.text


def test_ids_are_not_used_twice() -> None:
    ids = [has["id"] for _, has in _Reader(page.render(_full())).tags if "id" in has]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (record(), "fewer than two points, so there is no curve"),
        (record(), "No step was logged"),
        (record(), "No failure, restart or resize was noted"),
        (record(), "There is no contact sheet: the run logged none"),
        (record(), "not evaluated, so there are no cases"),
        (record(), "The config names no evaluate.zero_shot"),
        (record(), "The run has left no plan"),
        (record(params={"evaluate.zero_shot": "[{}]"}), "The run logged no counts"),
        (record(tags={"gammaray.task": "vqa"}), "it has no embeddings of its own"),
        (trained(), "The run logged none: they are made by the evaluation at a run's end"),
        (record(lacking="no such bucket"), "Parts are missing: no such bucket"),
        (record(lacking="no such bucket"), "files could not be read: no such bucket"),
        (trained(status="RUNNING"), "last heard of after 90.0 seconds"),
    ],
)
def test_what_is_missing_is_said(run: Record, said: str) -> None:
    assert said in _Reader(page.render(run)).text


def test_passwords_in_urls_are_not_shown() -> None:
    uri = "postgresql://user:s3cret@host/db"
    text = page.render(record(params={"tracking.uri": uri}))
    assert "s3cret" not in text
    assert "postgresql://***@host/db" in text


def test_pictures_of_the_run_come_before_those_of_a_later_evaluation() -> None:
    titles = [each.title for each in page.galleries(_full())]
    assert titles == [
        "Captions and the images found for them", "Images and the captions found for them",
        "Zero-shot classification: colour", "Zero-shot classification: shape", "Answers",
    ]  # fmt: skip
    assert page.galleries(record(files={"answers.png": b"no picture"})) == []


def test_charts_are_svg_in_the_colours_of_the_page() -> None:
    lines = {"a $x": curve((10, 1, 1.0), (20, 2, 2.0)), "_b": curve((10, 1, 1.0), (20, 2, 3.0))}
    for text in (draw_curves(lines, percent=True), draw_times(_full(), events(_full()))):
        root = ET.fromstring(text)
        assert root.tag.endswith("svg")
        assert "width" not in root.attrib
        assert root.attrib["viewBox"]
        assert "currentColor" in text
        assert "#123456" not in text


def test_long_curves_are_thinned() -> None:
    points = [(number, number, float(number % 7)) for number in range(1, 40_000)]
    assert len(draw_curves({"": curve(*points)})) < 200_000


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.0, "0.0 seconds"), (170, "170.0 seconds"), (600, "10.0 minutes"),
                          (86400, "24.0 hours"), (864000, "10.0 days")],
)  # fmt: skip
def test_spans_are_said_in_a_unit_that_reads(seconds: float, said: str) -> None:
    assert page.duration(seconds) == said


def test_a_tracker_or_file_out_of_reach_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="no tracker there"):
        page.write_report(RunRef(uri=f"sqlite:///{tmp_path}/no.db", run_id="x"), tmp_path / "out")
    monkeypatch.setattr(page, "read_record", lambda ref: record())
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="--out: cannot write"):
        page.write_report(RunRef(uri="", run_id=""), tmp_path / "folder")
