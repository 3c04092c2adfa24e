"""polygons_to_masks: bit for bit pycocotools, on random, degenerate and real polygons."""

import json

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch

from ops import polygons_to_masks


def reference(polygons, roi, size):
    """Normalise in float32, then pycocotools."""
    width, height = (np.maximum(roi[k + 2] - roi[k], np.float32(1)) for k in (0, 1))
    normalised = []
    for polygon in polygons:
        p = np.array(polygon, dtype=np.float32)
        p[0::2] = (p[0::2] - roi[0]) * np.float32(size) / width
        p[1::2] = (p[1::2] - roi[1]) * np.float32(size) / height
        normalised.append(p.astype(np.float64).tolist())
    return mask_util.decode(mask_util.merge(mask_util.frPyObjects(normalised, size, size)))


def pack(objects):
    """coords, poly_offsets, object_offsets of a list (objects) of lists of flat polygons."""
    polygons = [np.asarray(p, dtype=np.float32).reshape(-1, 2) for o in objects for p in o]
    coords = np.concatenate([np.zeros((0, 2), np.float32), *polygons])
    poly_offsets = np.cumsum([0] + [len(p) for p in polygons])
    object_offsets = np.cumsum([0] + [len(o) for o in objects])
    return tuple(map(torch.from_numpy, (coords, poly_offsets, object_offsets)))


def random_objects(count, seed=0):
    """Objects of polygons of many kinds, and an RoI for each: over it, beside it, or tiny."""
    rng = np.random.default_rng(seed)
    objects, rois = [], []
    for i in range(count):
        polygons = []
        for _ in range(rng.integers(1, 4)):
            points = rng.random((rng.integers(3, 12), 2)) * 100
            kind = rng.integers(0, 7)
            if kind == 1:
                points = points.round()
            elif kind == 2:
                points = (points / 20).round() * 20  # repeated points, edges that fold back
            elif kind == 3:
                points = points * 50 - 2000  # far larger than the RoI, partly negative
            elif kind == 4:
                points[:, rng.integers(0, 2)] = points[0, 0]  # a line
            elif kind == 5:
                points = points * 0.1 + 30  # smaller than a cell
            elif kind == 6:
                points[:] = points[0]  # a point
            polygons.append(points.reshape(-1))
        objects.append(polygons)
        corner = rng.random(2) * 100 - 10
        roi = np.concatenate([corner, corner + rng.random(2) * (120 if i % 2 else 3) - 1])
        rois.append(roi.round() if i % 3 == 0 else roi)
    return objects, np.array(rois, dtype=np.float32)


def assert_all_equal(objects, rois, size, masks):
    for i, polygons in enumerate(objects):
        np.testing.assert_array_equal(
            masks[i], reference(polygons, rois[i], size), err_msg=f"object {i}"
        )


@pytest.mark.parametrize(
    ("size", "count"), [(1, 200), (7, 1000), (14, 2000), (28, 2000), (56, 200)]
)
def test_random_and_degenerate_polygons_are_pycocotools_bit_for_bit(size, count):
    objects, rois = random_objects(count, seed=size)
    index = torch.arange(len(objects))
    masks = polygons_to_masks(*pack(objects), torch.from_numpy(rois), index, size)
    assert masks.dtype == torch.uint8 and masks.shape == (count, size, size)
    assert 0.02 < masks.float().mean() < 0.5
    assert_all_equal(objects, rois, size, masks.numpy())


def coco_objects(shared, limit=1500):
    path = shared / "data" / "coco" / "annotations" / "instances_train2017.json"
    if not path.is_file():
        pytest.skip(f"no {path.name} in shared/data/coco")
    annotations = json.loads(path.read_text())["annotations"]
    annotations = [a for a in annotations if not a["iscrowd"]][:limit]
    boxes = np.array([a["bbox"] for a in annotations], dtype=np.float32)
    boxes[:, 2:] += boxes[:, :2]
    return [a["segmentation"] for a in annotations], boxes


def test_real_polygons_under_jittered_boxes_are_pycocotools_bit_for_bit(shared):
    objects, boxes = coco_objects(shared)
    rng = np.random.default_rng(0)
    for size in (14, 28):
        rois = boxes + rng.normal(0, 8, boxes.shape).astype(np.float32)
        masks = polygons_to_masks(
            *pack(objects), torch.from_numpy(rois), torch.arange(len(objects)), size
        )
        assert_all_equal(objects, rois, size, masks.numpy())


def test_golden_values(shared):
    units = shared / "golden" / "units"
    golden = np.load(units / "segms.npz")
    objects = json.loads((units / "segms.json").read_text())["polys"]
    rois = torch.from_numpy(golden["poly_rois"])
    for size in (14, 28):
        expected = golden[f"wrt_box_{size}"]  # (objects, rois, size, size)
        for o in range(len(objects)):
            masks = polygons_to_masks(*pack(objects), rois, torch.full((len(rois),), o), size)
            np.testing.assert_array_equal(masks.numpy(), expected[o])


