"""A training from flags and config to its end: what all training scripts do."""

from __future__ import annotations

import argparse
import functools
import logging
import platform
import random
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import core.distributed as ranks
import nn as mynn
import utils.net as net_utils
from core.checkpoints import newest_good_checkpoint, read_training_checkpoint, resume_position
from core.config import assert_and_infer_cfg, cfg, merge_cfg_from_file, merge_cfg_from_list
from core.errors import UserError
from core.train_engine import TrainSettings, place_model, prepare_device, train
from core.train_eval import TestSetEvaluation
from core.train_flags import check_flags
from core.train_pictures import draw_batch
from core.train_schedule import Schedule
from datasets.dataset_catalog import ResolvedDataset, resolve_dataset
from datasets.proposals import proposal_files
from datasets.roidb import combined_roidb_for_training
from modeling.compilation import compile_parts
from modeling.model_builder import Generalized_RCNN
from roi_data.loader import build_train_loader
from utils.detectron_weight_helper import load_detectron_weight
from utils.device import pick_devices
from utils.logging import log_to_file, setup_logging
from utils.lr_policy import adapt_schedule, format_schedule_changes
from utils.run_dir import make_folder, plain, run_dir, save_config_and_args
from utils.training_stats import TrainingStats

logger = logging.getLogger(__name__)

CPU_INPUTS = ["blob_size", "image_ids"]


@dataclass(frozen=True)
class _Start:
    """Where a training comes from and where it goes."""

    folder: Path | None  # None: nothing is written
    source: str | None  # file of the checkpoint
    checkpoint: dict[str, Any] | None  # to go on from


def run_training(
    args: argparse.Namespace, make_schedule: Callable[[argparse.Namespace, int], Schedule]
) -> int:
    """Train as the flags (core.train_flags) say; every process of a distributed training calls it.

    Args:
        make_schedule: flags and batches of an epoch -> Schedule; the config is merged by then.
    Returns:
        exit code: 0, or 128 + N after signal N (a checkpoint is written before).
    Raises:
        UserError: anything that the user can mend.
    """
    check_flags(args)
    # Until the first step, as on Ctrl-C, what is being written is cleaned up.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    launch = ranks.launch_from_environment()
    setup_logging(__name__)
    if launch.rank > 0:
        logging.getLogger().setLevel(logging.WARNING)
    devices = ranks.device_of(launch, pick_devices(args.device, args.no_cuda))
    prepare_device(devices[0])
    ranks.join(launch)
    number = _train(args, make_schedule, devices)
    ranks.leave()
    return 128 + number if number else 0


