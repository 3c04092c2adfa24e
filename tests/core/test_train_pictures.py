"""Pictures of a training batch show the pixels, boxes and masks that the network gets."""

from __future__ import annotations

import pickle

import numpy as np

from core.train_pictures import draw_batch, draw_detections
from datasets.roidb import combined_roidb_for_training
from roi_data.loader import build_train_loader
from utils.image import read_image
from utils.segms import rle_to_mask
from utils.vis_layout import class_colour


def coloured(picture: np.ndarray, index: int) -> np.ndarray:
    """Where the picture has nearly the colour of a class: outlines and frames."""
    return (np.abs(picture[..., ::-1].astype(int) - class_colour(index)) < 40).all(axis=-1)


def test_boxes_and_masks_lie_where_the_objects_are(cfg, tiny_dataset, monkeypatch):
    cfg.MODEL.NUM_CLASSES, cfg.MODEL.MASK_ON = 3, True
    cfg.TRAIN.SCALES, cfg.TRAIN.MAX_SIZE, cfg.TRAIN.IMS_PER_BATCH = (120,), 400, 4
    training = combined_roidb_for_training(tiny_dataset.train_names)
    drawn = []

    import core.train_pictures as module

    lay_out = module.lay_out
    monkeypatch.setattr(module, "lay_out", lambda *args: drawn.append(args) or lay_out(*args))
    batch = next(iter(build_train_loader(*training, batch_size=4, num_workers=0)))
    pictures = draw_batch(batch, cfg.PIXEL_MEANS, tiny_dataset.class_names)
    assert list(pictures) == [f"train/{n}" for n in range(4)]
    for n, (shape, boxes, classes, segms, _, _) in enumerate(drawn):
        info = batch["im_info"][0][n]
        assert shape[:2] == tuple(int(v) for v in info[:2])
        assert len(boxes) == len(classes) == len(segms) > 0
        for box, segm in zip(boxes, segms, strict=True):
            if isinstance(segm, dict):
                ys, xs = np.nonzero(rle_to_mask(segm))
            else:
                xs, ys = (np.concatenate([p[i::2] for p in segm]) for i in (0, 1))
            corners = [xs.min(), ys.min(), xs.max(), ys.max()]
            np.testing.assert_allclose(corners, box[:4], atol=1 + 2 * float(info[2]))
    assert all(coloured(p, 1).any() or coloured(p, 2).any() for p in pictures.values())


def test_detections_of_a_file_are_drawn(tiny_files, tmp_path):
    images = [str(tiny_files.images / f"{n}.png") for n in (1, 2)]
    box = np.array([[10, 20, 39, 59, 0.9], [50, 10, 70, 30, 0.1]], np.float32)
    found = {
        "all_boxes": [[[], []], [box, np.zeros((0, 5), np.float32)]],
        "all_segms": [[[], []], [[], []]],
        "all_keyps": [[[], []], [[], []]],
    }
    (tmp_path / "detections.pkl").write_bytes(pickle.dumps(found))
    pictures = draw_detections(tmp_path / "detections.pkl", images, ["background", "cat"])
    first, second = pictures["detections/0"], pictures["detections/1"]
    scale = first.shape[0] / read_image(images[0]).shape[0]
    rows, columns = np.nonzero(coloured(first, 1))
    assert rows.max() < 62 * scale  # the box that scores 0.1 is left out
    assert columns.max() < 70 * scale
    assert coloured(first, 1).sum() > 100
    assert not coloured(second, 1).any()
