"""Test-time augmentation: boxes, masks and keypoints from several views of an image.

Boxes of all views are pooled before suppression (or, with given proposals, averaged); the maps of
masks and keypoints, mirrored back, are combined for the final boxes. Views of one scale, the
mirrored ones among them, share forward passes; only the running combination of maps is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import utils.boxes as box_utils
from core.config import cfg
from core.errors import UserError
from core.test_forward import (
    Features,
    ImageBatch,
    Output,
    View,
    as_rois,
    forward,
    forward_views,
    heatmaps,
    mask_probabilities,
    own_mask_probabilities,
    plain_view,
)
from utils.heatmaps import flip_heatmaps
from utils.keypoints import get_keypoints

Candidates = tuple[Tensor, Tensor, Tensor, Tensor]
Pairs = Sequence[tuple[int, int]]


def augmented_views(aug: Mapping[str, Any]) -> list[list[View]]:
    """The views that TEST.BBOX_AUG, MASK_AUG or KPS_AUG asks for beside the plain one, in the
    order of Detectron; views of one scale and ratio together. None if not ENABLED."""
    if not aug["ENABLED"]:
        return []
    test = cfg.TEST
    groups = [[View(test.SCALE, test.MAX_SIZE, flip=True)]] if aug["H_FLIP"] else []
    for scale in aug["SCALES"]:
        flips = (False, True) if aug["SCALE_H_FLIP"] else (False,)
        groups.append([View(scale, aug["MAX_SIZE"], flip=flip) for flip in flips])
    for ratio in aug["ASPECT_RATIOS"]:
        flips = (False, True) if aug["ASPECT_RATIO_H_FLIP"] else (False,)
        groups.append([View(test.SCALE, test.MAX_SIZE, ratio, flip) for flip in flips])
    return groups


def box_outputs(net: nn.Module, images: ImageBatch) -> tuple[list[Output], Features]:
    """What the network says of every view that boxes are taken from, the plain one last, and the
    feature maps of that one."""
    groups = augmented_views(cfg.TEST.BBOX_AUG)
    outputs = [out for views in groups for out in forward_views(net, images, views)]
    plain, features = forward(net, images, plain_view())
    return [*outputs, plain], features


def candidates(outputs: Sequence[Output]) -> Candidates:
    """Everything that may become a detection: what scores more than TEST.SCORE_THRESH.

    outputs: of the views, the plain one last; combined as TEST.BBOX_AUG says.

    Returns:
        boxes (K, 4) float32 in image pixels, scores (K,), classes and images (K,) int64.
    """
    # Only these are decoded: a few hundred of 80 x 1000 boxes an image.
    heuristics = cfg.TEST.BBOX_AUG.SCORE_HEUR, cfg.TEST.BBOX_AUG.COORD_HEUR
    if len(outputs) == 1 or "UNION" in heuristics:
        parts = [_of_scores(out.scores, [out]) for out in outputs]
        return tuple(torch.cat(values) for values in zip(*parts, strict=True))
    score_heur, coord_heur = heuristics
    scores = combine([out.scores for out in outputs], score_heur)
    return _of_scores(scores, outputs if coord_heur == "AVG" else outputs[-1:])


def _of_scores(scores: Tensor, outputs: Sequence[Output]) -> Candidates:
    """Candidates by scores (R, C), with the mean of the boxes that the outputs give them."""
    row, cls = (scores[:, 1:] > cfg.TEST.SCORE_THRESH).nonzero().unbind(1)
    cls = cls + 1
    boxes = combine([out.boxes_of(row, cls) for out in outputs], "AVG")
    return boxes, scores[row, cls], cls, outputs[-1].image[row]


def combine(values: Sequence[Tensor], heuristic: str) -> Tensor:
    """UNION, AVG or ID (the last) of what the views gave."""
    if heuristic == "UNION":
        return torch.cat(list(values))
    if heuristic == "ID" or len(values) == 1:
        return values[-1]
    if len({len(value) for value in values}) > 1:
        raise UserError(
            "TEST.BBOX_AUG can average only views of equal proposals: set SCORE_HEUR and "
            "COORD_HEUR to UNION."
        )
    return torch.stack(list(values)).mean(dim=0)


def mask_maps(
    net: nn.Module, boxes: Tensor, image: Tensor, features: Features, cls: Tensor | None = None
) -> Tensor:
    """Mask probabilities of detections, combined over views as TEST.MASK_AUG says.

    Args:
        boxes: (n, 4) in pixels of images (n,); cls: (n,) their classes.
        features: of the plain view.

    Returns:
        (n, M, M) float32, each of its own class; without cls (n, K, M, M), those of every class.
    """
    views, heuristic = augmented_views(cfg.TEST.MASK_AUG), cfg.TEST.MASK_AUG.HEUR
    by_logit = bool(views) and heuristic == "LOGIT_AVG"

    def predict(blob_conv: Any, rois: Tensor, rows: Tensor | slice) -> Tensor:
        if cls is None:
            maps = mask_probabilities(net, blob_conv, rois)
        else:
            maps = own_mask_probabilities(net, blob_conv, rois, cls[rows])
        return _logit(maps) if by_logit else maps

    maps = _over_views(net, boxes, image, features, views, predict, lambda m: m.flip(-1), heuristic)
    return maps.sigmoid() if by_logit else maps


def _logit(y: Tensor) -> Tensor:
    return -torch.log((1.0 - y) / y.clamp(min=1e-20))


def keypoint_maps(
    net: nn.Module,
    boxes: Tensor,
    image: Tensor,
    features: Features,
    left_right: Pairs | None = None,
) -> Tensor:
    """(n, K, S, S) keypoint logits of boxes (n, 4), combined over views as TEST.KPS_AUG says.

    left_right: indices of the points that change places in a mirrored image; by default those of
    COCO's persons.

    Raises:
        UserError: mirrored views of points that are not those of persons, without left_right.
    """

    def predict(blob_conv: Any, rois: Tensor, rows: Tensor | slice) -> Tensor:
        return heatmaps(net, blob_conv, rois)

    views = augmented_views(cfg.TEST.KPS_AUG)
    if left_right is None and any(view.flip for group in views for view in group):
        left_right = person_pairs()
    return _over_views(
        net,
        boxes,
        image,
        features,
        views,
        predict,
        lambda maps: flip_heatmaps(maps, list(left_right)),
        cfg.TEST.KPS_AUG.HEUR,
        size_dependent=cfg.TEST.KPS_AUG.SCALE_SIZE_DEP,
    )


def person_pairs() -> list[tuple[int, int]]:
    """Indices of the left and right points of COCO's persons. Raises UserError for other points."""
    names, flip_map = get_keypoints()
    if len(names) != cfg.KRCNN.NUM_KEYPOINTS:
        raise UserError(
            f"TEST.KPS_AUG mirrors images, but which of the {cfg.KRCNN.NUM_KEYPOINTS} keypoints "
            "are left and right is known only with a data set: turn the flips of TEST.KPS_AUG off."
        )
    return [(names.index(left), names.index(right)) for left, right in flip_map.items()]


