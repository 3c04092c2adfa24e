"""DataParallel on one device; its scattering and gathering for several."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nn as mynn
from nn.parallel.scatter import gather, split_batch


class Losses(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Linear(3, 2)

    def forward(self, data, blob_size=None, nested=None):
        out = self.conv(data)
        return {
            "losses": {"loss_a": out.sum(), "loss_b": out.pow(2).mean()},
            "metrics": {"size": blob_size, "nested": nested},
        }


def test_a_minibatch_of_one_device_gives_the_module_its_only_entry():
    module = Losses()
    model = mynn.DataParallel(module, cpu_keywords=["blob_size"], minibatch=True)
    data = torch.randn(4, 3)
    output = model(data=[data], blob_size=[(64, 96)], nested=[{"boxes": [data, 3]}])
    torch.testing.assert_close(output["losses"]["loss_a"], module.conv(data).sum())
    assert output["metrics"]["size"] == (64, 96)
    assert torch.equal(output["metrics"]["nested"]["boxes"][0], data)


def test_names_in_the_state_dict_are_the_modules_own():
    module, other = Losses(), Losses()
    model = mynn.DataParallel(module)
    assert list(model.state_dict()) == ["conv.weight", "conv.bias"]
    model.load_state_dict(other.state_dict())
    assert torch.equal(module.conv.weight, other.conv.weight)
    assert model.module is module


def test_without_batching_outputs_are_a_list_per_device():
    model = mynn.DataParallel(Losses(), batch_outputs=False)
    assert isinstance(model(torch.randn(2, 3)), list)


def test_every_gpu_gets_its_own_entry_of_a_minibatch():
    kwargs = {"data": [torch.zeros(2, 3), torch.zeros(2, 5)], "blob_size": [(2, 3), (2, 5)]}
    parts = split_batch(((), kwargs), 2, minibatch=True)
    assert [p[1]["data"].shape[1] for p in parts] == [3, 5]
    assert [p[1]["blob_size"] for p in parts] == [(2, 3), (2, 5)]
    with pytest.raises(ValueError, match="data must be a list .* 3 device"):
        split_batch(((), kwargs), 3, minibatch=True)


def test_a_plain_batch_is_cut_along_dimension_0():
    parts = split_batch(((torch.arange(5), 7), {}), 2, minibatch=False)
    assert [p[0][0].tolist() for p in parts] == [[0, 1, 2], [3, 4]]
    assert [p[0][1] for p in parts] == [7, 7]
    assert len(split_batch(((torch.arange(1),), {}), 4, minibatch=False)) == 1


def test_gathered_losses_have_one_entry_per_replica():
    outputs = [
        {"losses": {"a": torch.tensor(1.0)}, "rois": torch.zeros(2, 5)},
        {"losses": {"a": torch.tensor(3.0)}, "rois": torch.ones(3, 5)},
    ]
    gathered = gather(outputs, torch.device("cpu"))
    assert gathered["losses"]["a"].tolist() == [1.0, 3.0]
    assert gathered["rois"].shape == (5, 5)


@pytest.mark.gpu
def test_two_replicas_give_the_gradients_of_one_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    module = Losses().cuda()
    data = [torch.randn(2, 3), torch.randn(2, 3)]
    model = mynn.DataParallel(module, device_ids=[0, 1], minibatch=True)
    loss = model(data=data)["losses"]["loss_b"]
    assert loss.shape == (2,)
    loss.mean().backward()
    expected = module.conv(torch.cat(data).cuda()).pow(2).mean()
    (gradient,) = torch.autograd.grad(expected, [module.conv.weight])
    torch.testing.assert_close(module.conv.weight.grad, gradient)
    with pytest.raises(RuntimeError, match="replica 1"):
        model(data=[torch.randn(2, 3), torch.randn(2, 9)])
