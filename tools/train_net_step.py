"""Train a detector: `python tools/train_net_step.py --dataset coco2017 --cfg configs/....yaml`."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from pathlib import Path
from typing import Any

import torch

import _init_paths  # noqa: F401  (puts lib/ on the path)
import nn as mynn
import utils.net as net_utils
from core.config import assert_and_infer_cfg, cfg, merge_cfg_from_file, merge_cfg_from_list
from core.errors import UserError, exit_on_user_error
from core.train_engine import AMP_DTYPES, TrainSettings, place_model, prepare_device, train
from datasets.dataset_catalog import resolve_dataset
from datasets.roidb import combined_roidb_for_training
from modeling.model_builder import Generalized_RCNN
from roi_data.loader import build_train_loader
from utils.detectron_weight_helper import load_detectron_weight
from utils.device import pick_devices
from utils.logging import log_to_file, setup_logging
from utils.lr_policy import adapt_schedule, format_schedule_changes, schedule_from_solver
from utils.run_dir import make_folder, run_dir, save_config_and_args
from utils.training_stats import TrainingStats

CPU_INPUTS = ["blob_size", "image_ids"]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--dataset", required=True, help="coco2017, another name, a YAML or ANN.json:IMAGES")
    add("--cfg", dest="cfg_file", required=True, metavar="FILE", help="config (YAML)")
    add("--set", dest="set_cfgs", nargs="+", default=[], metavar="K V", help="config options")
    add("--disp_interval", type=int, default=20, help="steps between log lines")
    add("--no_cuda", action="store_true", help="run on the CPU")
    add("--device", help="cuda (default if there is one), cuda:1, cpu")
    add("--bs", type=int, dest="batch_size", help="images of a pass, over all GPUs")
    add("--nw", type=int, dest="num_workers", help="loader processes")
    add("--iter_size", type=int, default=1, help="passes of a step")
    add("--o", dest="optimizer", help="SGD, Adam or AdamW")
    add("--lr", type=float, help="base learning rate, not scaled any more")
    add("--lr_decay_gamma", type=float, help="factor of each decay")
    add("--no_lr_scaling", action="store_true", help="keep rate and steps at another batch size")
    add("--start_step", type=int, default=0, help="first step, zero-based")
    add("--resume", action="store_true", help="with --load_ckpt: go on with that training")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--load_ckpt", metavar="FILE", help="start from a .pth checkpoint")
    weights.add_argument("--load_detectron", metavar="FILE", help="start from a Detectron .pkl")
    add("--amp", choices=list(AMP_DTYPES), default="off", help="mixed precision")
    add("--no_save", action="store_true", help="write nothing")
    add("--output_dir", type=Path, help="for checkpoints and logs, instead of Outputs/...")
    add("--use_tfboard", action="store_true", help="write TensorBoard event files")
    return parser.parse_args()


def configure(args: argparse.Namespace, num_gpus: int, device: torch.device) -> str:
    """Merge and freeze the config; returns the table of what the batch size changed in it."""
    merge_cfg_from_file(args.cfg_file)
    merge_cfg_from_list(args.set_cfgs)
    dataset = resolve_dataset(args.dataset)
    if not dataset.train_names:
        raise UserError(f"--dataset {args.dataset} has no part `train`")
    cfg.TRAIN.DATASETS, cfg.TEST.DATASETS = dataset.train_names, dataset.test_names
    cfg.MODEL.NUM_CLASSES = dataset.num_classes
    cfg.CUDA = device.type == "cuda"
    if args.num_workers is not None:
        cfg.DATA_LOADER.NUM_THREADS = args.num_workers
    if args.load_ckpt or args.load_detectron:
        cfg.MODEL.LOAD_IMAGENET_PRETRAINED_WEIGHTS = False
    changes = adapt_schedule(
        cfg, num_gpus, args.batch_size, args.iter_size, scale_lr=not args.no_lr_scaling
    )
    cfg.SOLVER.TYPE = args.optimizer or cfg.SOLVER.TYPE
    cfg.SOLVER.BASE_LR = cfg.SOLVER.BASE_LR if args.lr is None else args.lr
    cfg.SOLVER.GAMMA = cfg.SOLVER.GAMMA if args.lr_decay_gamma is None else args.lr_decay_gamma
    assert_and_infer_cfg()
    return format_schedule_changes(changes)


def load_weights(args: argparse.Namespace, model: torch.nn.Module) -> dict[str, Any] | None:
    """Start from the weights that the flags name; returns the checkpoint to resume, if any."""
    if args.load_detectron:
        load_detectron_weight(model, args.load_detectron, new_classes=True)
    if not args.load_ckpt:
        random = not (args.load_detectron or cfg.MODEL.LOAD_IMAGENET_PRETRAINED_WEIGHTS)
        if random and cfg.RESNETS.FREEZE_AT > 0:
            logging.getLogger(__name__).warning(
                "no weights are loaded, yet RESNETS.FREEZE_AT %d keeps the first stages as they "
                "are, random: set it to 0 to train them",
                cfg.RESNETS.FREEZE_AT,
            )
        return None
    checkpoint = net_utils.read_ckpt(args.load_ckpt)
    net_utils.load_ckpt(model, checkpoint, new_classes=not args.resume, source=args.load_ckpt)
    if args.resume and not {"step", "optimizer"} <= checkpoint.keys():
        raise UserError(f"{args.load_ckpt} holds weights only: leave out --resume to start anew")
    return checkpoint if args.resume else None


@exit_on_user_error
def main() -> int:
    args = parse_args()
    logger = setup_logging("train_net_step")
    if args.resume and not args.load_ckpt:
        raise UserError("--resume needs --load_ckpt FILE, the checkpoint to go on from")
    for flag, least in (("disp_interval", 1), ("start_step", 0)):
        if getattr(args, flag) < least:
            raise UserError(f"--{flag} must be at least {least}, not {getattr(args, flag)}")
    devices = pick_devices(args.device, args.no_cuda)
    schedule_table = configure(args, len(devices), devices[0])
    torch.manual_seed(cfg.RNG_SEED)
    prepare_device(devices[0])
    model = Generalized_RCNN()
    checkpoint = load_weights(args, model)
    roidb, ratio_list, ratio_index = combined_roidb_for_training(
        cfg.TRAIN.DATASETS, cfg.TRAIN.PROPOSAL_FILES
    )
    batch_size = cfg.NUM_GPUS * cfg.TRAIN.IMS_PER_BATCH
    loader = build_train_loader(
        roidb, ratio_list, ratio_index, batch_size, cfg.DATA_LOADER.NUM_THREADS
    )
    place_model(model, devices[0])
    optimizer = net_utils.build_optimizer(model, cfg.SOLVER, args.iter_size)
    if checkpoint is not None:
        net_utils.load_optimizer_state(optimizer, checkpoint["optimizer"])
        net_utils.warn_of_another_training(checkpoint, train_size=len(roidb), batch_size=batch_size)
        args.start_step = checkpoint["step"] + 1
        loader.batch_sampler.seek(args.start_step * args.iter_size)

    folder = None if args.no_save else args.output_dir or run_dir(cfg.OUTPUT_DIR, args.cfg_file)
    if folder is not None:
        make_folder(folder)
        log_to_file(folder / "log.txt")
        save_config_and_args(folder, cfg, vars(args))
    logger.info("schedule:\n%s", schedule_table)
    settings = TrainSettings.from_solver(
        cfg.SOLVER,
        start_step=args.start_step,
        iter_size=args.iter_size,
        disp_interval=args.disp_interval,
        amp=args.amp,
        ckpt_dir=folder and folder / "ckpt",
        snapshot_period=max(1, int(cfg.TRAIN.SNAPSHOT_ITERS / cfg.NUM_GPUS)),
        train_size=len(roidb),
        batch_size=batch_size,
    )
    parallel = mynn.DataParallel(model, devices, cpu_keywords=CPU_INPUTS, minibatch=True)
    stats = TrainingStats(settings.max_iter, folder, args.use_tfboard)
    rate = schedule_from_solver(cfg.SOLVER)
    train(parallel, optimizer, loader, rate, settings, stats, checkpoint)
    return 0


if __name__ == "__main__":
    # As on Ctrl-C, what is being written is cleaned up.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
