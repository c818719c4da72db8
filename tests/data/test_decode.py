import io
import warnings

import numpy as np
import pytest
from PIL import Image

from attention_transfer.data import decode
from attention_transfer.data.reader import Reader
from attention_transfer.errors import UserError


def encode(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def decoded(*encoded, size=8, on_bad_image="error"):
    out = np.zeros((len(encoded), size, size, 3), dtype=np.uint8)
    return out, decode.decode_into(out, encoded.__getitem__, lambda i: f"image {i}", on_bad_image)


def grey(values):
    return np.repeat(np.asarray(values, dtype=np.uint8)[..., None], 3, axis=-1)


RAMP = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


def test_the_filters_of_warnings_stay_as_they_were(picture, monkeypatch):
    real = decode.orientation

    def orientation(image):
        warnings.simplefilter("ignore")  # as threads leave it that end in another order
        return real(image)

    monkeypatch.setattr(decode, "orientation", orientation)
    before = list(warnings.filters)
    decoded(encode(picture()))
    assert warnings.filters == before


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "TIFF"])
def test_rgb_and_grey_are_exact(kind, picture):
    out, sizes = decoded(encode(picture(), kind), encode(Image.fromarray(RAMP), kind))
    assert np.array_equal(out[0], np.asarray(picture())) and np.array_equal(out[1], grey(RAMP))
    assert sizes.tolist() == [[8, 8], [8, 8]]


def test_lossless_webp(picture):
    assert np.array_equal(
        decoded(encode(picture(), "WEBP", lossless=True))[0][0], np.asarray(picture())
    )


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(kind):
    wide = RAMP.astype(np.uint16) * 257
    assert np.array_equal(decoded(encode(Image.fromarray(wide), kind))[0][0], grey(RAMP))


def test_transparency_is_dropped(picture):
    pixels = np.asarray(picture())
    alpha = np.concatenate([pixels, RAMP[..., None]], axis=-1)
    with_alpha = np.stack([RAMP, 255 - RAMP], axis=-1)
    out, _ = decoded(
        encode(Image.fromarray(alpha, "RGBA")), encode(Image.fromarray(with_alpha, "LA"))
    )
    assert np.array_equal(out[0], pixels) and np.array_equal(out[1], grey(RAMP))


@pytest.mark.filterwarnings("error")
def test_palettes_with_and_without_transparency(picture):
    palette = picture().quantize(16)
    out, _ = decoded(
        encode(palette), encode(palette, transparency=bytes(range(16))), encode(palette, "GIF")
    )
    for made in out:
        assert np.array_equal(made, np.asarray(palette.convert("RGB")))


def test_cmyk_jpeg(picture):
    smooth = picture(2, 2).resize((8, 8), Image.Resampling.BILINEAR)
    out, _ = decoded(encode(smooth.convert("CMYK"), "JPEG", quality=100))
    assert np.abs(out[0].astype(int) - np.asarray(smooth)).max() <= 6


def test_black_and_white():
    assert np.array_equal(
        decoded(encode(Image.fromarray(RAMP > 100)))[0][0], grey((RAMP > 100) * 255)
    )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation, picture):
    from PIL import ImageOps

    image = picture(8, 8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    blob = encode(image, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(blob)))
    assert np.array_equal(decoded(blob)[0][0], np.asarray(expected))


def test_damaged_exif_leaves_the_pixels(picture):
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = encode(picture(), "JPEG", exif=exif)
    start = whole.index(b"MM\x00*") + 4
    damaged = whole[:start] + b"\xff" * 6 + whole[start + 6 :]
    upright, turned = decoded(encode(picture(), "JPEG"), whole)[0]
    assert not np.array_equal(upright, turned)
    assert np.array_equal(decoded(damaged)[0][0], upright)


def test_upright_size_of_a_rotated_image(picture):
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decoded(encode(picture(16, 8), exif=exif))[1].tolist() == [[8, 16]]


def test_shorter_side_is_resized_and_the_centre_cropped(picture):
    image = picture(20, 10)
    expected = image.resize((12, 6), Image.Resampling.BILINEAR).crop((3, 0, 9, 6))
    assert np.array_equal(decoded(encode(image), size=6)[0][0], np.asarray(expected))
    tall = picture(5, 9)
    expected = tall.resize((10, 18), Image.Resampling.BILINEAR).crop((0, 4, 10, 14))
    assert np.array_equal(decoded(encode(tall), size=10)[0][0], np.asarray(expected))


def test_a_wide_line_still_fills_the_square(picture):
    out, _ = decoded(encode(picture(100, 1)), size=8)
    assert out.any(axis=(1, 2, 3)).all()


@pytest.mark.parametrize("broken", [b"", b"not an image", None])
def test_a_bad_image_is_named_or_skipped(broken, picture):
    whole = encode(picture())
    with pytest.raises(
        UserError, match=r"cannot read the image image 1 \(.*--on-bad-image skip"
    ) as caught:
        decoded(whole, broken)
    assert "\n" not in str(caught.value)
    out, sizes = decoded(whole, broken, whole, on_bad_image="skip")
    assert sizes[:, 0].tolist() == [8, 0, 8] and np.array_equal(out[0], out[2])


@pytest.mark.parametrize(("kind", "side"), [("PNG", 32), ("JPEG", 64), ("WEBP", 32)])
def test_truncated_files_are_bad(kind, side, picture):
    blob = encode(picture(side, side), kind)
    with pytest.raises(UserError, match="cannot read the image image 0"):
        decoded(blob[: len(blob) * 2 // 3])


def test_of_many_bad_images_the_first_is_named(picture):
    blobs = [encode(picture())] * 100 + [b"bad"] * 200
    with pytest.raises(UserError, match="image 100 "):
        decoded(*blobs)


def test_boxes_follow_resize_and_crop():
    boxes = np.array([[0, 0, 20, 10], [0, 0, 4, 10], [5, 0, 6, 1], [0, 0, 0, 0]])
    sizes = np.array([[20, 10]] * 4)
    # 20x10 becomes 12x6, of which columns 3 to 9 stay.
    expected = [[0, 0, 6, 6], [0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]]
    assert decode.fit_boxes(boxes, sizes, 6).tolist() == expected


class Encodings(Reader):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def encoded(self, i):
        return self.images[i]


def test_default_size(picture):
    def size(*shapes):
        return Encodings([encode(picture(*shape)) for shape in shapes]).default_size()

    assert size((40, 40), (40, 40)) == 40
    assert size((40, 30), (40, 30)) == 64
    assert size((40, 40), (96, 96)) == 64
    assert size((200, 120), (97, 110), (50, 50)) == 224
    assert Encodings([b"bad", None]).default_size() == 64


def test_memory_is_asked_before_it_is_taken(monkeypatch):
    monkeypatch.setattr(decode, "available_memory", lambda: 10 * 2**30)
    decode.check_memory("folder:x", 40_000, 224, True)
    with pytest.raises(
        UserError,
        match=r"folder:x: 50000 images of 224x224 take 7.01 GiB.*60% of the 10.00 GiB.*stream",
    ):
        decode.check_memory("folder:x", 50_000, 224, True)
    with pytest.raises(UserError, match="or limit_val$"):
        decode.check_memory("cifar10", 50_000, 224, False)
    monkeypatch.setattr(decode, "available_memory", lambda: None)
    decode.check_memory("folder:x", 10**9, 224, True)


def test_this_machine_has_memory():
    free = decode.available_memory()
    assert free is None or free > 2**20
