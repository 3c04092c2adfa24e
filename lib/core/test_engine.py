"""A data set to results: detect in every image, keep the detections in a file, evaluate them."""

from __future__ import annotations

import argparse
import logging
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn

from core.config import cfg
from core.errors import UserError
from core.test import ClassBoxes, ClassKeyps, ClassSegms
from core.test_pipeline import detect_files
from core.train_engine import place_model, prepare_device
from datasets import task_evaluation
from datasets.json_dataset import JsonDataset
from datasets.proposals import proposal_file_for_testing
from modeling.model_builder import Generalized_RCNN
from utils.detectron_weight_helper import load_detectron_weight
from utils.net import load_ckpt
from utils.progress import Progress
from utils.run_dir import make_folder, plain
from utils.vis import picture_names, vis_one_image
from utils.weights import atomic_write

logger = logging.getLogger(__name__)

DETECTIONS_FILE = "detections.pkl"


@dataclass
class DatasetResults:
    """Detections of a data set's images as Detectron nests them: `all_boxes[class][image]`."""

    all_boxes: list[list[np.ndarray | list]]
    all_segms: list[list[list[dict[str, Any]]]]
    all_keyps: list[list[list]]

    @classmethod
    def empty(cls, num_classes: int, num_images: int) -> DatasetResults:
        """Nothing detected yet: every entry is []."""
        return cls(
            *([[[] for _ in range(num_images)] for _ in range(num_classes)] for _ in range(3))
        )

    def extend(
        self,
        image: int,
        cls_boxes: ClassBoxes,
        cls_segms: ClassSegms | None,
        cls_keyps: ClassKeyps | None,
    ) -> None:
        """Put in what was detected in one image; class 0, the background, stays []."""
        for j in range(1, len(cls_boxes)):
            self.all_boxes[j][image] = cls_boxes[j]
            if cls_segms is not None:
                self.all_segms[j][image] = cls_segms[j]
            if cls_keyps is not None:
                self.all_keyps[j][image] = cls_keyps[j]

    def save(self, path: Path) -> None:
        """Write Detectron's detections file: whole, or not at all."""
        content = {
            "all_boxes": self.all_boxes,
            "all_segms": self.all_segms,
            "all_keyps": self.all_keyps,
            "cfg": yaml.safe_dump(plain(cfg), sort_keys=False),
        }
        with atomic_write(path) as file:
            pickle.dump(content, file, pickle.HIGHEST_PROTOCOL)
        logger.info("wrote %s", path.resolve())


def run_inference(
    args: argparse.Namespace, ind_range: tuple[int, int] | None = None
) -> dict[str, dict[str, dict[str, float]]]:
    """Test a model on cfg.TEST.DATASETS.

    Args:
        args: `load_ckpt` or `load_detectron` (weight file), `output_dir`, `device`, and optionally
            `bs` (images a forward pass, 1) and `vis` (draw the detections too).
        ind_range: test only the images START .. END - 1 and write a part file; nothing is scored.

    Returns:
        data set -> task -> metric -> value; {} with ind_range.
    """
    model = initialize_model_from_cfg(args)
    results: dict[str, dict[str, dict[str, float]]] = {}
    for name in cfg.TEST.DATASETS:
        folder = Path(args.output_dir)
        if len(cfg.TEST.DATASETS) > 1:
            folder = folder / name
        options = {
            "batch_size": getattr(args, "bs", 1),
            "vis": getattr(args, "vis", False) or cfg.VIS,
        }
        if ind_range is None:
            results.update(test_net_on_dataset(model, name, folder, **options))
        else:
            test_net(model, name, folder, ind_range, **options)
    return results


def test_net_on_dataset(
    model: nn.Module, dataset_name: str, output_dir: Path, *, batch_size: int = 1, vis: bool = False
) -> Mapping[str, dict[str, dict[str, float]]]:
    """Detect in every image of a data set, write `detections.pkl`, and evaluate.

    Returns:
        data set -> task -> metric -> value.
    """
    dataset = JsonDataset(dataset_name)
    found = test_net(model, dataset, output_dir, batch_size=batch_size, vis=vis)
    return task_evaluation.evaluate_all(
        dataset, found.all_boxes, found.all_segms, found.all_keyps, str(output_dir)
    )


def test_net(
    model: nn.Module,
    dataset: JsonDataset | str,
    output_dir: Path,
    ind_range: tuple[int, int] | None = None,
    *,
    batch_size: int = 1,
    vis: bool = False,
) -> DatasetResults:
    """Detect in the images of a data set (or of a range of it) and write the detections file.

    A model without an RPN looks at the proposals of the data set's TEST.PROPOSAL_FILES.

    Args:
        model: `Generalized_RCNN` in eval mode.
        ind_range: first image and one past the last, in the order of image ids; the file is then
            `detection_range_{START}_{END}.pkl`.
        vis: also write a PDF of each image's detections that score VIS_TH into `output_dir/vis`.

    Raises:
        UserError: an image cannot be read, or the range is not one of this data set.
    """
    dataset = JsonDataset(dataset) if isinstance(dataset, str) else dataset
    given = proposal_file_for_testing(dataset.name)
    roidb = dataset.get_roidb(proposal_file=given)
    file = Path(output_dir) / DETECTIONS_FILE
    if ind_range is not None:
        start, end = ind_range
        if not 0 <= start < end <= len(roidb):
            raise UserError(
                f"--range {start} {end} is not part of {dataset.name}: it has {len(roidb)} images, "
                f"so START may be 0 to {len(roidb) - 1} and END at most {len(roidb)}."
            )
        roidb = roidb[start:end]
        file = file.with_name(f"detection_range_{start}_{end}.pkl")
    make_folder(file.parent)

    results = DatasetResults.empty(cfg.MODEL.NUM_CLASSES, len(roidb))
    names = picture_names([entry["image"] for entry in roidb], "pdf")
    with Progress(len(roidb)) as progress:
        for found in detect_files(
            model,
            [entry["image"] for entry in roidb],
            [(entry["height"], entry["width"]) for entry in roidb],
            batch_size=batch_size,
            num_workers=cfg.DATA_LOADER.NUM_THREADS,
            proposals=None if given is None else [entry["boxes"] for entry in roidb],
        ):
            if found.error is not None:
                raise found.error
            results.extend(found.index, found.cls_boxes, found.cls_segms, found.cls_keyps)
            if vis:
                make_folder(file.parent / "vis")
                vis_one_image(
                    found.image,
                    file.parent / "vis" / names[found.index],
                    found.cls_boxes,
                    found.cls_segms,
                    class_names=dataset.classes,
                    thresh=cfg.VIS_TH,
                )
            progress.advance()
    results.save(file)
    return results


def initialize_model_from_cfg(args: argparse.Namespace) -> nn.Module:
    """The configured model with the weights of `args.load_ckpt` or `args.load_detectron`, in eval
    mode on `args.device`. Raises UserError if the weights are not those of such a model."""
    model = Generalized_RCNN()
    if args.load_ckpt:
        logger.info("loading checkpoint %s", args.load_ckpt)
        load_ckpt(model, args.load_ckpt)
    else:
        logger.info("loading Detectron weights %s", args.load_detectron)
        missing = load_detectron_weight(model, args.load_detectron).missing
        if missing:
            raise UserError(
                f"{args.load_detectron} is not a model of this config: it lacks {missing[0]} and "
                f"{len(missing) - 1} more; use the config that it was trained with."
            )
    device = torch.device(args.device)
    prepare_device(device)
    return place_model(model, device).eval()
