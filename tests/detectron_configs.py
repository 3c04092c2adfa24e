"""Detectron's 87 published configs, from the reference tables, and their files here."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import yaml

from core.config_yaml import nested

ROOT = Path(__file__).resolve().parent.parent
# Detectron's folders and this family's.
FOLDERS = {
    "12_2017_baselines": "baselines",
    "04_2018_gn_baselines": "gn_baselines",
    "getting_started": "getting_started",
    "test_time_aug": "test_time_aug",
}
# Configs for test-time augmentation have the names of others, so the tables put this before them.
TTA = "test_time_aug__"


@functools.cache
def config_table() -> dict[str, dict[str, Any]]:
    """All 87 by name, each {full key: value}; none where there is no reference data."""
    path = ROOT.parent / "shared/spec/config_table.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def table_stems() -> list[str]:
    return sorted(config_table())


def detectron_yaml(stem: str) -> str:
    """The file as Detectron has it."""
    keys = {
        k: v
        for k, v in config_table()[stem].items()
        if not k.startswith("_") and not k.endswith(".file")
    }
    return yaml.safe_dump(nested(keys))


def family_config(stem: str) -> Path:
    """This family's file of the same model and schedule."""
    return (
        ROOT / "configs" / FOLDERS[config_table()[stem]["_dir"]] / f"{stem.removeprefix(TTA)}.yaml"
    )
