"""Which runs are the same but for the seed, and what differs between the others.

Enters: runs as the tracker has them. Leaves: `Group`, by config. Must not know: MLflow, metrics.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.tracking.search import Tracked

# Where a run is kept and what it is called is no part of what it is.
PLACES = ("name", "tracking.", "cluster.storage", "cluster.address")
ORDER = ("loss", "structure", "fusion", "task", "model", "optim", "train", "data", "engine")
DIGEST = "data.digest"  # of the training files, which may change under one path
NAMED = 3  # differences that a group's name tells
VALUE = 28  # characters of a value in it
ABSENT = "-"


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Runs of one config, seeds apart. `label` is a letter or two, `what` says the difference."""

    label: str
    what: str
    config: Mapping[str, str]
    runs: tuple[Tracked, ...]

    @property
    def title(self) -> str:
        """Label and difference."""
        return f"{self.label}: {self.what}"


def config_of(run: Tracked) -> dict[str, str]:
    """What makes the run what it is: its parameters without seed, name and places."""
    config = {key: value for key, value in run.params.items() if not _is_aside(key)}
    if digest := run.tags.get("gammaray.data_digest"):
        config[DIGEST] = digest
    return config


def seed_of(run: Tracked) -> str:
    """The seed of the run's training."""
    return run.params.get("train.seed", ABSENT)


def group_runs(runs: Sequence[Tracked]) -> list[Group]:
    """Put runs of one config together, in the order in which the configs first occur."""
    found: dict[tuple[tuple[str, str], ...], list[Tracked]] = {}
    for run in runs:
        found.setdefault(tuple(sorted(config_of(run).items())), []).append(run)
    configs = [dict(key) for key in found]
    keys = differing(configs)
    telling = _telling(configs, keys)
    return [
        Group(
            label=_letters(number),
            what=_what(config, telling, len(keys) - len(telling)),
            config=config,
            runs=tuple(members),
        )
        for number, (config, members) in enumerate(zip(configs, found.values(), strict=True))
    ]


def differing(configs: Sequence[Mapping[str, str]]) -> list[str]:
    """The keys that not all configs have with one value; what shapes the training first."""
    keys = {key for config in configs for key in config}
    differ = [key for key in keys if len({config.get(key, ABSENT) for config in configs}) > 1]
    return sorted(differ, key=lambda key: (_place(key), key))


def _is_aside(key: str) -> bool:
    return key == "train.seed" or any(
        key == place or (place.endswith(".") and key.startswith(place)) for place in PLACES
    )


def _place(key: str) -> int:
    section = key.partition(".")[0]
    return ORDER.index(section) if section in ORDER else len(ORDER)


def _telling(configs: Sequence[Mapping[str, str]], keys: Sequence[str]) -> list[str]:
    """The few of the keys that tell the most configs apart, in their order."""
    chosen: list[str] = []

    def kinds(key: str) -> int:
        return len({tuple(config.get(each) for each in (*chosen, key)) for config in configs})

    while len(chosen) < min(NAMED, len(keys)):
        chosen.append(max((key for key in keys if key not in chosen), key=kinds))
    return sorted(chosen, key=keys.index)


def _what(config: Mapping[str, str], keys: Sequence[str], more: int) -> str:
    if not keys:
        return "one config"
    told = [f"{key}={_short(config.get(key, ABSENT))}" for key in keys]
    return ", ".join(told) + (f" and {more} more" if more else "")


def _short(value: str) -> str:
    """The end of a long value: paths begin alike."""
    return value if len(value) <= VALUE else f"...{value[3 - VALUE :]}"


def _letters(number: int) -> str:
    """A to Z, then AA, AB and so on."""
    label = ""
    number += 1
    while number:
        number, rest = divmod(number - 1, 26)
        label = chr(ord("A") + rest) + label
    return label