def _train(
    args: argparse.Namespace,
    make_schedule: Callable[[argparse.Namespace, int], Schedule],
    devices: list[torch.device],
) -> int:
    rank, num_gpus = ranks.rank(), max(len(devices), ranks.world_size())
    dataset = _merge_config(args, devices[0])
    start = _find_start(args)
    table = _adapt_config(args, num_gpus, start)
    _seed(cfg.RNG_SEED)
    prepare_device(devices[0], cfg.DETERMINISTIC)
    if args.eval_period:
        proposal_files("TEST")  # what is missing is better said now than at the first evaluation
    model = Generalized_RCNN()
    with ranks.rank_zero_first():
        _load_weights(args, model, start)
        roidb, ratio_list, ratio_index = combined_roidb_for_training(
            cfg.TRAIN.DATASETS, proposal_files("TRAIN")
        )
    train_size, batch_size = len(roidb), cfg.NUM_GPUS * cfg.TRAIN.IMS_PER_BATCH
    loader = build_train_loader(
        roidb,
        ratio_list,
        ratio_index,
        batch_size,
        cfg.DATA_LOADER.NUM_THREADS,
        rank,
        ranks.world_size(),
        endless=True,
    )
    del roidb  # the loader has a compact copy
    place_model(model, devices[0])
    if cfg.MODEL.COMPILE:
        if len(devices) > 1:
            raise UserError(
                "MODEL.COMPILE needs a process for every GPU: start the script with torchrun"
            )
        compile_parts(model)
    schedule = make_schedule(args, len(loader.batch_sampler))
    optimizer = net_utils.build_optimizer(model, cfg.SOLVER, args.iter_size)
    first_step, first_batch = schedule.start_step, 0
    if start.checkpoint is not None:
        net_utils.load_optimizer_state(optimizer, start.checkpoint["optimizer"])
        net_utils.warn_of_another_training(start.checkpoint, train_size=train_size)
        first_step, first_batch = resume_position(
            start.checkpoint, batch_size, args.iter_size, adapt=not args.no_lr_scaling
        )
        if args.auto_resume and first_step >= schedule.max_iter:
            logger.info("%s is the end of the training: nothing is left to do", start.source)
            return 0
        for taken in ("model", "optimizer"):  # days are too long to hold them twice
            del start.checkpoint[taken]
    loader.batch_sampler.seek(first_batch)

    folder = start.folder if rank == 0 else None
    if folder is not None:
        make_folder(folder)
        log_to_file(folder / "log.txt")
        goes_on = start.source is not None and Path(start.source).parent == folder / "ckpt"
        if not goes_on and any((folder / "ckpt").glob("model_step*.pth")):
            logger.warning(
                "%s has checkpoints of another training, which this one's of the same steps "
                "replace: another --output_dir keeps them",
                folder,
            )
        save_config_and_args(folder, cfg, vars(args))
    logger.info("schedule:\n%s", table)
    settings = TrainSettings.from_solver(
        cfg.SOLVER,
        max_iter=schedule.max_iter,
        start_step=first_step,
        iter_size=args.iter_size,
        disp_interval=args.disp_interval,
        amp=args.amp,
        ckpt_dir=start.folder and start.folder / "ckpt",
        snapshot_period=schedule.snapshot_period,
        keep=cfg.TRAIN.KEEP_CHECKPOINTS,
        eval_period=args.eval_period,
        train_size=train_size,
        batch_size=batch_size,
        first_batch=first_batch,
        cuda_graphs=cfg.MODEL.CUDA_GRAPHS,
        notes={
            "num_gpus": num_gpus,
            "schedule": {"max_iter": schedule.max_iter, **plain(schedule.learning_rate.keywords)},
            "config": plain(cfg),
            "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
        },
    )
    parallel = mynn.DataParallel(
        ranks.distribute(model), devices, cpu_keywords=CPU_INPUTS, minibatch=True
    )
    stats = TrainingStats(
        settings.max_iter,
        folder,
        args.use_tfboard,
        max_bad_steps=cfg.TRAIN.MAX_BAD_STEPS,
        gather=ranks.gather_objects,
        quiet=rank > 0,
    )
    evaluate = None
    if args.eval_period:
        evaluate = TestSetEvaluation(start.folder / "eval", devices[0], args.use_tfboard)
    draw = functools.partial(
        draw_batch, pixel_means=cfg.PIXEL_MEANS, class_names=dataset.class_names
    )
    if rank > 0:  # the weights came out equal, from here on every rank draws its own
        _seed(cfg.RNG_SEED + rank)
    return train(
        parallel,
        optimizer,
        loader,
        schedule.learning_rate,
        settings,
        stats,
        start.checkpoint,
        evaluate,
        draw,
    )


def _merge_config(args: argparse.Namespace, device: torch.device) -> ResolvedDataset:
    """Merge files, options and flags that do not depend on a checkpoint into the config."""
    merge_cfg_from_file(args.cfg_file)
    merge_cfg_from_list(args.set_cfgs)
    dataset = resolve_dataset(args.dataset)
    if not dataset.train_names:
        raise UserError(f"--dataset {args.dataset} has no part `train`")
    if args.eval_period and not dataset.test_names:
        raise UserError(f"--eval_period: --dataset {args.dataset} has nothing to test on (`val`)")
    cfg.TRAIN.DATASETS, cfg.TEST.DATASETS = dataset.train_names, dataset.test_names
    # A file's number may be that of other data; one on the command line is meant for these.
    given = cfg.MODEL.NUM_CLASSES if "MODEL.NUM_CLASSES" in args.set_cfgs[::2] else -1
    if given not in (-1, dataset.num_classes) and ranks.rank() == 0:
        logger.warning(
            "MODEL.NUM_CLASSES is %d, the number of --dataset with the background, not %d",
            dataset.num_classes,
            given,
        )
    cfg.MODEL.NUM_CLASSES = dataset.num_classes
    cfg.CUDA = device.type == "cuda"
    if args.num_workers is not None:
        cfg.DATA_LOADER.NUM_THREADS = args.num_workers
    return dataset


