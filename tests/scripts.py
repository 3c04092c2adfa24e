"""tools/test_net.py as a module. By its own name, tests of utils.net would be found instead."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_PATH = Path(__file__).resolve().parent.parent / "tools/test_net.py"
_SPEC = importlib.util.spec_from_file_location("test_net_script", _PATH)
test_net_script = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(test_net_script)
