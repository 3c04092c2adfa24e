"""Scoring a model between two steps of its training."""

from __future__ import annotations

import argparse
import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from core.config import cfg
from core.distributed import rank
from core.test_engine import DETECTIONS_FILE, run_inference
from core.train_engine import Evaluation
from core.train_pictures import draw_detections
from datasets.json_dataset import JsonDataset
from utils.run_dir import make_folder
from utils.weights import save_torch_file

logger = logging.getLogger(__name__)


class TestSetEvaluation:
    """Tests the weights of a training on cfg.TEST.DATASETS, as `tools/test_net.py` would.

    The ranks of a distributed training share the images.

    Args:
        folder: detections and COCO results of the last evaluation go there.
        device: where the copy of the model that is tested lives.
        pictures: draw the detections of some images too.
    """

    __test__ = False  # not a test, whatever its name begins with

    def __init__(self, folder: Path, device: torch.device, pictures: bool = False) -> None:
        self._folder, self._device, self._pictures = folder, device, pictures

    def __call__(self, model: nn.Module) -> Evaluation | None:
        """Scores `DATASET/TASK/METRIC`; the first one (AP) of the last task says what is best.

        Every rank calls it; those above 0 get None.
        """
        make_folder(self._folder)
        weights = self._folder / f"weights_{rank()}.pth"
        save_torch_file({"model": model.state_dict()}, weights)
        args = argparse.Namespace(
            load_ckpt=str(weights),
            load_detectron=None,
            output_dir=self._folder,
            device=self._device,
            bs=cfg.TRAIN.IMS_PER_BATCH,
            sharded=True,
        )
        try:
            with _config_of_a_test():
                results = run_inference(args)
        finally:
            weights.unlink()
        if rank() > 0:
            return None
        metrics = {
            f"{dataset}/{task}/{name}": value
            for dataset, tasks in results.items()
            for task, values in tasks.items()
            for name, value in values.items()
        }
        dataset = cfg.TEST.DATASETS[0]
        task, values = list(results[dataset].items())[-1]  # boxes, then masks, then keypoints
        pictures = self._draw(dataset) if self._pictures else {}
        return Evaluation(f"{dataset}/{task}/{next(iter(values))}", metrics, pictures)

    def _draw(self, name: str) -> dict[str, np.ndarray]:
        dataset = JsonDataset(name)
        folder = self._folder / name if len(cfg.TEST.DATASETS) > 1 else self._folder
        images = [entry["image"] for entry in dataset.get_roidb()]
        return draw_detections(folder / DETECTIONS_FILE, images, dataset.classes)


@contextlib.contextmanager
def _config_of_a_test() -> Iterator[None]:
    """What the training script has set for training only, as the test script sets it."""
    training = cfg.FPN.RPN_COLLECT_SCALE, cfg.MODEL.LOAD_IMAGENET_PRETRAINED_WEIGHTS
    cfg.freeze(False)
    cfg.FPN.RPN_COLLECT_SCALE, cfg.MODEL.LOAD_IMAGENET_PRETRAINED_WEIGHTS = 1, False
    cfg.freeze()
    try:
        yield
    finally:
        cfg.freeze(False)
        cfg.FPN.RPN_COLLECT_SCALE, cfg.MODEL.LOAD_IMAGENET_PRETRAINED_WEIGHTS = training
        cfg.freeze()
