"""Show a detector in the browser: drop an image on the page, see what is found."""

from __future__ import annotations

import argparse
import contextlib
import sys

import _init_paths  # noqa: F401  (puts lib/ on the path)
from core.errors import UserError, exit_on_user_error
from core.predictor import Predictor
from utils.device import pick_devices
from utils.logging import setup_logging


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", required=True, help="whose classes: coco2017, data.yaml, ...")
    parser.add_argument("--cfg", dest="cfg_file", required=True, help="config (YAML)")
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--load_ckpt", help="checkpoint (.pth)")
    weights.add_argument("--load_detectron", help="Detectron weights: .pkl or zoo://CONFIG_STEM")
    parser.add_argument(
        "--set", dest="set_cfgs", nargs="+", default=[], metavar="K V", help="config options"
    )
    parser.add_argument("--thresh", type=float, default=0.7, help="score to start with (0.7)")
    parser.add_argument("--amp", choices=("off", "bf16", "fp16"), default="off", help="precision")
    parser.add_argument("--device", help="cuda, cuda:1, cpu; default: cuda if there is any")
    parser.add_argument("--no_cuda", action="store_true", help="the same as --device cpu")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at; by default only this machine can reach the page",
    )
    parser.add_argument("--port", type=int, default=8000)
    return parser.parse_args(argv)


@exit_on_user_error
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    logger = setup_logging(__name__)
    try:
        import uvicorn

        from core.demo_server import LOOPBACK, demo_app, free_socket
    except ImportError as error:
        raise UserError(
            f"the demo page needs {error.name}: pip install starlette uvicorn"
        ) from error
    # Before the model is loaded: a port in use is known at once.
    with free_socket(args.host, args.port) as bound:
        predictor = Predictor(
            args.cfg_file,
            args.load_ckpt or args.load_detectron,
            args.dataset,
            device=pick_devices(args.device, args.no_cuda)[0],
            amp=args.amp,
            options=args.set_cfgs,
            detectron=bool(args.load_detectron),
        )
        hosts = LOOPBACK
        if args.host not in LOOPBACK:
            logger.warning("everyone who reaches %s can use this page", args.host)
            hosts = ("*",)
        host = f"[{args.host}]" if ":" in args.host else args.host
        logger.info("open http://%s:%d/ in a browser; Ctrl-C ends", host, bound.getsockname()[1])
        app = demo_app(predictor, args.thresh, hosts)
        config = uvicorn.Config(app, log_level="warning", limit_concurrency=32)
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[bound])
    return 0


if __name__ == "__main__":
    sys.exit(main())
