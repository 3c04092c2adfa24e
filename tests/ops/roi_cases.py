"""Features and RoIs for the tests of the RoI operators."""

import torch

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
SCALES = [1 / 4, 1 / 8, 1 / 16, 1 / 32]


def random_rois(count, images=2, extent=200.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=g) * extent - 10
    size = torch.rand(count, 2, generator=g) * extent
    image = torch.randint(0, images, (count, 1), generator=g).float()
    return torch.cat([image, corner, corner + size], dim=1)


def random_levels(count, levels=4, seed=1):
    return torch.randint(0, levels, (count,), generator=torch.Generator().manual_seed(seed))


def pyramid(channels=8, dtype=torch.float32, layout="nchw", seed=0):
    g = torch.Generator().manual_seed(seed)
    features = [torch.randn(2, channels, 64 >> k, 48 >> k, generator=g) for k in range(4)]
    return [f.to(dtype).contiguous(memory_format=LAYOUTS[layout]) for f in features]


INF, NAN = float("inf"), float("nan")
# Each gives zeros, if on one of the levels of ODD_LEVELS.
ODD_ROIS = torch.tensor(
    [
        [-1, 0, 0, 50, 50],  # a padding row
        [2, 0, 0, 50, 50],  # no such image
        [NAN, 0, 0, 50, 50],
        [0, NAN, 0, 50, 50],
        [0, 0, 0, NAN, 50],
        [0, 0, -INF, 50, 50],
        [0, 0, 0, INF, 50],
        [0, 1000, 1000, 1100, 1100],  # off the map
        [0, -1100, -1100, -1000, -1000],
        [0, 0, 0, 50, 50],  # on no level
        [0, 0, 0, 50, 50],
    ]
)
ODD_LEVELS = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 0, -1, 7])
# Anything finite will do.
HUGE_ROIS = torch.tensor(
    [
        [0, -1e7, -1e7, 1e7, 1e7],
        [1, -3e38, -3e38, 3e38, 3e38],
        [0, 3e38, 0, -3e38, 50],
        [1, 60, 60, 20, 20.0],
        [0, 63 * 4, 0, 63 * 4, 47 * 4],
    ]
)


def pool_and_differentiate(pool, features, rois, levels, scales, weight):
    """Output and gradients, with the features' layout kept."""
    features = [f.detach().requires_grad_() for f in features]
    out = pool(features, rois, levels, scales)
    grads = torch.autograd.grad(out, features, weight.to(out))
    return out.detach(), grads
