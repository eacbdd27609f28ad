"""Decoding as a person would expect, and ADM's crop to the pixel."""

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from mdt_ray.data import images
from tests.data.pictures import encoded

RED, GREY = (200, 30, 60), 77


def save(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixel(data: bytes, **options) -> tuple[int, ...]:
    image = images.decode_image(data, **options)
    assert image.mode == "RGB"
    return image.getpixel((1, 1))


@pytest.mark.parametrize(("mode", "kind", "colour"), [
    ("RGB", "png", RED), ("RGB", "bmp", RED), ("RGB", "webp", RED), ("RGB", "tiff", RED), ("CMYK", "tiff", RED),
    ("CMYK", "jpeg", RED), ("RGBA", "png", RED), ("P", "png", RED), ("P", "gif", RED), ("YCbCr", "jpeg", RED),
    ("L", "png", (GREY,) * 3), ("LA", "png", (GREY,) * 3), ("L", "jpeg", (GREY,) * 3), ("1", "png", (255,) * 3)])
def test_colours_stay_what_they_look_like(mode, kind, colour):
    image = Image.new("RGB", (8, 8), colour)
    image = image.quantize() if mode == "P" else image.convert(mode)
    found = pixel(save(image, kind, **({"lossless": True} if kind == "webp" else {})))
    assert max(abs(a - b) for a, b in zip(found, colour, strict=True)) <= 2


def test_sixteen_bits_are_scaled_not_clipped():
    grey = Image.fromarray(np.full((8, 8), GREY * 256 + 99, np.uint16))
    assert pixel(save(grey, "png")) == (GREY,) * 3
    assert pixel(save(grey, "tiff")) == (GREY,) * 3
    assert pixel(_png_of_16_bit_colours()) == (200, 30, 60)


def _png_of_16_bit_colours() -> bytes:
    row = b"\0" + struct.pack(">3H", 200 * 257, 30 * 257, 60 * 257) * 4

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row * 4)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_transparency_lies_over_white(kind):
    image = Image.new("RGBA", (8, 8), (*RED, 0))
    assert pixel(save(image, kind, **({"lossless": True, "exact": True} if kind == "webp" else {}))) == (255, 255, 255)
    half = save(Image.new("RGBA", (8, 8), (0, 0, 0, 128)), "png")
    assert pixel(half) == (127, 127, 127)


def test_a_transparent_palette_colour_is_white():
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, *RED])
    assert pixel(save(image, "png", transparency=1)) == (255, 255, 255)
    assert pixel(save(image, "png")) == RED


@pytest.mark.parametrize("kind", ["gif", "png", "webp"])
def test_of_an_animation_the_first_frame_counts(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, (0, 255, 0))]
    data = save(frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "webp" else {}))
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert pixel(data) == RED


def test_exif_rotation_is_an_option():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    data = save(Image.new("RGB", (20, 10), RED), "jpeg", exif=exif)
    assert images.decode_image(data).size == (20, 10)
    assert images.decode_image(data, exif_rotation=True).size == (10, 20)


@pytest.mark.parametrize(("data", "reason"), [
    (b"", "no bytes"), (None, "no bytes"), (b"not an image", "no known format"),
    (encoded()[:120], "not a readable image"), (encoded(kind="jpeg")[:-40], "truncated"),
    (encoded()[:60], "not a readable image"), (encoded(kind="gif")[:20], "not a readable image"),
    (encoded(kind="tiff")[:50], "not a readable image"), (encoded(kind="webp")[:50], "not a readable image"),
    (save(Image.new("F", (8, 8)), "tiff"), "floating-point")])
def test_what_is_no_image_says_why(data, reason):
    with pytest.raises(ValueError, match=reason):
        images.decode_image(data)


def test_programs_are_no_pictures():
    """Pillow would hand them to Ghostscript."""
    for data in (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", b"%PDF-1.4\n"):
        with pytest.raises(ValueError, match="no known format"):
            images.decode_image(data)


def test_a_decompression_bomb_is_refused_by_its_header(monkeypatch):
    """By Pillow, and by us where somebody took its limit away."""
    bomb = save(Image.new("1", (15_000, 15_000)), "png")
    assert len(bomb) < 100_000
    for limit, message in ((Image.MAX_IMAGE_PIXELS, "decompression bomb"), (None, "15000 x 15000")):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match=message):
            images.decode_image(bomb)
    large = save(Image.new("1", (10_000, 9_500)), "png")  # above Pillow's warning, below the limit
    assert images.decode_image(large).size == (10_000, 9_500)


