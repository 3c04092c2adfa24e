"""anchor_windows against zero-padded maps that are indexed one window after another."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import ops

devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
layouts = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
ANCHORS, SIZES = 3, ((6, 8), (3, 4), (1, 1))
COUNT = sum(height * width for height, width in SIZES) * ANCHORS


def draw(device, dtype=torch.float64, layout=torch.channels_last, channels=5, slots=70):
    """Maps, and anchors with repetitions, neighbours, borders and indices that no anchor has."""
    g = torch.Generator().manual_seed(0)
    maps = [
        torch.randn(2, channels, *size, generator=g, dtype=torch.float64)
        .to(device, dtype)
        .contiguous(memory_format=layout)
        for size in SIZES
    ]
    index = torch.randint(COUNT, (2, slots), generator=g)
    index[0, :4] = torch.tensor([0, 0, COUNT - 1, ANCHORS * 8 - 1])
    index[1, -3:] = torch.tensor([-1, COUNT, 2**40])
    return maps, index.to(device)


def reference(maps, index):
    """The same by plain indexing; differentiable."""
    padded = [F.pad(x, (1, 1, 1, 1)) for x in maps]
    rows = []
    for image, of_image in enumerate(index.tolist()):
        for anchor in of_image:
            window = maps[0].new_zeros(9, maps[0].shape[1])
            for x, (height, width) in zip(padded, SIZES, strict=True):
                if 0 <= anchor < height * width * ANCHORS:
                    row, column = divmod(anchor // ANCHORS, width)
                    window = x[image, :, row : row + 3, column : column + 3].flatten(1).t()
                    break
                anchor -= height * width * ANCHORS if anchor >= 0 else 0
            rows.append(window)
    return torch.stack(rows).view(*index.shape, 9, -1)


@devices
@layouts
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str
)
@pytest.mark.parametrize("channels", [5, 300])
def test_windows_and_gradients(device, layout, dtype, channels):
    maps, index = draw(device, dtype, layout, channels)
    for x in maps:
        x.requires_grad_()
    found, wanted = ops.anchor_windows(maps, index, ANCHORS), reference(maps, index)
    assert found.dtype == dtype
    assert torch.equal(found, wanted)
    g = torch.Generator().manual_seed(1)
    grad = torch.randn(found.shape, generator=g, dtype=torch.float64).to(device, dtype)
    grads = torch.autograd.grad(found, maps, grad)
    exact = [x.detach().double().requires_grad_() for x in maps]
    wanted = torch.autograd.grad(reference(exact, index), exact, grad.double())
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5}.get(dtype, 0)
    for a, b in zip(grads, wanted, strict=True):
        assert a.dtype == dtype and a.is_contiguous(memory_format=layout)
        # Summed in a wide type and rounded once.
        torch.testing.assert_close(a, b.to(dtype), rtol=tolerance, atol=tolerance)
    again = torch.autograd.grad(ops.anchor_windows(maps, index, ANCHORS), maps, grad)
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))


@devices
def test_as_many_slots_as_fit(device):
    g = torch.Generator().manual_seed(2)
    maps, _ = draw(device, torch.float32)
    index = torch.randint(COUNT, (2, 2048), generator=g).to(device)
    for x in maps:
        x.requires_grad_()
    found = ops.anchor_windows(maps, index, ANCHORS)
    grads = torch.autograd.grad(found.sum(), maps)
    wanted = torch.autograd.grad(reference(maps, index).sum(), maps)
    for a, b in zip(grads, wanted, strict=True):
        torch.testing.assert_close(a, b)


@devices
def test_gradcheck(device):
    maps, index = draw(device, slots=12, channels=2)
    for x in maps:
        x.requires_grad_()
    function = lambda *maps: ops.anchor_windows(maps, index, ANCHORS)  # noqa: E731
    assert torch.autograd.gradcheck(function, maps)
    (first, *_) = torch.autograd.grad(function(*maps).sum(), maps)
    assert not first.requires_grad
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(function(*maps).sum(), maps, create_graph=True)


@devices
@layouts
def test_opcheck(device, layout):
    maps, index = draw(device, torch.float32, layout)
    windows = ops.anchor_windows(maps, index, ANCHORS)
    sizes = [2, 5, *(extent for size in SIZES for extent in size)]
    last = layout == torch.channels_last
    arguments = (windows, index, ANCHORS, sizes, last)
    torch.library.opcheck(torch.ops.detectron.anchor_windows_backward.default, arguments)
    for x in maps:
        x.requires_grad_()
    torch.library.opcheck(torch.ops.detectron.anchor_windows.default, (maps, index, ANCHORS))


@devices
def test_empty_inputs(device):
    maps, index = draw(device)
    for x in maps:
        x.requires_grad_()
    none = ops.anchor_windows(maps, index[:, :0], ANCHORS)
    assert none.shape == (2, 0, 9, 5)
    assert all(not g.any() for g in torch.autograd.grad(none.sum(), maps))
    no_image = [x[:0] for x in maps]
    assert ops.anchor_windows(no_image, index[:0], ANCHORS).shape == (0, 70, 9, 5)
    no_pixel = [x.detach()[:, :, :0] for x in maps]
    assert not ops.anchor_windows(no_pixel, index, ANCHORS).any()


@devices
def test_neither_layout_and_slices(device):
    maps, index = draw(device)
    wanted = ops.anchor_windows(maps, index, ANCHORS)
    turned = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in maps]
    every_other = index.repeat_interleave(2, dim=1)[:, ::2]
    assert torch.equal(ops.anchor_windows(turned, every_other, ANCHORS), wanted)


def test_wrong_arguments_are_named():
    maps, index = draw("cpu")
    for error, words, arguments in (
        (ValueError, "no feature level", ([], index, 3)),
        (ValueError, "index must be", (maps, index[0], 3)),
        (ValueError, "S <= 2048", (maps, index.repeat(1, 100), 3)),
        (TypeError, "index must be", (maps, index.int(), 3)),
        (ValueError, "num_anchors must be", (maps, index, 0)),
        (ValueError, "every level", ([maps[0], maps[1][:1]], index, 3)),
        (TypeError, "every feature level", ([maps[0], maps[1].float()], index, 3)),
        (ValueError, "between 1 and 8", ([maps[0]] * 9, index, 3)),
        (TypeError, "features must be", ([x.long() for x in maps], index, 3)),
    ):
        with pytest.raises(error, match=words):
            ops.anchor_windows(*arguments)


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu_and_names_mixed_devices():
    maps, index = draw("cpu", torch.float32, channels=64)
    grad = torch.randn(2, 70, 9, 64)

    def both(device):
        own = [x.to(device).requires_grad_() for x in maps]
        windows = ops.anchor_windows(own, index.to(device), ANCHORS)
        grads = torch.autograd.grad(windows, own, grad.to(device))
        return [windows.cpu(), *(g.cpu() for g in grads)]

    assert all(torch.equal(a, b) for a, b in zip(both("cpu"), both("cuda"), strict=True))
    with pytest.raises(ValueError, match="index is on cpu"):
        ops.anchor_windows([x.cuda() for x in maps], index, ANCHORS)
