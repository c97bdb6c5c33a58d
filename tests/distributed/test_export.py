"""Export of what engines saved: every ZeRO stage, both precisions, another number of workers.

Loaded where nothing of ours can be imported, by the Python that the model card shows.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from jobs.bench.ranks import run_ranks
from pipeline.config.schema import Config
from pipeline.engine.zero import Engine, load_weights
from pipeline.export.forms import export_run
from tests.tiny import CAPTIONS, FUSION, tiny_config, tiny_module, tiny_pairs
from tests.tiny_run import in_fresh_process, largest_difference, publish_run, tiny_inputs

Case = tuple[str, int, str]  # kind of model, ZeRO stage, precision
CASES: list[Case] = [
    *(("two_tower", stage, precision) for stage in (0, 1, 2, 3) for precision in ("fp32", "bf16")),
    *(("fusion", stage, "fp32") for stage in (0, 2, 3)),
]
RESIZED: list[Case] = [("two_tower", 2, "bf16"), ("two_tower", 3, "fp32"), ("fusion", 2, "fp32")]
BATCH = 12
TOLERANCE = 1e-5


def _config(case: Case) -> Config:
    kind, stage, precision = case
    return tiny_config(
        model=FUSION if kind == "fusion" else {},
        engine={"zero_stage": stage, "precision": precision},
        optim={"lr": 0.01},
    )


def _engine(case: Case, loads_universal: bool = False) -> Engine:
    config = _config(case)
    return Engine(
        tiny_module(config),
        engine=config.engine,
        optim=config.optim,
        micro_batch=BATCH // dist.get_world_size(),
        accumulation=1,
        device=torch.device("cpu"),
        loads_universal=loads_universal,
    )


def _train(engine: Engine, case: Case, seeds: range) -> None:
    for seed in seeds:
        images, tokens = (
            part.chunk(dist.get_world_size())[dist.get_rank()] for part in tiny_pairs(BATCH, seed)
        )
        chosen = torch.zeros_like(tokens, dtype=torch.bool)
        chosen[:, 2] = True
        outputs = engine(images, tokens, *((tokens, chosen) if case[0] == "fusion" else ()))
        loss = (outputs.logit_scale * (outputs.image - outputs.text.flip(1)).square()).mean()
        if case[0] == "fusion":
            loss = loss + outputs.masked_logits.log_softmax(1)[:, 5].neg().mean()
            loss = loss + outputs.match_logits.log_softmax(1)[:, 0].neg().mean()
        engine.backward(loss)
        engine.step(1.0)


def _embed(engine: Engine) -> dict[str, Tensor]:
    """What the engine itself makes of the inputs."""
    engine.train(False)
    with torch.no_grad():
        outputs = engine(*tiny_inputs())
    return {"image": outputs.image.clone(), "text": outputs.text.clone()}


def _save(folder: str, cases: list[Case], before: str | None) -> dict[Case, dict[str, Tensor]]:
    found = {}
    for case in cases:
        name = "-".join(map(str, case))
        engine = _engine(case, loads_universal=before is not None)
        if before is not None:
            engine.load(Path(before) / name)
        _train(engine, case, range(2) if before is None else range(2, 4))
        engine.save(Path(folder) / name)
        found[case] = _embed(engine)
    return found


Given = dict[tuple[int, Case], dict[str, Any]]  # by workers: exported folder, expected, engine's


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Given:
    """All cases, saved by two workers, and some after that by three; what others make of them."""
    root = tmp_path_factory.mktemp("export (1)+[a]")
    engines = {
        2: run_ranks(_save, 2, str(root / "2"), CASES, None)[0],
        3: run_ranks(_save, 3, str(root / "3"), RESIZED, str(root / "2"))[0],
    }
    given: Given = {}
    for workers, of_cases in engines.items():
        for case, embedded in of_cases.items():
            name = "-".join(map(str, case))
            saved = root / "sent" / f"{workers}-{name}"
            shutil.copytree(root / str(workers) / name, saved)
            expected = _expected(case, saved)
            config = _config(case).model_copy(update={"name": f"of{workers}-{name}"})
            run, record = publish_run(
                root / "runs", config, saved, zero_stage=case[1], world_size=workers
            )
            out = root / "out" / config.name
            export_run(run, record, out, form="transformers", dtype="fp32")
            given[workers, case] = {"out": out, "expected": expected, "engine": embedded}
    found = in_fresh_process(root / "fresh", [each["out"] for each in given.values()])
    for each in given.values():
        each["found"] = found[each["out"]]
    return given


def _expected(case: Case, saved: Path) -> dict[str, Tensor]:
    """What our module makes of the inputs with the consolidated weights."""
    module = tiny_module(_config(case))
    module.load_state_dict(load_weights(saved, case[1]))
    module.eval()
    images, tokens = tiny_inputs()
    with torch.no_grad():
        outputs = module(images, tokens)
        expected = {"image": outputs.image, "text": outputs.text}
        if case[0] == "fusion":
            matched = module(None, tokens, states=outputs.image_states)
            expected["match"] = matched.match_logits
    return expected


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("workers", "case"), [(2, case) for case in CASES] + [(3, case) for case in RESIZED]
)
def test_others_load_the_same_model(exported: Given, workers: int, case: Case) -> None:
    each = exported[workers, case]
    assert largest_difference(each["found"], each["expected"]) < TOLERANCE
    assert each["found"]["image"].shape == (len(CAPTIONS), 16)
    if case[2] == "fp32":  # in bf16 an engine's forward is rounded
        assert largest_difference(each["found"], each["engine"]) < TOLERANCE


@pytest.mark.distributed
def test_training_and_resizing_moved_the_weights(exported: Given) -> None:
    """Or else the comparison would be one of equal starts."""
    for case in RESIZED:
        before, after = (exported[workers, case]["expected"] for workers in (2, 3))
        assert largest_difference(before, after) > 1e-3, case
        start = tiny_module(_config(case)).eval()
        with torch.no_grad():
            outputs = start(*tiny_inputs())
        assert largest_difference({"image": outputs.image}, {"image": before["image"]}) > 1e-3
