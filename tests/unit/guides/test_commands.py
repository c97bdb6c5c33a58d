"""What README and guides name is there: commands and options, keys, configs, files, places."""

import importlib.util
import itertools
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from typer.main import get_command

from pipeline.cli import app
from pipeline.config.load import load_config
from pipeline.config.reference import tables
from pipeline.config.schema import Config

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "README.md", ROOT / "configs/REFERENCE.md", ROOT / "cluster/README.md",
         *sorted((ROOT / "pipeline").rglob("README.md"))]  # fmt: skip
KEYS = {re.sub(r"\[\]", "", key.path) for table in tables() for key in table.keys}
NODES = {".".join(key.split(".")[:depth]) for key in KEYS for depth in range(1, 5)}
SPAN = re.compile(r"`+([^`]+?)`+")
FENCED = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.M | re.S)
KEY = re.compile(rf"(?<![\w/.-])((?:{'|'.join(Config.model_fields)})(?:\.[a-z_0-9]+)+)(?![\w/(])")
PLACE = re.compile(r"(?<![\w/.-])((?:pipeline|configs|cluster|jobs|tests)/[\w./-]*\w)")
NEW = re.compile(r"`([\w/]+\.py)`, new:")


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _blocks(text: str) -> list[str]:
    """Commands: fenced shell, and indented lines as README has them."""
    fenced = [body for language, body in FENCED.findall(text) if language == "sh"]
    plain = FENCED.sub("", text)
    return [*fenced, "\n".join(re.findall(r"(?m)^    (.*)$", plain))]


def _spans(text: str) -> list[str]:
    return [" ".join(span.split()) for span in SPAN.findall(FENCED.sub("", text))]


class Told(NamedTuple):
    """What `gammaray` is told; in the text a command may lack what it needs."""

    words: list[str]
    is_whole: bool


def _told(text: str) -> list[Told]:
    lines = [line for block in _blocks(text) for line in block.replace("\\\n", " ").splitlines()]
    found = []
    for line, is_whole in (*((line, True) for line in lines), *((s, False) for s in _spans(text))):
        match = re.match(r"(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?gammaray +(.*)", line.strip())
        if match:
            words = shlex.split(re.sub(r"\{[^}]*\}", "RANGE", match[1]), comments=True)
            found.append(
                Told([re.sub(r"^N$", "1", word.partition("|")[0]) for word in words], is_whole)
            )
    return found


def _parse(told: Told) -> None:
    """Have the command take what it is told, without running it."""
    command: Any = get_command(app)
    context, rest, name = None, told.words, "gammaray"
    while hasattr(command, "resolve_command") and rest:
        context = command.make_context(name, [], parent=context, resilient_parsing=True)
        name, command, rest = command.resolve_command(context, list(rest))
        if command is None:
            raise LookupError(f"No such command: {told.words}")
    try:
        command.make_context(name, list(rest), parent=context)
    except Exception as error:  # typer's click is one of its own
        if told.is_whole or type(error).__name__ != "MissingParameter":
            raise


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_commands_and_their_options_are_taken(page: Path) -> None:
    for told in _told(page.read_text()):
        _parse(told)


def test_a_command_or_option_that_is_not_there_is_found() -> None:
    for words in (["trian", "CONFIG"], ["train", "CONFIG", "--jsn", "F"], ["data", "mend", "X"]):
        with pytest.raises(Exception, match=r"No such (option|command)"):
            _parse(Told(words, is_whole=False))


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_overrides_of_commands_are_taken_by_the_config_named(
    page: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    for words, _ in _told(page.read_text()):
        configs = [word for word in words if re.fullmatch(r"configs/[\w/]+\.yaml", word)]
        given = [word for word in words if re.match(r"[a-z_.]+=", word) and "RANGE" not in word]
        over = [word for before, word in itertools.pairwise(words) if before == "--over"]
        overrides = [word for word in given if word not in over]
        axes = [
            (key, values.split(",")) for key, _, values in (word.partition("=") for word in over)
        ]
        varied = [[f"{key}={value}"] for key, values in axes for value in values]
        for config in configs:
            for more in varied or [[]]:
                load_config(config, [*overrides, *more])
        for override in given:
            assert override.partition("=")[0] in NODES, f"{page.name}: no key {override}"


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_keys_are_those_of_the_schema(page: Path) -> None:
    ends = (".py", ".yaml", ".json", ".md")
    for span in _spans(page.read_text()):
        for key in KEY.findall(span):
            assert key in NODES or key.endswith(ends), f"{page.name}: no key {key}"


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_files_and_modules_are_there(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = page.read_text()
    new = set(NEW.findall(text))
    # A file may be named from where the page is, or by its place in a package.
    bases = (ROOT, page.parent, ROOT / "pipeline", ROOT / "configs/albef")
    for place in {*PLACE.findall(FENCED.sub("", text))} - new:
        assert (ROOT / place).exists(), f"{page.name}: no {place}"
        if place.endswith(".yaml") and place.startswith("configs"):
            load_config(place)
    for span in _spans(text):
        is_made = span in new or "my-" in span or span.startswith("RUN/")
        if re.fullmatch(r"[\w/]+\.(py|yaml)", span) and not is_made:
            assert any((base / span).exists() for base in bases), f"{page.name}: no {span}"
    for module in re.findall(r"python -m ((?:pipeline|jobs)[\w.]*\w)", text):
        assert importlib.util.find_spec(module), f"{page.name}: no module {module}"


def _anchors(page: Path) -> set[str]:
    titles = re.findall(r"(?m)^#+ (.*)$", page.read_text())
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_lead_to_places(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", page.read_text())):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        if there.is_dir():
            there /= "README.md"
        assert there.exists(), f"{page.name}: no {target}"
        assert not anchor or anchor in _anchors(there), f"{page.name}: no {target}"


def test_options_named_in_the_text_are_those_of_some_command() -> None:
    known = set()
    todo: list[Any] = [get_command(app)]
    while todo:
        command = todo.pop()
        todo += getattr(command, "commands", {}).values()
        known |= {option for parameter in command.params for option in parameter.opts}
    for page in PAGES:
        if page.parent.name != "cluster":  # it also names options of Ray, Docker and MLflow
            for span in _spans(page.read_text()):
                for option in re.findall(r"^--[a-z-]+", span):
                    assert option in known, f"{page.name}: no command has {option}"
