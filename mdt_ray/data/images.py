"""Encoded pictures in, square uint8 RGB arrays out. Not a reader of files, and not a pipeline."""

import io
import math
import struct
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mdt_ray.data.readers import Piece

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Pillow knows more, and gives PostScript to a program that runs it."""
MAX_PIXELS = 178_956_970
"""Pictures of more pixels are rejected, by their header: what Pillow calls a decompression bomb."""
TILE_WIDTH, TILE_LENGTH = 322, 323
"""Fields of a TIFF."""
TIFF_INTEGERS = {3: "H", 4: "I"}
"""Types of fields."""


def decode_image(data: bytes | None, exif_rotation: bool = False) -> Image.Image:
    """An encoded picture as RGB: the first frame, transparency over white, 16 bits scaled to 8.

    Args:
        exif_rotation: turn it as its EXIF orientation says (the published models were trained without).
    Raises ValueError for bytes that are no whole picture, and for what has no defined colours or too many pixels.
    """
    if not data:
        raise ValueError("no bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of corrupt EXIF data, of large pictures below MAX_PIXELS
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            _check_pixels(image.width, image.height)
            if image.format == "TIFF":
                _check_tiles(data, image.tag_v2.offset, image.width, image.height)
            if exif_rotation:
                image = ImageOps.exif_transpose(image)
            return _to_rgb(image)
    except UnidentifiedImageError as error:  # whose text holds an address in memory
        raise ValueError("not a readable image (no known format)") from error
    except Exception as error:  # Pillow's decoders raise whatever hostile bytes lead them to
        raise ValueError(f"not a readable image ({str(error) or type(error).__name__})") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("pixels are floating-point numbers without a defined range")
    if image.mode.startswith("I"):  # I;16, I;16B, I: 16-bit greyscale; plain conversion would clip at 255
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(canvas, image).convert("RGB")
    return image.convert("RGB")


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels are more than {MAX_PIXELS}")


def _check_tiles(data: bytes, offset: int, width: int, height: int) -> None:
    """Of a TIFF whose fields begin at an offset: libtiff unpacks all of each tile, however little the picture has of it.

    Looks at the bytes, since Pillow passes over types of fields that libtiff takes, and takes another of two that are the
    same. Source: TIFF 6.0, sections 2 and 15, and BigTIFF's for the wider fields.
    """
    order, large = "<" if data[:2] == b"II" else ">", data[2:4] in (b"\x2b\0", b"\0\x2b")
    count, entry = struct.Struct(order + ("Q" if large else "H")), struct.Struct(order + ("HHQ8s" if large else "HHI4s"))
    begin = offset + count.size
    fields = entry.iter_unpack(data[begin:begin + entry.size * count.unpack_from(data, offset)[0]])
    sizes: dict[int, int] = {}
    for tag, kind, number, value in fields:
        if tag in (TILE_WIDTH, TILE_LENGTH):
            if kind not in TIFF_INTEGERS or number != 1 or tag in sizes:
                raise ValueError("its tiles have no clear size")
            sizes[tag] = struct.unpack_from(order + TIFF_INTEGERS[kind], value)[0]
    if sizes:
        across, down = sizes[TILE_WIDTH], sizes[TILE_LENGTH]
        _check_pixels(math.ceil(width / across) * across, math.ceil(height / down) * down)


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """ADM's square crop: halve by box filter while the short side is at least 2 x size, bicubic to size, cut the centre.

    Returns (size, size, 3) uint8. Raises ValueError for a picture so long that the resized one would be too large.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    _check_pixels(width, height)
    image = image.resize((width, height), resample=Image.Resampling.BICUBIC)
    top, left = (height - size) // 2, (width - size) // 2
    return np.asarray(image)[top:top + size, left:left + size]


@dataclass(frozen=True)
class Pixels:
    """A decoded piece."""

    ids: list[str]
    labels: list[int]
    images: np.ndarray  # (n, H, W, 3) uint8
    rejected: list[dict[str, str]]
    """id and reason of those that are no readable image."""
    read_seconds: float
    decode_seconds: float

    @classmethod
    def of_rejected(cls, image_id: str, reason: str, image_size: int) -> "Pixels":
        empty = np.empty((0, image_size, image_size, 3), np.uint8)
        return cls([], [], empty, [{"id": image_id, "reason": reason}], 0.0, 0.0)

    @classmethod
    def joined(cls, parts: list["Pixels"]) -> "Pixels":
        return cls([i for p in parts for i in p.ids], [y for p in parts for y in p.labels],
                   np.concatenate([p.images for p in parts]), [r for p in parts for r in p.rejected],
                   sum(p.read_seconds for p in parts), sum(p.decode_seconds for p in parts))


def decode_piece(piece: Piece, image_size: int, exif_rotation: bool = False, exact: bool = False) -> Pixels:
    """Decode and crop a piece; an image that is not readable is listed, not fatal.

    Args:
        exact: list those of another size too, instead of cropping them.
    """
    started = time.perf_counter()
    ids, labels, pixels, rejected = [], [], [], []
    for image_id, label, data in zip(piece.ids, piece.labels, piece.data, strict=True):
        try:
            image = decode_image(data.as_py(), exif_rotation)
            if exact and image.size != (image_size, image_size):
                raise ValueError(f"has {image.width} x {image.height} pixels, the first picture {image_size} x {image_size}")
            pixels.append(center_crop(image, image_size))
        except ValueError as error:
            rejected.append({"id": image_id, "reason": str(error)})
            continue
        ids.append(image_id)
        labels.append(label)
    array = np.stack(pixels) if pixels else np.empty((0, image_size, image_size, 3), np.uint8)
    return Pixels(ids, labels, array, rejected, piece.seconds, time.perf_counter() - started)


def decode_pieces(pieces: Iterable[Piece], image_size: int, exif_rotation: bool = False, exact: bool = False) -> Pixels:
    """`decode_piece` of one after the other, so that memory holds one of them encoded."""
    return Pixels.joined([decode_piece(piece, image_size, exif_rotation, exact) for piece in pieces])
