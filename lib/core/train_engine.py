"""The training loop: optimizer, rate, precision, logging and checkpoints. Knows no boxes."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import core.distributed as ranks
import utils.net as net_utils
from core.checkpoints import CheckpointWriter, random_state, restore_random_state
from core.errors import UserError
from core.failures import explained
from core.signals import StopRequest
from core.train_batches import batches_on_devices
from core.train_graphs import Names, StepGraphs, StepValues, on_training_stream
from core.train_replicas import Replicas
from nn.parallel import DataParallel
from utils.training_stats import NonFiniteLossError, TrainingStats

logger = logging.getLogger(__name__)

# Passes after which DistributedDataParallel no longer rearranges or measures itself.
DDP_WARM_UP = 12

AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TrainSettings:
    """How long to train, how to step, what to write.

    Args:
        max_iter: number of steps (updates) of the whole training.
        start_step: first, zero-based step.
        iter_size: passes whose gradients are summed into a step.
        disp_interval: steps between reports.
        amp: `off`, `bf16` or `fp16` autocast of the model's forward.
        ckpt_dir: folder of `model_step{N}.pth` (made when the first is written); None: save none.
        snapshot_period: steps between checkpoints; one is written at the end in any case.
        keep: checkpoints to keep; 0 keeps all.
        eval_period: steps between evaluations, each with a checkpoint; 0: none.
        train_size: images of the training set, noted in checkpoints.
        batch_size: images of a pass over all GPUs, noted in checkpoints.
        first_batch: batches of the whole sequence that the loader has been made to leave out.
        notes: further entries of checkpoints.
        scale_momentum: with the two below, SOLVER.SCALE_MOMENTUM, _THRESHOLD and _TWICE.
        log_lr_change_threshold: a change of the rate by more than this factor is logged.
        cuda_graphs: replay recorded steps (core.train_graphs) where GPUs do a step in one pass
            without a loss scale.
    """

    max_iter: int
    start_step: int = 0
    iter_size: int = 1
    disp_interval: int = 20
    amp: str = "off"
    ckpt_dir: Path | None = None
    snapshot_period: int = 20000
    keep: int = 0
    eval_period: int = 0
    train_size: int = 0
    batch_size: int = 0
    first_batch: int = 0
    notes: Mapping[str, Any] = field(default_factory=dict)
    scale_momentum: bool = True
    scale_momentum_threshold: float = 1.1
    scale_momentum_twice: bool = False
    log_lr_change_threshold: float = 1.1
    cuda_graphs: bool = True

    @classmethod
    def from_solver(cls, solver: Any, **settings: Any) -> TrainSettings:
        """What a config's SOLVER group says, with the other settings."""
        return cls(
            scale_momentum=solver.SCALE_MOMENTUM,
            scale_momentum_threshold=solver.SCALE_MOMENTUM_THRESHOLD,
            scale_momentum_twice=solver.SCALE_MOMENTUM_TWICE,
            log_lr_change_threshold=solver.LOG_LR_CHANGE_THRESHOLD,
            **settings,
        )


def prepare_device(device: torch.device, deterministic: bool = False) -> None:
    """Settings for speed: on CUDA fp32 products run in TF32.

    deterministic: what is computed twice comes out equal, bit for bit, at some cost.

    `NVIDIA_TF32_OVERRIDE=0` in the environment keeps full fp32 for exact comparison. cuDNN's
    benchmark mode stays off: every padded image size would be tried out anew, for seconds, and
    the kernels it picks need twice the memory and are no faster in channels_last.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cuda.matmul.allow_tf32 = True
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def place_model(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The model on the device, in the memory format its convolutions are fastest in."""
    return model.to(device, memory_format=torch.channels_last)


@dataclass(frozen=True)
class Evaluation:
    """Scores of the model after a step; `metrics[name]` says which step was the best."""

    name: str
    metrics: Mapping[str, float]
    pictures: Mapping[str, np.ndarray] = field(default_factory=dict)  # (H, W, 3) uint8 BGR


