"""What each Ray Train worker runs: parts put together, state restored, then the loop.

Enters: a `Job`, the same for all ranks. Leaves: checkpoints, metrics, events on the board.
"""

import importlib.metadata
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs as pafs
import ray.train
import ray.train.torch
import torch
from torch import Tensor

from pipeline.config.plan import Plan
from pipeline.config.schema import Config
from pipeline.data.decode import REASONS
from pipeline.data.layout import Catalog
from pipeline.data.order import Cursor, as_intervals
from pipeline.data.stream import BadRow, Tally, make_order, train_batches
from pipeline.data.text import Tokenizer
from pipeline.engine.schedule import lr_factor
from pipeline.engine.zero import UNIVERSAL, Engine, load_weights
from pipeline.errors import RunStop
from pipeline.evaluate.suite import Suite, make_recipe, run_suite
from pipeline.tracking.meters import Meter
from pipeline.tracking.tracker import MetricLog, RunRef
from pipeline.train.board import Board, pass_warnings_on
from pipeline.train.checkpoint import State, load_checkpoint, read_meta, save_checkpoint
from pipeline.train.loop import Actions, Cadence, Progress, run_loop
from pipeline.train.objective import build_loss, build_pretraining
from pipeline.train.step import train_step
from pipeline.train.store import RunFolder


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that a worker needs; made once by the driver."""

    config: Config
    plan: Plan
    tokenizer: Tokenizer
    catalog: Catalog
    suite: Suite | None
    run: RunRef
    run_name: str
    board: Board


@dataclass(frozen=True, kw_only=True)
class EvaluationJob:
    """All that a worker needs to evaluate a checkpoint saved under `zero_stage`."""

    config: Config
    tokenizer: Tokenizer
    suite: Suite
    checkpoint: ray.train.Checkpoint
    zero_stage: int
    board: Board


def train_worker(settings: dict[str, Any]) -> None:
    """Train one rank to the end of the plan; `settings["job"]` is the `Job`.

    A `RunStop` (too many bad rows, non-finite steps) is posted and returns; any other error is
    raised, and Ray Train restarts the workers.
    """
    job: Job = settings["job"]
    trainer = _Trainer(job)
    with pass_warnings_on(lambda event: job.board.post(**event)):
        try:
            trainer.run()
        except RunStop as error:
            trainer.stop(error)
        finally:
            trainer.close()


def evaluate_worker(settings: dict[str, Any]) -> None:
    """Evaluate one checkpoint on this rank's share of the rows; rank 0 posts.

    `settings["job"]` is the `EvaluationJob`.
    """
    job: EvaluationJob = settings["job"]
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    _set_threads(job.config)
    module = build_pretraining(job.config, job.tokenizer)
    with job.checkpoint.as_directory() as folder:
        module.load_state_dict(load_weights(Path(folder), job.zero_stage))
    dtype = torch.bfloat16 if job.config.engine.precision == "bf16" else torch.float32
    module.to(device, dtype).eval()
    world_size, rank = context.get_world_size(), context.get_world_rank()
    try:
        metrics = dict(
            run_suite(
                job.suite,
                lambda images, tokens: module(images, tokens)[:2],
                device,
                world_size,
                rank,
            )
        )
    except RunStop as error:
        if rank == 0:
            job.board.post("stopped", message=str(error))
        return
    if rank == 0:
        job.board.post("evaluation", metrics=metrics)


def versions() -> dict[str, str]:
    """The versions a checkpoint or a result depends on."""
    names = ("gammaray", "ray", "torch", "deepspeed", "transformers", "pyarrow")
    return {name: importlib.metadata.version(name) for name in names}


def _set_threads(config: Config) -> None:
    torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))


class _Trainer:
    """The parts of one rank and the actions the loop calls."""

    def __init__(self, job: Job):
        self.job = job
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        _set_threads(job.config)
        config, plan = job.config, job.plan
        self.checkpoint = ray.train.get_checkpoint()
        meta = read_meta(self.checkpoint) if self.checkpoint is not None else None
        module = build_pretraining(config, job.tokenizer)
        self.engine = Engine(
            module,
            engine=config.engine,
            optim=config.optim,
            micro_batch=plan.micro_batch,
            accumulation=plan.accumulation,
            device=ray.train.torch.get_device(),
            loads_universal=meta is not None and meta["world_size"] != self.world_size,
        )
        self.loss = build_loss(
            config,
            plan,
            embed_dim=module.towers.embed_dim,
            rank=self.rank,
            world_size=self.world_size,
        )
        self.state = State(
            progress=Progress(), cursor=Cursor(digest=job.catalog.digest), tally=Tally()
        )
        self.meter = Meter()
        self.window: list[dict[str, Tensor]] = []
        self.diagnose: Callable[[], dict[str, Tensor]] = dict
        self.learning_rate = 0.0
        self.new_bad: list[BadRow] = []
        self.metrics: MetricLog | None = None
        self.batches: Iterator[Any] = iter(())

    def run(self) -> None:
        """Restore, open the stream, loop."""
        config, plan = self.job.config, self.job.plan
        self._restore()
        if self.rank == 0:
            self.metrics = MetricLog(
                self.job.run, config.tracking.system_metrics_seconds, self.state.points
            )
        order = make_order(self.job.catalog, config.data.shuffle_window, config.train.seed)
        self.batches = train_batches(
            self.job.catalog,
            order,
            make_recipe(config, self.job.tokenizer, train=True),
            self.state.cursor,
            world_size=self.world_size,
            rank=self.rank,
            batch_size=plan.micro_batch,
            ingest_cpus=config.cluster.ingest_cpus,
        )
        cadence = Cadence(
            samples=plan.samples,
            global_batch=plan.global_batch,
            log_every=config.train.log_every,
            evaluate_every=config.evaluate.every,
            checkpoint_every=config.train.checkpoint_every,
            max_nonfinite=config.train.max_nonfinite,
        )
        actions = Actions(
            step=self._step, log=self._log, evaluate=self._evaluate, checkpoint=self._checkpoint
        )
        self._post("started", step=self.state.progress.step, samples=self.state.progress.samples)
        self.meter.skip()
        run_loop(self.state.progress, cadence, actions)

    def stop(self, error: RunStop) -> None:
        """Say why the run ends, and keep what it knows of dropped rows."""
        self._write_quarantine(f"stop-{self.state.progress.step:08d}")
        self._post("stopped", message=str(error))

    def close(self) -> None:
        """Stop the stream and send the last points."""
        close = getattr(self.batches, "close", None)
        if close is not None:
            close()
        if self.metrics is not None:
            self.metrics.close()

    def _restore(self) -> None:
        if self.checkpoint is None:
            return
        with self.checkpoint.as_directory() as folder:
            self.state = load_checkpoint(
                Path(folder), self.engine, self.loss, rank=self.rank, world_size=self.world_size
            )
            if self.rank == 0:
                _keep_universal(Path(folder), self.checkpoint)

    def _step(self, progress: Progress) -> bool:
        config, plan = self.job.config, self.job.plan
        # Draws (sampled u) follow from (seed, step, rank), so a resumed run repeats them.
        seeds = np.random.SeedSequence([config.train.seed, progress.step, self.rank])
        torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0] >> 1))
        if progress.samples % plan.epoch_rows < plan.global_batch:
            # About where an epoch begins, at the same step on every rank.
            self.loss.share(self.engine.gather)
        factor = lr_factor(
            progress.samples,
            warmup=plan.warmup_samples,
            total=plan.samples,
            schedule=config.optim.schedule,
        )
        result = train_step(self.engine, self.loss, self.batches, plan.accumulation, factor)
        for batch in result.batches:
            self.state.tally.add(batch)
            self.new_bad.extend(batch.bad)
            for epoch, positions in batch.used.items():
                self.state.cursor.add(epoch, as_intervals(positions))
        self.meter.add(plan.global_batch, result.waited)
        self.window.append({**result.metrics, "grad_norm": torch.tensor(result.grad_norm)})
        self.diagnose = result.diagnose
        self.learning_rate = config.optim.lr * factor
        return result.is_finite

    def _log(self, progress: Progress) -> None:
        rates = self.meter.window()
        mine = _window_means([*self.window, self.diagnose()])
        self.window = []
        names = sorted(mine)
        tally = self.state.tally
        counts = [tally.rows, tally.cut, tally.cleaned, *(tally.bad[reason] for reason in REASONS)]
        vector = torch.tensor(
            [*(mine[name] for name in names), rates["data_wait_share"], *counts],
            dtype=torch.float64,
        )
        total = self.engine.sum(vector).tolist()
        means = dict(zip(names, (value / self.world_size for value in total), strict=False))
        rows, cut, cleaned, *bad = total[len(names) + 1 :]
        if self.rank == 0:
            point = {f"train/{name}": value for name, value in means.items()}
            point |= {f"train/{name}": value for name, value in rates.items()}
            point["train/data_wait_share"] = total[len(names)] / self.world_size
            point["train/samples_per_s_per_worker"] = rates["samples_per_s"] / self.world_size
            point["train/learning_rate"] = self.learning_rate
            point["train/step"] = progress.step
            point["train/world_size"] = self.world_size
            point["train/epoch"] = progress.samples / self.job.plan.epoch_rows
            point["train/nonfinite_steps"] = progress.nonfinite_steps
            point["data/cut_caption_share"] = cut / max(rows, 1)
            if self.job.config.data.clean_captions:
                point["data/cleaned_caption_share"] = cleaned / max(rows, 1)
            point["data/bad_rows/all"] = sum(bad)
            # A reason that never occurs would be an empty chart.
            point |= {
                f"data/bad_rows/{reason}": count
                for reason, count in zip(REASONS, bad, strict=True)
                if count
            }
            self._record(progress, point)
            self._post("step", step=progress.step, samples=progress.samples, metrics=point)
        self._check_bad_rows(rows, dict(zip(REASONS, bad, strict=True)))

    def _check_bad_rows(self, rows: float, bad: dict[str, float]) -> None:
        dropped = sum(bad.values())
        limit = self.job.config.data.max_bad_fraction
        if dropped > limit * (rows + dropped):
            worst = sorted(bad.items(), key=lambda item: -item[1])[:3]
            listing = ", ".join(f"{reason} {count:.0f}" for reason, count in worst if count)
            raise RunStop(
                f"data.train: {dropped:.0f} of {rows + dropped:.0f} rows read are unusable "
                f"({listing}), more than data.max_bad_fraction {limit}; raise it to go on, or mend "
                "the files and start a new run with name=..."
            )

    def _evaluate(self, progress: Progress) -> None:
        if self.job.suite is None:
            return
        self._post("evaluating", step=progress.step)
        self.engine.train(False)
        metrics = dict(
            run_suite(
                self.job.suite,
                lambda images, tokens: self.engine(images, tokens)[:2],
                self.engine.device,
                self.world_size,
                self.rank,
            )
        )
        self.engine.train(True)
        if self.rank == 0:
            self._record(progress, {f"eval/{name}": value for name, value in metrics.items()})
            self._post("evaluation", step=progress.step, metrics=metrics)
        self.meter.skip()

    def _checkpoint(self, progress: Progress) -> None:
        self.loss.share(self.engine.gather)
        name = f"step-{progress.step:08d}"
        run = RunFolder.of(self.job.config.cluster.storage, self.job.run_name)
        if self.rank == 0:
            # What workers of another number may have left there when they were killed. The others
            # have not begun to write: DeepSpeed's save waits for all ranks.
            run.remove(name)
        self.state.points = [] if self.metrics is None else self.metrics.undelivered
        folder = Path(tempfile.mkdtemp(prefix="gammaray-"))
        save_checkpoint(
            folder,
            self.engine,
            self.loss,
            self.state,
            rank=self.rank,
            world_size=self.world_size,
            config=self.job.config,
            plan=self.job.plan,
            tokenizer=self.job.tokenizer,
            versions=versions(),
        )
        self._write_quarantine(name)
        ray.train.report(
            {"step": progress.step},
            checkpoint=ray.train.Checkpoint.from_directory(folder),
            checkpoint_dir_name=name,
            delete_local_checkpoint_after_upload=True,
        )
        self._post("checkpoint", step=progress.step)
        self.meter.skip()

    def _write_quarantine(self, name: str) -> None:
        run = RunFolder.of(self.job.config.cluster.storage, self.job.run_name)
        run.write_quarantine(f"{name}-{self.rank:05d}", self.new_bad)
        self.new_bad = []

    def _record(self, progress: Progress, point: dict[str, float]) -> None:
        if self.metrics is not None:
            finite = {name: value for name, value in point.items() if np.isfinite(value)}
            self.metrics.log(progress.samples, finite)

    def _post(self, kind: str, **content: Any) -> None:
        if self.rank == 0:
            self.job.board.post(kind, **content)


def _keep_universal(folder: Path, checkpoint: ray.train.Checkpoint) -> None:
    """Put a converted state beside the checkpoint it was made of, where that is remote."""
    made, kept = folder / UNIVERSAL, f"{checkpoint.path}/{UNIVERSAL}"
    is_local = Path(checkpoint.path).is_dir() and folder.samefile(checkpoint.path)
    if made.exists() and not is_local:
        pafs.copy_files(str(made), kept, pafs.LocalFileSystem(), checkpoint.filesystem)


def _window_means(window: list[dict[str, Tensor]]) -> dict[str, float]:
    """Mean of each metric over the steps that have it (a skipped step has none)."""
    names = {name for item in window for name in item}
    means = {}
    for name in names:
        values = torch.stack([item[name].double().cpu() for item in window if name in item])
        means[name] = float(values[values.isfinite()].mean())  # NaN where none is finite
    return means
