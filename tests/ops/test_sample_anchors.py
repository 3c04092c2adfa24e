"""The draw of anchors: against a slow reference on the same numbers; CUDA against the CPU."""

from __future__ import annotations

import pytest
import torch

from ops import sample_anchors


def below(uniform: torch.Tensor, count: int) -> int:
    return min(int(uniform * torch.tensor(count, dtype=torch.float32)), count - 1)


def reference(foreground, background, random, max_foreground):
    """{anchor: label} of one image."""
    objects, rest = foreground.nonzero()[:, 0].tolist(), background.nonzero()[:, 0].tolist()
    draws = len(random) - max_foreground
    chosen = set(range(len(objects)))
    if len(objects) > max_foreground:
        chosen = set()
        for uniform, last in zip(
            random, range(len(objects) - max_foreground, len(objects)), strict=False
        ):
            drawn = below(uniform, last + 1)
            chosen.add(last if drawn in chosen else drawn)
    left = draws - len(chosen)
    ranks = range(len(rest))
    if len(rest) > left:
        ranks = [below(u, len(rest)) for u in random[max_foreground : max_foreground + left]]
    return {objects[i]: 1 for i in chosen} | {rest[i]: 0 for i in ranks}


def problem(images, anchors, draws, max_foreground, fg=0.1, bg=0.6, seed=0):
    g = torch.Generator().manual_seed(seed)
    foreground = torch.rand(images, anchors, generator=g) < fg
    background = torch.rand(images, anchors, generator=g) < bg
    random = torch.rand(images, max_foreground + draws, generator=g)
    random[:, -1] = 1 - 2**-24  # the largest there is
    return foreground, background, random, max_foreground


def as_dicts(index, labels):
    """{anchor: label} of every image; the slots that count hold no anchor twice."""
    images = []
    for row, label in zip(index.tolist(), labels.tolist(), strict=True):
        used = [(a, k) for a, k in zip(row, label, strict=True) if k >= 0]
        assert len(dict(used)) == len(used)
        images.append(dict(used))
    return images


PROBLEMS = {
    "enough of both": (3, 5003, 256, 128),
    "little foreground": (2, 3000, 64, 32, 0.004),
    "no foreground": (2, 3000, 64, 32, 0.0),
    "foreground alone": (2, 400, 64, 32, 0.5, 0.0),
    "few candidates": (2, 4001, 64, 16, 0.1, 0.01),
    "nothing": (2, 40, 16, 8, 0.0, 0.0),
    "fewer anchors than draws": (2, 31, 256, 128, 0.5, 0.9),
    "all of everything": (2, 700, 256, 128, 1.1, 1.1),
    "one anchor": (16, 1, 8, 4, 0.5, 0.5),
    "no foreground wanted": (2, 500, 8, 0),
    "foreground only wanted": (2, 500, 8, 8),
    "many draws": (2, 9000, 2048, 1024, 0.3),
}
problems = pytest.mark.parametrize("name", PROBLEMS)


@problems
def test_draws_are_those_of_the_slow_reference(name):
    args = problem(*PROBLEMS[name])
    index, labels = sample_anchors(*args)
    assert index.dtype == torch.int64 and labels.dtype == torch.int8
    assert ((index >= 0) & (index < args[0].shape[1])).all()
    expected = [reference(*image, args[3]) for image in zip(*args[:3], strict=True)]
    assert as_dicts(index, labels) == expected


def test_every_anchor_is_drawn_as_often():
    """8 of 40 foreground, 24 draws of 60 background; over 4,000 draws, by five deviations."""
    foreground = (torch.arange(100) < 40).expand(4000, -1)
    random = torch.rand(4000, 40, generator=torch.Generator().manual_seed(1))
    index, labels = sample_anchors(foreground, ~foreground, random, 8)
    for label, share in ((1, 8 / 40), (0, 1 - (1 - 1 / 60) ** 24)):
        own = torch.arange(40) if label else torch.arange(40, 100)
        counts = index[labels == label].bincount(minlength=100)[own].double()
        assert (counts - 4000 * share).abs().max() < 5 * (4000 * share * (1 - share)) ** 0.5
        assert (labels == 1).sum(dim=1).eq(8).all()


def test_wrong_arguments_are_named():
    foreground, background, random, _ = problem(2, 50, 16, 8)
    with pytest.raises(ValueError, match=r"background must be \(N, A\) like foreground \[2, 50\]"):
        sample_anchors(foreground, background[:, :9], random, 8)
    with pytest.raises(ValueError, match=r"random must be \(N, max_foreground \+ draws\)"):
        sample_anchors(foreground, background, random, 20)
    with pytest.raises(TypeError, match="random must be Float"):
        sample_anchors(foreground, background, random.double(), 8)


def test_opcheck():
    torch.library.opcheck(torch.ops.detectron.sample_anchors.default, problem(2, 50, 16, 8))


def on_gpu(args):
    return tuple(x.cuda() if isinstance(x, torch.Tensor) else x for x in args)


@pytest.mark.gpu
@problems
def test_cuda_draws_the_same_without_synchronising(name):
    for seed in range(3):
        args = problem(*PROBLEMS[name], seed=seed)
        inputs = on_gpu(args)
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = sample_anchors(*inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for a, b in zip(found, sample_anchors(*args), strict=True):
            assert torch.equal(a.cpu(), b)


@pytest.mark.gpu
def test_cuda_on_many_anchors_views_and_no_images():
    args = problem(16, 242991, 256, 128, 0.001, 0.9)
    foreground, background, random, most = on_gpu(args)
    flags = torch.stack([foreground, background], dim=2)
    found = sample_anchors(flags[..., 0], flags[..., 1], random, most)
    for a, b in zip(found, sample_anchors(*args), strict=True):
        assert torch.equal(a.cpu(), b)
    index, labels = sample_anchors(*on_gpu(problem(1, 50, 16, 8))[:2], random[:1, :24], 8)
    assert index.shape == labels.shape == (1, 16)
    assert sample_anchors(foreground[:0], background[:0], random[:0], most)[0].shape == (0, 256)
    torch.library.opcheck(torch.ops.detectron.sample_anchors.default, on_gpu(problem(2, 50, 16, 8)))