def train(
    model: DataParallel,
    optimizer: torch.optim.Optimizer,
    loader: Iterable[Mapping[str, Any]],
    learning_rate: Callable[[int], float],
    settings: TrainSettings,
    stats: TrainingStats,
    restored: Mapping[str, Any] | None = None,
    evaluate: Callable[[torch.nn.Module], Evaluation | None] | None = None,
    draw: Callable[[Mapping[str, Any]], Mapping[str, np.ndarray]] | None = None,
) -> int:
    """Train from `settings.start_step` to `settings.max_iter`.

    Every rank of a distributed training calls it, with a model of `core.distributed.distribute`;
    rank 0 writes.

    Args:
        model: `model(**batch)` gives `{'losses': {name: tensor}, 'metrics': {name: tensor}}` with
            tensors of shape () or (num_gpus,).
        optimizer: a fused one: a step with a loss that is not finite is left out on the device.
        loader: batches (name -> list with an entry per device) of one epoch; repeated as needed.
            Their `image_ids`, if any, are named when a loss is not finite.
        learning_rate: zero-based step -> rate.
        restored: checkpoint to continue random numbers, loss scale and best score from.
        evaluate: scores the bare model every `settings.eval_period` steps; called by every rank,
            and rank 0 gets the scores.
        draw: pictures of a batch, wanted for TensorBoard at the start and with every checkpoint.
    Returns:
        0, or the number of the signal that ended the training early, after a checkpoint.
    Raises:
        NonFiniteLossError: a loss is NaN or infinite; nothing is saved from then on.
        UserError: the loader has no batch, there is nothing left to train, a checkpoint cannot be
            written, a GPU's memory is full, or a loader process died.
    """
    if settings.start_step >= settings.max_iter:
        raise UserError(
            f"nothing to train: the first step would be {settings.start_step}, but the schedule "
            f"ends after {settings.max_iter} steps (SOLVER.MAX_ITER, scaled to the batch size)"
        )
    loop = _Loop(model, optimizer, settings, stats, evaluate, draw)
    if restored is not None:
        loop.restore(restored)
    model.train()
    step, signal, failed = settings.start_step, 0, True
    try:
        with StopRequest() as stop, on_training_stream(*loop.devices_with_streams):
            batches = batches_on_devices(loader, model)
            for step in range(settings.start_step, settings.max_iter):
                rate = learning_rate(step)
                _set_rate(step, optimizer, rate, settings)
                loop.step(step, batches)
                signal = stop.agreed()
                loop.after_step(step, rate, signal, stop)
                if signal:
                    break
            stop.finish()
            loop.wait_for_checkpoint()
        failed = False
    except BaseException as error:
        # The weights may be half updated or broken: they are not written.
        told = explained(error, loader, settings.batch_size, loop.blob_sizes)
        if told is not None:
            raise told from error
        if not isinstance(error, UserError):
            saved = "its checkpoint is written" if loop.saved == step else "nothing is saved"
            logger.error("stopped in step %d by %s; %s", step, type(error).__name__, saved)
        raise
    finally:
        stats.close()
        loop.close(failed)
    if signal:
        logger.info("signal %d: stopped after step %d; --auto_resume goes on", signal, step)
    return signal


def _set_rate(
    step: int, optimizer: torch.optim.Optimizer, rate: float, settings: TrainSettings
) -> None:
    old = net_utils.current_lr(optimizer)
    change = max(old / rate, rate / old) if min(old, rate) > 0 else 1.0
    # Before the first step the optimizer holds the rate without warm-up.
    if step > settings.start_step and change > settings.log_lr_change_threshold:
        logger.info("learning rate changes from %.6g to %.6g", old, rate)
    net_utils.update_learning_rate(
        optimizer,
        old,
        rate,
        scale_momentum=settings.scale_momentum,
        threshold=settings.scale_momentum_threshold,
        twice=settings.scale_momentum_twice,
    )


