"""Compiled parts are the same modules, and compute the same, for images of every size."""

from __future__ import annotations

import torch
import torch._dynamo.testing
from torch import nn

import nn as mynn
from modeling.compilation import compile_parts


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4)

    def forward(self, data):
        return self.norm(self.conv(data)).relu()


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, features):
        return self.fc(features.mean(dim=(2, 3)))


class Detector(nn.Module):
    """The names of a detector's parts; the RPN between them is not compiled."""

    def __init__(self):
        super().__init__()
        self.Conv_Body, self.RPN, self.Box_Head = Body(), nn.Conv2d(4, 2, 1), Head()

    def forward(self, data):
        features = self.Conv_Body(data)
        return self.RPN(features).mean() + self.Box_Head(features).square().sum()


def test_names_and_results_stay_and_two_graphs_serve_all_sizes():
    torch.manual_seed(0)
    plain, compiled = Detector(), Detector()
    compiled.load_state_dict(plain.state_dict())
    counter = torch._dynamo.testing.CompileCounter()
    assert compile_parts(compiled, backend=counter) is compiled
    assert list(compiled.state_dict()) == list(plain.state_dict())
    model = mynn.DataParallel(compiled)
    for height, width in ((32, 64), (64, 96), (96, 64), (128, 96), (160, 224)):
        data = torch.randn(2, 3, height, width)
        plain.zero_grad()
        compiled.zero_grad()
        expected, got = plain(data), model(data)
        expected.backward()
        got.backward()
        torch.testing.assert_close(got, expected)
        for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(other.grad, one.grad)
    # Of each part a graph for the first size, and one for all others.
    assert counter.frame_count == 4
