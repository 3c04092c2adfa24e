"""image_batch: against OpenCV doing the steps one by one; CUDA against the CPU."""

import cv2
import numpy as np
import pytest
import torch

from ops import image_batch

MEANS = torch.tensor([102.9801, 115.9465, 122.7717], dtype=torch.float64)


def reference(image, flip, scale, crop, height, width):
    """Flip, subtract in float64, resize in float32 by the factor, crop, pad."""
    if flip:
        image = image[:, ::-1]
    blob = (image.astype(np.float64) - MEANS.numpy()).astype(np.float32)
    blob = cv2.resize(blob, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
    x, y, w, h = crop or (0, 0, blob.shape[1], blob.shape[0])
    blob = blob[y : y + h, x : x + w]
    out = np.zeros((3, height, width), dtype=np.float32)
    out[:, : blob.shape[0], : blob.shape[1]] = blob.transpose(2, 0, 1)
    return out


CASES = [  # height, width, flip, scale, crop (x, y, w, h)
    (37, 53, 0, 1.0, None),
    (37, 53, 1, 1.0, None),
    (48, 64, 0, 1.6667, None),
    (60, 45, 1, 2.137, (7, 11, 60, 50)),
    (100, 31, 1, 0.37, None),
    (1, 1, 0, 5.0, None),
    (90, 120, 0, 0.5, (3, 2, 40, 30)),
    (2, 400, 1, 0.9, None),
]


def batch(cases=CASES, seed=0):
    """The operator's arguments and the expected blob."""
    rng = np.random.default_rng(seed)
    height, width = 160, 384
    pixels, meta, expected, offset = [], [], [], 0
    for h, w, flip, scale, crop in cases:
        image = rng.integers(0, 256, (h, w, 3), dtype=np.uint8)
        x, y, out_w, out_h = crop or (0, 0, round(w * scale), round(h * scale))
        meta.append([offset, h, w, flip, out_h, out_w, x, y, 1 / scale])
        expected.append(reference(image, flip, scale, crop, height, width))
        pixels.append(image.reshape(-1))
        offset += image.size
    arguments = (
        torch.from_numpy(np.concatenate(pixels)),
        torch.tensor(meta, dtype=torch.float64),
        height,
        width,
        MEANS,
    )
    return arguments, torch.from_numpy(np.stack(expected))


def test_agrees_with_opencv_step_by_step():
    arguments, expected = batch()
    out = image_batch(*arguments)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, atol=1e-3, rtol=0)


def test_a_photograph_of_usual_size_agrees_with_opencv(shared):
    path = sorted((shared / "golden" / "images").glob("*.jpg"))[0]
    image = cv2.imread(str(path))
    h, w = image.shape[:2]
    scale = 800 / min(h, w)
    out_h, out_w = round(h * scale), round(w * scale)
    meta = torch.tensor([[0, h, w, 1, out_h, out_w, 0, 0, 1 / scale]], dtype=torch.float64)
    out = image_batch(torch.from_numpy(image.reshape(-1)), meta, 832, out_w + 9, MEANS)
    expected = reference(image, 1, scale, None, 832, out_w + 9)
    np.testing.assert_allclose(out[0].numpy(), expected, atol=1e-3)
    assert not out[:, :, out_h:].any() and not out[:, :, :, out_w:].any()


def test_what_exceeds_the_blob_is_cut():
    (pixels, meta, _, _, means), expected = batch()
    out = image_batch(pixels, meta, 20, 30, means)
    torch.testing.assert_close(out, expected[:, :, :20, :30], atol=1e-3, rtol=0)


def test_no_images():
    none = torch.zeros(0, dtype=torch.uint8)
    assert image_batch(none, torch.zeros(0, 9).double(), 8, 9, MEANS).shape == (0, 3, 8, 9)


def test_wrong_arguments_are_named():
    (pixels, meta, height, width, means), _ = batch()
    with pytest.raises(ValueError, match=r"image 7 .* does not lie inside"):
        image_batch(pixels[:-1], meta, height, width, means)
    with pytest.raises(ValueError, match=r"meta must be \(N, 9\)"):
        image_batch(pixels, meta[:, :8], height, width, means)
    with pytest.raises(TypeError, match="pixels must be Byte"):
        image_batch(pixels.int(), meta, height, width, means)
    with pytest.raises(TypeError, match="meta must be Double"):
        image_batch(pixels, meta.float(), height, width, means)


def test_opcheck():
    torch.library.opcheck(torch.ops.detectron.image_batch.default, batch()[0])


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu_without_synchronising():
    (pixels, meta, height, width, means), _ = batch()
    expected = image_batch(pixels, meta, height, width, means)
    inputs = pixels.cuda(), meta.cuda(), height, width, means.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = image_batch(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(out.cpu(), expected)


@pytest.mark.gpu
def test_cuda_leaves_an_image_outside_the_buffer_zero():
    (pixels, meta, height, width, means), _ = batch()
    expected = image_batch(pixels, meta, height, width, means)
    out = image_batch(pixels[:-1].cuda(), meta.cuda(), height, width, means.cuda()).cpu()
    assert torch.equal(out[:7], expected[:7])
    assert not out[7].any()


@pytest.mark.gpu
def test_cuda_opcheck_and_mixed_devices():
    (pixels, meta, height, width, means), _ = batch()
    inputs = pixels.cuda(), meta.cuda(), height, width, means.cuda()
    torch.library.opcheck(torch.ops.detectron.image_batch.default, inputs)
    with pytest.raises(ValueError, match="means is on cpu but pixels is on cuda:0"):
        image_batch(*inputs[:4], means)
