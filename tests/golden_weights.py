"""Models and configs as the golden values' authors built them (`golden/README.md`, "Weight
recipe").

The weights depend on nothing but the names and shapes of the Detectron blobs, so that every number
of `golden/model` and `golden/tta` can be reproduced without any weight file.
"""

from __future__ import annotations

import json
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import nn

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
# Jobs that are not named after a configuration file of their own.
STEMS = {"tiny_mask_FPN": "e2e_mask_rcnn_R-50-FPN_1x"}
# Jobs of `golden/tta` whose blobs stand in no file.
UNRECORDED = ("tiny_keypoint_FPN",)


@cache
def recipe(shared: Path) -> dict:
    """`golden/model/recipe.json`: multipliers by family, the tiny model's options."""
    return json.loads((shared / "golden/model/recipe.json").read_text())


def golden_cfg(job: str, shared: Path, opts: list | None = None):
    """Load the global config of a golden job; returns `cfg`, mutable and inferred.

    `opts` ([key, value, ...]) are merged last, as `--set` does. The caller restores the config
    (fixture `cfg`).
    """
    from core.config import (
        assert_and_infer_cfg,
        cfg,
        merge_cfg_from_file,
        merge_cfg_from_list,
        reset_cfg,
    )

    stem = STEMS.get(job, job)
    found = sorted(CONFIGS.glob(f"*/{stem}.yaml"))
    assert found, f"no configuration named {stem}.yaml under {CONFIGS}"
    reset_cfg()
    cfg.MODEL.NUM_CLASSES = 2 if "keypoint" in stem else 81
    merge_cfg_from_file(str(found[0]))
    cfg.MODEL.LOAD_IMAGENET_PRETRAINED_WEIGHTS = False
    tiny = recipe(shared)["tiny_opts"] if job.startswith("tiny") else []
    merge_cfg_from_list([*tiny, *(opts or [])])
    assert_and_infer_cfg(make_immutable=False)
    return cfg


def recipe_blob(name: str, shape: tuple[int, ...], multipliers: dict[str, float]) -> np.ndarray:
    """The float32 values of the blob `name`; `multipliers` is one family's table."""
    normal = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    n = normal.astype(np.float32)
    if name.endswith(("_bn_s", "_gn_s")):
        if "branch2c" in name:
            return np.float32(0.2) + np.float32(0.02) * n
        return np.float32(1) + np.float32(0.05) * n
    if name.endswith("_b"):
        return np.float32(0.01) * n
    assert name.endswith("_w"), f"the recipe says nothing about a blob named {name}"
    prefixes = [prefix for prefix in multipliers if name.startswith(prefix)]
    mult = multipliers[max(prefixes, key=len)] if prefixes else 1.0
    return np.float32(mult * np.sqrt(2.0 / np.prod(shape[1:]))) * n


def fill_from_recipe(model: nn.Module, job: str, shared: Path) -> None:
    """Fill a `Generalized_RCNN` in place and check every blob against the recorded ones of `job`,
    where they were recorded.

    Parameters that map to no blob (the bilinear up-sampling) keep the constructor's values.
    """
    mapping, _ = model.detectron_weight_mapping
    multipliers = recipe(shared)["multipliers"][recipe(shared)["job_family"].get(job, "_default")]
    file = shared / f"golden/model/{job}.blobs.json"
    recorded = {} if job in UNRECORDED else json.loads(file.read_text())
    filled = set()
    with torch.no_grad():
        for name, parameter in model.state_dict().items():
            blob = mapping[name]
            if blob is None:
                continue
            values = recipe_blob(blob, tuple(parameter.shape), multipliers)
            parameter.copy_(torch.from_numpy(values))
            filled.add(blob)
            if job in UNRECORDED:
                continue
            expected = recorded[blob]
            assert list(values.shape) == expected["shape"], (name, blob, values.shape, expected)
            l2 = np.sqrt(np.square(values, dtype=np.float64).sum())
            np.testing.assert_allclose(l2, expected["l2"], rtol=1e-6, err_msg=blob)
            np.testing.assert_allclose(
                values.ravel()[:3], expected["first"][: values.size], rtol=1e-6, err_msg=blob
            )
    assert filled >= set(recorded), f"blobs without a parameter: {sorted(set(recorded) - filled)}"
