"""The training loop: optimizer, rate, precision, logging and checkpoints. Knows no boxes."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import utils.net as net_utils
from core.errors import UserError
from nn.parallel import DataParallel
from nn.parallel.scatter import tensors_in
from utils.training_stats import NonFiniteLossError, TrainingStats

logger = logging.getLogger(__name__)

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
        train_size: images of the training set, noted in checkpoints.
        batch_size: images of a pass, noted in checkpoints.
        scale_momentum: with the two below, SOLVER.SCALE_MOMENTUM, _THRESHOLD and _TWICE.
        log_lr_change_threshold: a change of the rate by more than this factor is logged.
    """

    max_iter: int
    start_step: int = 0
    iter_size: int = 1
    disp_interval: int = 20
    amp: str = "off"
    ckpt_dir: Path | None = None
    snapshot_period: int = 20000
    train_size: int = 0
    batch_size: int = 0
    scale_momentum: bool = True
    scale_momentum_threshold: float = 1.1
    scale_momentum_twice: bool = False
    log_lr_change_threshold: float = 1.1

    @classmethod
    def from_solver(cls, solver: Any, **settings: Any) -> TrainSettings:
        """What a config's SOLVER group says, with the other settings."""
        return cls(
            max_iter=solver.MAX_ITER,
            scale_momentum=solver.SCALE_MOMENTUM,
            scale_momentum_threshold=solver.SCALE_MOMENTUM_THRESHOLD,
            scale_momentum_twice=solver.SCALE_MOMENTUM_TWICE,
            log_lr_change_threshold=solver.LOG_LR_CHANGE_THRESHOLD,
            **settings,
        )


def prepare_device(device: torch.device) -> None:
    """Settings for speed: on CUDA fp32 products run in TF32.

    `NVIDIA_TF32_OVERRIDE=0` in the environment keeps full fp32 for exact comparison. cuDNN's
    benchmark mode stays off: every padded image size would be tried out anew, for seconds, and
    the kernels it picks need twice the memory and are no faster in channels_last.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cuda.matmul.allow_tf32 = True


def place_model(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The model on the device, in the memory format its convolutions are fastest in."""
    return model.to(device, memory_format=torch.channels_last)


def train(
    model: DataParallel,
    optimizer: torch.optim.Optimizer,
    loader: Iterable[Mapping[str, Any]],
    learning_rate: Callable[[int], float],
    settings: TrainSettings,
    stats: TrainingStats,
    restored: Mapping[str, Any] | None = None,
) -> None:
    """Train from `settings.start_step` to `settings.max_iter`.

    Args:
        model: `model(**batch)` gives `{'losses': {name: tensor}, 'metrics': {name: tensor}}` with
            tensors of shape () or (num_gpus,).
        loader: batches (name -> list with an entry per device) of one epoch; repeated as needed.
            Their `image_ids`, if any, are named when a loss is not finite.
        learning_rate: zero-based step -> rate.
        restored: checkpoint to continue random numbers and loss scale from.
    Raises:
        NonFiniteLossError: a loss is NaN or infinite; nothing is saved from then on.
        UserError: the loader has no batch, or there is nothing left to train.
    """
    if settings.start_step >= settings.max_iter:
        raise UserError(
            f"nothing to train: the first step would be {settings.start_step}, but the schedule "
            f"ends after {settings.max_iter} steps (SOLVER.MAX_ITER, scaled to the batch size)"
        )
    scaler = torch.amp.GradScaler(model.devices[0].type, enabled=settings.amp == "fp16")
    if restored is not None:
        _restore(restored, scaler)
    model.train()
    batches = _on_devices(_endless(loader), model)
    step = settings.start_step
    try:
        for step in range(settings.start_step, settings.max_iter):
            rate = learning_rate(step)
            _set_rate(step, optimizer, rate, settings)
            _step(step, model, optimizer, scaler, batches, settings, stats)
            last = step + 1 == settings.max_iter
            if last or (step + 1) % settings.disp_interval == 0 or step == settings.start_step:
                stats.report(step, rate)
            if settings.ckpt_dir is not None and (
                last or (step + 1) % settings.snapshot_period == 0
            ):
                stats.check()
                before = time.perf_counter()
                _save(step, model, optimizer, scaler, settings)
                stats.exclude(time.perf_counter() - before)
    except BaseException as error:
        # The weights may be half updated or broken: they are not written.
        if not isinstance(error, UserError):
            logger.error("stopped in step %d by %s; nothing is saved", step, type(error).__name__)
        raise


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


