"""The page, the terminal's table and the figure of `maps`."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from attention_transfer.errors import UserError
from attention_transfer.report import (
    MapColumn,
    group_runs,
    print_table,
    read_run,
    save_maps_figure,
    write_report,
)
from attention_transfer.report.pictures import overlay, tile_size
from attention_transfer.report.table import columns
from attention_transfer.run_folder import RunFolder

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Collects what a page refers to and checks that its tags are closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.scripts: list[dict[str, str | None]] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        named = dict(attrs)
        self.tags.append(tag)
        self.addresses += [
            named[k] or "" for k in ("src", "href", "xlink:href", "srcset", "data") if k in named
        ]
        self.ids += [named["id"] or ""] if "id" in named else []
        if tag == "img":
            self.images.append(named)
        if tag == "script":
            self.scripts.append(named)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open[-1:] == [tag], f"</{tag}> closes {self.open[-1:]}"
            self.open.pop()

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def html(runs, tmp_path_factory) -> str:
    out = tmp_path_factory.mktemp("page") / "report.html"
    write_report(runs, out)
    return out.read_text()


def test_the_page_is_whole_and_needs_no_network(html):
    page = Page(html)
    assert page.open == []
    assert page.scripts == [{"type": "application/json", "id": "curve-data"},
                            {"type": "application/json", "id": "image-data"}, {}]  # fmt: skip
    assert "link" not in page.tags
    assert all(address.startswith(("#", "data:image/webp;base64,")) for address in page.addresses)
    assert not re.search(r"https?://|@import|url\((?!#)", html)
    assert len(html) < 1_500_000


def test_ids_are_unique_and_references_lead_somewhere(html):
    page = Page(html)
    assert len(set(page.ids)) == len(page.ids)
    referred = {a[1:] for a in page.addresses if a.startswith("#")} | set(
        re.findall(r"url\(#([^)]+)\)", html)
    )
    referred |= set(re.findall(r'aria-labelledby="([^"]+)"', html))
    assert referred <= set(page.ids)


def test_the_page_can_be_read_without_seeing_it(html):
    page = Page(html)
    assert page.images
    # The script gives the others a source and a description at once.
    assert all(image.get("alt") for image in page.images if image.get("src"))
    assert all("scope=" in th for th in re.findall(r"<th[\s>][^>]*", html))
    assert html.count('role="img" aria-label="') >= 4
    assert '<html lang="en">' in html


def test_the_page_shows_the_results_of_the_runs(html):
    text = Page(html).text
    for expected in (
        "WRN-16-2 → WRN-16-1 on cifar10",
        "25.7 ± 0.7",
        "−8.9",
        "0.18 M",
        "Example CPU",
        "0123abc",
    ):
        assert expected in text
    assert "8.9 points below the student alone (2 seeds; the ranges do not overlap)" in text
    assert "✗" in text
    assert "✓" in text


def test_the_same_runs_make_the_same_page(runs, html, tmp_path):
    write_report(runs, tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == html


def test_hostile_names_are_escaped(tmp_path, make_run):
    hostile = "<script>alert('x')</script>"
    classes = [hostile, "a&b", "\"c\" 'd'"]
    run = read_run(
        make_run(tmp_path, "at", "at", 0, 30, classes=classes, recipe=hostile, data=hostile)
    )
    write_report([run], tmp_path / "r.html", title=hostile)
    text = (tmp_path / "r.html").read_text()
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert" in text
    assert text.count("<script") == text.count("</script") == 3  # the page's own
    assert Page(text).open == []


@pytest.mark.parametrize(
    "left",
    ["config.yaml", "config.yaml metrics.jsonl", "config.yaml metrics.jsonl maps.npz", "all"],
)
def test_an_incomplete_run_folder_makes_a_page(tmp_path, left, make_run):
    folder = make_run(tmp_path, "at", "at", 0, 30, finished=left == "all" or "maps.npz" in left)
    for file in folder.path.iterdir():
        if left != "all" and file.name not in left.split():
            file.unlink()
    runs = [read_run(folder)]
    write_report(runs, tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert Page(text).open == []
    assert ("unfinished" in text) == (left != "all")
    assert ("data:image/webp" in text) == (left == "all" or "maps.npz" in left)


def test_an_odd_old_run_makes_a_page(tmp_path):
    folder = RunFolder(tmp_path / "old")
    folder.path.mkdir()
    folder.config_file.write_text(
        "model: FILE.py:net\nmethod: at\nteacher: timm/resnet34:pretrained\nbeta: {at: 1000}\n"
    )
    folder.metrics_file.write_text(
        '{"epoch": 1, "val_loss": NaN, "parts": null}\n{"epoch": 2, "val_accuracy": 0.5}\n{"ep'
    )
    folder.summary_file.write_text(
        '{"final": {}, "teacher": {"name": "t"}, "attention": {"stages": ["a"]}}'
    )
    folder.environment_file.write_text("{}")
    write_report([read_run(folder)], tmp_path / "r.html")
    print_table(group_runs([read_run(folder)]), Console(file=io.StringIO()))
    assert "timm/resnet34:pretrained → FILE.py:net" in Page((tmp_path / "r.html").read_text()).text


def test_write_report_refuses_no_runs_and_a_folder(runs, tmp_path):
    with pytest.raises(UserError, match="no runs"):
        write_report([], tmp_path / "r.html")
    with pytest.raises(UserError, match="is a folder"):
        write_report(runs, tmp_path)


@pytest.mark.parametrize("width", [80, 220])
def test_the_terminal_shows_every_row_and_number(runs, width):
    out = io.StringIO()
    print_table(group_runs(runs), Console(file=out, width=width))
    text = out.getvalue()
    for expected in (
        "student alone",
        "AT+KD",
        "25.7 ± 0.7",
        "−8.9",
        "22.0–22.6",
        "0.18 M",
        "0.25×",
    ):
        assert expected in text
    assert "…" not in text
    tables = text[: text.index("WRN-16-2 teacher: ")]
    assert max(map(len, tables.splitlines())) <= width


def test_the_terminal_shows_an_unfinished_run(tmp_path, make_run):
    out = io.StringIO()
    print_table(
        group_runs([read_run(make_run(tmp_path, "at", "at", 0, 30, finished=False))]),
        Console(file=out, width=100),
    )
    assert "unfinished" in out.getvalue()
    assert "epoch 5 of 12" in out.getvalue()


def test_top5_has_a_column_if_a_run_has_it(tmp_path, make_run):
    run = read_run(make_run(tmp_path, "at", "at", 0, 30))
    run.summary["final"]["val_top5"] = 0.95
    out = io.StringIO()
    print_table(group_runs([run]), Console(file=out, width=200))
    assert "top-5" in out.getvalue()
    assert "5.0" in out.getvalue()


def test_the_precision_that_is_exported(tmp_path, make_run):
    """A row that was trained in float32 has one error only."""
    folders = [make_run(tmp_path, f"{m}-{s}", m, s, 30) for m in ("at", "kd") for s in (0, 1)]
    runs = [read_run(folder) for folder in folders]
    rows = group_runs(runs)
    assert "fp32 error %" not in [column.header for column in columns(rows)]
    for run, accuracy in zip(runs[:2], (0.69, 0.68), strict=True):
        run.environment["auto"]["precision"] = "bf16"
        run.summary["final"]["val_accuracy_fp32"] = accuracy
    (column,) = [c for c in columns(rows) if c.header == "fp32 error %"]
    assert [cell.text for cell in column.cells] == ["31.5 ± 0.7", "–"]


def test_charts_keep_the_digits_of_tick_labels(tmp_path, make_run):
    run = read_run(make_run(tmp_path, "alone", "none", 0, 30))
    run.metrics = [{"epoch": epoch, "train_loss": 0.1 + epoch / 1e4} for epoch in range(1, 9)]
    write_report([run], tmp_path / "r.html")
    assert re.search(r">0\.10\d\d</text>", (tmp_path / "r.html").read_text())


def test_the_axis_of_a_single_epoch_has_whole_numbers(tmp_path, make_run):
    run = read_run(make_run(tmp_path, "alone", "none", 0, 30))
    run.metrics = [{"epoch": 1, "val_accuracy": 0.5}]
    write_report([run], tmp_path / "r.html")
    ticks = re.findall(r">([\d.]+)</text>", (tmp_path / "r.html").read_text())
    assert "1" in ticks
    assert not any(tick.startswith(("0.9", "1.0")) for tick in ticks)


def test_overlay_is_brightest_where_the_map_is_greatest():
    heat = np.zeros((4, 4), np.float32)
    heat[0, 3] = 5.0
    shown = overlay(np.full((32, 32, 3), 100, np.uint8), heat).sum(axis=-1)
    assert np.unravel_index(shown.argmax(), shown.shape)[0] < 8
    assert shown[:8, 24:].mean() > 3 * shown[16:, :16].mean()
    for odd in (np.zeros((4, 4)), np.full((4, 4), np.nan)):
        assert overlay(np.full((8, 8, 3), 100, np.uint8), odd).shape == (8, 8, 3)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (32, 32), (224, 160)])
def test_the_figure_of_maps_has_a_tile_for_each_map(tmp_path, height, width):
    images = np.zeros((3, height, width, 3), np.uint8)
    maps = {"group1": np.ones((3, 8, 8), np.float32), "group2": np.ones((3, 4, 4), np.float32)}
    columns = [
        MapColumn("WRN-16-2", ["cat", "dog", "$5 cat"], maps),
        MapColumn("AT", None, {"group2": maps["group2"]}),
    ]
    save_maps_figure(columns, images, tmp_path / "maps.png")
    tall, wide = tile_size(height, width)
    with Image.open(tmp_path / "maps.png") as figure:
        assert figure.size == (
            12 + wide + 16 + 2 * (wide + 4) + 14 + wide + 12,
            46 + 3 * (tall + 36) + 42 + 12,
        )
    assert [path.name for path in tmp_path.iterdir()] == ["maps.png"]


def test_the_figure_of_maps_as_vectors(tmp_path):
    """Images and text lie where they lie in the PNG."""
    images = np.zeros((2, 32, 32, 3), np.uint8)
    column = MapColumn("AT", ["cat", "dog"], {"group1": np.ones((2, 8, 8), np.float32)})
    save_maps_figure([column], images, tmp_path / "m.svg")
    text = (tmp_path / "m.svg").read_text()
    # 12 + 96 + 17 + 96 + 12 pixels wide, 46 + 2 * 132 + 42 + 12 high; 0.72 points a pixel.
    assert 'viewBox="0 0 167.76 262.08"' in text
    places = re.findall(
        r'width="96" height="96" transform="matrix\(0.72 0 0 0.72 (\S+) (\S+)\)"', text
    )
    in_pixels = [(round(float(x) / 0.72), round(float(y) / 0.72)) for x, y in places]
    assert in_pixels == [(12, 46), (125, 46), (12, 178), (125, 178)]
    save_maps_figure([column], images, tmp_path / "m.PDF")
    assert (tmp_path / "m.PDF").read_bytes().startswith(b"%PDF")


def test_other_extensions_are_refused(tmp_path, runs):
    column = MapColumn("AT", None, {"group1": np.ones((2, 8, 8), np.float32)})
    for name in ("z.txt", "z", "z.jpg"):
        with pytest.raises(UserError, match="expected a figure, a file ending in .png, .svg, .pdf"):
            save_maps_figure([column], np.zeros((2, 32, 32, 3), np.uint8), tmp_path / name)
    with pytest.raises(UserError, match="expected an HTML page, a file ending in .html"):
        write_report(runs, tmp_path / "r.pdf")
    assert [*tmp_path.iterdir()] == []


def test_maps_that_do_not_belong_to_the_images_are_refused(tmp_path):
    images = np.zeros((3, 32, 32, 3), np.uint8)
    column = MapColumn("AT", None, {"group1": np.ones((2, 8, 8), np.float32)})
    with pytest.raises(UserError, match="AT at group1"):
        save_maps_figure([column], images, tmp_path / "m.png")
    with pytest.raises(UserError, match="predictions"):
        save_maps_figure([MapColumn("AT", ["cat"], {})], images, tmp_path / "m.png")
    with pytest.raises(UserError, match="no maps"):
        save_maps_figure([], images, tmp_path / "m.png")


def test_importing_the_report_is_cheap():
    import subprocess
    import sys

    heavy = ("torch", "numpy", "matplotlib", "jinja2")
    code = f"import sys, attention_transfer.report; print([m for m in {heavy} if m in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


def test_a_speed_of_a_runs_own_end_is_not_compared(runs):
    out = io.StringIO()
    print_table(group_runs(runs), Console(file=out, width=220))
    assert "inference" not in out.getvalue()
    assert "latency" not in out.getvalue()


def test_speeds_measured_side_by_side_have_spread_memory_and_precision(tmp_path, make_run):
    runs = [read_run(make_run(tmp_path, method, method, 0, 30)) for method in ("at", "kd")]
    for run, median in zip(runs, (1000.0, 2000.0), strict=True):
        spread = {"median": median, "low": median / 2, "high": 2 * median}
        run.speed = {"images_per_second": spread, "latency_ms": spread, "peak_mib": 35.2}
    runs[1].environment["auto"]["precision"] = "bf16"
    write_report(runs, tmp_path / "r.html")
    out = io.StringIO()
    print_table(group_runs(runs), Console(file=out, width=220))
    for text in (out.getvalue(), Page((tmp_path / "r.html").read_text()).text):
        for expected in ("1.0 k", "500–2.0 k", "35", "bf16", "fp32", "differ in precision"):
            assert expected in text