def test_rows_without_object_or_polygons_are_zero_and_roi_order_is_free():
    square = [0, 0, 10, 0, 10, 10, 0, 10]
    objects = [[square], [], [[1, 1, 2, 2]]]  # the last has too few points
    rois = torch.tensor([[0, 0, 10, 10.0]]).expand(6, 4)
    masks = polygons_to_masks(*pack(objects), rois, torch.tensor([1, 0, -1, 2, 0, 99]), 8)
    assert masks.flatten(1).any(1).tolist() == [False, True, False, False, True, False]
    assert masks[1].all()


def test_no_rois():
    none = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    assert polygons_to_masks(*pack([[[0, 0, 1, 0, 1, 1]]]), *none, 28).shape == (0, 28, 28)
    assert polygons_to_masks(*pack([]), *none, 28).shape == (0, 28, 28)


def test_coordinates_that_are_not_finite_do_not_crash():
    wild = [float("nan"), 0, float("inf"), 5, -float("inf"), 1e30, 3, 4]
    roi = torch.tensor([[0, 0, 5, 5.0], [float("nan"), 0, 5, 5]])
    masks = polygons_to_masks(*pack([[wild]]), roi, torch.tensor([0, 0]), 28)
    assert masks.max() <= 1


def test_wrong_arguments_are_named():
    coords, poly_offsets, object_offsets = pack([[[0, 0, 1, 0, 1, 1]]])
    roi, index = torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="poly_offsets must ascend within"):
        polygons_to_masks(coords, poly_offsets + 1, object_offsets, roi, index, 28)
    with pytest.raises(TypeError, match="coords must be Float"):
        polygons_to_masks(coords.double(), poly_offsets, object_offsets, roi, index, 28)
    with pytest.raises(ValueError, match=r"resolution must be in \[1, 256\]"):
        polygons_to_masks(coords, poly_offsets, object_offsets, roi, index, 257)
    with pytest.raises(ValueError, match=r"object_index must be \(R,\) with R = 1"):
        polygons_to_masks(coords, poly_offsets, object_offsets, roi, index[:0], 28)


def test_opcheck():
    objects, rois = random_objects(10)
    arguments = (*pack(objects), torch.from_numpy(rois), torch.arange(10), 14)
    torch.library.opcheck(torch.ops.detectron.polygons_to_masks.default, arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1, 7, 14, 28, 56, 256])
def test_cuda_is_the_cpu_bit_for_bit_without_synchronising(size):
    objects, rois = random_objects(4000 if size < 100 else 100, seed=size)
    index = torch.arange(len(objects))
    index[::5] = -1
    arguments = [*pack(objects), torch.from_numpy(rois), index]
    expected = polygons_to_masks(*arguments, size)
    arguments = [argument.cuda() for argument in arguments]
    torch.cuda.set_sync_debug_mode("error")
    try:
        masks = polygons_to_masks(*arguments, size)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(masks.cpu(), expected)


@pytest.mark.gpu
def test_cuda_real_polygons_are_the_cpu_bit_for_bit(shared):
    objects, boxes = coco_objects(shared, limit=5000)
    arguments = [*pack(objects), torch.from_numpy(boxes), torch.arange(len(objects))]
    expected = polygons_to_masks(*arguments, 28)
    masks = polygons_to_masks(*(argument.cuda() for argument in arguments), 28)
    assert torch.equal(masks.cpu(), expected)


@pytest.mark.gpu
def test_cuda_malformed_offsets_draw_nothing():
    coords, poly_offsets, object_offsets = pack([[[0, 0, 9, 0, 9, 9]], [[0, 0, 9, 0, 9, 9]]])
    poly_offsets[-1] = 1000
    rois = torch.tensor([[0, 0, 9, 9.0]] * 2)
    arguments = coords, poly_offsets, object_offsets, rois, torch.tensor([0, 1])
    masks = polygons_to_masks(*(argument.cuda() for argument in arguments), 14)
    assert masks[0].any() and not masks[1].any()


@pytest.mark.gpu
def test_cuda_opcheck_and_mixed_devices():
    objects, rois = random_objects(10)
    arguments = [*pack(objects), torch.from_numpy(rois), torch.arange(10)]
    device = [argument.cuda() for argument in arguments]
    torch.library.opcheck(torch.ops.detectron.polygons_to_masks.default, (*device, 14))
    with pytest.raises(ValueError, match="rois is on cpu but coords is on cuda:0"):
        polygons_to_masks(*device[:3], arguments[3], device[4], 14)
