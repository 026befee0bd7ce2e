# SPDX-License-Identifier: Apache-2.0
"""Transforms against torchvision.transforms.v2 with the same parameters, and what must hold for all of them."""

import pytest
import torch
import torchvision.transforms.v2.functional as F
from torch.testing import assert_close
from torchvision.transforms import InterpolationMode, v2

from fvm_fast.data import EmojiPairs
from fvm_fast.data.transforms import (
    Aligned,
    Anywhere,
    CenterResize,
    ColorJitter,
    Compose,
    Composite,
    GaussianBlur,
    Normalize,
    Place,
    RandomAffine,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomResizedCrop,
    ToFloat,
    clip_train,
)
from fvm_fast.data.transforms.blur import gaussian_blur
from fvm_fast.data.transforms.color import adjust_brightness, adjust_contrast, adjust_hue, adjust_saturation
from fvm_fast.data.transforms.geometry import affine_sample, crop_resize, rotation_shear
from fvm_fast.data.transforms.separable import to_uint8

RANDOM = {
    "crop": RandomResizedCrop(20, (0.2, 1.0)),
    "affine": RandomAffine((-30, 30), (0.1, 0.2), (0.7, 1.3), (-10, 10)),
    "place": Place(20),
    "place, rectangular": Place((20, 28), antialias=False),
    "flip": RandomHorizontalFlip(),
    "jitter": ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
    "gray": RandomGrayscale(0.5),
    "blur": GaussianBlur(p=0.5),
    "composite": Composite("random"),
    "anywhere": Anywhere(20, after=[ColorJitter(0.4, 0.4, 0.4, 0.1), GaussianBlur(p=0.3)]),
    "clip_train": clip_train(20, (0.3, 1.0), 0.5, (0.4, 0.4, 0.4, 0.1), grayscale_p=0.2, blur_p=0.3),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(*shape: int) -> torch.Tensor:
    """Smooth colourful images (resampled noise), uint8."""
    B, C, H, W = shape
    coarse = torch.rand(B, C, max(H // 4, 1), max(W // 4, 1), generator=seeded(1)) * 255
    return torch.nn.functional.interpolate(coarse, (H, W), mode="bicubic").clamp(0, 255).to(torch.uint8)


def assert_levels(got: torch.Tensor, expected: torch.Tensor, levels: float = 1.01) -> None:
    assert_close(got.float(), expected.float(), atol=levels, rtol=0)


@pytest.mark.parametrize("size", [(24, 24), (17, 40), (80, 72)])  # down, mixed, up
def test_crop_resize_is_torchvisions(size):
    images = pictures(3, 3, 37, 53)
    boxes = [(0, 0, 37, 53), (5, 11, 20, 30), (36, 2, 1, 7)]
    got = crop_resize(images.float(), torch.tensor(boxes, dtype=torch.float32).T, size)
    for i, (top, left, height, width) in enumerate(boxes):
        expected = F.resized_crop(images[i].float(), top, left, height, width, list(size), antialias=True)
        assert_levels(got[i], expected, 0.05)


@pytest.mark.parametrize("shape", [(64, 96), (96, 64), (48, 48)])
def test_center_resize_is_torchvisions(shape):
    images = pictures(2, 3, *shape)
    expected = F.center_crop(F.resize(images, [32], antialias=True), [32, 32])
    assert_levels(CenterResize(32)(images), expected)
    stretched = F.resize(images, [32, 40], antialias=True)
    assert_levels(CenterResize((32, 40), fit="stretch")(images), stretched)


@pytest.mark.parametrize("shape", [(40, 40), (31, 52)])
@pytest.mark.parametrize("angle, translate, scale, shear", [(25.0, (3, -4), 0.8, 12.0), (-70.0, (0, 5), 1.3, 0.0)])
def test_affine_is_torchvisions(shape, angle, translate, scale, shear):
    images = pictures(2, 3, *shape).float()
    expected = F.affine(images, angle, list(translate), scale, [shear, 0.0], InterpolationMode.BILINEAR)
    H, W = shape
    linear = rotation_shear(torch.full((2,), angle), torch.full((2,), shear)) / scale
    centre = torch.tensor([[W / 2 + translate[0], H / 2 + translate[1]]]).expand(2, 2)
    assert_close(affine_sample(images, linear, centre, shape), expected, atol=0.05, rtol=0)


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.7])
@pytest.mark.parametrize(
    "ours, oracle",
    [
        (adjust_brightness, F.adjust_brightness),
        (adjust_contrast, F.adjust_contrast),
        (adjust_saturation, F.adjust_saturation),
    ],
)
def test_colour_factors_are_torchvisions(ours, oracle, factor):
    images = pictures(3, 3, 19, 33)
    factors = torch.tensor([1.0, factor, factor])
    got = ours(images.float(), factors)
    for image, value, result in zip(images, factors.tolist(), got, strict=True):
        assert_levels(result, oracle(image, value), 2)


@pytest.mark.parametrize("shift", [-0.5, -0.13, 0.0, 0.08, 0.31])
def test_hue_is_torchvisions(shift):
    images = pictures(2, 3, 19, 33)
    images[0, :, :4] = 128  # grey has no hue
    images[0, :, 4:6] = 0
    images[0, :2, 6:8] = 255  # two channels share the maximum
    got = adjust_hue(images.float(), torch.tensor([shift, shift]))
    assert_levels(got, F.adjust_hue(images, shift), 2)


@pytest.mark.parametrize("kernel_size", [3, 9])
@pytest.mark.parametrize("shape", [(32, 32), (13, 40)])
def test_blur_is_torchvisions(kernel_size, shape):
    images = pictures(3, 3, *shape)
    sigmas = [0.3, 1.0, 2.5]
    got = gaussian_blur(images.float(), torch.tensor(sigmas), kernel_size)
    for image, sigma, result in zip(images, sigmas, got, strict=True):
        assert_levels(result, F.gaussian_blur(image, [kernel_size] * 2, [sigma] * 2))


def test_flip_gray_normalize_are_torchvisions():
    images = pictures(4, 3, 11, 18)
    assert torch.equal(RandomHorizontalFlip(1.0)(images), F.hflip(images))
    assert torch.equal(RandomHorizontalFlip(0.0)(images), images)
    assert_levels(RandomGrayscale(1.0)(images), F.rgb_to_grayscale(images, num_output_channels=3))
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    floats = F.to_dtype(images, torch.float32, scale=True)
    assert_close(ToFloat()(images), floats)
    assert_close(Normalize(mean, std)(images), F.normalize(floats, list(mean), list(std)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("background, colour", [("white", (255, 255, 255)), ((10, 200, 30), (10, 200, 30))])
def test_composite_is_pillows(background, colour):
    images = pictures(2, 4, 15, 22)
    got = Composite(background)(images)
    for image, result in zip(images, got, strict=True):
        picture = F.to_pil_image(image, mode="RGBA")
        canvas = F.to_pil_image(torch.zeros(3, 15, 22, dtype=torch.uint8))
        canvas.paste(colour, (0, 0, 22, 15))
        canvas.paste(picture, mask=picture.getchannel("A"))
        assert_levels(result, F.pil_to_tensor(canvas))


def test_composite_random_draws_one_colour_an_image():
    empty = torch.zeros(500, 4, 3, 5, dtype=torch.uint8)
    got = Composite("random")(empty, seeded()).float()
    assert torch.equal(got, got[:, :, :1, :1].expand_as(got))
    assert_close(got.mean(dim=(0, 2, 3)), torch.full((3,), 127.5), atol=12, rtol=0)
    assert got.min() < 5 and got.max() > 250


def test_composite_random_is_white_for_its_share():
    empty = torch.zeros(500, 4, 2, 2, dtype=torch.uint8)
    got = Composite("random", white_share=0.3)(empty, seeded())
    assert 0.22 < (got == 255).all(dim=(1, 2, 3)).float().mean() < 0.38
    assert (Composite("random", white_share=1.0)(empty, seeded()) == 255).all()
    with pytest.raises(ValueError, match=r"Composite.*1.5"):
        Composite("random", white_share=1.5)


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("channels, H, W", [(3, 24, 24), (4, 24, 24), (3, 17, 30), (4, 31, 12)])
def test_same_seed_same_bytes(name, channels, H, W):
    transform, images = RANDOM[name], pictures(12, channels, H, W)
    before = images.clone()
    first, again, other = (transform(images, seeded(seed)) for seed in (3, 3, 4))
    assert first.dtype == torch.uint8 and len(first) == 12
    assert torch.equal(first, again)
    assert torch.equal(images, before), "the input was written to"
    if not (name == "composite" and channels == 3):  # RGB has nothing to composite
        assert not torch.equal(first, other)
        assert first.float().std() > 1


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("channels", [3, 4])
def test_empty_batch(name, channels):
    full = RANDOM[name](pictures(2, channels, 16, 20), seeded())
    assert RANDOM[name](pictures(2, channels, 16, 20)[:0], seeded()).shape == (0, *full.shape[1:])


def test_default_generator_follows_manual_seed():
    images = pictures(8, 4, 16, 16)
    torch.manual_seed(5)
    first = Anywhere(12)(images)
    assert not torch.equal(first, Anywhere(12)(images))
    torch.manual_seed(5)
    assert torch.equal(first, Anywhere(12)(images))


def test_crop_boxes_cover_the_ranges():
    crop = RandomResizedCrop(8, (0.25, 0.5), (0.5, 2.0))
    top, left, height, width = crop.boxes(4000, 90, 120, seeded(), torch.device("cpu"))
    area, ratio = height * width / (90 * 120), width / height
    assert area.min() > 0.24 and area.max() < 0.51 and area.std() > 0.05
    assert ratio.min() > 0.48 and ratio.max() < 2.1 and ratio.log().std() > 0.3
    assert top.min() == 0 and left.min() == 0
    assert torch.equal((top + height).max(), torch.tensor(90.0))
    assert torch.equal((left + width).max(), torch.tensor(120.0))


def test_place_keeps_the_picture_when_there_is_no_choice():
    images = pictures(2, 4, 33, 33)
    images[:, 3] = 255
    assert_levels(Place(33, (1.0, 1.0), degrees=0.0, flip=0.0)(images), images)
    assert_levels(Place(33, (1.0, 1.0), degrees=0.0, flip=1.0)(images[:, :3])[:, :3], images[:, :3].flip(-1))


@pytest.mark.parametrize("H, W, size", [(64, 64, (48, 48)), (20, 40, (30, 36))])
def test_place_is_uniform_in_size_and_place(H, W, size):
    white = torch.full((1500, 3, H, W), 255, dtype=torch.uint8)
    alpha = Place(size, (0.5, 1.0), degrees=0.0)(white, seeded())[:, 3].float() / 255
    fit = min(size[0] / H, size[1] / W)
    width, height = alpha.amax(1).sum(1) / (W * fit), alpha.amax(2).sum(1) / (H * fit)
    assert_close(width, height, atol=0.06, rtol=0)  # the shape is kept, and nothing is cut off at the border
    assert width.min() > 0.48 and width.max() < 1.02
    assert_close(width.mean(), torch.tensor(0.75), atol=0.02, rtol=0)
    column = (alpha.sum(1) * (torch.arange(size[1]) + 0.5)).sum(1) / alpha.sum((1, 2))
    place = (column - width * W * fit / 2) / (size[1] - width * W * fit)  # 0 at the left edge, 1 at the right
    place = place[width < 0.9]
    assert_close(place.mean(), torch.tensor(0.5), atol=0.03, rtol=0)
    assert_close(place.std(), torch.tensor(12**-0.5), atol=0.03, rtol=0)


def test_place_turns_both_ways_and_mirrors_half():
    bar = torch.zeros(2000, 4, 33, 33, dtype=torch.uint8)
    bar[:, :, :16, 16] = 255  # a hand that points up
    bar[:, :, 2:5, 16:28] = 255  # with a flag on its right
    alpha = Place(33, (1.0, 1.0), degrees=30.0, flip=0.25)(bar, seeded())[:, 3].float()
    offset = torch.arange(33) - 16.0
    right = (alpha * offset).sum((1, 2)) / alpha.sum((1, 2))
    assert 0.2 < (right < 0).float().mean() < 0.4  # mirrored, or turned to the left by 30 degrees
    upright = Place(33, (1.0, 1.0), degrees=0.0, flip=0.25)(bar, seeded())[:, 3].float()
    right = (upright * offset).sum((1, 2)) / upright.sum((1, 2))
    assert_close((right < 0).float().mean(), torch.tensor(0.25), atol=0.03, rtol=0)


def test_place_rotates_as_torchvision():
    images = pictures(1, 3, 33, 33)
    place = Place(33, (1.0, 1.0), degrees=30.0, flip=0.0)
    got = place(images, seeded(2))[0]
    generator = seeded(2)
    torch.rand(1, generator=generator)  # the scale is drawn first
    angle = float(torch.rand(1, generator=generator) * 60 - 30)
    expected = F.affine(images, angle, [0, 0], 1.0, [0.0, 0.0], InterpolationMode.BILINEAR)[0]
    assert abs(angle) > 5
    opaque = (got[3] == 255).expand(3, 33, 33)
    assert opaque.float().mean() > 0.6
    assert_levels(got[:3][opaque], expected[opaque], 1)


@pytest.mark.parametrize("size", [24, 10])  # one and two levels down from 65
def test_place_does_not_alias(size):
    checkers = (torch.arange(65)[:, None] + torch.arange(65)) % 2 * 255
    images = checkers.to(torch.uint8).expand(6, 3, 65, 65)
    inner = slice(size // 3, -(size // 3))
    smooth = Place(size, (1.0, 1.0), degrees=20.0)(images, seeded())[:, 0, inner, inner].float()
    rough = Place(size, (1.0, 1.0), degrees=20.0, antialias=False)(images, seeded())[:, 0, inner, inner].float()
    assert rough.std() > 25 and smooth.std() < 0.25 * rough.std()
    assert_close(smooth.mean(), torch.tensor(127.5), atol=6, rtol=0)


@pytest.mark.parametrize(
    "transform", [RANDOM["crop"], RANDOM["affine"], RANDOM["place"], GaussianBlur(p=1.0), CenterResize(20)]
)
def test_transparent_pixels_lend_no_colour(transform):
    """A red disc whose transparent surroundings are coloured green stays red to its very rim."""
    y, x = torch.meshgrid(torch.arange(32) - 15.5, torch.arange(32) - 15.5, indexing="ij")
    disc = (x**2 + y**2 < 100).to(torch.uint8)
    image = torch.stack([disc * 255, (1 - disc) * 255, disc * 0, disc * 255]).expand(8, 4, 32, 32)
    got = Compose([transform, Composite((255, 0, 0))])(image, seeded())
    assert_levels(got[:, 1:], torch.zeros_like(got[:, 1:]))


def test_affine_fill():
    images = pictures(4, 3, 16, 16)
    assert_levels(RandomAffine(fill=200.0)(images), images)
    got = RandomAffine(scale=(0.25, 0.25), fill=200.0)(images, seeded())
    assert_levels(got[:, :, :4], torch.full((4, 3, 4, 16), 200.0))


def test_rounding_is_to_the_nearest():
    values = torch.tensor([-3.0, 0.4, 0.6, 1.4, 127.6, 254.6, 255.4, 300.0])
    assert to_uint8(values).tolist() == [0, 0, 1, 1, 128, 255, 255, 255]


def test_jitter_leaves_the_rest_alone():
    images = pictures(60, 3, 8, 9)
    assert torch.equal(ColorJitter(0.5, 0.5, 0.5, p=0.0)(images, seeded()), images)
    changed = (ColorJitter(0.5, 0.5, 0.5, 0.2, p=0.5)(images, seeded()).float() - images).abs().amax((1, 2, 3)) > 2
    assert 20 <= changed.sum() <= 40


def test_alpha_passes_through_colour():
    images = pictures(6, 4, 8, 9)
    for transform in (ColorJitter(0.5, 0.5, 0.5, 0.2), RandomGrayscale(1.0)):
        got = transform(images, seeded())
        assert torch.equal(got[:, 3], images[:, 3]) and not torch.equal(got[:, :3], images[:, :3])


def test_compose_rounds_once_and_takes_any_callable():
    images = pictures(4, 3, 16, 16)
    dim = ColorJitter(brightness=0.9)
    chain = Compose([dim, v2.RandomInvert(p=1.0), ToFloat()])
    generator = seeded()
    expected = ToFloat()(v2.RandomInvert(p=1.0)(dim(images, generator)))
    assert_close(chain(images, seeded()), expected)
    assert chain.returns_float and chain(images).dtype == torch.float32


def test_presets_on_emoji():
    pairs = EmojiPairs("google", subset=("activities",))
    aligned = Aligned(64)(pairs.images)
    opaque = (pairs.images[:, 3:] == 255).expand_as(aligned)
    assert_levels(aligned[opaque], pairs.images[:, :3][opaque])
    assert (aligned[(pairs.images[:, 3:] == 0).expand_as(aligned)] == 255).all()
    placed = Anywhere(48)(pairs.images, seeded())
    assert placed.shape == (len(pairs), 3, 48, 48)
    corners = placed[:, :, 0, 0].float()
    assert corners.std() > 50  # backgrounds differ


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: RandomHorizontalFlip()(torch.zeros(3, 8, 8, dtype=torch.uint8)), "add the batch with images"),
        (lambda: RandomHorizontalFlip()(torch.zeros(1, 3, 8, 8)), "should be uint8"),
        (lambda: RandomHorizontalFlip(1.5), "probability"),
        (lambda: RandomResizedCrop(0), "positive int"),
        (lambda: RandomResizedCrop(8, scale=(1.0, 0.1)), "low <= high"),
        (lambda: RandomResizedCrop(8, scale=0.5), "low <= high"),
        (lambda: CenterResize(8, fit="pad"), "'crop' or 'stretch'"),
        (lambda: Composite("pink"), "'white', 'random' or"),
        (lambda: Composite((1, 2)), "'white', 'random' or"),
        (lambda: ColorJitter(hue=0.7), "hue in"),
        (lambda: GaussianBlur(kernel_size=4), "odd"),
        (lambda: Normalize((0.5,), (0.0,)), "positive stds"),
        (lambda: Normalize((0.5,), (0.5,))(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)), "expected 1 channels"),
        (lambda: Compose([ToFloat(), RandomHorizontalFlip()]), "should be the last"),
    ],
)
def test_errors_are_sentences(call, message):
    with pytest.raises(ValueError, match=message):
        call()
