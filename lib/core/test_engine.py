"""A data set to results: detect in every image, keep the detections in a file, evaluate them."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from core.config import cfg, reset_cfg
from core.distributed import gather_objects, rank, world_size
from core.errors import UserError
from core.processes import run_in_processes
from core.rpn_generator import (
    PROPOSALS_FILE,
    ProposalResults,
    evaluate_proposal_file,
    generate_proposals,
)
from core.test_pipeline import FileResult, Stages, detect_files
from core.test_results import (
    DETECTIONS_FILE,
    DatasetResults,
    PartFile,
    check_range,
    join_parts,
    load_detections,
    split_range,
    test_fingerprint,
)
from core.test_slots import forget_graphs
from core.train_engine import place_model, prepare_device
from datasets import task_evaluation
from datasets.dataset_catalog import resolve_dataset
from datasets.json_dataset import JsonDataset
from datasets.proposals import proposal_file_for_testing
from datasets.scoring_ahead import ScoringAhead
from modeling.model_builder import Generalized_RCNN
from utils.detectron_weight_helper import load_detectron_weight, use_box_weights_of
from utils.garbage import only_young_garbage
from utils.load_report import first_names
from utils.logging import setup_logging
from utils.net import load_ckpt
from utils.progress import Progress
from utils.run_dir import make_folder
from utils.vis import picture_names, vis_one_image

logger = logging.getLogger(__name__)

# data set -> task -> metric -> value
Results = dict[str, dict[str, dict[str, float]]]


def run_inference(args: argparse.Namespace, ind_range: tuple[int, int] | None = None) -> Results:
    """Test a model on cfg.TEST.DATASETS.

    Args:
        args: `load_ckpt` or `load_detectron` (weight file), `output_dir`, `device`, and optionally
            `bs` (images a forward pass, 1), `amp` (`off`, `bf16`, `fp16`), `vis` (draw the
            detections too), `devices` (several: a process on each shares the test, which needs
            `dataset`, the script's --dataset), `sharded` (the ranks of core.distributed share it:
            all of them call this, and rank 0 scores).
        ind_range: test only the images START .. END - 1 and write a part file; nothing is scored.

    Returns:
        data set -> task -> metric -> value; {} with ind_range, and on ranks other than 0.
    """
    devices = getattr(args, "devices", None) or [args.device]
    if len(devices) > 1 and ind_range is None:
        return _test_in_processes(args, devices)
    model = initialize_model_from_cfg(args)
    results: Results = {}
    shares = world_size() if getattr(args, "sharded", False) else 1
    for name, folder in _folders(args.output_dir):
        if ind_range is not None:
            _test(model, name, folder, ind_range, **_options(args))
        elif shares > 1:
            _test_share(model, name, folder, rank(), shares, args)
            gather_objects(None)  # every part file is written
            if rank() == 0:
                results.update(_join_and_score(name, folder, shares))
        else:
            results.update(test_net_on_dataset(model, name, folder, **_options(args)))
    forget_graphs(model)  # a training goes on after its evaluation, and needs the memory
    return results


def _folders(output_dir: str | Path) -> list[tuple[str, Path]]:
    """Each data set of cfg.TEST.DATASETS and where its results go."""
    names = cfg.TEST.DATASETS
    return [(n, Path(output_dir) / n if len(names) > 1 else Path(output_dir)) for n in names]


def _options(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "batch_size": getattr(args, "bs", 1),
        "vis": getattr(args, "vis", False) or cfg.VIS,
        "amp": getattr(args, "amp", "off"),
    }


def _test_in_processes(args: argparse.Namespace, devices: Sequence[torch.device]) -> Results:
    """run_inference by one process a device, each on a contiguous range of every data set."""
    logger.info("testing in %d processes: the first one's progress is shown", len(devices))
    run_in_processes(_one_process, len(devices), devices, dict(cfg), args)
    results: Results = {}
    for name, folder in _folders(args.output_dir):
        results.update(_join_and_score(name, folder, len(devices)))
    return results


def _one_process(
    number: int,
    devices: Sequence[torch.device],
    config: Mapping[str, Any],
    args: argparse.Namespace,
) -> None:
    """What one of several testing processes does, from the beginning."""
    setup_logging(__name__)
    if number:
        logging.getLogger().setLevel(logging.WARNING)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // len(devices)))
    reset_cfg()
    cfg.update(config)
    cfg.freeze()
    resolve_dataset(args.dataset)  # makes a user's own data known here
    args.device = devices[number]
    model = initialize_model_from_cfg(args)
    for name, folder in _folders(args.output_dir):
        _test_share(model, name, folder, number, len(devices), args)


def _test_share(
    model: nn.Module, name: str, folder: Path, number: int, shares: int, args: argparse.Namespace
) -> None:
    """Test the part of a data set that falls to one of several processes; write a part file."""
    ranges = split_range(len(JsonDataset(name).image_ids), shares)
    if number < len(ranges):
        _test(model, name, folder, ranges[number], **_options(args))


def _join_and_score(name: str, folder: Path, shares: int) -> Results:
    dataset = JsonDataset(name)
    ranges = split_range(len(dataset.image_ids), shares)
    if cfg.MODEL.RPN_ONLY:
        _save(join_parts(folder, ranges, ProposalResults), folder / PROPOSALS_FILE)
        return evaluate_proposal_file(dataset, folder / PROPOSALS_FILE, folder)
    found = join_parts(folder, ranges)
    _save(found, folder / DETECTIONS_FILE)
    return score(dataset, found, folder)


def _test(
    model: nn.Module,
    dataset: JsonDataset | str,
    folder: Path,
    ind_range: tuple[int, int] | None = None,
    **options: Any,
) -> DatasetResults | ProposalResults:
    """test_net, or the same for the proposals of a model that is an RPN alone."""
    run = generate_proposals if cfg.MODEL.RPN_ONLY else test_net
    return run(model, dataset, folder, ind_range, **options)


def score(
    dataset: JsonDataset, found: DatasetResults, folder: Path, ahead: ScoringAhead | None = None
) -> Results:
    """Evaluate detections: data set -> task -> metric -> value. Result files go to the folder.

    ahead: has been given all of them, and does it."""
    return task_evaluation.evaluate_all(
        dataset,
        found.all_boxes,
        found.all_segms,
        found.all_keyps,
        str(folder),
        ahead and ahead.result(),
    )


def _save(found: DatasetResults | ProposalResults, path: Path) -> None:
    found.save(path)
    logger.info("wrote %s", path.resolve())


def test_net_on_dataset(
    model: nn.Module,
    dataset_name: str,
    output_dir: Path,
    *,
    batch_size: int = 1,
    vis: bool = False,
    amp: str = "off",
) -> Results:
    """Detect in every image of a data set, write `detections.pkl` (with MODEL.RPN_ONLY
    `rpn_proposals.pkl`), and evaluate.

    Returns:
        data set -> task -> metric -> value.
    """
    dataset = JsonDataset(dataset_name)
    folder = Path(output_dir)
    options: dict[str, Any] = {"batch_size": batch_size, "vis": vis, "amp": amp}
    if cfg.MODEL.RPN_ONLY:
        generate_proposals(model, dataset, folder, **options)
        return evaluate_proposal_file(dataset, folder / PROPOSALS_FILE, folder)
    return detect_and_score(model, dataset, folder, **options)[1]


def detect_and_score(
    model: nn.Module, dataset: JsonDataset, folder: Path, **options: Any
) -> tuple[DatasetResults, Results]:
    """test_net and score; where it pays, images are scored while others are being tested.

    options: of test_net; `stages` is also told how long evaluation takes afterwards.
    """
    stages = options.get("stages") or Stages()
    kinds = task_evaluation.kinds_of_coco(dataset)
    with only_young_garbage(), ExitStack() as context:
        ahead = None
        if kinds and ScoringAhead.possible(len(dataset.image_ids)):
            with stages.timed("fork"):
                ahead = context.enter_context(ScoringAhead(dataset, kinds, folder))
        found = test_net(model, dataset, folder, ahead=ahead, **options)
        with stages.timed("evaluate"):
            return found, score(dataset, found, folder, ahead)


def score_detections(file: str | Path, output_dir: str | Path) -> Results:
    """Evaluate a detections file (with MODEL.RPN_ONLY a proposal file), of this project or of
    Detectron, on the one data set of cfg.TEST.DATASETS. Nothing in the file is run.

    Raises:
        UserError: the file is none, or is of other classes or images than the data set.
    """
    if len(cfg.TEST.DATASETS) != 1:
        raise UserError(f"{file} is of one data set, but --dataset names {cfg.TEST.DATASETS}")
    dataset = JsonDataset(cfg.TEST.DATASETS[0])
    if cfg.MODEL.RPN_ONLY:
        return evaluate_proposal_file(dataset, Path(file), make_folder(output_dir))
    found, _ = load_detections(file)
    shape = len(found.all_boxes), found.num_images
    if shape != (dataset.num_classes, len(dataset.image_ids)):
        raise UserError(
            f"{file} has {shape[0]} classes (with background) and {shape[1]} images, but "
            f"{dataset.name} has {dataset.num_classes} and {len(dataset.image_ids)}: name the data "
            "set that was tested with --dataset"
        )
    return score(dataset, found, make_folder(output_dir))


@only_young_garbage()
def test_net(
    model: nn.Module,
    dataset: JsonDataset | str,
    output_dir: Path,
    ind_range: tuple[int, int] | None = None,
    *,
    batch_size: int = 1,
    vis: bool = False,
    amp: str = "off",
    stages: Stages | None = None,
    ahead: ScoringAhead | None = None,
) -> DatasetResults:
    """Detect in the images of a data set (or of a range of it) and write the detections file.

    An interrupted test leaves a part file, and the next one of the same model, config and images
    goes on from there. A model without an RPN looks at the proposals of the data set's
    TEST.PROPOSAL_FILES.

    Args:
        model: `Generalized_RCNN` in eval mode.
        ind_range: first image and one past the last, in the order of image ids; the file is then
            `detection_range_{START}_{END}.pkl`.
        vis: also write a PDF of each image's detections that score VIS_TH into `output_dir/vis`.
        amp: `off`, `bf16` or `fp16`: precision of the network.
        stages: is told how long the thread that feeds the device spends on what.
        ahead: is given the detections of all images, without a range.

    Raises:
        UserError: an image cannot be read, or the range is not one of this data set.
    """
    dataset = JsonDataset(dataset) if isinstance(dataset, str) else dataset
    stages = stages or Stages()
    given = proposal_file_for_testing(dataset.name)
    with stages.timed("read annotations"):
        roidb = dataset.get_roidb(proposal_file=given)
    start, end = ind_range or (0, len(roidb))
    check_range(dataset, start, end)
    folder = make_folder(output_dir)
    fingerprint = partial(test_fingerprint, model, roidb, amp=amp, vis=vis)
    with stages.timed("look for parts"):
        part = PartFile(folder, start, end, fingerprint)
    pictures = picture_names([entry["image"] for entry in roidb], "pdf") if vis else []
    roidb = roidb[start:end]
    remaining = part.remaining
    if len(remaining) < len(roidb):
        logger.info("%d of %d images have been tested before", part.done.sum(), len(roidb))
    todo = [roidb[i] for i in remaining]
    if ahead is not None:
        for image in np.flatnonzero(part.done).tolist():
            ahead.add(image, *part.results.of_image(image))
    with part.kept():
        with Progress(len(todo)) as progress:
            for found in detect_files(
                model,
                [entry["image"] for entry in todo],
                [(entry["height"], entry["width"]) for entry in todo],
                batch_size=batch_size,
                num_workers=cfg.DATA_LOADER.NUM_THREADS,
                amp=amp,
                left_right=_left_right(dataset),
                proposals=None if given is None else [entry["boxes"] for entry in todo],
                stages=stages,
            ):
                if found.error is not None:
                    raise found.error
                image = remaining[found.index]
                with stages.timed("collect"):
                    part.add(image, found.cls_boxes, found.cls_segms, found.cls_keyps)
                if ahead is not None:
                    with stages.timed("hand over"):
                        ahead.add(image, found.cls_boxes, found.cls_segms, found.cls_keyps)
                if vis:
                    _draw(found, folder / "vis" / pictures[start + image], dataset)
                progress.advance()
        if ahead is not None:
            with stages.timed("hand over"):
                ahead.complete()
        with stages.timed("write detections"):
            part.finish(folder / DETECTIONS_FILE if ind_range is None else None)
    return part.results


def _left_right(dataset: JsonDataset) -> list[tuple[int, int]] | None:
    """Indices of the keypoints that change places in a mirrored image."""
    names = dataset.keypoints
    if not names:
        return None
    return [(names.index(a), names.index(b)) for a, b in dataset.keypoint_flip_map.items()]


def _draw(found: FileResult, path: Path, dataset: JsonDataset) -> None:
    make_folder(path.parent)
    vis_one_image(
        found.image,
        path,
        found.cls_boxes,
        found.cls_segms,
        found.cls_keyps,
        class_names=dataset.classes,
        thresh=cfg.VIS_TH,
    )


def initialize_model_from_cfg(args: argparse.Namespace) -> nn.Module:
    """The configured model with the weights of `args.load_ckpt` or `args.load_detectron`, in eval
    mode on `args.device`. Raises UserError if the weights are not those of such a model."""
    model = Generalized_RCNN()
    if args.load_ckpt:
        logger.info("loading checkpoint %s", args.load_ckpt)
        load_ckpt(model, args.load_ckpt)
    else:
        logger.info("loading Detectron weights %s", args.load_detectron)
        report = load_detectron_weight(model, args.load_detectron)
        if report.missing:
            raise UserError(
                f"{args.load_detectron} is not a model of this config: it lacks "
                f"{first_names(report.missing)}; use the config that it was trained with."
            )
        use_box_weights_of(report)
    device = torch.device(args.device)
    prepare_device(device)
    return place_model(model, device).eval()
