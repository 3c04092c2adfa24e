"""The roidb that the original's records speak of."""

from __future__ import annotations

import pytest

from tiny_data import golden_data_dir, tiny_dataset, tiny_files

__all__ = ["golden_data_dir", "golden_roidb", "tiny_dataset", "tiny_files"]


@pytest.fixture
def golden_roidb(shared, cfg):
    """Training roidb (flips included) of the golden values' 80 images, with masks."""
    from datasets.dataset_catalog import resolve_dataset
    from datasets.roidb import combined_roidb_for_training

    annotations = shared / "golden/annotations/instances_train2017.json"
    dataset = resolve_dataset(f"{annotations}:{shared / 'data/coco/images/train2017'}")
    cfg.MODEL.NUM_CLASSES = dataset.num_classes
    cfg.MODEL.MASK_ON = True
    return combined_roidb_for_training(dataset.train_names, ())[0]
