"""Detections files: read safely, whoever wrote them, and scored as they should be."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from core.config import merge_cfg_from_cfg
from core.errors import UserError
from core.test_engine import score_detections
from core.test_results import DatasetResults, join_parts, load_detections, split_range
from core.test_results import test_fingerprint as fingerprint
from datasets.dataset_catalog import resolve_dataset
from datasets.json_dataset import JsonDataset
from scripts import test_net_script as script
from utils.run_dir import plain

# A config as Detectron stores it.
DETECTRON_CFG = """\
!!python/object/new:detectron.utils.collections.AttrDict
dictitems:
  MODEL: !!python/object/new:detectron.utils.collections.AttrDict
    dictitems: {TYPE: generalized_rcnn, MASK_ON: true, KEYPOINTS_ON: true, FASTER_RCNN: true,
      CONV_BODY: FPN.add_fpn_ResNet50_conv5_body}
    state: {__immutable__: true}
  FPN: !!python/object/new:detectron.utils.collections.AttrDict
    dictitems: {FPN_ON: true, MULTILEVEL_ROIS: true, MULTILEVEL_RPN: true}
  FAST_RCNN: !!python/object/new:detectron.utils.collections.AttrDict
    dictitems: {ROI_BOX_HEAD: fast_rcnn_heads.add_roi_2mlp_head}
  MRCNN: !!python/object/new:detectron.utils.collections.AttrDict
    dictitems: {ROI_MASK_HEAD: mask_rcnn_heads.mask_rcnn_fcn_head_v1up4convs}
  KRCNN: !!python/object/new:detectron.utils.collections.AttrDict
    dictitems: {ROI_KEYPOINTS_HEAD: keypoint_rcnn_heads.add_roi_pose_head_v1convX,
      NUM_KEYPOINTS: 17}
  OUTPUT_DIR: /checkpoints/somebody
  PIXEL_MEANS: !!python/tuple [102.9801, 115.9465, 122.7717]
