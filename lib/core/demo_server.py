"""A page in the browser: drop an image, see what is in it, move the score threshold.

An upload lives in memory only. No name or path that the browser sends is looked at, and an image's
size is checked in its header before a pixel is decoded.
"""

from __future__ import annotations

import asyncio
import io
import socket

import cv2
import numpy as np
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from core.config import cfg
from core.errors import UserError
from core.predictor import Predictor
from utils.gallery import SCRIPT, STYLE, controls, item, meta
from utils.html_page import json_block, page
from utils.image_sources import refuse_giant

MAX_UPLOAD = 30 * 2**20  # bytes
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
# Images that may be decoded at once; the others wait.
MOST_AT_ONCE = 2

LOOPBACK = ("127.0.0.1", "localhost", "::1")

_STYLE = """
#drop { display: block; border: 2px dashed var(--line); border-radius: 8px; padding: 1.4rem;
  text-align: center; margin-bottom: 1rem; cursor: pointer; }
#drop.over { border-color: var(--accent); background: var(--soft); }
#drop input { position: absolute; opacity: 0; width: 1px; height: 1px; }
#message { min-height: 1.5em; }
#message.error { color: #c62828; font-weight: 600; }
"""

_BODY = """<label id="drop">Drop images here, or click to choose
<input type="file" id="file" accept="image/*" multiple></label>
<div id="message" role="status"></div>"""

_SCRIPT = """
gallery.start(JSON.parse(document.getElementById("meta").textContent));
gallery.refresh();
const drop = document.getElementById("drop"), message = document.getElementById("message");
function say(text, error = false) {
  message.textContent = text;
  message.className = error ? "error" : "";
}
async function detect(files) {
  for (const file of files) {
    say(`Looking at ${file.name} ...`);
    try {
      const start = performance.now();
      const reply = await fetch("detect",
        {method: "POST", body: file, headers: {"Content-Type": "application/octet-stream"}});
      const answer = await reply.json();
      if (!reply.ok) { say(`${file.name}: ${answer.error}`, true); continue; }
      gallery.add({...answer, name: file.name, src: URL.createObjectURL(file)}, true);
      gallery.refresh();
      say(`${file.name}: ${((performance.now() - start) / 1000).toFixed(2)} s`);
    } catch (error) {
      say(`${file.name}: the server does not answer (${error.message})`, true);
    }
  }
}
document.getElementById("file").onchange = event => detect([...event.target.files]);
for (const name of ["dragover", "dragleave", "drop"]) {
  drop.addEventListener(name, event => {
    event.preventDefault();
    drop.classList.toggle("over", name === "dragover");
    if (name === "drop") detect([...event.dataTransfer.files]);
  });
}
"""


def demo_app(
    predictor: Predictor, thresh: float = 0.7, hosts: tuple[str, ...] = LOOPBACK
) -> Starlette:
    """The web application: `GET /` is the page; `POST /detect` takes an image file's bytes and
    answers with its detections, or with `{"error": sentence}`.

    hosts: names under which it may be asked: a page elsewhere that has its own name point here
    (DNS rebinding) is refused.
    """
    points = 2.0 if cfg.MODEL.KEYPOINTS_ON else None
    vocabulary = predictor.vocabulary
    html = page(
        "What does the detector see?",
        _BODY
        + controls(thresh, points)
        + json_block("meta", meta(vocabulary.names, vocabulary.skeleton)),
        style=STYLE + _STYLE,
        script=SCRIPT + _SCRIPT,
    )
    slots = asyncio.Semaphore(MOST_AT_ONCE)

    async def home(request: Request) -> Response:
        return HTMLResponse(html, headers={"X-Content-Type-Options": "nosniff"})

    async def detect(request: Request) -> Response:
        # No form of another site can send this type without the browser asking first (CORS).
        if request.headers.get("content-type") != "application/octet-stream":
            return _refusal("send the image's bytes as application/octet-stream", 415)
        try:
            data = await _body(request)
            async with slots:
                found = await run_in_threadpool(_detect, predictor, data)
        except UserError as error:
            return _refusal(str(error), 400)
        return JSONResponse(found)

    return Starlette(
        routes=[Route("/", home), Route("/detect", detect, methods=["POST"])],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))],
    )


def free_socket(host: str, port: int) -> socket.socket:
    """A socket that is bound to an address; UserError if the port is in use or not allowed.

    port: 0 is any that is free.
    """
    # The system would take such a number modulo 65536.
    if not 0 <= port <= 65535:
        raise UserError(f"--port must be 0 (any free port) to 65535, not {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(
            f"--host {host} is no address of this machine ({error.strerror})."
        ) from error
    # A server that was just ended leaves its port waiting.
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
        bound.listen()  # a browser waits, and another program is refused, while the model loads
    except OSError as error:
        bound.close()
        raise UserError(
            f"port {port} of {host} cannot be used ({error.strerror}): choose another with --port."
        ) from error
    return bound


async def _body(request: Request) -> bytes:
    """The upload, given up as soon as it is too large."""
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_UPLOAD:
            raise UserError(f"the file has more than {MAX_UPLOAD // 2**20} MiB: shrink the image")
    return bytes(data)


def _detect(predictor: Predictor, data: bytes) -> dict:
    image = decode_upload(data)
    result = predictor(image)
    boxes = np.hstack([result.boxes, result.scores[:, None]])
    return item("", image, boxes, result.classes, result.rles, result.keypoints, with_picture=False)


def decode_upload(data: bytes) -> np.ndarray:
    """The image (H, W, 3) uint8 BGR of a file's bytes; UserError if it is none, or a giant."""
    kinds = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
    if not refuse_giant(io.BytesIO(data), "the image", FORMATS):
        raise UserError(f"this is no image that can be read: send {kinds}")
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise UserError(f"the image is damaged and cannot be decoded: send another {kinds}")
    return image


def _refusal(sentence: str, status: int) -> JSONResponse:
    return JSONResponse({"error": sentence}, status_code=status)
