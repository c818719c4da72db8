"""`view`: what the page shows, and whom it refuses."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import attention_transfer
from attention_transfer.errors import UserError

pytest.importorskip("aiohttp")

FOLDER = Path(attention_transfer.__file__).parent / "view"
IMAGE_TYPE = "application/octet-stream"


def encoded_image(width: int = 40, height: int = 30) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


def pixels_of(address: str) -> np.ndarray:
    """The pixels (H, W, 3) of a picture in a data: address."""
    encoded = base64.b64decode(address.removeprefix("data:image/webp;base64,"))
    return np.asarray(Image.open(io.BytesIO(encoded)), dtype=int)


@dataclass
class Page:
    """A page that a process serves, and the folder of its temporary files."""

    process: subprocess.Popen[str]
    port: int
    run: Path
    temporary: Path

    def ask(
        self, method: str, path: str, body: bytes = b"", **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the answer; `Host`, `Origin`, … replace a browser's own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, named)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, dict(answer.headers), content

    def look(self, body: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
        """Status and JSON of the answer to an image."""
        headers = {"Content_Type": IMAGE_TYPE} | headers
        status, _, content = self.ask("POST", "/look", body, **headers)
        return status, json.loads(content)


@pytest.fixture(scope="module")
def page(teacher_run, tmp_path_factory) -> Iterator[Page]:
    temporary = tmp_path_factory.mktemp("temporary")
    command = [sys.executable, "-m", "attention_transfer", "view", str(teacher_run), "wrn-10-1"]
    process = subprocess.Popen(
        [*command, "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(temporary)},
    )
    assert process.stdout is not None
    (port,) = re.findall(
        r"^http://127\.0\.0\.1:(\d+)/ shows 2 networks$", process.stdout.readline()
    )
    yield Page(process, int(port), teacher_run, temporary)
    process.kill()


# What it shows


def test_it_shows_each_networks_predictions_and_stages(page):
    status, views = page.look(encoded_image())
    assert status == 200
    trained, untrained = views["networks"]
    assert trained["name"] == str(page.run)
    probabilities = [guess["probability"] for guess in trained["predictions"]]
    assert len(probabilities) == 5 and probabilities == sorted(probabilities, reverse=True)
    assert [stage["layer"] for stage in trained["stages"]] == ["group0", "group1", "group2"]
    assert [stage["size"] for stage in trained["stages"]] == ["32×32", "16×16", "8×8"]
    assert untrained["predictions"] == [] and "random" in untrained["note"]
    for source in [views["image"], *(stage["picture"] for stage in trained["stages"])]:
        assert source.startswith("data:image/webp;base64,")


def test_the_maps_are_those_of_the_command_maps(teacher_run, tmp_path):
    from attention_transfer.apply.maps import map_columns
    from attention_transfer.report.pictures import heat_address, overlay
    from attention_transfer.view.viewer import Viewer

    file = tmp_path / "image.png"
    file.write_bytes(encoded_image())
    _, [(_, (predicted,), maps)], _ = map_columns([str(teacher_run)], str(file), 1, "sum", 2.0)
    viewer = Viewer((str(teacher_run),), "sum", 2.0, trust_code=False)
    views = viewer.describe(file.read_bytes())["networks"][0]
    assert views["predictions"][0]["class"] == predicted
    pixels = np.asarray(Image.open(io.BytesIO(encoded_image())).resize((42, 32), Image.BILINEAR))
    picture = Image.fromarray(pixels[:, 5:37]).resize((224, 224), Image.BICUBIC)
    for stage in views["stages"]:
        drawn = overlay(np.asarray(picture), maps[stage["layer"]][0])
        # Other memory layouts sum in another order; WebP loses a little.
        difference = pixels_of(stage["picture"]) - pixels_of(heat_address(drawn))
        assert np.abs(difference).mean() < 0.5


def test_the_page_loads_nothing_from_elsewhere(page):
    for path in ("/", "/page.css", "/page.js"):
        status, headers, content = page.ask("GET", path)
        assert status == 200
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert not re.search(rb"(https?:)?//[a-z]", content)
    assert "Access-Control-Allow-Origin" not in headers


def test_names_are_shown_as_text():
    script = (FOLDER / "page.js").read_text()
    assert "textContent" in script
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval", script)


# Whom it refuses


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example:8765"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
    ],
)
def test_other_pages_are_refused(page, headers):
    assert page.look(encoded_image(), **headers)[0] == 403
    assert page.ask("GET", "/", **headers)[0] == 403


def test_its_own_page_is_answered_by_either_name(page):
    for name in ("127.0.0.1", "localhost"):
        host = f"{name}:{page.port}"
        headers = {"Host": host, "Origin": f"http://{host}", "Sec_Fetch_Site": "same-origin"}
        assert page.look(encoded_image(), **headers)[0] == 200


def test_a_form_of_another_page_cannot_send_an_image(page):
    for kind in ("text/plain", "multipart/form-data", "application/x-www-form-urlencoded"):
        assert page.look(encoded_image(), Content_Type=kind)[0] == 415
    assert page.ask("OPTIONS", "/look")[0] == 405


def test_files_are_bounded_in_bytes(page):
    status, answer = page.look(bytes(20_000_001))
    assert (status, answer["error"]) == (413, "the file is too large: expected at most 20 MB")


def test_images_are_bounded_in_pixels(page):
    stream = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(stream, "png")  # 12 kB, 300 MB decoded
    status, answer = page.look(stream.getvalue())
    assert status == 422
    assert "10000×10000 pixels: expected at most 50 million" in answer["error"]


@pytest.mark.parametrize("body", [b"", b"no image", encoded_image()[:200]])
def test_what_is_no_image_is_refused(page, body):
    status, answer = page.look(body)
    assert (status, answer["error"]) == (
        422,
        "this image cannot be read: expected JPEG, PNG, …",
    )


def test_other_paths_lead_nowhere(page):
    for path in ("/page.py", "/../server.py", "/look", "/etc/passwd"):
        assert page.ask("GET", path)[0] in (404, 405)


def test_no_file_is_written_and_sigterm_ends_it(page):
    assert page.look(encoded_image(2000, 1500))[0] == 200
    assert list(page.temporary.rglob("*")) == []
    page.process.send_signal(signal.SIGTERM)
    assert page.process.wait(30) == 130
    assert page.process.stderr.read() == "attention-transfer: interrupted: the page is closed\n"


# The command's words


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "example.org", ""])
def test_other_addresses_are_refused(host):
    from attention_transfer.view.server import open_socket

    with pytest.raises(UserError, match="expected 127.0.0.1, ::1 or localhost"):
        open_socket(host, 0)


def test_a_port_in_use_is_named(command):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        said = command(f"view wrn-10-1 --port {port}")
    assert said.status == 2
    assert f"--port {port} cannot be opened on 127.0.0.1: Address already in use" in said.err


def test_without_aiohttp_it_says_what_to_install(command, monkeypatch):
    monkeypatch.delitem(sys.modules, "attention_transfer.view.server", raising=False)
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    said = command("view wrn-10-1")
    assert said.status == 2
    assert "pip install 'attention-transfer[view]'" in said.err


def test_a_network_that_does_not_exist_is_named(command):
    said = command("view wrn-17-1 --port 0")
    assert said.status == 2
    assert "wrn-16-1" in said.err
