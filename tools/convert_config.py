"""Write a Detectron config in this family's words: `convert_config.py IN.yaml OUT.yaml`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import _init_paths  # noqa: F401  (puts lib/ on the path)
from core.config import merge_cfg_from_file, read_config
from core.config_yaml import dump_yaml, nested
from core.errors import exit_on_user_error
from utils.logging import setup_logging
from utils.run_dir import write_text


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("input", type=Path, metavar="IN.yaml", help="Detectron's config")
    parser.add_argument("output", type=Path, metavar="OUT.yaml", help="what to write")
    return parser.parse_args(argv)


@exit_on_user_error
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    logger = setup_logging("convert_config")
    merge_cfg_from_file(args.input)  # checks every key and value, and says what is translated
    text = dump_yaml(nested(read_config(args.input)))
    write_text(args.output, text)
    logger.info("wrote %s", args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
