"""A package that stands in for detectron2: the documented names that the benchmark uses, made
small; they refuse what the documentation of detectron2 0.6 does not allow."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_iou

KINDS = {
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml": ("GeneralizedRCNN", True),
    "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml": ("GeneralizedRCNN", False),
    "COCO-Detection/retinanet_R_50_FPN_1x.yaml": ("RetinaNet", False),
}
storages: list[dict] = []  # that are open


class Node:
    """A config whose keys are known."""

    def __init__(self, **keys: Any) -> None:
        vars(self).update(keys)

    def __setattr__(self, key: str, value: Any) -> None:
        assert key in vars(self), f"no key {key}"
        assert type(value) is type(getattr(self, key)), f"{key} {value}"
        vars(self)[key] = value


def get_config(config_path: str, trained: bool = False) -> Node:
    kind, masks = KINDS[config_path]
    thresholds = {"NUM_CLASSES": 80, "SCORE_THRESH_TEST": 0.05}
    return Node(
        MODEL=Node(
            META_ARCHITECTURE=kind,
            MASK_ON=masks,
            DEVICE="cuda",
            PIXEL_MEAN=[103.53, 116.28, 123.675],
            PIXEL_STD=[1.0, 1.0, 1.0],
            ROI_HEADS=Node(BATCH_SIZE_PER_IMAGE=512, **thresholds),
            RETINANET=Node(TOPK_CANDIDATES_TEST=1000, **thresholds),
        ),
        TEST=Node(DETECTIONS_PER_IMAGE=100),
    )


class Boxes:
    def __init__(self, tensor: Tensor) -> None:
        assert tensor.dim() == 2 and tensor.shape[1] == 4 and tensor.dtype == torch.float32
        self.tensor = tensor

    def __len__(self) -> int:
        return len(self.tensor)

    @classmethod
    def cat(cls, parts: list[Boxes]) -> Boxes:
        return cls(torch.cat([part.tensor for part in parts]))


class PolygonMasks:
    def __init__(self, polygons: list[list[np.ndarray]]) -> None:
        assert isinstance(polygons, list)
        for parts in polygons:
            assert isinstance(parts, list) and parts
            for part in parts:
                assert isinstance(part, np.ndarray) and part.ndim == 1
                assert part.size % 2 == 0 and part.size >= 6
        self.polygons = polygons

    def __len__(self) -> int:
        return len(self.polygons)


class Instances:
    def __init__(self, image_size: tuple[int, int], **fields: Any) -> None:
        assert isinstance(image_size, tuple) and all(type(side) is int for side in image_size)
        vars(self).update(image_size=image_size, fields={})
        for name, value in fields.items():
            setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        assert all(len(value) == len(other) for other in self.fields.values())
        self.fields[name] = value

    def __getattr__(self, name: str) -> Any:
        return self.fields[name]

    def __len__(self) -> int:
        return len(next(iter(self.fields.values())))

    @staticmethod
    def cat(parts: list[Instances]) -> Instances:
        joined = Instances(parts[0].image_size)
        for part in parts:
            assert part.image_size == joined.image_size
            assert part.fields.keys() == parts[0].fields.keys()
        for name, value in parts[0].fields.items():
            values = [part.fields[name] for part in parts]
            cat = torch.cat if torch.is_tensor(value) else type(value).cat
            setattr(joined, name, cat(values))
        return joined


@contextmanager
def event_storage():
    storages.append({})
    yield storages[-1]
    storages.pop()


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv3 = nn.Conv2d(3, 8, 7, stride=16)
        self.conv3.norm = nn.Module()
        self.conv3.norm.register_buffer("weight", torch.ones(8))

    def forward(self, image: Tensor) -> Tensor:
        return self.conv3(image[None]) * self.conv3.norm.weight[:, None, None]


class ProposalGenerator(nn.Module):
    def forward(self, sizes: list, features: list) -> tuple[list[Instances], dict[str, Tensor]]:
        found = []
        for size, feature in zip(sizes, features, strict=True):
            corner = torch.rand(60, 2) * torch.tensor([size[1], size[0]]) * 0.5
            boxes = Boxes(torch.cat([corner, corner * 1.5 + 5], dim=1).to(feature.device))
            logits = feature.new_zeros(60, dtype=torch.float32)
            found.append(Instances(size, proposal_boxes=boxes, objectness_logits=logits))
        return found, {"loss_rpn_cls": sum(feature.mean() for feature in features) * 0}


class Predictor(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(4, classes + 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x / 100), x


class RoIHeads(nn.Module):
    def __init__(self, config: Node) -> None:
        super().__init__()
        self.config = config
        self.box_predictor = Predictor(config.MODEL.ROI_HEADS.NUM_CLASSES)

    def label_and_sample_proposals(self, proposals: list, targets: list) -> list[Instances]:
        sampled = []
        for found, target in zip(proposals, targets, strict=True):
            boxes = torch.cat([found.proposal_boxes.tensor, target.gt_boxes.tensor])
            overlap, owner = box_iou(boxes, target.gt_boxes.tensor).max(dim=1)
            background = self.config.MODEL.ROI_HEADS.NUM_CLASSES
            classes = target.gt_classes[owner].where(overlap >= 0.5, background)
            keep = slice(self.config.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE)
            new = Instances(found.image_size, proposal_boxes=Boxes(boxes[keep]))
            new.gt_classes = classes[keep]
            sampled.append(new)
        return sampled


class Detector(nn.Module):
    """What build_model makes; `seen` are the inputs of its calls, `pasted` whether it was to finish
    their outputs."""

    def __init__(self, config: Node) -> None:
        super().__init__()
        self.config, self.seen, self.pasted = config, [], []
        self.retina = config.MODEL.META_ARCHITECTURE == "RetinaNet"
        self.backbone = Backbone()
        if self.retina:
            self.head = nn.Module()
            self.head.cls_score = nn.Conv2d(8, 2 * config.MODEL.RETINANET.NUM_CLASSES, 1)
            self.head.forward = lambda maps: ([self.head.cls_score(m) for m in maps], maps)
        else:
            self.proposal_generator = ProposalGenerator()
            self.roi_heads = RoIHeads(config)

    def forward(self, inputs: list[dict]) -> Any:
        if not self.training:
            return self.inference(inputs)
        assert storages, "needs an EventStorage"
        features, targets = self._features(inputs), [given["instances"] for given in inputs]
        if self.retina:
            logits = torch.stack([self.head([f])[0][0].mean() for f in features])
            self.label_anchors([], targets)
            return {"loss_cls": logits.square().mean()}
        sizes = [tuple(given["image"].shape[1:]) for given in inputs]
        proposals, losses = self.proposal_generator(sizes, features)
        sampled = self.roi_heads.label_and_sample_proposals(proposals, targets)
        boxes = torch.cat([one.proposal_boxes.tensor for one in sampled])
        classes = torch.cat([one.gt_classes for one in sampled])
        return losses | {
            "loss_cls": F.cross_entropy(self.roi_heads.box_predictor(boxes)[0], classes)
        }

    def label_anchors(self, anchors: list, targets: list) -> tuple[list[Tensor], list[Tensor]]:
        kinds = self.config.MODEL.RETINANET.NUM_CLASSES
        background = torch.full((500,), kinds, device=self.config.MODEL.DEVICE)
        background[:9] = -1
        boxes = [target.gt_boxes.tensor for target in targets]
        return [torch.cat([background, target.gt_classes]) for target in targets], boxes

    def inference(self, inputs: list[dict], do_postprocess: bool = True) -> list:
        assert not self.training
        self.pasted.append(do_postprocess)
        features, found = self._features(inputs), []
        for given, feature in zip(inputs, features, strict=True):
            size = tuple(given["image"].shape[1:])
            if self.retina:
                threshold = self.config.MODEL.RETINANET.SCORE_THRESH_TEST
                scores = self.head([feature])[0][0].sigmoid().flatten()
            else:
                threshold = self.config.MODEL.ROI_HEADS.SCORE_THRESH_TEST
                (proposed,), _ = self.proposal_generator([size], [feature])
                logits, _ = self.roi_heads.box_predictor(proposed.proposal_boxes.tensor)
                scores = logits.softmax(-1)[:, :-1].flatten()
            scores = scores[scores > threshold][: self.config.TEST.DETECTIONS_PER_IMAGE]
            if do_postprocess:
                size = given["height"], given["width"]
            found.append(Instances(size, scores=scores))
        return [{"instances": one} for one in found] if do_postprocess else found

    def _features(self, inputs: list[dict]) -> list[Tensor]:
        self.seen.append(inputs)
        std = torch.tensor(self.config.MODEL.PIXEL_STD, device=self.config.MODEL.DEVICE)
        for given in inputs:
            assert given["image"].dim() == 3 and given["image"].shape[0] == 3
        return [self.backbone(given["image"].float() / std[:, None, None]) for given in inputs]


def build_model(config: Node) -> Detector:
    return Detector(config).to(config.MODEL.DEVICE)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `import detectron2` find this."""
    contents = {
        "detectron2": {},
        "detectron2.model_zoo": {"get_config": get_config},
        "detectron2.modeling": {"build_model": build_model},
        "detectron2.structures": {c.__name__: c for c in (Boxes, Instances, PolygonMasks)},
        "detectron2.utils": {},
        "detectron2.utils.events": {"EventStorage": event_storage},
    }
    for name, names in contents.items():
        module = ModuleType(name)
        vars(module).update(names)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], own, module)
