"""ImageNet weights of each kind of file reach the layers of a model that they are for."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from core.errors import UserError
from utils.imagenet_weights import load_pretrained_imagenet_weights


class Affine(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))


def block(downsample=False):
    layers = {}
    for i in (1, 2, 3):
        layers[f"conv{i}"] = nn.Conv2d(4, 4, 1, bias=False)
        layers[f"bn{i}"] = Affine(4)
    if downsample:
        layers["downsample"] = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), Affine(4))
    return nn.ModuleDict(layers)


class Net(nn.Module):
    """The names of a C4 detector with one block a stage: res2 in the body, res5 in the head."""

    def __init__(self):
        super().__init__()
        self.Conv_Body = nn.ModuleDict(
            {
                "res1": nn.ModuleDict(
                    {"conv1": nn.Conv2d(3, 4, 7, padding=3, bias=False), "bn1": Affine(4)}
                ),
                "res2": nn.ModuleList([block(downsample=True)]),
            }
        )
        self.Box_Head = nn.ModuleDict({"res5": nn.ModuleList([block()]), "fc": nn.Linear(2, 2)})

    @property
    def detectron_weight_mapping(self):
        mapping = {}
        for name in self.state_dict():
            blob = name.split(".", 1)[1]
            for old, new in (
                ("res1.conv1", "conv1"), ("res1.bn1", "res_conv1_bn"),
                ("res2.0.", "res2_0_branch"), ("res5.0.", "res5_0_branch"),
                ("conv1.", "2a_"), ("conv2.", "2b_"), ("conv3.", "2c_"), ("bn1.", "2a_bn_"),
                ("bn2.", "2b_bn_"), ("bn3.", "2c_bn_"), ("downsample.0.", "1_"),
                ("downsample.1.", "1_bn_"), (".weight", "_w"), (".bias", "_b"),
                ("weight", "s" if "bn" in blob or "downsample.1" in blob else "w"), ("bias", "b"),
            ):  # fmt: skip
                blob = blob.replace(old, new)
            mapping[name] = blob.replace("res_conv1_bn_w", "res_conv1_bn_s")
        return mapping, []


def source_weights():
    """A batch-normalised ResNet of torchvision's names, with one block in layer1 and layer4."""
    generator = torch.Generator().manual_seed(0)
    names = {"conv1": (4, 3, 7, 7), "bn1": 4, "fc": 7}
    for layer in ("layer1.0", "layer4.0"):
        for i in (1, 2, 3):
            names[f"{layer}.conv{i}"], names[f"{layer}.bn{i}"] = (4, 4, 1, 1), 4
    names["layer1.0.downsample.0"], names["layer1.0.downsample.1"] = (4, 4, 1, 1), 4
    weights = {}
    for name, shape in names.items():
        if isinstance(shape, tuple):
            weights[f"{name}.weight"] = torch.randn(shape, generator=generator)
            continue
        for key in ("weight", "bias", "running_mean", "running_var"):
            weights[f"{name}.{key}"] = torch.rand(shape, generator=generator) + 0.5
        weights[f"{name}.num_batches_tracked"] = torch.tensor(3)
    return weights


@pytest.fixture
def load(cfg, tmp_path):
    def write_and_load(content, name, net=None):
        path = tmp_path / name
        if name.endswith(".pkl"):
            path.write_bytes(pickle.dumps(content, protocol=2))
        else:
            torch.save(content, path)
        cfg.RESNETS.IMAGENET_PRETRAINED_WEIGHTS = str(path)
        net = Net() if net is None else net
        load_pretrained_imagenet_weights(net)
        return net.state_dict()

    return write_and_load