class _Loop:
    """What happens in a step and after it."""

    def __init__(
        self,
        model: DataParallel,
        optimizer: torch.optim.Optimizer,
        settings: TrainSettings,
        stats: TrainingStats,
        evaluate: Callable[[torch.nn.Module], Evaluation | None] | None,
        draw: Callable[[Mapping[str, Any]], Mapping[str, np.ndarray]] | None,
    ) -> None:
        self._model, self._optimizer = model, optimizer
        self._settings, self._stats = settings, stats
        self._evaluate, self._draw = evaluate, draw
        self._scaler = torch.amp.GradScaler(model.devices[0].type, enabled=settings.amp == "fp16")
        self._recorded: StepGraphs | Replicas | None = None
        one_pass = settings.iter_size == 1 and not self._scaler.is_enabled()
        if settings.cuda_graphs and model.devices[0].type == "cuda" and one_pass:
            if len(model.devices) > 1:
                self._recorded = Replicas(model, self._pass, self._update, optimizer)
            else:
                warm_up = DDP_WARM_UP if ranks.world_size() > 1 else 0
                self._recorded = StepGraphs(self._whole_step, optimizer, model.devices[0], warm_up)
        self.saved = -1  # step whose checkpoint is on the disk although its evaluation failed
        self._best: dict[str, Any] | None = None
        self._batch: Mapping[str, Any] = {}
        self._writer = None
        if settings.ckpt_dir is not None and ranks.rank() == 0:
            self._writer = CheckpointWriter(settings.ckpt_dir, settings.keep)

    @property
    def blob_sizes(self) -> list[tuple[int, int]]:
        """Padded height and width of the last batch on each device, as far as known."""
        return list(self._batch.get("blob_size", ()))

    @property
    def devices_with_streams(self) -> list[torch.device]:
        """GPUs whose work need not be on their default stream. torch adds up the gradients of
        several GPUs there, and does not wait for what is on another one."""
        devices = self._model.devices
        return devices if self._recorded is not None or len(devices) == 1 else []

    def restore(self, checkpoint: Mapping[str, Any]) -> None:
        """Continue what `ckpt_content` does not know; checkpoints of Detectron.pytorch lack it."""
        if checkpoint.get("scaler"):
            self._scaler.load_state_dict(checkpoint["scaler"])
        self._best = checkpoint.get("best")
        states = checkpoint.get("rng")
        if isinstance(states, list) and len(states) == ranks.world_size():
            restore_random_state(states[ranks.rank()], self._model.devices)

    def step(self, step: int, batches: Iterator[tuple[list[tuple], Mapping[str, Any]]]) -> None:
        """One update from `iter_size` passes; nothing in here waits for the device."""
        iter_size, own = self._settings.iter_size, 0
        image_ids: list[Any] = []
        data_seconds = 0.0
        for number in range(1, iter_size + 1):
            before = time.perf_counter()
            inputs, self._batch = next(batches)
            data_seconds += time.perf_counter() - before
            image_ids += [i for entry in self._batch.get("image_ids", ()) for i in entry]
            if self._recorded is not None:
                names, own, values = self._recorded(inputs)
                break
            exchange = contextlib.nullcontext()
            if number < iter_size:
                exchange = ranks.without_exchange(self._model.module)
            with exchange:
                names, pass_values = self._pass(functools.partial(self._forward, inputs))
            own = own + pass_values / iter_size
        else:
            values = self._update(names, own)
        self._stats.record(step, names, values, own, image_ids, data_seconds)

    def _forward(self, inputs: list[tuple]) -> Mapping[str, Any]:
        return self._model.forward_scattered(inputs)

    def _pass(
        self, forward: Callable[[], Mapping[str, Any]], share: int = 1
    ) -> tuple[Names, torch.Tensor]:
        """Forward and backward; the names and values of losses and metrics.

        share: what the gradients are divided by.
        """
        dtype = AMP_DTYPES[self._settings.amp]
        with torch.autocast(self._model.devices[0].type, dtype, enabled=dtype is not None):
            output = forward()
        losses = _stacked(output["losses"])
        self._backward(losses.sum() / share)
        values = losses.detach()
        if output["metrics"]:
            values = torch.cat([values, _stacked(output["metrics"]).detach()])
        return (tuple(output["losses"]), tuple(output["metrics"])), values

    def _whole_step(self, **inputs: Any) -> StepValues:
        """What is recorded of a step of one pass."""
        names, own = self._pass(functools.partial(self._forward, [((), inputs)]))
        return names, own, self._update(names, own)

    def _backward(self, loss: torch.Tensor) -> None:
        if self._scaler.is_enabled():
            # The scaler leaves out a step by its gradients alone.
            loss = loss * torch.where(loss.isfinite(), 1.0, float("nan"))
        self._scaler.scale(loss).backward()

    def _update(self, names: Names, own: torch.Tensor) -> torch.Tensor:
        """Let the optimizer step, unless a loss is not finite: decided on the device.

        own: losses, then metrics, of this rank; returns their means over the ranks.
        """
        values = ranks.exchange_the_rest(self._model.module, own)
        if not self._scaler.is_enabled():
            # As the scaler tells a fused optimizer that it must change nothing.
            finite = values[: len(names[0])].isfinite().all()
            self._optimizer.found_inf = 1.0 - finite.float()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        if not self._scaler.is_enabled():
            del self._optimizer.found_inf  # a step leaves nothing new on the device
        self._optimizer.zero_grad(set_to_none=True)
        return values

    def after_step(self, step: int, rate: float, signal: int, stop: StopRequest) -> None:
        """Report, evaluate and save as far as it is time for it, or the last step."""
        settings = self._settings

        def due(period: int) -> bool:
            return period > 0 and (step + 1) % period == 0

        first, end = step == settings.start_step, step + 1 == settings.max_iter
        last = end or signal > 0
        evaluating = settings.eval_period > 0 and (due(settings.eval_period) or end) and not signal
        saving = settings.ckpt_dir is not None and (
            last or evaluating or due(settings.snapshot_period)
        )
        reporting = first or last or due(settings.disp_interval)
        if reporting or saving:
            stop.settle()
        if reporting:
            self._stats.report(step, rate)
        if (first or saving) and self._draw is not None and self._stats.wants_pictures:
            self._stats.add_pictures(step, self._draw(self._batch))
        if saving:
            before = time.perf_counter()
            self._save(step, evaluating)
            self._stats.exclude(time.perf_counter() - before)
        elif self._writer is not None:
            self._writer.check()

    def _save(self, step: int, evaluating: bool) -> None:
        self._stats.check()
        _assert_finite(self._model, step)
        own_state = random_state(self._model.devices)
        states = ranks.gather_objects(own_state)
        best = False
        if evaluating:
            try:
                found = self._evaluate(ranks.bare(self._model.module))
                restore_random_state(own_state, self._model.devices)
                if found is not None:
                    best = self._note_score(step, found)
            except Exception as error:
                logger.error(
                    "the evaluation after step %d failed: %s: %s",
                    step + 1,
                    type(error).__name__,
                    error,
                )
                self._write(step, states, False)
                self.wait_for_checkpoint()
                self.saved = step
                raise
        self._write(step, states, best)

    def _write(self, step: int, states: list[Any], best: bool) -> None:
        if self._writer is None:
            return
        settings = self._settings
        passes = (step + 1 - settings.start_step) * settings.iter_size
        content = net_utils.ckpt_content(
            step=step,
            train_size=settings.train_size,
            batch_size=settings.batch_size,
            model=ranks.bare(self._model.module),
            optimizer=self._optimizer,
            iter_size=settings.iter_size,
            sampler={"batches": settings.first_batch + passes, "batch_size": settings.batch_size},
            scaler=self._scaler.state_dict(),
            rng=states,
            best=self._best,
            **settings.notes,
        )
        self._writer.save(content, best)

    def _note_score(self, step: int, found: Evaluation) -> bool:
        """Report an evaluation; is it the best so far?"""
        value = found.metrics[found.name]
        self._stats.report_evaluation(step, found.metrics)
        self._stats.add_pictures(step, found.pictures)
        best = self._best is None or value > self._best["value"]
        if best:
            self._best = {"metric": found.name, "value": value, "step": step}
        logger.info(
            "evaluation after step %d: %s %.4f, the best is %.4f after step %d",
            step + 1,  # as the lines of the losses count
            found.name,
            value,
            self._best["value"],
            self._best["step"] + 1,
        )
        return best

    def wait_for_checkpoint(self) -> None:
        if self._writer is not None:
            self._writer.wait()

    def close(self, failed: bool) -> None:
        if self._recorded is not None:
            logger.info("%s", self._recorded)
            with ranks.without_peers() if failed else contextlib.nullcontext():
                self._recorded.forget()
        if self._writer is not None:
            self._writer.close()


def _stacked(values: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """(n,) float32: the values, each a mean over the GPUs."""
    return torch.stack([v.float().mean() if v.dim() else v.float() for v in values.values()])


def _assert_finite(model: DataParallel, step: int) -> None:
    # Finite losses do not mean that the last update was finite.
    weights = [p for p in model.parameters() if p.requires_grad]
    largest = torch.stack(torch._foreach_norm(weights, float("inf")))
    if not largest.isfinite().all():
        raise NonFiniteLossError(
            f"weights are not finite after step {step}: nothing is saved; lower the learning rate "
            "(--lr) or train with --amp off"
        )
