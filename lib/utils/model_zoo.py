"""Detectron's published models by the names of their configs.

`model_zoo.json` has, for each, the address below `BASE_URL` and the published results (percent).
"""

from __future__ import annotations

import difflib
import functools
import json
import logging
from dataclasses import dataclass
from pathlib import Path

from core.config import cfg
from core.errors import UserError
from utils.download import download
from utils.weights import read_detectron_blobs

logger = logging.getLogger(__name__)

BASE_URL = "https://dl.fbaipublicfiles.com/detectron/"
ZOO_PREFIX = "zoo://"


@dataclass(frozen=True)
class ZooModel:
    """A published model; results (in percent) on COCO 2014 minival, the 2017 val."""

    path: str
    box_ap: float | None = None
    mask_ap: float | None = None
    kp_ap: float | None = None
    prop_ar1000: float | None = None

    @property
    def url(self) -> str:
        return BASE_URL + self.path


@functools.cache
def zoo_models() -> dict[str, ZooModel]:
    """Config name (`e2e_mask_rcnn_R-50-FPN_1x`) -> model."""
    table = json.loads(Path(__file__).with_suffix(".json").read_text())
    return {stem: ZooModel(**entry) for stem, entry in table.items()}


def models_dir() -> Path:
    """Where fetched models are kept."""
    return Path(cfg.DATA_DIR) / "detectron_models"


def local_weights(weights: str | Path) -> Path:
    """The file of `zoo://<config name>`, fetched if it is not there; any other path as it is.

    Raises:
        UserError: the zoo has no such model, or it cannot be fetched; says what to put where.
    """
    if not str(weights).startswith(ZOO_PREFIX):
        return Path(weights)
    return fetch_model(str(weights).removeprefix(ZOO_PREFIX), models_dir())


def fetch_model(stem: str, folder: Path) -> Path:
    """Download a model as `folder/<stem>.pkl`, unless it is there; resumed and verified.

    Args:
        stem: a config's name, with or without `.yaml`.
    Raises:
        UserError: the zoo has no such model, or it cannot be fetched.
    """
    stem = stem.rpartition("/")[2].removesuffix(".yaml")
    model = zoo_models().get(stem)
    if model is None:
        near = difflib.get_close_matches(stem, zoo_models(), n=3, cutoff=0.3)
        raise UserError(
            f"Detectron's zoo has no model {stem!r} (nearest: {', '.join(near) or 'none'}): "
            "`python tools/download_model.py --list` shows all"
        )
    path = folder / f"{stem}.pkl"
    if path.is_file():
        logger.info("%s is there already", path)
    else:
        download(model.url, path, read_detectron_blobs)
        logger.info("saved %s", path)
    return path
