"""detectron2's models as one more peer of `tools/benchmark.py train` and `infer`.

Written from the documentation of detectron2 0.6 (readthedocs.io: "Use Models", "Yacs Configs", API
of model_zoo, modeling, structures, utils.events), never run with it. Imported only to be measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from core.benchmark_infer import PeerDetector, best_sigmoids
from core.benchmark_models import Scene, calm, peer_backbone
from core.benchmark_train import PeerTrainer, calls_of
from core.config import cfg
from utils.blob import get_target_scale, scaled_size


def zoo_file() -> str | None:
    """Which of detectron2's model zoo is the config's model; None: none is."""
    if peer_backbone() != "resnet50" or cfg.MODEL.KEYPOINTS_ON:
        return None
    if cfg.MODEL.MASK_ON:
        return "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
    kind = "retinanet" if cfg.RETINANET.RETINANET_ON else "faster_rcnn"
    return f"COCO-Detection/{kind}_R_50_FPN_1x.yaml"


def load_detectron2() -> ModuleType:
    """detectron2 with what is used of it. Raises ImportError; a broken install raises anything."""
    import detectron2.model_zoo
    import detectron2.modeling
    import detectron2.structures
    import detectron2.utils.events

    return detectron2


def detectron2_model(device: torch.device, threshold: float = 0.05) -> nn.Module:
    """The model of `zoo_file`, with the same random weights in every call."""
    detectron2 = load_detectron2()
    config = detectron2.model_zoo.get_config(zoo_file())
    config.MODEL.DEVICE = str(device)
    # Random weights want inputs of unit variance, as torchvision's get; the zoo's do not. BGR.
    config.MODEL.PIXEL_STD = [57.375, 57.12, 58.395]
    heads, retina = config.MODEL.ROI_HEADS, config.MODEL.RETINANET
    heads.NUM_CLASSES = retina.NUM_CLASSES = cfg.MODEL.NUM_CLASSES - 1
    heads.SCORE_THRESH_TEST = retina.SCORE_THRESH_TEST = threshold
    heads.BATCH_SIZE_PER_IMAGE = cfg.TRAIN.BATCH_SIZE_PER_IM
    retina.TOPK_CANDIDATES_TEST = cfg.RETINANET.PRE_NMS_TOP_N
    config.TEST.DETECTIONS_PER_IMAGE = cfg.TEST.DETECTIONS_PER_IM
    torch.manual_seed(cfg.RNG_SEED)
    model = detectron2.modeling.build_model(config)
    calm(model.backbone)
    return model


class Detectron2Trainer(PeerTrainer):
    """detectron2's model; images are resized beforehand, as in its loader."""

    def __init__(self, batches: Sequence[Sequence[Scene]], device: torch.device, amp: str) -> None:
        self._detectron2 = load_detectron2()
        samples = [[self._sample(scene) for scene in batch] for batch in batches]
        super().__init__(detectron2_model(device), samples, device, amp)
        if not cfg.RETINANET.RETINANET_ON:
            self.model.proposal_generator.register_forward_hook(self._with_near)

    def losses(self, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        structures, inputs = self._detectron2.structures, []
        self._near = [sample["near"] for sample in batch]
        for sample in batch:
            fields = {name: value for name, value in sample.items() if name.startswith("gt_")}
            fields["gt_boxes"] = structures.Boxes(fields["gt_boxes"])
            instances = structures.Instances(tuple(sample["image"].shape[1:]), **fields)
            inputs.append({"image": sample["image"], "instances": instances})
        with self._detectron2.utils.events.EventStorage():
            return self.model(inputs)

    def counts(self) -> dict[str, float]:
        retina, background = cfg.RETINANET.RETINANET_ON, cfg.MODEL.NUM_CLASSES - 1
        owner = self.model if retina else self.model.roi_heads
        with calls_of(owner, "label_anchors" if retina else "label_and_sample_proposals") as calls:
            self.steps(1)
        ((_, made),) = calls
        labels = made[0] if retina else [sampled.gt_classes for sampled in made]  # -1: ignored
        foreground = statistics.mean(int(((k >= 0) & (k < background)).sum()) for k in labels)
        if retina:
            return {"foreground anchors": foreground}
        return {"RoIs": statistics.mean(map(len, labels)), "foreground": foreground}

    def _sample(self, scene: Scene) -> dict[str, Any]:
        sample = _input(scene.image, cfg.TRAIN.SCALES[0], cfg.TRAIN.MAX_SIZE)
        scale = sample["image"].shape[2] / scene.image.shape[1]
        sample["gt_boxes"] = torch.from_numpy(scene.entry["boxes"]).float() * scale
        sample["gt_classes"] = torch.from_numpy(scene.entry["gt_classes"]).long() - 1
        if cfg.MODEL.MASK_ON:
            polygons = [[part * scale for part in parts] for parts in scene.entry["segms"]]
            sample["gt_masks"] = self._detectron2.structures.PolygonMasks(polygons)
        sample["near"] = torch.from_numpy(scene.near).float() * scale
        return sample

    def _with_near(self, module: nn.Module, args: Any, output: tuple) -> tuple:
        structures, (proposals, losses), both = self._detectron2.structures, output, []
        for near, found in zip(self._near, proposals, strict=True):
            added = structures.Instances(found.image_size, proposal_boxes=structures.Boxes(near))
            added.objectness_logits = near.new_ones(len(near))
            both.append(structures.Instances.cat([added, found]))
        return both, losses


class Detectron2Detector(PeerDetector):
    """detectron2's model; images are resized beforehand, as in its loader."""

    def __init__(
        self, batches: Sequence[Sequence[Scene]], device: torch.device, amp: str, paste: bool
    ) -> None:
        self._paste, sides = paste, (cfg.TEST.SCALE, cfg.TEST.MAX_SIZE)
        inputs = [[_input(scene.image, *sides) for scene in batch] for batch in batches]
        super().__init__(detectron2_model(device), inputs, device, amp)

    def detect(self, batch: list[dict[str, Any]]) -> list[int]:
        if self._paste:
            return [len(found["instances"]) for found in self.model(batch)]
        return [len(found) for found in self.model.inference(batch, do_postprocess=False)]

    def scoring(self) -> nn.Module:
        return self.model.head if cfg.RETINANET.RETINANET_ON else self.model.roi_heads.box_predictor

    def scores(self, made: tuple) -> Tensor:
        if cfg.RETINANET.RETINANET_ON:  # (images, anchors * classes, h, w) of every level
            return best_sigmoids(torch.cat([level.flatten(1) for level in made[0]], dim=1))
        return made[0].float().softmax(-1)[:, :-1].flatten()

    def set_threshold(self, threshold: float) -> None:
        self._take(detectron2_model(self.device, threshold))


def _input(image: np.ndarray, short: int, longest: int) -> dict[str, Any]:
    """The image resized, (3, h, w) uint8 BGR, and the size that is wanted of the output."""
    height, width = image.shape[:2]
    h, w = scaled_size(height, width, get_target_scale(height, width, short, longest))
    pixels = torch.from_numpy(cv2.resize(image, (w, h)).transpose(2, 0, 1).copy())
    return {"image": pixels, "height": height, "width": width}
