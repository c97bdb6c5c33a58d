"""A run's folder with one checkpoint, and what others make of its export, without our code."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.config.schema import Config
from pipeline.data.text import Tokenizer
from pipeline.train.module import architecture
from pipeline.train.publish import Sender
from pipeline.train.store import META, RunFolder, RunRecord
from tests.tiny import CAPTIONS, tiny_pairs, tiny_tokenizer

STATE = Path("state") / "mp_rank_00_model_states.pt"  # what stage 0 writes
PLAN: dict[str, Any] = {"samples": 64, "train_rows": 99, "virtual_batch": 8, "global_batch": 8,
                        "structure": []}  # fmt: skip


def publish_run(
    storage: Path,
    config: Config,
    saved: Path,
    *,
    zero_stage: int,
    world_size: int = 1,
    tokenizer: Tokenizer | None = None,
    model: nn.Module | None = None,
) -> tuple[RunFolder, RunRecord]:
    """The run `config.name` in `storage` with what an engine saved as its one checkpoint.

    Without `model` it is one of an older version, which did not keep its architecture.
    """
    record = RunRecord(
        name=config.name, config=config.model_dump(mode="json"),
        tokenizer=tokenizer or tiny_tokenizer(), data_digest="0123456789abcdef0123",
        mlflow_uri=f"sqlite:///{storage}/none.db", mlflow_run_id="4ac1", is_finished=True,
    )  # fmt: skip
    run = RunFolder.of(str(storage), config.name)
    run.write_record(record)
    meta: dict[str, Any] = {
        "progress": {"step": 4, "samples": 32},
        "world_size": world_size,
        "zero_stage": zero_stage,
        "plan": PLAN,
        "versions": {"gammaray": "0.1.0"},
    }
    if model is not None:
        meta["architecture"] = architecture(model)
    (saved / META).write_text(json.dumps(meta))
    sender = Sender(run, rank=0, world_size=1, keep=9, published=lambda name: None)
    sender.send("step-00000004", saved)
    assert not sender.settle(lambda value: [value])
    return run, record


def publish_module(
    storage: Path, config: Config, module: nn.Module, tokenizer: Tokenizer | None = None
) -> tuple[RunFolder, RunRecord]:
    """The same of a module that no engine has, as stage 0 saves it."""
    saved = storage / "saved"
    shutil.rmtree(saved, ignore_errors=True)
    (saved / STATE.parent).mkdir(parents=True)
    torch.save({"module": module.state_dict()}, saved / STATE)
    model = module if hasattr(module, "towers") else None
    return publish_run(storage, config, saved, zero_stage=0, tokenizer=tokenizer, model=model)


def tiny_inputs() -> tuple[Tensor, Tensor]:
    """What `pictures` and CAPTIONS are to our model."""
    tokens, _ = tiny_tokenizer().encode(CAPTIONS, 8)
    return tiny_pairs(len(CAPTIONS))[0], torch.from_numpy(tokens)


FRESH = """
import re, sys
sys.modules["pipeline"] = None
try:
    import pipeline.config
except ImportError:
    pass
else:
    raise SystemExit("it must not be importable")
import torch
from PIL import Image
work, *folders = sys.argv[1:]
found = {}
for folder in folders:
    code = re.search("```python\\n(.*?)```", open(f"{folder}/README.md").read(), re.S).group(1)
    given = f"folder, images, texts = {folder!r}, IMAGES, TEXTS"
    code, count = re.subn("(?m)^folder, images, texts = .*$", lambda match: given, code)
    assert count == 1, code
    images = [Image.open(f"{work}/{number}.png") for number in range(3)]
    names = {"IMAGES": images, "TEXTS": open(f"{work}/texts").read().splitlines()}
    exec(code, names)
    values = {name: names[name] for name in ("image", "text", "match") if name in names}
    found[folder] = {name: value.float() for name, value in values.items()}
torch.save(found, f"{work}/found.pt")
"""


def in_fresh_process(work: Path, folders: list[Path]) -> dict[Path, dict[str, Tensor]]:
    """What the Python in each folder's model card gives, where nothing of ours can be imported."""
    work.mkdir(exist_ok=True)
    for number, pixels in enumerate(tiny_inputs()[0]):
        Image.fromarray(np.asarray(pixels)).save(work / f"{number}.png")
    (work / "texts").write_text("\n".join(CAPTIONS))
    names = [str(work), *map(str, folders)]
    command = [sys.executable, "-I", "-c", FRESH, *names]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(work / "found.pt")
    return {folder: found[str(folder)] for folder in folders}


def largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Over all that is expected."""
    return max(
        (found[name] - value.detach()).abs().max().item() for name, value in expected.items()
    )
