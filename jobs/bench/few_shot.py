"""Few-shot classification of pictures by a run's image tower, beside two that learned nothing.

A linear probe on the embeddings of a checkpoint, on those of the same towers with random weights,
and on the pixels themselves (32 x 32, by areas): of 5, 20, 50 rows a class, the mean of three draws
of rows, the same for all, with the standard deviation; and of all rows. The penalty is chosen on a
fifth of the training rows (`pipeline.evaluate.probe`).

    python -m jobs.bench.few_shot RUN --train FOLDER --test FOLDER --column LABEL [--json FILE]

Goal, or exit status 1: with all rows the run finds more than both.
"""

from concurrent.futures import Executor, ThreadPoolExecutor

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from jobs.bench.report import arguments, conclude, show_table
from pipeline.data.image import decode_eval
from pipeline.data.layout import read_catalog
from pipeline.embed.encoder import Encoder, find_checkpoint
from pipeline.evaluate.probe import SHOTS, chance, few_shot, linear_probe
from pipeline.export.trained import read_trained
from pipeline.train.module import build_pretraining

PIXELS = 32  # a side
BATCH = 64
WHITE = (255, 255, 255)


def read(folder: str, column: str) -> tuple[list[bytes], list[str]]:
    """Encoded pictures and labels of all rows."""
    catalog = read_catalog(folder, "folder", split="all")
    columns = [catalog.sources[0].columns.image, column]
    tables = [pq.read_table(shard.path, columns=columns) for shard in catalog.shards]
    rows = [row for table in tables for row in table.to_pylist()]
    return [row[columns[0]] for row in rows], [row[column] or "" for row in rows]


def embed(encoder: Encoder, pictures: list[bytes], pool: Executor) -> Tensor:
    """Embeddings [rows, dim]."""
    encoder.settle()
    found = []
    for start in range(0, len(pictures), BATCH):
        pixels, reasons = encoder.read_pictures(pictures[start : start + BATCH], pool)
        assert not any(reasons), reasons
        found.append(encoder.embed_pictures(pixels).cpu())
    return torch.cat(found)


def flatten(pictures: list[bytes]) -> Tensor:
    """Pixels as features [rows, 3072]."""
    pixels = [decode_eval(picture, WHITE, PIXELS).reshape(-1) for picture in pictures]
    return torch.from_numpy(np.stack(pixels)).float()


def main() -> None:
    """Embed three ways, probe, compare."""
    parser = arguments(__doc__)
    parser.add_argument("run", metavar="RUN", help="folder or URL of a pretraining run")
    parser.add_argument("--train", required=True, metavar="FOLDER", help="labelled rows")
    parser.add_argument("--test", required=True, metavar="FOLDER", help="labelled rows")
    parser.add_argument("--column", required=True, metavar="LABEL", help="which column to tell")
    args = parser.parse_args()

    checkpoint = find_checkpoint(args.run)
    trained = read_trained(checkpoint.folder, checkpoint.record, checkpoint.name)
    config, tokenizer = trained.config, trained.record.tokenizer
    modules = {
        "run": trained.module,
        "untrained": build_pretraining(config, tokenizer, trained.meta.get("architecture")),
    }
    (train, train_labels), (test, test_labels) = (
        read(folder, args.column) for folder in (args.train, args.test)
    )
    with ThreadPoolExecutor() as pool:
        features = {
            name: [embed(Encoder(config, tokenizer, each), rows, pool) for rows in (train, test)]
            for name, each in modules.items()
        }
    features["pixels"] = [flatten(rows) for rows in (train, test)]
    shots = SHOTS[:1] if args.quick else SHOTS
    found = {
        name: {
            **{str(few): few_shot(known, train_labels, others, test_labels, few) for few in shots},
            "all": (linear_probe(known, train_labels, others, test_labels), None),
        }
        for name, (known, others) in features.items()
    }
    least = chance(test_labels)
    show_table(
        f"{args.column} of {len(test):,} pictures, {len(train):,} to learn from; "
        f"the commonest label alone {least:.1%}",
        ["features", *(f"{few} a class" for few in shots), "all"],
        [
            [
                name,
                *(
                    f"{100 * mean:.1f} %" + ("" if spread is None else f" ± {100 * spread:.1f}")
                    for mean, spread in by_shots.values()
                ),
            ]
            for name, by_shots in found.items()
        ],
    )
    best = max(found[name]["all"][0] for name in ("untrained", "pixels"))
    own = found["run"]["all"][0]
    missed = [] if own > best else [f"with all rows the run finds {own:.1%}, others {best:.1%}"]
    conclude({"accuracy": found, "chance": least}, missed, args.json)


if __name__ == "__main__":
    main()
