"""Image files of every kind are read as OpenCV reads them, or refused by name."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from PIL import Image

from core.errors import UserError
from utils.image import read_image


@pytest.fixture
def gradient() -> np.ndarray:
    """RGB (24, 36, 3), smooth so that JPEG keeps it nearly."""
    y, x = np.mgrid[0:24, 0:36]
    return np.stack((x * 7, y * 10, 255 - x * 3 - y * 4), axis=2).astype(np.uint8)


def test_colour_is_bgr(gradient, tmp_path):
    Image.fromarray(gradient).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, gradient[:, :, ::-1])


def test_alpha_is_dropped(gradient, tmp_path):
    alpha = np.full((24, 36, 1), 255, dtype=np.uint8)
    Image.fromarray(np.concatenate((gradient, alpha), axis=2)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), gradient[:, :, ::-1])


@pytest.mark.parametrize("name", ["grey.jpg", "grey.png"])
def test_grey_becomes_three_channels(gradient, tmp_path, name):
    Image.fromarray(gradient[:, :, 0]).save(tmp_path / name)
    image = read_image(tmp_path / name)
    assert image.shape == (24, 36, 3)
    assert (image == image[:, :, :1]).all()
    assert np.abs(image[:, :, 0].astype(int) - gradient[:, :, 0]).max() < 12


def test_cmyk_becomes_bgr(gradient, tmp_path):
    Image.fromarray(gradient).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    image = read_image(tmp_path / "a.jpg")
    assert image.shape == (24, 36, 3)
    np.testing.assert_array_equal(image, cv2.imread(str(tmp_path / "a.jpg")))
    assert np.abs(image[:, :, ::-1].astype(int) - gradient).mean() < 25


def test_exif_orientation_is_applied(gradient, tmp_path):
    picture = Image.fromarray(gradient)
    exif = picture.getexif()
    exif[0x0112] = 6  # to be turned clockwise
    picture.save(tmp_path / "a.jpg", quality=95, exif=exif)
    image = read_image(tmp_path / "a.jpg")
    assert image.shape == (36, 24, 3)
    turned = np.rot90(gradient, -1)[:, :, ::-1]
    assert np.abs(image.astype(int) - turned).mean() < 8
    with pytest.raises(UserError, match=r"a\.jpg is 24 x 36 pixels \(its EXIF .* say 36 x 24"):
        read_image(tmp_path / "a.jpg", (24, 36))


def test_palette_image(gradient, tmp_path):
    Image.fromarray(gradient).quantize(16).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", (24, 36)).shape == (24, 36, 3)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"none\.jpg does not exist"):
        read_image(tmp_path / "none.jpg")


@pytest.mark.parametrize("content", [b"", b"not an image", b"\xff\xd8\xff\xe0 broken"])
def test_unreadable_file(tmp_path, content):
    (tmp_path / "bad.jpg").write_bytes(content)
    with pytest.raises(UserError, match=r"bad\.jpg cannot be decoded.*replace the file or leave"):
        read_image(tmp_path / "bad.jpg")


def test_another_size_than_annotated(gradient, tmp_path):
    Image.fromarray(gradient).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", (24, 36)).shape == (24, 36, 3)
    with pytest.raises(UserError, match=r"a\.png is 36 x 24 pixels but .* say 30 x 24"):
        read_image(tmp_path / "a.png", (24, 30))


SAMPLINGS = sorted(key for key in vars(cv2) if key.startswith("IMWRITE_JPEG_SAMPLING_FACTOR_"))


@pytest.mark.parametrize("progressive", [0, 1])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_every_kind_of_jpeg_has_opencvs_pixels(tmp_path, sampling, progressive):
    path = str(tmp_path / "a.jpg")
    pixels = np.random.default_rng(0).integers(0, 256, (13, 17, 3), dtype=np.uint8)
    pixels = cv2.resize(pixels, (133, 101), interpolation=cv2.INTER_CUBIC)
    options = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, getattr(cv2, sampling)]
    cv2.imwrite(path, pixels, [*options, cv2.IMWRITE_JPEG_PROGRESSIVE, progressive])
    np.testing.assert_array_equal(read_image(path), cv2.imread(path))


@pytest.mark.parametrize("missing", [1, 100])
def test_a_file_cut_short_is_read_as_far_as_opencv_reads_it(gradient, tmp_path, missing):
    path = tmp_path / "a.jpg"
    Image.fromarray(np.tile(gradient, (8, 8, 1))).save(path, quality=95)
    path.write_bytes(path.read_bytes()[:-missing])
    np.testing.assert_array_equal(read_image(path), cv2.imread(str(path)))


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_an_image_is_decoded_into_given_memory(gradient, tmp_path, name):
    Image.fromarray(gradient).save(tmp_path / name)
    memory = np.zeros(2 * gradient.size, dtype=np.uint8)
    out = memory[: gradient.size].reshape(gradient.shape)
    image = read_image(tmp_path / name, (24, 36), out)
    assert np.shares_memory(image, memory) and not memory[gradient.size :].any()
    np.testing.assert_array_equal(out, cv2.imread(str(tmp_path / name)))
    # An image that turns out larger than annotated does not run over the memory's end.
    with pytest.raises(UserError, match="is 36 x 24 pixels but its annotations say 36 x 12"):
        read_image(tmp_path / name, (12, 36), memory[: 12 * 36 * 3].reshape(12, 36, 3))
    assert not memory[gradient.size :].any()
