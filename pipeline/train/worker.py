"""What each Ray Train worker runs: parts put together, state restored, then the loop.

Enters: a `Job`, the same for all ranks. Leaves: checkpoints, metrics, events on the board.
"""

import importlib.metadata
import logging
import os
import pickle
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch
from torch import Tensor

from pipeline.config.plan import Plan
from pipeline.config.schema import Config
from pipeline.data.batches import Batch, Tally, make_order, train_batches
from pipeline.data.decode import REASONS, Asked
from pipeline.data.layout import Catalog
from pipeline.data.order import Cursor, as_intervals
from pipeline.data.rows import BadRow
from pipeline.data.text import Tokenizer
from pipeline.engine.momentum import Momentum
from pipeline.engine.schedule import lr_factor
from pipeline.engine.zero import UNIVERSAL, Engine, gather, load_weights
from pipeline.errors import RunStop
from pipeline.evaluate.suite import Suite, make_recipe, run_suite
from pipeline.tracking.meters import Meter
from pipeline.tracking.tracker import MetricLog, RunRef
from pipeline.train.board import Board, pass_warnings_on
from pipeline.train.checkpoint import State, load_checkpoint, read_meta, save_checkpoint
from pipeline.train.loop import Actions, Cadence, Left, Progress, Wish, run_loop
from pipeline.train.objective import Objective, build_momentum, build_objective
from pipeline.train.outside import load_on_all
from pipeline.train.publish import Sender, agreed, fetch_derived, forget_after, keep
from pipeline.train.pulse import Pulse
from pipeline.train.start import build_start, load_outside, starting_run
from pipeline.train.step import train_step
from pipeline.train.store import RunFolder
from pipeline.train.task import Module, TaskObjective, build_as, build_module, build_task_objective

LOG = logging.getLogger(__name__)
LAST_TRIES = 5  # to send the last checkpoint of a run
LAST_PAUSE = 30.0  # seconds between them


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that a worker needs; made once by the driver.

    `sizes`: config and plan by the number of workers that Ray Train may start.
    """

    sizes: Mapping[int, tuple[Config, Plan]]
    tokenizer: Tokenizer
    catalog: Catalog
    suite: Suite | None
    asked: Asked | None
    run: RunRef
    run_name: str
    board: Board


@dataclass(frozen=True, kw_only=True)
class EvaluationJob:
    """All that a worker needs to evaluate checkpoint `name` of the run in `storage`."""

    config: Config
    tokenizer: Tokenizer
    suite: Suite
    storage: str
    run_name: str
    name: str
    board: Board


def train_worker(job: Job) -> None:
    """Train one rank to the end of the plan.

    A `RunStop` (too many bad rows, non-finite steps) is posted and returns, and so does a stop that
    was wished for; any other error is raised, and Ray Train restarts the workers.
    """
    with pass_warnings_on(lambda event: job.board.post(**event)):
        trainer = _Trainer(job)
        try:
            trainer.run()
        except RunStop as error:
            trainer.stop(error)
        except Left as left:
            if left.wish is Wish.MOVE:
                raise
        finally:
            if trainer.rank == 0:
                # However it ends: a resize that was asked for meanwhile waits for this.
                job.board.leave()
            trainer.close()


def evaluate_worker(job: EvaluationJob) -> None:
    """Evaluate one checkpoint on this rank's share of the rows; rank 0 posts."""
    context = ray.train.get_context()
    world_size, rank = context.get_world_size(), context.get_world_rank()
    device = ray.train.torch.get_device()
    _set_up_torch(job.config, device)
    try:
        with _agreed(RunFolder.of(job.storage, job.run_name), [job.name]) as found:
            assert found is not None, "one was named"
            _, folder = found
            meta = read_meta(folder)
            module = build_as(job.config, job.tokenizer, job.suite.recipe.asked, meta)
            module.load_state_dict(load_weights(folder, meta["zero_stage"]))
        dtype = torch.bfloat16 if job.config.engine.precision == "bf16" else torch.float32
        module.to(device, dtype).eval()
        metrics, sample = run_suite(job.suite, module, device, world_size, rank, in_full=True)
    except RunStop as error:
        if rank == 0:
            job.board.post("stopped", message=str(error))
        return
    if rank == 0:
        job.board.post("evaluation", metrics=metrics)
        # As bytes: the board's process would import PyTorch to hold it, while the driver waits.
        job.board.post("sample", sample=pickle.dumps(sample))
        job.board.leave()