state: {__immutable__: true}
"""


def truth_as_detections(dataset: JsonDataset) -> DatasetResults:
    """The annotations themselves, as a detector without fault would find them."""
    coco, found = dataset.COCO, DatasetResults.empty(dataset.num_classes, len(dataset.image_ids))
    for i, image_id in enumerate(dataset.image_ids):
        objects = [o for o in coco.imgToAnns[image_id] if not o["iscrowd"]]
        for label in range(1, dataset.num_classes):
            mine = [
                o
                for o in objects
                if dataset.json_category_id_to_contiguous_id[o["category_id"]] == label
            ]
            boxes, segms, keyps = [], [], []
            for o in mine:
                x, y, w, h = o["bbox"]
                # Persons without labelled points cannot be found: they come after the others.
                score = 0.9 if o.get("num_keypoints", 1) else 0.1
                boxes.append([x, y, x + w - 1, y + h - 1, score])
                segms.append(coco.annToRLE(o))
                points = np.array(o.get("keypoints", []), dtype=float).reshape(-1, 3)[:, :2].T
                keyps.append(np.vstack([points, np.ones_like(points)]))
            found.all_boxes[label][i] = np.array(boxes, dtype=np.float64).reshape(-1, 5)
            found.all_segms[label][i] = segms
            found.all_keyps[label][i] = keyps
    return found


@pytest.fixture
def people(shared) -> tuple[str, JsonDataset]:
    """Real persons with boxes, masks and keypoints: the spec for --dataset, and the data set."""
    folder = shared / "data/coco"
    spec = f"{folder}/annotations/person_keypoints_val2017.json:{folder}/images/val2017"
    return spec, JsonDataset(resolve_dataset(spec).test_names[0])


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_the_truth_in_detectron_s_file_scores_one_in_everything(people, cfg, tmp_path, protocol):
    spec, dataset = people
    found = truth_as_detections(dataset)
    content = {"all_boxes": found.all_boxes, "all_segms": found.all_segms}
    content |= {"all_keyps": found.all_keyps, "cfg": DETECTRON_CFG}
    (tmp_path / "detections.pkl").write_bytes(pickle.dumps(content, protocol))
    flags = ["--dataset", spec, "--eval_only", tmp_path / "detections.pkl"]
    scores = {}

    def remember(*args):
        scores.update(score_detections(*args))
        return scores

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "score_detections", remember)
        assert script.main([str(flag) for flag in flags]) == 0
    ((_, tasks),) = scores.items()
    assert set(tasks) == {"box", "mask", "keypoint"}
    for metrics in tasks.values():
        assert metrics["AP"] == pytest.approx(1.0, abs=1e-9)
    names = sorted(p.name for p in tmp_path.glob("*_results.json"))
    suffix = f"{dataset.name}_results.json"
    assert names == [f"{kind}_{suffix}" for kind in ("bbox", "keypoints", "segmentations")]


def test_scratch_results_leave_no_json(people, cfg, tmp_path):
    _, dataset = people
    merge_cfg_from_cfg({"TEST": {"COMPETITION_MODE": False, "DATASETS": (dataset.name,)}})
    truth_as_detections(dataset).save(tmp_path / "detections.pkl")
    score_detections(tmp_path / "detections.pkl", tmp_path)
    assert not list(tmp_path.glob("*.json"))


def test_the_bytes_of_the_file_are_those_of_pickle(cfg, tmp_path):
    """However they are made sooner."""
    found = DatasetResults.empty(3, 2)
    boxes = np.arange(15, dtype=np.float32).reshape(3, 5)
    rles, points = [{"size": [4, 5], "counts": "05"}], [np.ones((4, 17))]
    found.extend(0, [[], boxes[1:], boxes[:0]], [[], rles * 2, []], [[], points * 2, []])
    found.extend(1, [[], boxes[:, ::-1], boxes[:1].astype(np.float64)], None, None)
    extra = {"done": np.array([True, False]), "odd": np.ones((2, 3)).T, "names": np.array(["a"])}
    found.save(tmp_path / "detections.pkl", **extra)
    content = {"all_boxes": found.all_boxes, "all_segms": found.all_segms}
    content |= {"all_keyps": found.all_keyps, "cfg": yaml.safe_dump(plain(cfg), sort_keys=False)}
    with io.BytesIO() as file:
        pickle.dump(content | extra, file, pickle.HIGHEST_PROTOCOL)
        assert (tmp_path / "detections.pkl").read_bytes() == file.getvalue()


def test_a_file_of_other_images_is_refused(people, cfg, tmp_path):
    _, dataset = people
    merge_cfg_from_cfg({"TEST": {"DATASETS": (dataset.name,)}})
    DatasetResults.empty(2, 3).save(tmp_path / "detections.pkl")
    with pytest.raises(UserError, match=r"2 classes .* and 3 images, but .* has 2 and 51"):
        score_detections(tmp_path / "detections.pkl", tmp_path)


class _Runs:
    def __reduce__(self):
        return os.mkdir, (self.target,)

    def __init__(self, target: str) -> None:
        self.target = target


def test_a_file_that_would_run_something_is_refused(tmp_path):
    target = tmp_path / "made"
    path = tmp_path / "detections.pkl"
    path.write_bytes(pickle.dumps({"all_boxes": _Runs(str(target))}))
    with pytest.raises(UserError, match="will not be loaded"):
        load_detections(path)
    assert not target.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"all_boxes": [[], [1]]}, "no all_boxes"),
        ([1, 2], "no all_boxes"),
        ({"all_boxes": [[[]], [[]]], "all_segms": [[[]]]}, "all_segms has other images"),
    ],
)
def test_what_is_no_detections_file_is_said(content, message, tmp_path):
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=message):
        load_detections(path)
    with pytest.raises(UserError, match="cannot read"):
        load_detections(Path("nowhere.pkl"))


def test_ranges_cover_every_image_once_and_are_as_equal_as_can_be():
    assert split_range(7, 3) == [(0, 3), (3, 5), (5, 7)]
    assert split_range(2, 4) == [(0, 1), (1, 2)]


def test_parts_of_different_tests_are_not_joined(cfg, tmp_path):
    for start, of in ((0, "a"), (1, "b")):
        part = DatasetResults.empty(2, 1)
        path = tmp_path / f"detection_range_{start}_{start + 1}.pkl"
        part.save(path, done=np.ones(1, bool), fingerprint=of)
    with pytest.raises(UserError, match="not of one test"):
        join_parts(tmp_path, [(0, 1), (1, 2)])


def test_the_fingerprint_tells_weights_settings_and_images_apart(cfg):
    def images(width):
        return [{"id": 1, "height": 2, "width": width, "boxes": np.zeros((0, 4), np.float32)}]

    torch.manual_seed(0)
    model = torch.nn.Linear(2, 3)
    prints = [fingerprint(model, images(3), amp="off"), fingerprint(model, images(4), amp="off")]
    prints.append(fingerprint(model, images(3), amp="bf16"))
    cfg.TEST.NMS = 0.4
    prints.append(fingerprint(model, images(3), amp="off"))
    with torch.no_grad():
        model.weight[0, 0] += 1e-7
    prints.append(fingerprint(model, images(3), amp="off"))
    assert len(set(prints)) == 5
    cfg.OUTPUT_DIR = "elsewhere"
    assert fingerprint(model, images(3), amp="off") == prints[-1]