def _find_start(args: argparse.Namespace) -> _Start:
    """The output folder and the checkpoint to go on from, the same on every rank."""
    folder, source, checkpoint = None, args.load_ckpt if args.resume else None, None
    if not args.no_save and ranks.rank() == 0:
        folder = args.output_dir or run_dir(cfg.OUTPUT_DIR, args.cfg_file)
        if args.auto_resume:
            folders = [folder]
            if args.output_dir is None:  # the last run that left a checkpoint
                folders = sorted(folder.parent.glob("*/ckpt"), key=lambda f: -f.stat().st_mtime)
                folders = [f.parent for f in folders] + [folder]
            for candidate in folders:
                if found := newest_good_checkpoint(candidate / "ckpt"):
                    folder, source = candidate, str(found[0])
                    break
    folder, source = ranks.from_rank_zero((folder, source))
    if source is not None:
        checkpoint = read_training_checkpoint(Path(source))
        logger.info("going on from %s", source)
    return _Start(folder, source, checkpoint)


def _adapt_config(args: argparse.Namespace, num_gpus: int, start: _Start) -> str:
    """Fit the schedule to the batch size and freeze the config; returns the table of changes."""
    if start.checkpoint is not None or args.load_ckpt or args.load_detectron:
        cfg.MODEL.LOAD_IMAGENET_PRETRAINED_WEIGHTS = False
    changes = adapt_schedule(
        cfg, num_gpus, args.batch_size, args.iter_size, scale_lr=not args.no_lr_scaling
    )
    cfg.SOLVER.TYPE = args.optimizer or cfg.SOLVER.TYPE
    cfg.SOLVER.BASE_LR = cfg.SOLVER.BASE_LR if args.lr is None else args.lr
    cfg.SOLVER.GAMMA = cfg.SOLVER.GAMMA if args.lr_decay_gamma is None else args.lr_decay_gamma
    assert_and_infer_cfg()
    return format_schedule_changes(changes)


def _load_weights(args: argparse.Namespace, model: torch.nn.Module, start: _Start) -> None:
    """Start from the weights of the training to go on with, or from those that the flags name."""
    if start.checkpoint is not None:
        net_utils.load_ckpt(model, start.checkpoint, source=start.source)
    elif args.load_ckpt:
        net_utils.load_ckpt(model, args.load_ckpt, new_classes=True)
    elif args.load_detectron:
        load_detectron_weight(model, args.load_detectron, new_classes=True)
    elif not cfg.MODEL.LOAD_IMAGENET_PRETRAINED_WEIGHTS:
        warn_of_random_frozen_layers()


def warn_of_random_frozen_layers() -> None:
    """Say so if the config freezes layers of a backbone for which no weights are loaded."""
    if cfg.MODEL.CONV_BODY.startswith("VGG"):
        logger.warning(
            "no weights are loaded, yet the first layers of %s are always frozen and stay random: "
            "set MODEL.LOAD_IMAGENET_PRETRAINED_WEIGHTS True, RESNETS.IMAGENET_PRETRAINED_WEIGHTS "
            "naming the file",
            cfg.MODEL.CONV_BODY,
        )
    elif cfg.RESNETS.FREEZE_AT > 0:
        logger.warning(
            "no weights are loaded, yet RESNETS.FREEZE_AT %d keeps the first stages as they "
            "are, random: set it to 0 to train them",
            cfg.RESNETS.FREEZE_AT,
        )


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
