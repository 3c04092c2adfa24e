"""Shared fixtures: `lib/` and `tools/` on the path, a pristine config, the reference folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
for folder in ("lib", "tools"):
    sys.path.insert(0, str(ROOT / folder))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GPU tests say why they do not run on a machine without one."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def cfg():
    """The global config at its defaults; whatever the test does to it is undone."""
    from core.config import cfg, reset_cfg

    reset_cfg()
    yield cfg
    reset_cfg()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data (`shared/` beside the checkout)."""
    path = ROOT.parent / "shared"
    if not (path / "golden").is_dir():
        pytest.skip("no reference data: the folder shared/ is not beside this checkout")
    return path
