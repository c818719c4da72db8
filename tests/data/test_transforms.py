import io

import numpy as np
import pytest
import torch
from PIL import Image

from attention_transfer.data.options import AugmentOptions, check_augment
from attention_transfer.data.transforms import AugmentDraw, decode, make_transform
from attention_transfer.errors import UserError


@pytest.fixture
def encoded(picture):
    stream = io.BytesIO()
    picture(40, 30).save(stream, "PNG")
    return stream.getvalue()


def random_resized_crop(scale=(0.08, 1), ratio=(3 / 4, 4 / 3), flip=True):
    return make_transform(AugmentOptions("imagenet", 4, scale, ratio, flip), 16)


def made(transform, encoded, noise, size=16):
    out = np.zeros((size, size, 3), dtype=np.uint8)
    transform(out, encoded, AugmentDraw(noise=noise))
    return out


@pytest.mark.parametrize("noise", range(6))
@pytest.mark.parametrize("flip", [True, False])
def test_random_resized_crop_is_torchvisions(encoded, picture, noise, flip):
    from torchvision.transforms import v2

    steps = [
        v2.RandomResizedCrop(16, (0.2, 0.9), (0.5, 1.5), antialias=True),
        v2.RandomHorizontalFlip(),
    ]
    torch.manual_seed(noise)
    theirs = v2.Compose(steps if flip else steps[:1])(
        torch.from_numpy(np.array(picture(40, 30))).permute(2, 0, 1)
    )
    before = torch.get_rng_state()
    ours = made(random_resized_crop((0.2, 0.9), (0.5, 1.5), flip), encoded, noise)
    assert np.array_equal(ours, theirs.permute(1, 2, 0).numpy())
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_drawn_depends_on_the_noise_alone(encoded):
    transform = random_resized_crop()
    first = [made(transform, encoded, noise) for noise in range(4)]
    again = [made(transform, encoded, noise) for noise in (3, 2, 1, 0)][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], first[1])


def test_the_whole_image_brought_to_size(picture):
    stream = io.BytesIO()
    picture(16, 16).save(stream, "PNG")
    assert np.array_equal(
        made(random_resized_crop((1, 1), (1, 1), False), stream.getvalue(), 0),
        np.asarray(picture(16, 16)),
    )


def test_an_image_smaller_than_the_crop_is_enlarged(picture):
    stream = io.BytesIO()
    picture(5, 4).save(stream, "PNG")
    out = made(random_resized_crop(), stream.getvalue(), 1)
    assert out.std() > 0 and (out.reshape(-1, 3).max(0) > 0).all()


@pytest.mark.parametrize(
    ("scale", "ratio", "message"),
    [
        ((0, 1), (1, 1), r"crop_scale is \(0, 1\): expected LOW,HIGH with 0 < LOW ≤ HIGH ≤ 1"),
        ((0.5, 1.1), (1, 1), r"crop_scale is \(0.5, 1.1\)"),
        ((0.5,), (1, 1), r"crop_scale is \(0.5,\)"),
        ((0.5, 1), (2, 1), r"crop_ratio is \(2, 1\): expected LOW,HIGH with 0 < LOW ≤ HIGH"),
    ],
)
def test_wrong_ranges_are_named(scale, ratio, message):
    with pytest.raises(UserError, match=message):
        check_augment(AugmentOptions("imagenet", 4, scale, ratio), "auto")


@pytest.mark.parametrize("share", [0.3, 0.7, 0.98])
def test_a_truncated_jpeg_is_bad(share, picture):
    stream = io.BytesIO()
    picture(64, 64).save(stream, "JPEG")
    data = stream.getvalue()
    assert decode(data).shape == (64, 64, 3)
    with pytest.raises(OSError, match="truncated"):
        decode(data[: int(len(data) * share)])


def test_a_file_is_decoded_as_its_bytes(tmp_path, picture):
    Image.Image.save(picture(20, 10), tmp_path / "a.jpg", quality=90)
    made = decode(tmp_path / "a.jpg")
    assert torch.equal(made, decode((tmp_path / "a.jpg").read_bytes())) and made.shape == (
        10,
        20,
        3,
    )
