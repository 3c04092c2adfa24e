"""A data set of four small images that shows what annotations can be like."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as mask_util

from datasets.dataset_catalog import ResolvedDataset, resolve_dataset


@dataclass(frozen=True)
class TinyFiles:
    annotations: Path
    images: Path

    @property
    def spec(self) -> str:
        return f"{self.annotations}:{self.images}"

    def edit(self, change) -> None:
        """Rewrite the annotations after change(data)."""
        data = json.loads(self.annotations.read_text())
        change(data)
        self.annotations.write_text(json.dumps(data))


def rectangle(x: float, y: float, w: float, h: float) -> list[float]:
    return [x, y, x + w, y, x + w, y + h, x, y + h]


def uncompressed_rle(mask: np.ndarray) -> dict:
    """COCO's run lengths, column by column, starting with zeros."""
    flat = mask.flatten(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff(np.concatenate(([0], changes, [flat.size]))).tolist()
    return {"size": list(mask.shape), "counts": runs if flat[0] == 0 else [0, *runs]}


def write_tiny_files(folder: Path) -> TinyFiles:
    """Image 1: a cat (polygon), a dog (RLE), a crowd of cats. Image 2: a dog in two polygons.
    Image 3: nothing. Image 4: a crowd only."""
    files = TinyFiles(folder / "tiny.json", folder / "images")
    files.images.mkdir(parents=True)
    sizes = {1: (80, 100), 2: (120, 60), 3: (50, 50), 4: (60, 90)}  # height, width
    rng = np.random.RandomState(0)
    for image_id, (h, w) in sizes.items():
        pixels = rng.randint(0, 256, (h, w, 3), dtype=np.uint8)
        # Blurred: from pixel to pixel, noise amplifies the last bits of interpolation weights.
        pixels = cv2.GaussianBlur(pixels, (0, 0), 1.5)
        cv2.imwrite(str(files.images / f"{image_id}.png"), pixels)
    dog = np.zeros(sizes[1], dtype=np.uint8)
    dog[30:50, 60:80] = 1
    dog[30:40, 60:70] = 0
    crowd = np.zeros(sizes[1], dtype=np.uint8)
    crowd[60:75, 5:95] = 1
    crowd4 = np.zeros(sizes[4], dtype=np.uint8)
    crowd4[10:50, 10:80] = 1
    compressed = mask_util.encode(np.asfortranarray(crowd4))
    compressed["counts"] = compressed["counts"].decode()

    def annotation(number, image_id, category_id, bbox, segmentation, area=None, iscrowd=0):
        area = bbox[2] * bbox[3] if area is None else area
        return {
            "id": number,
            "image_id": image_id,
            "category_id": category_id,
            "bbox": bbox,
            "segmentation": segmentation,
            "area": area,
            "iscrowd": iscrowd,
        }

    two_parts = [rectangle(10, 30, 20, 10), rectangle(30, 60, 15, 20)]
    annotations = [
        annotation(11, 1, 7, [10, 20, 30, 40], [rectangle(10, 20, 30, 40)]),
        annotation(12, 1, 3, [60, 30, 20, 20], uncompressed_rle(dog), area=300),
        annotation(13, 1, 7, [5, 60, 90, 15], uncompressed_rle(crowd), iscrowd=1),
        annotation(14, 2, 3, [10, 30, 35, 50], two_parts, area=500),
        annotation(15, 4, 3, [10, 10, 70, 40], compressed, iscrowd=1),
    ]
    data = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "height": h, "width": w}
            for i, (h, w) in sizes.items()
        ],
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
        "annotations": annotations,
    }
    files.annotations.write_text(json.dumps(data))
    return files


@pytest.fixture
def tiny_files(tmp_path: Path) -> TinyFiles:
    return write_tiny_files(tmp_path / "tiny_data")


@pytest.fixture
def tiny_dataset(cfg, tiny_files: TinyFiles, tmp_path: Path) -> ResolvedDataset:
    """The tiny data set, registered, with the roidb cache in the test's folder."""
    cfg.DATA_DIR = str(tmp_path / "data_dir")
    return resolve_dataset(tiny_files.spec)


@pytest.fixture
def golden_data_dir(cfg, shared: Path, tmp_path: Path) -> Path:
    """cfg.DATA_DIR with the data set of the golden values as coco_2017_train."""
    folder = tmp_path / "golden_data"
    (folder / "coco").mkdir(parents=True)
    (folder / "coco/annotations").symlink_to(shared / "golden/annotations")
    (folder / "coco/images").symlink_to(shared / "data/coco/images")
    cfg.DATA_DIR = str(folder)
    return folder
