"""Put the losses, speeds and scores of several runs beside each other.

`python tools/compare_runs.py RUN_DIR RUN_DIR ... --output comparison.html`: folders that a training
or tools/test_net.py wrote to.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import _init_paths  # noqa: F401  (puts lib/ on the path)
from core.compare_runs import read_runs, text_table, write_comparison
from core.errors import UserError, exit_on_user_error


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="folder of a training or test")
    parser.add_argument("--output", type=Path, help="also draw the curves: .html or .png")
    args = parser.parse_args(argv)
    if args.output and not args.output.parent.is_dir():
        raise UserError(f"--output {args.output}: there is no folder {args.output.parent}")
    runs = read_runs(args.runs)
    print(text_table(runs))
    if args.output:
        write_comparison(runs, args.output)
        print(f"wrote {args.output}")


if __name__ == "__main__":
    raise SystemExit(main())