def _over_views(
    net: nn.Module,
    boxes: Tensor,
    image: Tensor,
    features: Features,
    groups: Sequence[Sequence[View]],
    predict: Callable[[Any, Tensor, Tensor | slice], Tensor],
    mirror: Callable[[Tensor], Tensor],
    heuristic: str,
    size_dependent: bool = False,
) -> Tensor:
    """Maps (n, ...) of boxes, the mean (or, by heuristic, the maximum) over the plain view and
    those of `groups`.

    predict: (feature maps, RoIs, which boxes they are) -> maps; mirror: what undoes a flip.
    size_dependent: small boxes do without smaller scales, large ones without larger.
    """
    rois = as_rois(boxes, image, features.scales)
    maps = predict(features.blob_conv, rois, slice(None))
    if not groups or not len(boxes):
        return maps
    count = maps.new_ones(len(maps), *[1] * (maps.dim() - 1))
    small = box_utils.boxes_area(boxes) < cfg.TEST.KPS_AUG.AREA_TH
    for group in groups:
        for view, rows, blob_conv, rois in boxes_in_views(
            net, boxes, image, features.images, group
        ):
            if size_dependent and view.scale != cfg.TEST.SCALE:
                used = ~small[rows] if view.scale < cfg.TEST.SCALE else small[rows]
                rows, rois = rows[used], rois[used]
            found = predict(blob_conv, rois, rows)
            found = mirror(found) if view.flip else found
            if heuristic.endswith("MAX"):
                maps[rows] = torch.maximum(maps[rows], found)
            else:
                maps[rows] += found
                count[rows] += 1
    return maps / count


def boxes_in_views(
    net: nn.Module, boxes: Tensor, image: Tensor, images: ImageBatch, views: Sequence[View]
) -> Iterator[tuple[View, Tensor, Any, Tensor]]:
    """For each view of each image: which of the boxes are in it, feature maps, their RoIs."""
    for shown in images.show(views):
        blob_conv = net.convbody_net(shown.data)
        for position, (view, index) in enumerate(shown.pairs):
            rows = (image == index).nonzero()[:, 0]
            seen = view.from_image(boxes[rows], images.widths(view, image[rows]))
            where = torch.full_like(rows, position)
            yield view, rows, blob_conv, as_rois(seen, where, shown.scales)
