"""The page: all sections of a run in one HTML file that asks nothing of any network.

Enters: a run's record. Leaves: HTML, a file. A section that has nothing to show says why.
"""

import base64
import re
import struct
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pipeline.errors import UserError
from pipeline.report import facts
from pipeline.report.advice import next_steps
from pipeline.report.charts import draw_curves, draw_times, time_unit
from pipeline.report.confusion import confusions
from pipeline.report.events import events, stalls
from pipeline.report.record import Record, read_record
from pipeline.report.spent import last_moment, spend
from pipeline.tracking.tracker import RunRef

NAME = "report.html"  # among a run's files
PASSWORD = re.compile(r"://[^/@\s:<>\"]+:[^/@\s<>\"]+@")
GALLERIES = {
    "text_to_image": ("Captions and the images found for them",
                      "The five best of each, the best first; the right one is framed."),
    "image_to_text": ("Images and the captions found for them",
                      "The five best of each, the best first; right ones are green."),
    "zero_shot": ("Zero-shot classification",
                  "Right ones on top; of wrong ones (red) the right label is in brackets."),
    "answers": ("Answers", "Right ones on top; of wrong ones (red) the right one is in brackets."),
}  # fmt: skip
PLACES = {
    "projection.png": ("In one plane", "The two directions of the largest variance of both."),
    "similarities.png": ("Similarities", "Cosines in and across the modalities."),
    "bridge.png": ("Along the bridge", "How far views of images are from it."),
}


class Picture(NamedTuple):
    """A picture of the run, as a data URI."""

    title: str
    note: str
    uri: str
    width: int
    height: int


class Chart(NamedTuple):
    """A chart that stands in the page."""

    title: str
    svg: Markup


def write_report(ref: RunRef, path: Path) -> None:
    """Write the report of a run. Raises `UserError` for a tracker or a file out of reach."""
    page = render(read_record(ref))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out: cannot write {path} ({error}); name another file") from error


def render(record: Record) -> str:
    """The page as HTML; a password in a URL is not shown."""
    environment = Environment(
        loader=PackageLoader("pipeline.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    environment.filters["duration"] = duration
    environment.filters["clock"] = clock
    style = Markup((Path(__file__).parent / "page.css").read_text(encoding="utf-8"))
    page = environment.get_template("page.html").render(style=style, **_parts(record))
    return PASSWORD.sub("://***@", page)


def percent(share: float) -> str:
    """A share for people: small ones with more digits."""
    return f"{100 * share:.2f} %" if share < 0.01 else f"{100 * share:.1f} %"


def duration(seconds: float) -> str:
    """A span of time for people."""
    unit, length = time_unit(seconds)
    return f"{seconds / length:.1f} {unit}"


def clock(moment: float) -> str:
    """A moment for people, in UTC."""
    return f"{datetime.fromtimestamp(moment, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _parts(record: Record) -> dict[str, Any]:
    run = record.run
    began, ended = (run.began or 0) / 1000, last_moment(record)
    happened = events(record)
    return {
        "run": run,
        "about": _about(record),
        "began": began,
        "ended": ended,
        "lacking": record.lacking,
        "verdict": facts.verdict(record),
        "measures": facts.measures(record),
        "measured_rows": facts.evaluated_rows(record),
        "all_measures": facts.all_measures(record),
        "suite": list(facts.suite(record)),
        "steps": next_steps(record),
        "curves": _charts(facts.curves(record)),
        "speed": facts.speed(record),
        "spent": spend(record),
        "speed_charts": _charts(facts.panels(record, facts.SPEED)),
        "events": happened,
        "stalls": stalls(record),
        "times": Markup(draw_times(record, happened))
        if record.curve("train/step") or happened
        else None,
        "rows": facts.rows(record),
        "skipped": facts.skipped(record),
        "named_rows": facts.named_rows(record),
        "sheet": _picture(record, "contact_sheet.png", "Pairs of the training data", ""),
        "galleries": galleries(record),
        "no_galleries": _why_no_galleries(record),
        "confusions": confusions(record),
        "is_task": "gammaray.task" in run.tags,
        "geometry": facts.geometry(record),
        "places": [
            picture
            for path, (title, note) in PLACES.items()
            if (picture := _picture(record, path, title, note)) is not None
        ],
        "config": record.text("config.yaml") or _params(record),
        "plan": record.text("plan.txt")
        or run.tags.get("mlflow.note.content", "").replace("\n\n", "\n"),
        "versions": record.text("versions.txt"),
    }


def _about(record: Record) -> dict[str, str]:
    """What the run is and where it is."""
    run = record.run
    names = {
        "model": run.params.get("model.kind"),
        "task": run.tags.get("gammaray.task"),
        "began with": run.tags.get("gammaray.init"),
        "loss": None if "gammaray.task" in run.tags else run.params.get("loss.kind"),
        "prior": run.tags.get("gammaray.prior"),
        "ZeRO stage": run.tags.get("gammaray.zero_stage"),
        "workers": run.tags.get("gammaray.world_size") or run.tags.get("gammaray.workers"),
        "attempts": run.tags.get("gammaray.attempt"),
        "folder": run.tags.get("gammaray.storage"),
        "experiment": run.experiment,
        "MLflow run": f"{run.ref.run_id} in {run.ref.uri}",
        "gammaray": run.tags.get("gammaray.version"),
        "commit": run.tags.get("mlflow.source.git.commit"),
    }
    return {name: value for name, value in names.items() if value}


def _params(record: Record) -> str:
    return "\n".join(f"{name}: {value}" for name, value in sorted(record.run.params.items()))


def _charts(panels: list[facts.Panel]) -> list[Chart]:
    return [
        Chart(panel.title, Markup(draw_curves(panel.lines, percent=panel.is_share)))
        for panel in panels
    ]


def galleries(record: Record) -> list[Picture]:
    """Right and wrong cases; those of a later evaluation where the run itself has none."""
    found = []
    for kind, (title, note) in GALLERIES.items():
        names = sorted({
            path.rpartition("/")[2]
            for path in record.files
            if re.fullmatch(rf"(suite/)?{kind}{'_.+' if kind == 'zero_shot' else ''}\.png", path)
        })  # fmt: skip
        for name in names:
            column = name.removeprefix(f"{kind}_").removesuffix(".png")
            full = f"{title}: {column}" if kind == "zero_shot" else title
            path = name if name in record.files else f"suite/{name}"
            if (picture := _picture(record, path, full, note)) is not None:
                found.append(picture)
    return found


def _why_no_galleries(record: Record) -> str:
    if record.lacking:
        return f"The run's files could not be read: {record.lacking}"
    if not record.evaluated:
        return "The run was not evaluated, so there are no cases to show."
    return (
        "The run logged none: they are made by the evaluation at a run's end, and by "
        "gammaray evaluate RUN --suite all."
    )


def _picture(record: Record, path: str, title: str, note: str) -> Picture | None:
    """A PNG among the run's files."""
    data = record.files.get(path)
    if data is None or not data.startswith(b"\x89PNG") or len(data) < 24:
        return None
    width, height = struct.unpack(">II", data[16:24])
    uri = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return Picture(title, note, uri, width, height)
