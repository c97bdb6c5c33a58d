"""A tiny model, its config, and batches that need no files: what many tests share."""

from typing import Any

import torch

from pipeline.config.load import parse_config
from pipeline.config.plan import Facts
from pipeline.config.schema import Config
from pipeline.data.batches import Batch
from pipeline.data.text import Tokenizer, train_tokenizer
from pipeline.train.module import FusionPretraining, Pretraining, build_pretraining

CAPTIONS = ["a small red circle", "a large blue square", "a green star above a gray cross"]


def tiny_values(**sections: dict[str, Any]) -> dict[str, Any]:
    """Plain values of a config whose model takes milliseconds; sections are merged in."""
    values: dict[str, Any] = {
        "name": "tiny",
        "data": {"train": "nowhere", "vocab_size": 300},
        "model": {
            "embed_dim": 16,
            "image": {"size": 16, "patch": 8, "width": 16, "layers": 2, "heads": 2},
            "text": {"context_length": 8, "width": 16, "layers": 2, "heads": 2},
        },
        "engine": {"zero_stage": 0, "precision": "fp32"},
        "train": {"global_batch": 8, "samples": 64},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return values


def tiny_config(**sections: dict[str, Any]) -> Config:
    return parse_config(tiny_values(**sections), "tiny")


def tiny_facts(rows: int = 99, embed_dim: int = 16) -> Facts:
    """Facts of a data set of so many rows, for a plan."""
    return Facts(
        train_rows=rows,
        epoch_rows=rows,
        row_groups=1,
        val_rows=0,
        vocab_size=300,
        num_parameters=1,
        embed_dim=embed_dim,
    )


FUSION: dict[str, Any] = {"kind": "fusion", "fusion": {"layers": 2, "dropout": 0.0}}  # a model
CONV: dict[str, Any] = {**tiny_values()["model"]["image"], "stem": "conv"}  # its image tower


def tiny_tokenizer() -> Tokenizer:
    return train_tokenizer(CAPTIONS, 300)


def tiny_module(config: Config) -> Pretraining | FusionPretraining:
    """A module whose text and image embeddings differ between pairs from the start."""
    module = build_pretraining(config, tiny_tokenizer())
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "projection" in name or "embedding" in name:
                parameter.mul_(3.0)
    return module


def tiny_pairs(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random uint8 images [count, 16, 16, 3] and int32 tokens [count, 8]."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 16, 16, 3), generator=generator, dtype=torch.uint8)
    tokens = torch.randint(4, 290, (count, 8), generator=generator, dtype=torch.int32)
    tokens[:, 0], tokens[:, -1] = 1, 3
    return images, tokens


def tiny_batch(
    size: int, rows: int, seed: int = 0, captions: int = 1, views: bool = False
) -> Batch:
    """A batch of `size` of which `rows` are real, each with so many captions."""
    images, tokens = tiny_pairs(size, seed)
    more = tiny_pairs(size * (captions - 1) or 1, seed + 1)[1].numpy()
    return Batch(
        images=images,
        tokens=tokens,
        keys=torch.arange(size),
        rows=rows,
        used={},
        bad=[],
        cut=0,
        cleaned=0,
        labels={},
        more_tokens=[
            more[row * (captions - 1) : (row + 1) * (captions - 1)] for row in range(rows)
        ],
        view_images=images.flip(2) if views else None,
        view_tokens=tokens if views else None,
    )
