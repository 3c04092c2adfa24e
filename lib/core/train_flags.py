"""Flags that every training script has, and what they say of the config."""

from __future__ import annotations

import argparse
from pathlib import Path

from core.errors import UserError
from core.train_engine import AMP_DTYPES


def training_parser(description: str, disp_interval: int) -> argparse.ArgumentParser:
    """A parser with the flags that do not depend on how steps are counted.

    disp_interval: default of that flag.
    """
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--dataset", required=True, help="coco2017, another name, a YAML or ANN.json:IMAGES")
    add("--cfg", dest="cfg_file", required=True, metavar="FILE", help="config (YAML)")
    add("--set", dest="set_cfgs", nargs="+", default=[], metavar="K V", help="config options")
    add("--disp_interval", type=int, default=disp_interval, help="steps between log lines")
    add("--no_cuda", action="store_true", help="run on the CPU")
    add("--device", help="cuda (default if there is one), cuda:1, cpu")
    add("--bs", type=int, dest="batch_size", help="images of a pass, over all GPUs")
    add("--nw", type=int, dest="num_workers", help="loader processes of each process")
    add("--iter_size", type=int, default=1, help="passes of a step")
    add("--o", dest="optimizer", help="SGD, Adam or AdamW")
    add("--lr", type=float, help="base learning rate, not scaled any more")
    add("--lr_decay_gamma", type=float, help="factor of each decay")
    add("--no_lr_scaling", action="store_true", help="keep rate and steps at another batch size")
    add("--resume", action="store_true", help="with --load_ckpt: go on with that training")
    add("--auto_resume", action="store_true", help="go on from the output folder's last checkpoint")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--load_ckpt", metavar="FILE", help="start from a .pth checkpoint")
    weights.add_argument(
        "--load_detectron", metavar="FILE", help="or a Detectron .pkl, or zoo://STEM"
    )
    add("--amp", choices=list(AMP_DTYPES), default="off", help="mixed precision")
    add("--eval_period", type=int, default=0, help="steps between evaluations; 0: none")
    add("--no_save", action="store_true", help="write nothing")
    add("--output_dir", type=Path, help="for checkpoints and logs, instead of Outputs/...")
    add("--use_tfboard", action="store_true", help="write TensorBoard event files")
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Raise UserError for flags that contradict each other or are out of range."""
    if args.resume and not args.load_ckpt:
        raise UserError("--resume needs --load_ckpt FILE, the checkpoint to go on from")
    if args.no_save and (args.auto_resume or args.eval_period):
        flag = "--auto_resume" if args.auto_resume else "--eval_period"
        raise UserError(f"{flag} needs checkpoints: leave out --no_save")
    least = {"disp_interval": 1, "start_step": 0, "eval_period": 0, "start_iter": 0,
             "start_epoch": 0, "epochs": 1, "ckpt_num_per_epoch": 1}  # fmt: skip
    for flag, value in vars(args).items():
        if value is not None and flag in least and value < least[flag]:
            raise UserError(f"--{flag} must be at least {least[flag]}, not {value}")