def _agreed(run: RunFolder, names: list[str]) -> Any:
    context = ray.train.get_context()
    return agreed(
        run,
        names,
        gather,
        node_rank=context.get_node_rank(),
        local_rank=context.get_local_rank(),
    )


def versions() -> dict[str, str]:
    """The versions a checkpoint or a result depends on."""
    names = ("gammaray", "ray", "torch", "deepspeed", "transformers", "pyarrow")
    return {name: importlib.metadata.version(name) for name in names}


def _set_up_torch(config: Config, device: torch.device) -> None:
    torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
    # On CPUs in bf16 the gradient of PyTorch's fused attention takes more time than all the rest of
    # a step. The switch between it and plain attention is named after CUDA, but holds for CPUs too.
    is_slow = device.type == "cpu" and config.engine.precision == "bf16"
    torch.backends.cuda.enable_flash_sdp(not is_slow)


class _Trainer:
    """The parts of one rank and the actions the loop calls."""

    engine: Engine
    objective: Objective | TaskObjective
    momentum: Momentum | None

    def __init__(self, job: Job):
        self.job = job
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.local_rank = context.get_local_rank()
        self.config, self.plan = job.sizes[self.world_size]
        _set_up_torch(self.config, ray.train.torch.get_device())
        self.folder = RunFolder.of(self.config.cluster.storage, job.run_name)
        self.sender = Sender(
            self.folder,
            rank=self.rank,
            world_size=self.world_size,
            keep=self.config.train.keep,
            published=lambda name: self._post("checkpoint", name=name),
        )
        self.pulse = Pulse(job.board, self.rank, 60 * self.config.cluster.stall_minutes)
        self.state = State(
            progress=Progress(), cursor=Cursor(digest=job.catalog.digest), tally=Tally()
        )
        self.attempt = 0
        # What a worker that was killed had written, but not sent, is found by the next one.
        self.scratch = f"gammaray-{job.run.run_id}-"
        if self.local_rank == 0:
            for left in Path(tempfile.gettempdir()).glob(f"{self.scratch}*"):
                shutil.rmtree(left, ignore_errors=True)
        self.meter = Meter()
        self.window: list[dict[str, Tensor]] = []
        self.diagnose: Callable[[], dict[str, Tensor]] = dict
        self.learning_rate = 0.0
        self.saving_seconds = 0.0
        self.new_bad: list[BadRow] = []
        self.metrics: MetricLog | None = None
        self.batches: Iterator[Any] = iter(())

    def run(self) -> None:
        """Restore, open the stream, loop, and wait until all is kept."""
        config, plan = self.config, self.plan
        self._restore()
        if self.rank == 0:
            self.attempt = self.job.board.begin()
            self.metrics = MetricLog(
                self.job.run, config.tracking.system_metrics_seconds, self.state.points
            )
        order = make_order(self.job.catalog, config.data.shuffle_window, config.train.seed)
        self.batches = train_batches(
            self.job.catalog,
            order,
            make_recipe(config, self.job.tokenizer, train=True, asked=self.job.asked),
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
            step=self._step,
            wish=lambda _: Wish(self.engine.largest(self.pulse.wish())),
            log=self._log,
            evaluate=self._evaluate,
            checkpoint=self._checkpoint,
        )
        progress = self.state.progress
        self._post(
            "started",
            step=progress.step,
            samples=progress.samples,
            attempt=self.attempt,
            workers=self.world_size,
            plan=plan,
        )
        self.meter.skip()
        try:
            run_loop(progress, cadence, actions)
        except Left as left:
            self._finish()
            self._post("left", step=progress.step, wish=left.wish)
            raise
        self._finish()

    def stop(self, error: RunStop) -> None:
        """Say why the run ends, and keep what it knows of dropped rows."""
        self._write_quarantine(f"stop-{self.state.progress.step:08d}")
        self._post("stopped", message=str(error))

    def close(self) -> None:
        """Stop the stream and send the last points."""
        self.pulse.close()
        close = getattr(self.batches, "close", None)
        if close is not None:
            close()
        if self.metrics is not None:
            self.metrics.close()

    def _restore(self) -> None:
        """Build engine and loss, with the state of the newest checkpoint that is whole."""
        with _agreed(self.folder, self.folder.checkpoints()) as found:
            name, folder = found or ("", None)
            meta = None if folder is None else read_meta(folder)
            is_resized = meta is not None and meta["world_size"] != self.world_size
            if folder is not None and is_resized and self.local_rank == 0:
                fetch_derived(self.folder, f"{name}/{UNIVERSAL}", folder / UNIVERSAL)
            device = ray.train.torch.get_device()
            if meta is not None:
                module = build_as(self.config, self.job.tokenizer, self.job.asked, meta)
            else:
                module = self._start()
            self.momentum = build_momentum(self.config, module, device)
            self.engine = Engine(
                module,
                engine=self.config.engine,
                optim=self.config.optim,
                micro_batch=self.plan.micro_batch,
                accumulation=self.plan.accumulation,
                device=device,
                loads_universal=is_resized,
            )
            self.objective = self._build_objective(module)
            if folder is None:
                return
            self.state = load_checkpoint(
                folder,
                self.engine,
                self.momentum,
                self.objective,
                rank=self.rank,
                world_size=self.world_size,
            )
            if self.rank == 0:
                forget_after(self.folder, name)
                if (folder / UNIVERSAL).exists():
                    keep(self.folder, f"{name}/{UNIVERSAL}", folder / UNIVERSAL)

    def _start(self) -> Module:
        """Begin with new weights, or with those of another run or of a model from elsewhere."""
        init = self.config.model.init
        module = build_module(self.config, self.job.tokenizer, self.job.asked)
        if init is None:
            return module
        place = f"rank {self.rank} on {ray.util.get_node_ip_address()}"
        if load_on_all(partial(load_outside, module, init), init, gather, place):
            return module
        run = starting_run(self.config)
        with _agreed(run, run.checkpoints()) as found:
            if found is None:
                raise RunStop(f"model.init: {run.url} has lost its checkpoints; put them back")
            return build_start(self.config, self.job.tokenizer, self.job.asked, found[1])

    def _build_objective(self, module: Module) -> Objective | TaskObjective:
        if self.config.task is not None:
            return build_task_objective(self.config.task, module)
        return build_objective(
            self.config,
            self.plan,
            self.job.tokenizer,
            embed_dim=module.towers.embed_dim,
            rank=self.rank,
            world_size=self.world_size,
        )

    def _step(self, progress: Progress) -> bool:
        config, plan = self.config, self.plan
        # Draws (sampled u) follow from (seed, step, rank), so a resumed run repeats them.
        seeds = np.random.SeedSequence([config.train.seed, progress.step, self.rank])
        torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0] >> 1))
        if progress.samples % plan.epoch_rows < plan.global_batch:
            # About where an epoch begins, at the same step on every rank.
            self.objective.share(gather)
        factor = lr_factor(
            progress.samples,
            warmup=plan.warmup_samples,
            total=plan.samples,
            schedule=config.optim.schedule,
            least=config.optim.min_lr / config.optim.lr,
        )
        result = train_step(
            self.engine,
            self.momentum,
            self.objective,
            self._fed(),
            accumulation=plan.accumulation,
            lr_factor=factor,
            samples=progress.samples,
        )
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

    def _fed(self) -> Iterator[Batch]:
        """The batches; the pulse is told when one is waited for."""
        step = self.state.progress.step
        while True:
            self.pulse.beat(step, "waiting for data")
            batch = next(self.batches)
            self.pulse.beat(step, "in a step")
            yield batch

    def _log(self, progress: Progress) -> None:
        rates = self.meter.window()
        mine = _window_means([*self.window, self.diagnose()])
        self.window = []
        names = sorted(mine)
        tally = self.state.tally
        counts = [tally.rows, tally.cut, tally.cleaned, tally.skipped]
        counts += [tally.bad[reason] for reason in REASONS]
        vector = torch.tensor(
            [*(mine[name] for name in names), rates["data_wait_share"], *counts],
            dtype=torch.float64,
        )
        total = self.engine.sum(vector).tolist()
        means = dict(zip(names, (value / self.world_size for value in total), strict=False))
        rows, cut, cleaned, skipped, *bad = total[len(names) + 1 :]
        if self.rank == 0:
            point = {f"train/{name}": value for name, value in means.items()}
            point |= {f"train/{name}": value for name, value in rates.items()}
            point["train/data_wait_share"] = total[len(names)] / self.world_size
            point["train/samples_per_s_per_worker"] = rates["samples_per_s"] / self.world_size
            point["train/learning_rate"] = self.learning_rate
            point["train/step"] = progress.step
            point["train/world_size"] = self.world_size
            point["train/attempt"] = self.attempt
            point["train/saving_seconds"], self.saving_seconds = self.saving_seconds, 0.0
            point["train/epoch"] = progress.samples / self.plan.epoch_rows
            point["train/nonfinite_steps"] = progress.nonfinite_steps
            point["data/cut_caption_share"] = cut / max(rows, 1)
            if self.config.data.clean_captions:
                point["data/cleaned_caption_share"] = cleaned / max(rows, 1)
            if skipped:
                point["data/skipped_questions"] = skipped
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
        limit = self.config.data.max_bad_fraction
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

        def model(*inputs: Tensor | None) -> Any:
            self.pulse.beat(progress.step, "evaluating")
            return self.engine(*inputs)

        is_last = progress.samples + self.plan.global_batch > self.plan.samples
        metrics, sample = run_suite(
            self.job.suite,
            model,
            self.engine.device,
            self.world_size,
            self.rank,
            in_full=is_last,
        )
        self.engine.train(True)
        if self.rank == 0:
            self._record(progress, {f"eval/{name}": value for name, value in metrics.items()})
            self._post("evaluation", step=progress.step, metrics=metrics)
            if is_last:
                self._post("sample", sample=pickle.dumps(sample))
        self.meter.skip()

    def _checkpoint(self, progress: Progress) -> None:
        """Write this rank's part to its own disk; a thread sends it while training goes on."""
        started = time.perf_counter()
        self.pulse.rest()
        failed = self.sender.settle(gather)
        self.pulse.beat(progress.step, "saving")
        self.objective.share(gather)
        if failed and self.rank == 0:
            LOG.warning("a checkpoint could not be kept: %s; training goes on", failed[0])
        lacking = [lack for lack in gather(self._lacking_space()) if lack is not None]
        if lacking:
            if self.rank == 0:
                LOG.warning("step %d is not saved: %s", progress.step, lacking[0])
            return
        name = f"step-{progress.step:08d}"
        if self.rank == 0:
            # What workers of another number may have left there when they were killed. The others
            # have not begun to write: DeepSpeed's save waits for all ranks.
            self.folder.remove(name)
        self.state.points = [] if self.metrics is None else self.metrics.undelivered
        folder = Path(tempfile.mkdtemp(prefix=self.scratch))
        save_checkpoint(
            folder,
            self.engine,
            self.momentum,
            self.objective,
            self.state,
            rank=self.rank,
            world_size=self.world_size,
            config=self.config,
            plan=self.plan,
            tokenizer=self.job.tokenizer,
            versions=versions(),
        )
        self._write_quarantine(name)
        self.sender.send(name, folder)
        self.saving_seconds += time.perf_counter() - started
        self.meter.skip()

    def _lacking_space(self) -> str | None:
        """What is missing on this node's disk for the parts that its workers are about to write."""
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        wanted = self.plan.checkpoint_bytes * here / self.world_size
        place = tempfile.gettempdir()
        free = shutil.disk_usage(place).free
        if free >= 1.2 * wanted:
            return None
        return (
            f"rank {self.rank}: {place} on {ray.util.get_node_ip_address()} has "
            f"{free / 1e9:,.1f} GB free, a checkpoint takes {wanted / 1e9:,.1f} GB there: make "
            "room, or set TMPDIR to another disk"
        )

    def _finish(self) -> None:
        """Wait until the last checkpoint is kept. Raises RuntimeError when it cannot be."""
        tries = 0
        while True:
            self.pulse.rest()
            failed = self.sender.settle(gather)
            if not failed:
                return
            tries += 1
            if tries == LAST_TRIES:
                raise RuntimeError(f"the last checkpoint could not be kept: {failed[0]}")
            if self.rank == 0:
                LOG.warning("the last checkpoint could not be kept: %s; trying again", failed[0])
            time.sleep(LAST_PAUSE)
            self.sender.retry()

    def _write_quarantine(self, name: str) -> None:
        self.folder.write_quarantine(f"{name}-{self.rank:05d}", self.new_bad)
        self.new_bad = []

    def _record(self, progress: Progress, point: dict[str, float]) -> None:
        if self.metrics is not None:
            finite = {name: value for name, value in point.items() if np.isfinite(value)}
            self.metrics.log(progress.samples, finite)

    def _post(self, kind: str, **content: Any) -> None:
        if self.rank == 0:
            self.job.board.post(kind, **content)


def _window_means(window: list[dict[str, Tensor]]) -> dict[str, float]:
    """Mean of each metric over the steps that have it (a skipped step has none)."""
    names = {name for item in window for name in item}
    means = {}
    for name in names:
        values = torch.stack([item[name].double().cpu() for item in window if name in item])
        means[name] = float(values[values.isfinite()].mean())  # NaN where none is finite
    return means
