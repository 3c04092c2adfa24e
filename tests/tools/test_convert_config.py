"""A converted config is this family's, and merges to what Detectron's own file merges to."""

from __future__ import annotations

import pytest

import convert_config
from core import config
from core.config_yaml import load_yaml
from detectron_configs import detectron_yaml, table_stems


def merged(path):
    config.reset_cfg()
    config.merge_cfg_from_file(path)
    return {
        key: value.tolist() if hasattr(value, "tolist") else value
        for key, value in config._flat(config.cfg).items()
    }


# Names are sorted by kind of model, so these are of every kind.
@pytest.mark.parametrize("stem", table_stems()[::6])
def test_round_trip(stem, cfg, tmp_path, caplog):
    source, target = tmp_path / "in.yaml", tmp_path / "new/out.yaml"
    source.write_text(detectron_yaml(stem))
    assert convert_config.main([str(source), str(target)]) == 0
    expected = merged(source)
    caplog.clear()
    caplog.set_level("INFO", "core.config")
    assert merged(target) == expected
    assert caplog.messages == []  # nothing is left to translate


def test_a_dump_with_every_key_and_tag(cfg, tmp_path):
    source, target = tmp_path / "in.yaml", tmp_path / "out.yaml"
    source.write_text(
        "!!python/object/new:detectron.utils.collections.AttrDict\n"
        "dictitems:\n"
        "  MODEL: !!python/object/new:detectron.utils.collections.AttrDict\n"
        "    dictitems: {CONV_BODY: ResNet.add_ResNet50_conv4_body, TYPE: rpn, RPN_ONLY: true}\n"
        "  ROOT_DIR: /home/someone/detectron\n"
        "  TRAIN: {SCALES: !!python/tuple [500]}\n"
    )
    assert convert_config.main([str(source), str(target)]) == 0
    assert load_yaml(target.read_text()) == {
        "MODEL": {
            "CONV_BODY": "ResNet.ResNet50_conv4_body",
            "TYPE": "generalized_rcnn",
            "RPN_ONLY": True,
            "LOAD_IMAGENET_PRETRAINED_WEIGHTS": False,
        },
        "TRAIN": {"SCALES": "(500,)"},
    }


def test_a_bad_config_writes_nothing(cfg, tmp_path, capsys):
    source = tmp_path / "in.yaml"
    source.write_text("TRAIN: {SCALSE: [500]}")
    assert convert_config.main([str(source), str(tmp_path / "out.yaml")]) == 2
    assert "unknown config key TRAIN.SCALSE" in capsys.readouterr().err
    assert not (tmp_path / "out.yaml").exists()


@pytest.mark.parametrize("target", ["", "file/out.yaml", "/proc/nope/out.yaml", "x" * 300])
def test_a_place_that_cannot_be_written_to_is_one_sentence(target, cfg, tmp_path, capsys):
    source = tmp_path / "in.yaml"
    source.write_text("TRAIN: {SCALES: [500]}")
    (tmp_path / "file").touch()
    assert convert_config.main([str(source), f"{tmp_path / target}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: cannot write {tmp_path / target}")
    assert {file.name for file in tmp_path.iterdir()} == {"in.yaml", "file"}