def tiff(fields: dict[int, tuple[str, int]], order: str = "<", large: bool = False, more: tuple = ()) -> bytes:
    """A grey picture of 16 x 16 in one tile, deflated; fields by their number, as type and value, and some once more."""
    at, number, entry, width = ("Q", "Q", "HHQ", 8) if large else ("I", "H", "HHI", 4)
    magic = struct.pack(order + "HHH", 43, 8, 0) if large else struct.pack(order + "H", 42)
    head = {"<": b"II", ">": b"MM"}[order] + magic
    begin = len(head) + width
    tile = zlib.compress(bytes([GREY]) * fields[322][1] * fields[323][1], 9)
    every = {256: ("H", 16), 257: ("H", 16), 258: ("H", 8), 259: ("H", 8), 262: ("H", 1), 277: ("H", 1),
             324: ("I", begin), 325: ("I", len(tile))} | fields
    kinds = {"H": 3, "I": 4, "Q": 16, "q": 17}
    entries = [struct.pack(order + entry, tag, kinds[kind], 1) + struct.pack(order + kind, value).ljust(width, b"\0")
               for tag, (kind, value) in sorted([*every.items(), *more])]
    index = struct.pack(order + number, len(entries)) + b"".join(entries) + bytes(width)
    return head + struct.pack(order + at, begin + len(tile)) + tile + index


@pytest.mark.parametrize(("order", "large"), [("<", False), (">", False), ("<", True)])
def test_tiles_are_counted_among_the_pixels(monkeypatch, order, large):
    """A reader unpacks all of a tile, however small the picture."""
    monkeypatch.setattr(images, "MAX_PIXELS", 10_000)
    kinds = "HIQ" if large else "HI"
    for side, kind in zip((16, 64, 96), "HIH", strict=True):
        assert pixel(tiff({322: (kind, side), 323: (kind, side)}, order, large)) == (GREY,) * 3
    for kind in kinds:
        with pytest.raises(ValueError, match=r"112 x 112 pixels|no clear size"):
            images.decode_image(tiff({322: (kind, 112), 323: (kind, 112)}, order, large))
    for other in (16, 112):  # Pillow takes one of them, libtiff the other
        with pytest.raises(ValueError, match="no clear size"):
            images.decode_image(tiff({322: ("H", 128 - other), 323: ("H", 16)}, order, large, ((322, ("H", other)),)))
    if large:  # Pillow does not know the type
        with pytest.raises(ValueError, match="no clear size"):
            images.decode_image(tiff({322: ("q", 112), 323: ("q", 112)}, order, large))


def test_what_tiles_have_beyond_the_picture_is_counted(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 10_000)
    with pytest.raises(ValueError, match="112 x 112 pixels"):
        images.decode_image(tiff({257: ("H", 100), 322: ("H", 112), 323: ("H", 16)}))


@pytest.mark.parametrize("seed", range(40))
def test_hostile_bytes_only_ever_raise_value_errors(seed):
    rng = np.random.default_rng(seed)
    kind = ("png", "jpeg", "gif", "tiff", "webp", "bmp")[seed % 6]
    data = bytearray(encoded(seed=seed, kind=kind))
    for place in rng.integers(0, len(data), 12):
        data[place] = rng.integers(0, 256)
    with contextlib.suppress(ValueError):
        assert images.decode_image(bytes(data[:rng.integers(1, len(data))] if seed % 2 else data)).mode == "RGB"


# The crop


def adm_crop(image: Image.Image, size: int) -> np.ndarray:
    """The oracle: halve while twice too large, resize the short side, cut."""
    w, h = image.size
    while min(w, h) >= 2 * size:
        w, h = w // 2, h // 2
        image = image.resize((w, h), Image.BOX)
    w, h = round(w * (size / min(w, h))), round(h * (size / min(w, h)))
    pixels = np.array(image.resize((w, h), Image.BICUBIC))
    return pixels[(h - size) // 2:, (w - size) // 2:][:size, :size]


@pytest.mark.parametrize("size", [(32, 32), (33, 70), (100, 64), (31, 500), (640, 480), (17, 16), (1, 1), (3, 2), (63, 64),
                                  (65, 127), (2048, 1365), (1, 900), (5000, 40), (129, 4001)])
@pytest.mark.parametrize("side", [8, 32, 56])
def test_center_crop_is_adms(size, side):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    found = images.center_crop(image, side)
    assert found.shape == (side, side, 3)
    assert np.array_equal(found, adm_crop(image, side))


@pytest.mark.parametrize("size", [(500, 375), (333, 500), (1601, 1201), (4000, 600), (256, 256), (200, 90)])
def test_center_crop_is_adms_at_imagenets_size(size):
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    assert np.array_equal(images.center_crop(image, 256), adm_crop(image, 256))


def test_a_picture_too_long_to_resize_is_refused():
    with pytest.raises(ValueError, match=r"256 x 2560000 pixels are more than"):
        images.center_crop(Image.new("RGB", (1, 10_000)), 256)
