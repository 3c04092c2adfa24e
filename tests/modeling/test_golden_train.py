"""Training losses and gradients from the original's own samples (`golden/model/*.train.*`).

The original's draws are replayed: its RPN labels and targets, its sampled RoIs with their labels,
regression and mask targets. What is left (image preparation, backbone, heads, losses, backward)
is deterministic.
"""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
import torch

import utils.blob as blob_utils
from golden_weights import fill_from_recipe, golden_cfg
from roi_data.rpn import RPNTargets

JOBS = [
    "tiny_mask_FPN",
    "e2e_mask_rcnn_R-50-FPN_1x",
    "e2e_mask_rcnn_R-50-FPN_2x_gn",
    "e2e_faster_rcnn_R-50-C4_1x",
]


class Replay:
    """One recorded step: the model with the recipe's weights, and the recorded samples."""

    def __init__(self, job: str, shared) -> None:
        from modeling.model_builder import Generalized_RCNN

        self.cfg = golden_cfg(job, shared)
        self.model = Generalized_RCNN()
        fill_from_recipe(self.model, job, shared)
        self.model.train()
        self.record = json.loads((shared / f"golden/model/{job}.train.json").read_text())
        self.arrays = np.load(shared / f"golden/model/{job}.train.npz")
        self.rpn = np.load(shared / f"golden/model/{job}.rpn_blobs.npz")
        self.images = shared / "data/coco/images/train2017"

    def data(self) -> torch.Tensor:
        """The recorded mini-batch, prepared from the JPEG files."""
        record, pixels, meta, sizes, offset = self.record, [], [], [], 0
        for name, flip in zip(record["images"], record["flipped"], strict=True):
            image = cv2.imread(str(self.images / name), cv2.IMREAD_COLOR)
            h, w = image.shape[:2]
            scale = blob_utils.get_target_scale(h, w, record["scale"], record["max_size"])
            sizes.append((round(h * scale), round(w * scale)))
            meta.append(blob_utils.image_meta(offset, h, w, flip, sizes[-1], (0, 0), scale))
            pixels.append(image.reshape(-1))
            offset += image.size
        return blob_utils.images_to_blob(
            torch.from_numpy(np.concatenate(pixels)),
            torch.tensor(meta, dtype=torch.float64),
            blob_utils.padded_size(sizes, blob_utils.coarsest_stride()),
            self.model.pixel_means,
        )

    def _dense(self, name: str, level: str, fill: float) -> np.ndarray:
        key = f"{name}_wide{level}"
        dense = np.full(self.rpn[f"{key}.shape"], fill, np.float32)
        dense.ravel()[self.rpn[f"{key}.idx"]] = self.rpn[f"{key}.val"]
        return dense

    def rpn_targets(self, logits: list[torch.Tensor]) -> RPNTargets:
        """The recorded labels that count, of each level cut to the maps' sizes."""
        labels, targets, weights = [], [], []
        for level, scores in zip(self.model.RPN.level_names, logits, strict=True):
            n, a, h, w = scores.shape

            def crop(name, fill, level=level, n=n, a=a, h=h, w=w):
                dense = torch.from_numpy(self._dense(name, level, fill)[:, :, :h, :w].copy())
                dense = dense.view(n, a, -1, h, w).permute(0, 3, 4, 1, 2)
                return dense.reshape(n, h * w * a, -1)

            labels.append(crop("rpn_labels_int32", -1)[..., 0])
            targets.append(crop("rpn_bbox_targets", 0))
            inside = crop("rpn_bbox_inside_weights", 0)
            weights.append((inside * crop("rpn_bbox_outside_weights", 0))[..., 0])
        labels, targets, weights = (torch.cat(x, dim=1) for x in (labels, targets, weights))
        used = labels >= 0
        index = used.int().topk(int(used.sum(dim=1).max()), dim=1).indices
        of_four = index.unsqueeze(-1).expand(-1, -1, 4)
        return RPNTargets(
            index,
            labels.gather(1, index).to(torch.int8),
            targets.gather(1, of_four),
            weights.gather(1, index),
        )

    def losses(self) -> dict[str, torch.Tensor]:
        from modeling import fast_rcnn_heads, mask_rcnn_heads

        model, arrays = self.model, self.arrays
        features = model._features(self.data())
        logits, _ = model.RPN.predict(features)
        losses = model.RPN.losses(features, self.rpn_targets(logits))
        blob_conv = model._roi_maps(features)
        rois = torch.from_numpy(arrays["rois"])
        labels = torch.from_numpy(arrays["labels_int32"]).long()
        losses["loss_cls"], losses["loss_bbox"], _ = fast_rcnn_heads.fast_rcnn_losses(
            *model.Box_Outs(model.Box_Head(blob_conv, {"rois": rois})),
            labels,
            torch.ones(len(rois), dtype=torch.bool),
            torch.from_numpy(arrays["bbox_targets_cls"]),
        )
        if self.cfg.MODEL.MASK_ON:
            size = self.cfg.MRCNN.RESOLUTION
            masks = np.unpackbits(arrays["masks_bits"], axis=1)[:, : size * size]
            mask_rois = torch.from_numpy(arrays["mask_rois"])
            features = model.Mask_Head(blob_conv, {"mask_rois": mask_rois})
            losses["loss_mask"] = mask_rcnn_heads.mask_rcnn_loss(
                model.Mask_Outs.of_class(features, torch.from_numpy(arrays["mask_cls"])),
                torch.from_numpy(masks.reshape(-1, size, size)),
                torch.ones(len(mask_rois), dtype=torch.bool),
                1.0,
            )
        return losses


@pytest.mark.parametrize("job", JOBS)
def test_losses_and_gradients_agree_with_the_original(job, shared, cfg):
    replay = Replay(job, shared)
    losses = replay.losses()
    recorded = replay.record["losses"]
    assert set(losses) == set(recorded)
    for name, value in losses.items():
        assert value.item() == pytest.approx(recorded[name], rel=1e-4, abs=1e-6), name
    sum(losses.values()).backward()
    for name, parameter in replay.model.named_parameters():
        expected = replay.record["grad_l2"][name]
        if expected is None:
            assert parameter.grad is None, name
        else:
            assert parameter.grad.norm().item() == pytest.approx(expected, rel=2e-3), name


def test_the_prepared_images_are_the_original_s(shared, cfg):
    replay = Replay("tiny_mask_FPN", shared)
    data, recorded = replay.data().double(), replay.record["data"]
    assert list(data.shape) == recorded["shape"]
    assert data.mean().item() == pytest.approx(recorded["mean"], abs=1e-4)
    assert data.norm().item() == pytest.approx(recorded["l2"], rel=1e-6)