def test_caffe_converted_weights_fold_batch_norm_into_the_affine_layers(load):
    source = source_weights()
    state = load(source, "resnet50_caffe.pth")
    for name, origin in {
        "Conv_Body.res1.bn1": "bn1",
        "Conv_Body.res2.0.bn2": "layer1.0.bn2",
        "Conv_Body.res2.0.downsample.1": "layer1.0.downsample.1",
        "Box_Head.res5.0.bn3": "layer4.0.bn3",
    }.items():
        x = torch.linspace(-2, 2, 8).reshape(2, 4)
        expected = F.batch_norm(
            x, *(source[f"{origin}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        )
        got = x * state[f"{name}.weight"] + state[f"{name}.bias"]
        torch.testing.assert_close(got, expected)
    assert torch.equal(state["Conv_Body.res1.conv1.weight"], source["conv1.weight"])
    assert torch.equal(state["Box_Head.res5.0.conv3.weight"], source["layer4.0.conv3.weight"])


def test_torchvisions_own_file_is_made_to_take_bgr_of_0_to_255(load, cfg):
    source = source_weights()
    state = load(source, "resnet50-0676ba61.pth")
    rgb = torch.randint(0, 256, (1, 3, 32, 32)).float()
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, None, :, None, None]
    statistics = (source[f"bn1.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
    expected = F.batch_norm(F.conv2d((rgb / 255 - mean) / std, source["conv1.weight"]), *statistics)
    bgr = rgb.flip(1) - torch.tensor(cfg.PIXEL_MEANS).float().reshape(1, 3, 1, 1)
    got = F.conv2d(bgr, state["Conv_Body.res1.conv1.weight"])
    got = got * state["Conv_Body.res1.bn1.weight"].reshape(1, -1, 1, 1)
    got = got + state["Conv_Body.res1.bn1.bias"].reshape(1, -1, 1, 1)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("stride_1x1", [True, False])
def test_a_stride_that_torchvisions_weights_do_not_suit_is_pointed_out(
    load, cfg, caplog, stride_1x1
):
    cfg.RESNETS.STRIDE_1X1 = stride_1x1
    load(source_weights(), "resnet50-0676ba61.pth")
    assert ("set RESNETS.STRIDE_1X1 False" in caplog.text) == stride_1x1


def test_the_config_says_what_a_file_of_another_name_was_trained_on(load, cfg):
    source = source_weights()
    by_name = load(source, "resnext101_32x8d-8ba56ff5.pth")
    cfg.RESNETS.IMAGENET_PRETRAINED_PIXELS = "rgb1"
    renamed = load(source, "my_backbone.pth")
    cfg.RESNETS.IMAGENET_PRETRAINED_PIXELS = "bgr255"
    plain = load(source, "resnet50-0676ba61.pth")
    stem = "Conv_Body.res1.conv1.weight"
    assert torch.equal(renamed[stem], by_name[stem])
    assert torch.equal(plain[stem], source["conv1.weight"])
    assert not torch.equal(renamed[stem], plain[stem])


class VGGNet(nn.Module):
    """VGG16's names with few channels, and a box head with or without ImageNet's layers."""

    def __init__(self, with_fc: bool):
        super().__init__()
        counts = {1: 2, 2: 2, 3: 3, 4: 3, 5: 3}
        names = [f"conv{block}_{i}" for block, n in counts.items() for i in range(1, n + 1)]
        self.Conv_Body = nn.ModuleDict(
            {name: nn.Conv2d(3 if name == "conv1_1" else 4, 4, 3, padding=1) for name in names}
        )
        fcs = {"fc6": nn.Linear(8, 5), "fc7": nn.Linear(5, 5)}
        self.Box_Head = nn.ModuleDict(fcs if with_fc else {"fc1": nn.Linear(2, 2)})

    @property
    def detectron_weight_mapping(self):
        mapping = {}
        for name in self.state_dict():
            blob = name.split(".", 1)[1].replace(".weight", "_w").replace(".bias", "_b")
            mapping[name] = blob.replace("fc1", "fc6")  # as the blob of roi_2mlp_head is named
        return mapping, []


VGG16_FEATURES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)


def vgg_weights():
    """torchvision's names of VGG16 for the layers of VGGNet, and its classifier."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for i in VGG16_FEATURES:
        weights[f"features.{i}.weight"] = torch.randn(
            4, 3 if i == 0 else 4, 3, 3, generator=generator
        )
        weights[f"features.{i}.bias"] = torch.randn(4, generator=generator)
    for i, shape in ((0, (5, 8)), (3, (5, 5)), (6, (7, 5))):
        weights[f"classifier.{i}.weight"] = torch.randn(shape, generator=generator)
        weights[f"classifier.{i}.bias"] = torch.randn(shape[0], generator=generator)
    return weights


@pytest.mark.parametrize("with_fc", [True, False])
def test_vgg16s_convolutions_and_its_own_head_are_loaded(load, with_fc):
    source = vgg_weights()
    net = VGGNet(with_fc)
    fresh = {n: v.clone() for n, v in net.Box_Head.state_dict().items()}
    state = load(source, "vgg16_caffe.pth", net)
    for name, i in zip(list(net.Conv_Body), VGG16_FEATURES, strict=True):
        for key in ("weight", "bias"):
            assert torch.equal(state[f"Conv_Body.{name}.{key}"], source[f"features.{i}.{key}"])
    if with_fc:
        assert torch.equal(state["Box_Head.fc6.weight"], source["classifier.0.weight"])
        assert torch.equal(state["Box_Head.fc7.bias"], source["classifier.3.bias"])
    else:
        assert all(torch.equal(state[f"Box_Head.{n}"], v) for n, v in fresh.items())


def test_torchvisions_vgg16_is_made_to_take_bgr_of_0_to_255(load, cfg):
    source = vgg_weights()
    state = load(source, "vgg16-397923af.pth", VGGNet(True))
    rgb = torch.randint(0, 256, (1, 3, 16, 16)).float()
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, None, :, None, None]
    first = (source["features.0.weight"], source["features.0.bias"])
    expected = F.conv2d((rgb / 255 - mean) / std, *first)
    bgr = rgb.flip(1) - torch.tensor(cfg.PIXEL_MEANS).float().reshape(1, 3, 1, 1)
    got = F.conv2d(bgr, *(state[f"Conv_Body.conv1_1.{key}"] for key in ("weight", "bias")))
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def test_a_deeper_or_normalised_vgg_is_refused(load):
    deeper = vgg_weights() | {"features.30.weight": torch.zeros(4, 4, 3, 3)}
    with pytest.raises(UserError, match=r"vgg19.pth .*another network .*features.30"):
        load(deeper, "vgg19.pth", VGGNet(True))
    with pytest.raises(UserError, match=r"holds no VGG: .*features.0.weight"):
        load(source_weights(), "resnet50_caffe.pth", VGGNet(True))


def test_vgg_m_is_known_as_a_pkl_alone(load):
    net = nn.ModuleDict({"Conv_Body": nn.ModuleDict({"conv2": nn.Conv2d(1, 1, 1)})})
    with pytest.raises(UserError, match=r"vgg_m.pth .*known only as Caffe's .pkl: name one"):
        load(vgg_weights(), "vgg_m.pth", net)


@pytest.mark.parametrize("with_fc", [True, False])
def test_caffes_vgg_pkl_loads_by_blob_name_into_imagenets_layers_alone(load, with_fc):
    net = VGGNet(True)
    blobs = {
        blob: np.full(net.state_dict()[name].shape, i + 1, np.float32)
        for i, (name, blob) in enumerate(net.detectron_weight_mapping[0].items())
    }
    state = load(blobs | {"fc8_w": np.zeros((7, 5), np.float32)}, "VGG16.pkl", VGGNet(with_fc))
    assert state["Conv_Body.conv5_3.bias"].unique().item() == blobs["conv5_3_b"][0]
    if with_fc:
        assert state["Box_Head.fc7.weight"].unique().item() == blobs["fc7_w"].flat[0]
    del blobs["conv3_2_w"]
    with pytest.raises(UserError, match=r"VGG16.pkl .*another network .*conv3_2_w"):
        load(blobs, "VGG16.pkl", VGGNet(with_fc))


def test_detectrons_pkl_loads_by_blob_name(load):
    net = Net()
    mapping, _ = net.detectron_weight_mapping
    assert mapping["Conv_Body.res2.0.downsample.1.weight"] == "res2_0_branch1_bn_s"
    state = net.state_dict()
    blobs = {
        blob: np.full(state[name].shape, i + 1, np.float32)
        for i, (name, blob) in enumerate(mapping.items())
        if "fc" not in name
    }
    loaded = load(blobs, "R-50.pkl")
    for name, blob in mapping.items():
        if "fc" not in name:
            assert loaded[name].unique().item() == blobs[blob].flat[0], name
    del blobs["res2_0_branch2a_w"]
    with pytest.raises(UserError, match=r"R-50.pkl .*another network .*res2_0_branch2a_w"):
        load(blobs, "R-50.pkl")


def test_the_file_of_another_network_is_refused(load):
    deeper = source_weights()
    deeper["layer1.1.conv1.weight"] = torch.zeros(4, 4, 1, 1)
    with pytest.raises(UserError, match=r"resnet101_caffe.pth .*another network .*layer1.1"):
        load(deeper, "resnet101_caffe.pth")
    wider = source_weights()
    wider["layer1.0.conv1.weight"] = torch.zeros(8, 4, 1, 1)
    with pytest.raises(UserError, match=r"another network .*res2.0.conv1.weight"):
        load(wider, "resnet50_caffe.pth")
    with pytest.raises(UserError, match="holds no ResNet"):
        load({"features.0.weight": torch.zeros(1)}, "vgg16_caffe.pth")


def test_a_missing_file_says_how_to_get_it_or_do_without(cfg):
    cfg.RESNETS.IMAGENET_PRETRAINED_WEIGHTS = "data/pretrained_model/no_such_net.pth"
    with pytest.raises(UserError) as error:
        load_pretrained_imagenet_weights(Net())
    assert "python tools/download_imagenet_weights.py -t no_such_net.pth" in str(error.value)
    assert "MODEL.LOAD_IMAGENET_PRETRAINED_WEIGHTS False" in str(error.value)
