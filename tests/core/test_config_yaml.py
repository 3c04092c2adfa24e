"""Config files are read with Detectron's tags and without running anything."""

from __future__ import annotations

import numpy as np
import pytest
import yaml

from core.config_yaml import dump_yaml, load_yaml

# As python 2 dumps Detectron's config: aliases, old module names, bytes as text or binary.
DUMPED = """\
!!python/object/new:utils.collections.AttrDict
dictitems:
  BBOX_XFORM_CLIP: !!python/object/apply:numpy.core.multiarray.scalar
  - &id001 !!python/object/apply:numpy.dtype
    args: [f8, 0, 1]
    state: !!python/tuple [3, <, null, null, null, -1, -1, 0]
  - !!binary |
    qeISGmmKEEA=
  MODEL: !!python/object/new:detectron.utils.collections.AttrDict
    dictitems:
      CONV_BODY: !!python/unicode 'FPN.add_fpn_ResNet50_conv5_body'
      BBOX_REG_WEIGHTS: !!python/tuple [10.0, 10.0, 5.0, 5.0]
    state: {__immutable__: true}
  PIXEL_MEANS: !!python/object/apply:numpy.core.multiarray._reconstruct
    args:
    - !!python/name:numpy.ndarray ''
    - !!python/tuple [0]
    - b
    state: !!python/tuple
    - 1
    - !!python/tuple [1, 1, 3]
    - *id001
    - false
    - !!binary |
      0LNZ9bm+WUB/arx0k/xcQK+UZYhjsV5A
state: {__immutable__: true}
"""


def test_a_config_that_detectron_dumped():
    config = load_yaml(DUMPED)
    assert config["MODEL"]["BBOX_REG_WEIGHTS"] == (10.0, 10.0, 5.0, 5.0)
    assert config["MODEL"]["CONV_BODY"] == "FPN.add_fpn_ResNet50_conv5_body"
    assert config["BBOX_XFORM_CLIP"] == pytest.approx(np.log(1000 / 16))
    np.testing.assert_allclose(config["PIXEL_MEANS"], [[[102.9801, 115.9465, 122.7717]]])


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.mkdir [{target}]",
        "A: [!!python/object/apply:os.mkdir [{target}]]",
        "!!python/object/apply:subprocess.check_call [[mkdir, {target}]]",
        '!!python/object/apply:eval [\'__import__("os").mkdir("{target}")\']',
        "!!python/object/new:os.mkdir [{target}]",
        "!!python/object/apply:numpy.core.multiarray.scalar [!!python/name:os.mkdir '', {target}]",
        "!!python/object/new:utils.collections.AttrDict {{state: !!python/name:os.system ''}}",
        "!!python/object/new:type {{args: [x, !!python/tuple [], {{}}], state: {{}}}}",
        "!!python/module:antigravity ''",
        "!!python/object/apply:numpy.dtype [object]",
    ],
)
def test_other_tags_are_refused_and_do_nothing(text, tmp_path):
    target = tmp_path / "made"
    with pytest.raises(yaml.YAMLError):
        load_yaml(text.format(target=target))
    assert not target.exists()


def test_what_is_written_reads_as_it_was():
    config = {
        "MODEL": {"CONV_BODY": "FPN.fpn", "MASK_ON": True},
        "TRAIN": {"SCALES": (640, 800), "DATASETS": ()},
        "SOLVER": {"STEPS": [0, 60000], "BASE_LR": 1e-5, "LRS": []},
        "CLIP": np.float64(4.5),
    }
    text = dump_yaml(config)
    assert "  MASK_ON: True\n" in text and "  SCALES: (640, 800)\n" in text
    assert "  STEPS: [0, 60000]\n" in text
    expected = {**config, "TRAIN": {"SCALES": "(640, 800)", "DATASETS": "()"}, "CLIP": 4.5}
    assert yaml.safe_load(text) == expected