def _step(
    step: int,
    model: DataParallel,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    batches: Iterator[tuple[list[tuple], list[Any]]],
    settings: TrainSettings,
    stats: TrainingStats,
) -> None:
    """One update from `iter_size` passes; nothing in here waits for the device."""
    dtype = AMP_DTYPES[settings.amp]
    losses = metrics = 0
    image_ids: list[Any] = []
    data_seconds = 0.0
    for _ in range(settings.iter_size):
        before = time.perf_counter()
        inputs, ids = next(batches)
        data_seconds += time.perf_counter() - before
        image_ids += ids
        with torch.autocast(model.devices[0].type, dtype, enabled=dtype is not None):
            output = model.forward_scattered(inputs)
        pass_losses = _stacked(output["losses"])
        scaler.scale(pass_losses.sum()).backward()
        losses = losses + pass_losses.detach() / settings.iter_size
        pass_metrics = _stacked(output["metrics"]) if output["metrics"] else pass_losses[:0]
        metrics = metrics + pass_metrics.detach() / settings.iter_size
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    names = tuple(output["losses"]), tuple(output["metrics"])
    stats.record(step, names, (losses, metrics), image_ids, data_seconds)


def _stacked(values: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """(n,) float32: the values, each a mean over the GPUs."""
    return torch.stack([v.float().mean() if v.dim() else v.float() for v in values.values()])


def _endless(loader: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    while True:
        batches = iter(loader)
        # torch's DataLoader draws a number when an epoch begins. The model's draws must not depend
        # on where epochs begin, or a resumed training would differ from an uninterrupted one.
        with torch.random.fork_rng(devices=[]):
            first = next(batches, None)
        if first is None:
            raise UserError(
                "the training set has fewer images than a batch: lower --bs or "
                "TRAIN.IMS_PER_BATCH, or use more images"
            )
        yield first
        yield from batches


def _on_devices(
    batches: Iterator[Mapping[str, Any]], model: DataParallel
) -> Iterator[tuple[list[tuple], list[Any]]]:
    """Each batch's inputs on the devices and its image ids.

    A batch is fetched when the kernels of the step before are queued: its copy, on a stream of
    its own, runs beside them.
    """
    streams = [torch.cuda.Stream(d) for d in model.devices if d.type == "cuda"]
    for batch in batches:
        ids = [i for entry in batch.get("image_ids", ()) for i in entry]
        with contextlib.ExitStack() as stack:
            for stream in streams:
                stack.enter_context(torch.cuda.stream(stream))
            inputs = model.scatter((), batch)
        for stream, (_, kwargs) in zip(streams, inputs, strict=False):
            current = torch.cuda.current_stream(stream.device)
            current.wait_stream(stream)
            for tensor in tensors_in(kwargs):
                if tensor.is_cuda:
                    tensor.record_stream(current)
        yield inputs, ids


def _save(
    step: int,
    model: DataParallel,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    settings: TrainSettings,
) -> None:
    _assert_finite(model, step)
    settings.ckpt_dir.mkdir(parents=True, exist_ok=True)
    path = settings.ckpt_dir / f"model_step{step}.pth"
    net_utils.save_ckpt(
        path,
        step=step,
        train_size=settings.train_size,
        batch_size=settings.batch_size,
        model=model.module,
        optimizer=optimizer,
        scaler=scaler.state_dict(),
        rng={"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()},
    )
    logger.info("saved %s", path)


def _assert_finite(model: DataParallel, step: int) -> None:
    # Finite losses do not mean that the last update was finite.
    weights = [p for p in model.parameters() if p.requires_grad]
    largest = torch.stack(torch._foreach_norm(weights, float("inf")))
    if not largest.isfinite().all():
        raise NonFiniteLossError(
            f"weights are not finite after step {step}: nothing is saved; lower the learning rate "
            "(--lr) or train with --amp off"
        )


def _restore(checkpoint: Mapping[str, Any], scaler: torch.amp.GradScaler) -> None:
    """Continue the random numbers; checkpoints of Detectron.pytorch have none."""
    if checkpoint.get("scaler"):
        scaler.load_state_dict(checkpoint["scaler"])
    rng = checkpoint.get("rng", {})
    if "cpu" in rng:
        torch.set_rng_state(rng["cpu"])
    if len(rng.get("cuda", ())) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(rng["cuda"])
