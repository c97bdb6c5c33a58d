"""Odd and broken images, each made here, with the picture it holds or the reason it is refused.

Every picture is made from `UPRIGHT`, whose corners differ, so that a turn, a swap of colours or a
missing part shows.
"""

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

from pipeline.data.image import Pixels, Reason

BACKGROUND = (250, 120, 180)
WIDTH, HEIGHT = 60, 40
EXACT, LOSSY, COARSE = 1, 10, 40  # largest differences of a colour value


@dataclass(frozen=True, kw_only=True, slots=True)
class Beast:
    """An image, and what it is to give: `pixels` within `tolerance`, or else a `reason`."""

    name: str
    data: bytes | None
    pixels: Pixels | None = None
    tolerance: int = LOSSY
    reason: Reason | None = None


def _upright() -> Pixels:
    """Smooth colours, so that JPEG keeps them; no symmetry, so that a turn shows."""
    x, y = np.meshgrid(np.linspace(0, 255, WIDTH), np.linspace(0, 255, HEIGHT))
    return np.stack([x, y, (x + 2 * y) / 3], axis=-1).astype(np.uint8)


UPRIGHT = _upright()
PICTURE = Image.fromarray(UPRIGHT)
GRAY = np.repeat(np.asarray(PICTURE.convert("L"))[..., None], 3, axis=-1)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    """Encode by Pillow."""
    buffer = io.BytesIO()
    image.copy().save(buffer, kind, **options)  # saving leaves its settings on the image
    return buffer.getvalue()


def other() -> Image.Image:
    """Give a second frame or page, nothing like the first."""
    return Image.fromarray(255 - UPRIGHT)


