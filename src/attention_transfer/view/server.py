"""The server of `view`, for browsers on this machine only.

Three checks reject requests of other web pages. The Host header must be the address of this page,
which prevents DNS rebinding. The Origin header must be this page. Images must have the type
application/octet-stream, which the form of another page can only send after a CORS preflight.
Images stay in memory: no file is written.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Any

from aiohttp import web

from ..errors import UserError
from .viewer import Viewer

MAX_BYTES = 20_000_000
WAITING = 8  # images in memory, with the one in process; each holds up to MAX_BYTES
IMAGE_TYPE = "application/octet-stream"
FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
HEADERS = {
    # Nothing is loaded from other hosts, and no other page may frame this one.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def open_socket(host: str, port: int) -> socket.socket:
    """A socket on a loopback address.

    Raises:
        UserError: for any other address, and for a port that is in use.
    """
    address = "127.0.0.1"
    if host != "localhost":
        address = host
    try:
        is_loopback = ipaddress.ip_address(address).is_loopback
    except ValueError:
        is_loopback = False
    if not is_loopback:
        raise UserError(
            f"--host is {host!r}: expected 127.0.0.1, ::1 or localhost; to open the page from "
            "another machine, forward the port with ssh -L"
        )
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return socket.create_server((address, port), family=family)
    except OSError as error:
        raise UserError(f"--port {port} cannot be opened on {host}: {error.strerror}") from error


def hosts(listening: socket.socket) -> set[str]:
    """The values of the Host header that name this page."""
    address, port = listening.getsockname()[:2]
    names = {address, "localhost"}
    if ":" in address:
        names = {f"[{address}]", "localhost"}
    own = {f"{name}:{port}" for name in names}
    if port == 80:  # browsers omit the default port
        own |= names
    return own


def make_app(viewer: Viewer, own_hosts: set[str]) -> web.Application:
    """The web application: its static files and the handler of images."""
    app = web.Application(client_max_size=MAX_BYTES, middlewares=[_guard(own_hosts)])
    for path, (file, content_type) in FILES.items():
        app.router.add_get(path, _static(file, content_type))
    app.router.add_post("/look", _look_handler(viewer))
    return app


def _guard(own_hosts: set[str]) -> Any:
    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            _check_origin(request, own_hosts)
            response = await handler(request)
        except web.HTTPException as error:
            response = web.json_response({"error": error.text}, status=error.status)
        response.headers.update(HEADERS)
        return response

    return guard


def _check_origin(request: web.Request, own_hosts: set[str]) -> None:
    """Raises `HTTPForbidden` for a request from another page, or to another host name."""
    host = request.headers.get("Host", "")
    if host not in own_hosts:
        raise web.HTTPForbidden(text="this page is served under its own address only")
    origin = request.headers.get("Origin", f"http://{host}")
    site = request.headers.get("Sec-Fetch-Site", "same-origin")
    # A browser sends `none` if the user typed the address.
    if origin != f"http://{host}" or site not in ("same-origin", "none"):
        raise web.HTTPForbidden(text="requests from other pages are refused")


def _static(file: str, content_type: str) -> Handler:
    body = resources.files(__package__).joinpath(file).read_bytes()

    async def send(request: web.Request) -> web.Response:
        return web.Response(body=body, content_type=content_type, charset="utf-8")

    return send


def _look_handler(viewer: Viewer) -> Handler:
    turn = asyncio.Lock()
    waiting = 0

    async def look(request: web.Request) -> web.Response:
        nonlocal waiting
        if request.content_type != IMAGE_TYPE:
            raise web.HTTPUnsupportedMediaType(text=f"expected an image as {IMAGE_TYPE}")
        if waiting >= WAITING:
            raise web.HTTPServiceUnavailable(text="too many images are waiting: try again")
        waiting += 1
        try:
            encoded = await _read(request)
            async with turn:  # one image at a time
                views = await asyncio.to_thread(viewer.describe, encoded)
        except UserError as error:
            raise web.HTTPUnprocessableEntity(text=str(error)) from error
        finally:
            waiting -= 1
        return web.json_response(views)

    return look


async def _read(request: web.Request) -> bytes:
    try:
        return await request.read()
    except web.HTTPRequestEntityTooLarge as error:
        text = f"the file is too large: expected at most {MAX_BYTES // 1_000_000} MB"
        # The size is not known, because reading stopped at the limit.
        raise web.HTTPRequestEntityTooLarge(MAX_BYTES, MAX_BYTES + 1, text=text) from error


def serve(viewer: Viewer, listening: socket.socket) -> None:
    """Serves until Ctrl-C or SIGTERM."""
    app = make_app(viewer, hosts(listening))
    # aiohttp's handlers wait for the end of a task; Python's would interrupt it anywhere.
    web.run_app(app, sock=listening, print=None, access_log=None)
