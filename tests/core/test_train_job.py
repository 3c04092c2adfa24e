"""What a training says about its config before it starts."""

from __future__ import annotations

import pytest

from core.train_job import warn_of_random_frozen_layers


@pytest.mark.parametrize(
    ("body", "freeze_at", "warning"),
    [
        ("ResNet.ResNet50_conv4_body", 2, "RESNETS.FREEZE_AT 2 keeps the first stages"),
        ("FPN.fpn_ResNet50_conv5_body", 0, ""),
        ("VGG16.VGG16_conv5_body", 0, "always frozen and stay random"),
    ],
)
def test_frozen_layers_without_weights_are_pointed_out(body, freeze_at, warning, cfg, caplog):
    cfg.MODEL.CONV_BODY, cfg.RESNETS.FREEZE_AT = body, freeze_at
    warn_of_random_frozen_layers()
    assert warning in caplog.text and bool(caplog.text) == bool(warning)
