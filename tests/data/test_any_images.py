"""Images of every mode and orientation come out as RGB uint8, from every kind of data."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageOps

from attention_transfer.data.open import open_data
from attention_transfer.data.transforms import decode

SIDE = 16


def smooth(seed=0):
    """JPEG keeps slow changes of colour."""
    pixels = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BILINEAR)


def encode(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def rgb(image):
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return np.asarray(image.convert("RGB"))


def rotated(image):
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def made_images():
    """{what: (file suffix, bytes, the pixels to expect, how far off each may be)}."""
    plain, grey = smooth(), smooth(1).convert("L")
    alpha = plain.copy()
    alpha.putalpha(Image.fromarray(np.arange(256, dtype=np.uint8).reshape(SIDE, SIDE)))
    wide = np.asarray(grey).astype(np.uint16) * 257
    palette = plain.quantize(16)
    exif = rotated(plain)
    turned = np.rot90(np.asarray(plain), -1)
    jpeg = {"quality": 100, "subsampling": 0}
    frames = {"save_all": True, "append_images": [smooth(7)], "lossless": True}
    return {
        "jpeg": ("jpg", encode(plain, "JPEG", **jpeg), rgb(plain), 3),
        "progressive jpeg": (
            "JPEG",
            encode(plain, "JPEG", progressive=True, **jpeg),
            rgb(plain),
            3,
        ),
        "grey jpeg": ("jpg", encode(grey, "JPEG", quality=100), rgb(grey), 1),
        "cmyk jpeg": ("jpg", encode(plain.convert("CMYK"), "JPEG", quality=100), rgb(plain), 4),
        "turned jpeg": ("jpg", encode(plain, "JPEG", exif=exif, **jpeg), turned, 3),
        "grey png": ("png", encode(grey, "PNG"), rgb(grey), 0),
        "16-bit png": ("png", encode(Image.fromarray(wide), "PNG"), rgb(grey), 0),
        "16-bit tiff": ("tif", encode(Image.fromarray(wide), "TIFF"), rgb(grey), 0),
        "rgba png": ("png", encode(alpha, "PNG"), rgb(plain), 0),
        "palette png": (
            "png",
            encode(palette, "PNG", transparency=bytes(range(16))),
            rgb(palette),
            0,
        ),
        "turned png": ("png", encode(plain, "PNG", exif=exif), turned, 0),
        "webp": ("webp", encode(plain, "WEBP", lossless=True), rgb(plain), 0),
        "animated webp": ("webp", encode(plain, "WEBP", **frames), rgb(plain), 0),
        "rgba webp": ("webp", encode(alpha, "WEBP", lossless=True, exact=True), rgb(plain), 0),
    }


MADE = made_images()


def write_folder(root):
    for part in ("train", "val"):
        (root / part / "a").mkdir(parents=True)
        for i, (suffix, data, _, _) in enumerate(MADE.values()):
            (root / part / "a" / f"{i:02}.{suffix}").write_bytes(data)
    return f"folder:{root}"


def write_parquet(root):
    root.mkdir(exist_ok=True)
    table = pa.table(
        {
            "picture": [{"bytes": data, "path": None} for _, data, _, _ in MADE.values()],
            "what": [0] * len(MADE),
        }
    )
    features = {"picture": {"_type": "Image"}, "what": {"_type": "ClassLabel", "names": ["a"]}}
    table = table.replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    for part in ("train", "test"):
        pq.write_table(table, root / f"{part}-00000-of-00001.parquet", row_group_size=4)
    return f"parquet:{root}"


def write_wds(root):
    root.mkdir(exist_ok=True)
    for part in ("train", "val"):
        with tarfile.open(root / f"{part}-000.tar", "w") as tar:
            for i, (suffix, data, _, _) in enumerate(MADE.values()):
                for name, content in ((f"{i:02}.{suffix}", data), (f"{i:02}.cls", b"0")):
                    about = tarfile.TarInfo(name)
                    about.size = len(content)
                    tar.addfile(about, io.BytesIO(content))
    return f"wds:{root}"


def assert_as_made(images):
    assert images.dtype == torch.uint8 and len(images) == len(MADE)
    for image, (what, (_, _, expected, off)) in zip(images.numpy(), MADE.items(), strict=True):
        assert np.abs(image.astype(int) - expected).max() <= off, what


@pytest.mark.parametrize("write", [write_folder, write_parquet, write_wds])
@pytest.mark.parametrize("stream", ["on", "off"])
def test_every_image_comes_out_as_rgb(tmp_path, write, stream):
    data = open_data(write(tmp_path / "data"), stream=stream)
    assert data.image_size == (SIDE, SIDE) and data.streamed == (stream == "on")
    assert_as_made(data.val.batch(slice(None)).permute(0, 2, 3, 1))
    if stream == "on":
        (made,) = data.val.batches(len(MADE))
        assert made.is_contiguous(memory_format=torch.channels_last)
        assert_as_made(made.permute(0, 2, 3, 1))


@pytest.mark.parametrize("what", MADE)
def test_the_decoder_of_streams_agrees(what):
    """The one that random resized crops are taken from, by torchvision where that is faster."""
    _, data, expected, off = MADE[what]
    made = decode(data)
    assert made.dtype == torch.uint8 and np.abs(made.numpy().astype(int) - expected).max() <= off
    with Image.open(io.BytesIO(data)) as image:
        if what not in ("16-bit png", "16-bit tiff"):  # which Pillow itself cuts off
            assert np.array_equal(made.numpy(), rgb(ImageOps.exif_transpose(image)))
