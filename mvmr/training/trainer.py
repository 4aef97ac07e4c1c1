"""The training loop: one student, with or without labels, from the first step or from where a killed run stopped."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor, distributed
from torch.utils.data import DataLoader, Dataset, Sampler

from mvmr.cores import usable_cores
from mvmr.errors import MvmrError
from mvmr.interrupt import stop_on_signal
from mvmr.methods.method import Method
from mvmr.methods.regulariser import RegulariserConfig, regularise
from mvmr.progress import track
from mvmr.training import checkpoint
from mvmr.training.optimizers import build_optimizer

if TYPE_CHECKING:
    from lightning_fabric import Fabric  # seconds, of which reading a recipe needs none

T = TypeVar("T")
Batch = dict[str, Tensor]
Targets = Callable[[Batch], dict[str, Tensor]]
Watch = Callable[[Method, int, int], None]
Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
_SEEDS = 2**32
_NONE = RegulariserConfig()


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, how fast and in which precision."""

    epochs: int = 100  # passes over the images; 0: an encoder that has learned nothing, to compare with [0 or more]
    batch_size: int = 256  # what a step takes through the method, over all devices [images, 1 or more]
    accumulate: int = 1  # batches to an optimiser step [1 or more]
    optimizer: Literal["adam", "adamw", "sgd", "lars"] = "adamw"  # the rule of the steps; sgd, lars: momentum 0.9
    lr: float = 1e-3  # peak learning rate [above 0]
    weight_decay: float = 1e-6  # the optimiser's pull of the weights to 0 [0 or more]
    warmup_steps: int = 10  # of linear warm-up, then a cosine to 0 [optimiser steps, 0 or more]
    clip_grad: float | None = None  # largest norm of the gradient; none: any [above 0]
    precision: Precision | None = None  # of the network; none: bf16-mixed where the device has it, else 32-true
    channels_last: bool = True  # whether the network's maps lie in memory with their channels last
    seed: int = 0  # of the weights at the start, the order of images and their views [0 to 4294967295]
    workers: int | None = None  # that load images; none: one to a usable core [processes, 0 or more]
    cache_gb: float = 4.0  # slow representations are computed once if they fit into it [10^9 bytes, 0 or more]
    checkpoint_steps: int = 500  # from one checkpoint to the next [optimiser steps, 1 or more]
    log_steps: int = 10  # from one line of metrics.jsonl to the next [optimiser steps, 1 or more]

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "checkpoint_steps", "log_steps"):
            if getattr(self, name) < 1:
                raise MvmrError(f"[train] {name} = {getattr(self, name)}: must be 1 or more")
        for name in ("epochs", "warmup_steps", "weight_decay", "cache_gb", "workers"):
            if (value := getattr(self, name)) is not None and not value >= 0:
                raise MvmrError(f"[train] {name} = {value}: must be 0 or more")
        for name in ("lr", "clip_grad"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise MvmrError(f"[train] {name} = {value}: must be above 0")
        if not 0 <= self.seed < _SEEDS:
            raise MvmrError(f"[train] seed = {self.seed}: must lie between 0 and {_SEEDS - 1}")

    def steps(self, images: int, devices: int = 1, smallest_batch: int = 1) -> int:
        """Optimiser steps of the whole run on so many images.

        Args:
            smallest_batch: that the method can learn from.

        Raises:
            MvmrError: the images don't fill one optimiser step, the devices can't share a batch evenly, or batches are
                too small for the method.
        """
        if self.batch_size < smallest_batch:
            raise MvmrError(
                f"[train] batch_size = {self.batch_size}: the method compares the images of a batch; "
                f"give {smallest_batch} or more"
            )
        if self.batch_size % devices:
            raise MvmrError(f"[train] batch_size = {self.batch_size}: give a multiple of the {devices} devices")
        if images < self.batch_size * self.accumulate:
            largest = images // self.accumulate
            cure = f"give --batch-size {largest} or less" if largest >= smallest_batch else "that is too few"
            raise MvmrError(
                f"a step takes {self.batch_size * self.accumulate} images and the data have {images}: {cure}"
            )
        return self.epochs * (images // (self.batch_size * self.accumulate))


class BatchOrder(Sampler[list[tuple[int, int]]]):
    """Every batch from ``start`` to ``stop``, as (epoch, index) pairs; a function of the seed alone, so it resumes."""

    def __init__(
        self, count: int, size: int, per_epoch: int, *, seed: int, start: int, stop: int, rank: int, world: int
    ):
        self.count, self.size, self.per_epoch, self.seed = count, size, per_epoch, seed
        self.start, self.stop, self.rank, self.world = start, stop, rank, world

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order, order_epoch = torch.empty(0, dtype=torch.int64), -1
        for batch in range(self.start, self.stop):
            epoch, k = divmod(batch, self.per_epoch)
            if epoch != order_epoch:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                order, order_epoch = torch.randperm(self.count, generator=generator), epoch
            indices = order[k * self.size : (k + 1) * self.size][self.rank :: self.world]
            yield [(epoch, int(i)) for i in indices]


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to 0; both counted in optimiser steps."""
    warmup = min(config.warmup_steps, steps // 2)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train(
    learner: Method,
    views: Dataset[Batch],
    targets: Targets,
    config: TrainConfig,
    regulariser: RegulariserConfig = _NONE,
    *,
    fabric: Fabric,
    folder: Path,
    features: Callable[[], Tensor],
    no_weight_decay: Collection[str] = (),
    watch: Watch | None = None,
    progress: bool = False,
) -> int:
    """Train ``learner`` in place; keep ``checkpoint.pt`` and ``metrics.jsonl`` in ``folder``; go on from them.

    Args:
        views: items of :class:`mvmr.training.views.Views`, addressed by (epoch, index).
        targets: from a batch on the device to the target of each name, as the method takes them.
        regulariser: what is added to the method's loss.
        no_weight_decay: names of the parameters that weight decay leaves alone.
        watch: called after every step with the learner, the step and the number of steps; its time doesn't count.
        features: those of all images, [N, D], in their order: for methods that look at all of them between epochs.

    Returns:
        The number of optimiser steps of the whole run.

    Raises:
        MvmrError: the loss is not finite (the last good checkpoint stays), or a checkpoint can't be written.
        KeyboardInterrupt: stopped by Ctrl-C or SIGTERM, after a checkpoint.
    """
    count = len(views)  # type: ignore[arg-type]
    steps, per_step = config.steps(count, fabric.world_size), config.batch_size * config.accumulate
    per_epoch = count // per_step
    if config.channels_last:
        learner = learner.to(memory_format=torch.channels_last)
    fused = config.precision != "16-mixed"  # a fused step unscales gradients itself, too late to clip them
    optimizer = build_optimizer(
        config.optimizer, learner, lr=config.lr, weight_decay=config.weight_decay, no_weight_decay=no_weight_decay,
        fused=fused,
    )  # fmt: skip
    module, optimizer = fabric.setup(learner, optimizer)
    metrics = folder / checkpoint.METRICS
    step = checkpoint.restore(folder, learner, optimizer, fabric)
    checkpoint.truncate_metrics(metrics, step)
    loader = _loader(views, config, fabric, start=step * config.accumulate, stop=steps * config.accumulate)

    began, first = time.perf_counter(), step
    module.train()
    batches = read(loader)
    shown = progress and fabric.is_global_zero
    with (
        stop_on_signal() as stop,
        track("training", step, steps, unit="img", per_step=per_step, shown=shown) as advance,
    ):
        while step < steps:
            if step % per_epoch == 0:
                learner.before_epoch(step // per_epoch, partial(_finite, features, step, folder))
                share_state(learner)
            lr = learning_rate(config, step, steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            for micro in range(config.accumulate):
                batch = next(batches)
                with fabric.no_backward_sync(module, enabled=micro + 1 < config.accumulate):
                    target = targets(batch)
                    terms, h, outputs = module(batch, target)
                    terms |= regularise(regulariser, h, target)
                    loss = torch.stack(list(terms.values())).sum()
                    if _on_any_rank(not torch.isfinite(loss), fabric):
                        raise _not_finite(terms, step, folder)
                    fabric.backward(loss / config.accumulate)
                loss, terms = loss.detach(), {name: term.detach() for name, term in terms.items()}
            if config.clip_grad is not None:
                fabric.clip_gradients(module, optimizer, max_norm=config.clip_grad, error_if_nonfinite=False)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            learner.after_step(step, steps)
            if fabric.is_global_zero and (step % config.log_steps == 0 or step == steps):
                seconds = time.perf_counter() - began
                record: dict[str, float | Tensor] = {
                    "epoch": step * per_step / count,
                    "lr": lr,
                    "loss": loss,
                }
                record |= terms | {"images_per_s": (step - first) * per_step / seconds, "seconds": seconds}
                generator = torch.Generator().manual_seed(config.seed + step)
                record |= learner.diagnose(outputs, generator)
                with metrics.open("a") as file:
                    figures = {name: float(f"{float(value):.6g}") for name, value in record.items()}
                    file.write(json.dumps({"step": step} | figures) + "\n")
            if watch is not None:
                paused = time.perf_counter()
                watch(learner, step, steps)
                began += time.perf_counter() - paused
            advance(step, f"loss {float(loss):.3f}")
            stopping = _on_any_rank(stop.requested, fabric)
            if stopping or step % config.checkpoint_steps == 0 or step == steps:
                checkpoint.save(folder, step, learner, optimizer, fabric)
            if stopping and step < steps:
                raise KeyboardInterrupt(f"step {step} of {steps} is saved in {folder}; go on with --resume")
    return steps


def _on_any_rank(requested: bool, fabric: Fabric) -> bool:
    """All ranks stop after the same step: one that went on alone would wait for the others for ever."""
    if fabric.world_size == 1:
        return requested
    return bool(fabric.all_reduce(torch.tensor(float(requested), device=fabric.device), reduce_op="sum"))


def share_state(learner: Method) -> None:
    """Give all ranks what the first one found between epochs: each computes it, in its own roundings and statistics."""
    if distributed.is_initialized():
        for value in learner.state_dict().values():
            distributed.broadcast(value, src=0)


def _finite(features: Callable[[], Tensor], step: int, folder: Path) -> Tensor:
    rows = features()
    if not torch.isfinite(rows).all():
        raise MvmrError(f"features are not finite at step {step}; {checkpoint.cure(folder)}")
    return rows


def leave_the_group(worker: int) -> None:
    """A terminal's Ctrl-C goes to the whole process group; a worker must live until the step is done."""
    os.setpgid(0, 0)


def read(batches: Iterable[T]) -> Iterator[T]:
    """What a loader yields, its errors in one line."""
    try:
        yield from batches
    except MvmrError as error:  # a worker's comes with its trace; the last line is the message
        raise MvmrError(str(error).rstrip().rpartition("MvmrError: ")[2]) from error


def _not_finite(terms: Mapping[str, Tensor], step: int, folder: Path) -> MvmrError:
    values = ", ".join(f"{name} = {float(value.detach()):g}" for name, value in terms.items())
    worst = next((name for name, value in terms.items() if not torch.isfinite(value)), "the sum of the terms")
    return MvmrError(f"{worst} is not finite at step {step} ({values}); {checkpoint.cure(folder)}")


def _loader(views: Dataset[Batch], config: TrainConfig, fabric: Fabric, *, start: int, stop: int) -> Any:
    count = len(views)  # type: ignore[arg-type]
    per_epoch = count // (config.batch_size * config.accumulate) * config.accumulate
    order = BatchOrder(
        count, config.batch_size, per_epoch,
        seed=config.seed, start=start, stop=stop, rank=fabric.global_rank, world=fabric.world_size,
    )  # fmt: skip
    workers = usable_cores() if config.workers is None else config.workers
    loader = DataLoader(
        views, batch_sampler=order, num_workers=workers, pin_memory=fabric.device.type == "cuda",
        prefetch_factor=4 if workers else None, worker_init_fn=leave_the_group,
        generator=torch.Generator(),  # else the loader draws a seed from the global generator
    )  # fmt: skip
    return fabric.setup_dataloaders(loader, use_distributed_sampler=False)