def turned(orientation: int) -> Pixels:
    """What is stored so that its EXIF orientation makes it `UPRIGHT`."""
    stored = {
        1: UPRIGHT,
        2: UPRIGHT[:, ::-1],
        3: UPRIGHT[::-1, ::-1],
        4: UPRIGHT[::-1],
        5: UPRIGHT.transpose(1, 0, 2),
        6: np.rot90(UPRIGHT, 1),
        7: UPRIGHT[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(UPRIGHT, -1),
    }
    return np.ascontiguousarray(stored[orientation])


def exif(orientation: int, order: str = "<", kind: int = 3) -> bytes:
    """EXIF that says nothing but the orientation, as SHORT (3) or LONG (4)."""
    value = struct.pack(order + ("HH" if kind == 3 else "I"), *[orientation, 0][: 5 - kind])
    magic = b"II*\0" if order == "<" else b"MM\0*"
    return magic + struct.pack(order + "IHHHI", 8, 1, 0x0112, kind, 1) + value + bytes(4)


def segment(marker: int, content: bytes) -> bytes:
    """Give a segment of a JPEG."""
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def jpeg_with(*segments: bytes, pixels: Pixels = UPRIGHT) -> bytes:
    """Give a JPEG with `segments` right after its start."""
    plain = encode(Image.fromarray(pixels), "JPEG", quality=95, subsampling=0)
    return plain[:2] + b"".join(segments) + plain[2:]


def png_chunk(kind: bytes, content: bytes) -> bytes:
    """Give a chunk of a PNG."""
    check = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + check


def png_header(width: int, height: int) -> bytes:
    """Give a PNG that promises a picture and has none."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b"")


def _claiming(jpeg: bytes, width: int, height: int) -> bytes:
    frame = max(jpeg.find(b"\xff\xc0"), jpeg.find(b"\xff\xc2"))
    return jpeg[: frame + 5] + struct.pack(">HH", height, width) + jpeg[frame + 9 :]


def _on_background(alpha: np.ndarray) -> Pixels:
    share = alpha[..., None] / 255
    return (UPRIGHT * share + np.array(BACKGROUND) * (1 - share)).round().astype(np.uint8)


def _jpegs() -> Iterator[Beast]:
    plain = encode(PICTURE, "JPEG", quality=95)
    progressive = encode(PICTURE, "JPEG", quality=95, progressive=True)
    cmyk = encode(PICTURE.convert("CMYK"), "JPEG", quality=95)
    scan = plain.index(b"\xff\xda")
    for name, data in {
        "baseline": plain,
        "progressive": progressive,
        "of full colour": encode(PICTURE, "JPEG", quality=95, subsampling=0),
        "of half colour": encode(PICTURE, "JPEG", quality=95, subsampling=1),
        "stored as RGB": encode(PICTURE, "JPEG", quality=95, keep_rgb=True),
        "with restart markers": encode(PICTURE, "JPEG", quality=95, restart_marker_blocks=2),
        "CMYK": cmyk,
        "with a comment": jpeg_with(segment(0xFE, b"x" * 60_000)),
        "with fill bytes between segments": jpeg_with(b"\xff" * 7),
        "with fill bytes before its end": plain[:-2] + b"\xff\xff" + plain[-2:],
        "with zeros behind": plain + bytes(5000),
        "with text behind": plain + b"<!-- served by a proxy -->",
        "with another behind": plain + encode(other(), "JPEG"),
        "with two pictures (MPO)": encode(PICTURE, "MPO", save_all=True, append_images=[other()],
                                          quality=95),
        "with EXIF of no entries": jpeg_with(segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0\0\0")),
        "with EXIF cut off": jpeg_with(segment(0xE1, b"Exif\0\0" + exif(6)[:14])),
        "with EXIF pointing nowhere": jpeg_with(segment(0xE1, b"Exif\0\0MM\0*" + b"\xff" * 4)),
        "with EXIF of garbage": jpeg_with(segment(0xE1, b"Exif\0\0" + b"garbage" * 9)),
        "with orientation 0": jpeg_with(segment(0xE1, b"Exif\0\0" + exif(0))),
        "with orientation 9": jpeg_with(segment(0xE1, b"Exif\0\0" + exif(9))),
    }.items():  # fmt: skip
        yield Beast(name=f"JPEG {name}", data=data, pixels=UPRIGHT)
    yield Beast(name="JPEG gray", data=encode(PICTURE.convert("L"), "JPEG"), pixels=GRAY)
    for orientation in range(1, 9):
        for order, letters in (("<", "II"), (">", "MM")):
            content = segment(0xE1, b"Exif\0\0" + exif(orientation, order))
            data = jpeg_with(content, pixels=turned(orientation))
            name = f"JPEG of orientation {orientation}, {letters}"
            yield Beast(name=name, data=data, pixels=UPRIGHT)
    sideways = turned(6)
    tag = segment(0xE1, b"Exif\0\0" + exif(6))
    for name, data in {
        "as LONG": jpeg_with(segment(0xE1, b"Exif\0\0" + exif(6, ">", 4)), pixels=sideways),
        "behind a colour profile": jpeg_with(segment(0xE2, bytes(50_000)), tag, pixels=sideways),
        "behind fill bytes": jpeg_with(b"\xff" * 7, tag, pixels=sideways),
        "behind XMP": jpeg_with(segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x/>"), tag,
                                pixels=sideways),
        "of a CMYK picture": encode(Image.fromarray(sideways).convert("CMYK"), "JPEG", quality=95,
                                    exif=b"Exif\0\0" + exif(6)),
    }.items():  # fmt: skip
        yield Beast(name=f"JPEG with orientation {name}", data=data, pixels=UPRIGHT)
    for name, data in {
        "magic only": plain[:2],
        "header only": plain[:scan],
        "without its last byte": plain[:-1],
        "without its end": plain[:-2],
        "short of 16 bytes": plain[:-16],
        "cut in half": plain[: len(plain) // 2],
        "progressive, short of 3 bytes": progressive[:-3],
        "progressive, cut in half": progressive[: len(progressive) // 2],
        "CMYK, cut in half": cmyk[: len(cmyk) // 2],
        "cut, with text behind": plain[: len(plain) * 3 // 4] + b"<html>timed out</html>",
        "damaged inside": plain[: scan + 40] + b"\xff\xd0" * 20 + plain[scan + 80 :],
        "missing its tables": plain[:2] + plain[plain.index(b"\xff\xc0") :],
        "of more rows than it has": _claiming(plain, WIDTH, 4 * HEIGHT),
        "of no rows": _claiming(plain, WIDTH, 0),
        "behind two bytes": b"\r\n" + plain,
    }.items():
        yield Beast(name=f"JPEG {name}", data=data, reason="corrupt_image")
    for width, height in ((13_400, 13_400), (65_500, 65_500)):
        data = _claiming(plain, width, height)
        yield Beast(name=f"JPEG bomb of {width}x{height}", data=data, reason="huge_image")
    data = _claiming(progressive, 65_500, 65_500)
    yield Beast(name="JPEG bomb, progressive", data=data, reason="huge_image")


def _pngs() -> Iterator[Beast]:
    plain = encode(PICTURE, "PNG")
    text = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(80_000_000), 9))
    broken = png_chunk(b"eXIf", b"II*\0" + b"\xff" * 9)
    deep = cv2.imencode(".png", UPRIGHT[..., ::-1].astype(np.uint16) * 257)[1].tobytes()
    stored = encode(Image.fromarray(turned(8)), "PNG")
    for name, data in {
        "RGB": plain,
        "of 16 bits a colour": deep,
        "animated": encode(PICTURE, "PNG", save_all=True, append_images=[other()]),
        "with broken EXIF": plain[:33] + broken + plain[33:],
        "with EXIF of garbage": plain[:33] + png_chunk(b"eXIf", b"garbage" * 9) + plain[33:],
        "of orientation 8": stored[:33] + png_chunk(b"eXIf", exif(8)) + stored[33:],
        "with text behind": plain + b"trailing",
    }.items():
        yield Beast(name=f"PNG {name}", data=data, pixels=UPRIGHT, tolerance=EXACT)
    ramp = np.linspace(0, 65_535, WIDTH * HEIGHT).reshape(HEIGHT, WIDTH).astype(np.uint16)
    expected = np.repeat((ramp / 257).round().astype(np.uint8)[..., None], 3, axis=-1)
    data = encode(Image.fromarray(ramp), "PNG")
    yield Beast(name="PNG gray of 16 bits", data=data, pixels=expected, tolerance=EXACT)
    is_white = UPRIGHT[..., 2] > 90
    expected = np.repeat(is_white[..., None], 3, axis=-1).astype(np.uint8) * 255
    data = encode(Image.fromarray(is_white), "PNG")
    yield Beast(name="PNG black and white", data=data, pixels=expected, tolerance=EXACT)
    colours = PICTURE.quantize(200)
    expected = np.asarray(colours.convert("RGB"))
    yield Beast(name="PNG palette", data=encode(colours, "PNG"), pixels=expected, tolerance=EXACT)
    alpha = np.repeat(np.linspace(0, 255, WIDTH)[None].astype(np.uint8), HEIGHT, axis=0)
    clear = Image.fromarray(np.dstack([UPRIGHT, alpha]))
    expected = _on_background(alpha)
    yield Beast(name="PNG with alpha", data=encode(clear, "PNG"), pixels=expected, tolerance=2)
    key = tuple(int(value) for value in UPRIGHT[3, 5])
    expected = np.where((key == UPRIGHT).all(-1)[..., None], BACKGROUND, UPRIGHT).astype(np.uint8)
    data = encode(PICTURE, "PNG", transparency=key)
    yield Beast(name="PNG with a key colour", data=data, pixels=expected, tolerance=EXACT)
    ground = np.full((HEIGHT, WIDTH, 3), BACKGROUND, np.uint8)
    data = encode(Image.new("LA", (WIDTH, HEIGHT), (9, 0)), "PNG")
    yield Beast(name="PNG gray, invisible", data=data, pixels=ground, tolerance=EXACT)
    flat = Image.new("P", (WIDTH, HEIGHT), 1)
    flat.putpalette([10, 20, 30, 40, 50, 60])
    data = encode(flat, "PNG", transparency=1)
    yield Beast(name="PNG palette, invisible", data=data, pixels=ground, tolerance=EXACT)
    for name, data in {
        "cut in half": plain[: len(plain) // 2],
        "damaged inside": plain[:60] + b"\xff" * 40 + plain[100:],
        "of no size": png_header(0, 0),
        "without pixels": png_header(WIDTH, HEIGHT),
        "with a bomb of text": plain[:33] + text + plain[33:],
        "magic only": plain[:8],
    }.items():
        yield Beast(name=f"PNG {name}", data=data, reason="corrupt_image")
    for side in (13_400, 60_000, 2**31 - 1):
        name = f"PNG bomb of {side}x{side}"
        yield Beast(name=name, data=png_header(side, side), reason="huge_image")


def _others() -> Iterator[Beast]:
    alpha = np.zeros((HEIGHT, WIDTH), np.uint8)
    alpha[:, WIDTH // 2 :] = 255
    clear = Image.fromarray(np.dstack([UPRIGHT, alpha]))
    lossless = encode(PICTURE, "WEBP", lossless=True)
    gif = encode(PICTURE, "GIF")
    bmp, tiff = encode(PICTURE, "BMP"), encode(PICTURE, "TIFF", compression="tiff_lzw")
    avif = encode(PICTURE, "AVIF", quality=95, subsampling="4:4:4")
    for name, data, tolerance in (
        ("WebP", encode(PICTURE, "WEBP", quality=95), LOSSY),
        ("WebP lossless", lossless, EXACT),
        ("WebP animated", encode(PICTURE, "WEBP", save_all=True, append_images=[other()],
                                 lossless=True), EXACT),
        ("WebP of orientation 3", encode(Image.fromarray(turned(3)), "WEBP", lossless=True,
                                         exif=exif(3)), EXACT),
        ("GIF", gif, COARSE),
        ("GIF animated", encode(PICTURE, "GIF", save_all=True, append_images=[other()]), COARSE),
        ("BMP", bmp, EXACT),
        ("TIFF, LZW", tiff, EXACT),
        ("TIFF of two pages", encode(PICTURE, "TIFF", save_all=True,
                                     append_images=[other()]), EXACT),
        ("TIFF of orientation 6", encode(Image.fromarray(turned(6)), "TIFF",
                                         tiffinfo={0x0112: 6}), EXACT),
        ("TIFF CMYK", encode(PICTURE.convert("CMYK"), "TIFF"), LOSSY),
        ("AVIF", avif, COARSE),
        ("JPEG 2000", encode(PICTURE, "JPEG2000"), EXACT),
        ("PPM", encode(PICTURE, "PPM"), EXACT),
    ):  # fmt: skip
        yield Beast(name=name, data=data, pixels=UPRIGHT, tolerance=tolerance)
    seen = _on_background(alpha)
    data = encode(clear, "WEBP", lossless=True)
    yield Beast(name="WebP with alpha", data=data, pixels=seen, tolerance=EXACT)
    yield Beast(name="GIF with alpha", data=encode(clear, "GIF"), pixels=seen, tolerance=COARSE)
    for name, data in (("WebP", lossless), ("GIF", gif), ("BMP", bmp), ("TIFF", tiff),
                       ("AVIF", avif)):  # fmt: skip
        yield Beast(name=f"{name} cut in half", data=data[: len(data) // 2], reason="corrupt_image")
    wide = bytearray(bmp)
    wide[18:26] = struct.pack("<ii", 60_000, 60_000)
    yield Beast(name="BMP bomb", data=bytes(wide), reason="huge_image")


def _not_images() -> Iterator[Beast]:
    yield Beast(name="null", data=None, reason="null_image")
    yield Beast(name="no bytes", data=b"", reason="null_image")
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 60 40\n%%EndComments\nshowpage\n%%EOF\n"
    for name, data in {
        "one byte": b"\xff",
        "zeros": bytes(1000),
        "spaces": b" \n" * 50,
        "an error page": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "JSON": b'{"error": "rate limit"}',
        "a path": b"images/0001.jpg",
        "base64": b"/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAgGBgcGBQgHBwcJ",
        "SVG": svg,
        "EPS": eps,
        "PDF": b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n",
        "ZIP": b"PK\x03\x04" + bytes(60),
        "gzip": b"\x1f\x8b\x08\x00" + bytes(60),
        "video": b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + bytes(60),
        "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(60),
        "noise": np.random.default_rng(0).bytes(4096),
    }.items():
        yield Beast(name=name, data=data, reason="corrupt_image")


def _sizes() -> Iterator[Beast]:
    for width, height in ((1, 1), (1, 40), (40, 1)):
        for kind in ("JPEG", "PNG"):
            data = encode(Image.new("RGB", (width, height)), kind)
            yield Beast(name=f"{kind} of {width}x{height}", data=data, reason="tiny_image")
    for width, height in ((2, 2), (3000, 2), (2, 3000)):
        for kind in ("JPEG", "PNG"):
            pixels = np.full((height, width, 3), (9, 99, 199), np.uint8)
            data = encode(Image.fromarray(pixels), kind)
            yield Beast(name=f"{kind} of {width}x{height}", data=data, pixels=pixels, tolerance=3)


BEASTS = [*_jpegs(), *_pngs(), *_others(), *_not_images(), *_sizes()]
