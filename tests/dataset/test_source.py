"""Image files as people have them: each becomes the right RGB pixels, or an error that names the cause."""

import errno
import io
import os
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, features
from torch.utils.data import Dataset

from dataset import source
from dataset.source import Arrays, BadImage, Files, Names, decode
from dataset.workers import PrefetchLoader

H, W = 40, 64
Y, X = np.mgrid[:H, :W, :1][:2]  # [H, W, 1] each
RGB = np.concatenate([X * 3 + 20, Y * 4 + 40, 220 - X - 2 * Y], -1).astype(
    np.uint8
)  # smooth, so that JPEG keeps it
GRAY = (X * 2 + Y).astype(np.uint8)  # [H, W, 1]
DEEP = np.where(Y == 0, 65535, GRAY * 257.0 + 200).astype(np.uint16)[..., 0]  # [H, W]
LEFT = X < W // 2  # [H, W, 1]
ALPHA = np.where(LEFT, 0, 255).astype(np.uint8)  # [H, W, 1]
IMAGE, GRAY_IMAGE = Image.fromarray(RGB), Image.fromarray(GRAY[..., 0])
FRAMES = [Image.new("RGB", (W, H), color) for color in ("red", "lime", "blue")]


def encoded(image, kind, **how):
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def joined(*channels):
    """An image of these channels [H, W, k]."""
    return Image.fromarray(np.concatenate(channels, -1))


def chunk(name, payload):
    """A part of a PNG file."""
    return struct.pack(">I", len(payload)) + name + payload + struct.pack(">I", zlib.crc32(name + payload))


def deep_color():
    """A PNG of 16 bits a channel, which Pillow reads and does not write."""
    lines = b"".join(b"\0" + line.tobytes() for line in RGB.astype(">u2") * 257)
    return b"\x89PNG\r\n\x1a\n" + (
        chunk(b"IHDR", struct.pack(">IIBBBBB", W, H, 16, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(lines))
        + chunk(b"IEND", b"")
    )


def inks():
    """Cyan, magenta, yellow and some black that give RGB: [H, W, 4]."""
    black = (255 - RGB.max(-1, keepdims=True).astype(int)) // 2
    return (
        np.concatenate([255 - np.minimum(255, RGB * 255.0 / (255 - black)), black], -1)
        .round()
        .astype(np.uint8)
    )


def ycck():
    """Adobe's other kind of CMYK: luminance and chrominance of the inks. Pillow writes 255 − x, and no marker
    that says so.
    """
    ycc = np.asarray(Image.fromarray(np.ascontiguousarray(inks()[..., :3])).convert("YCbCr"))
    stored = Image.fromarray(255 - np.concatenate([ycc, 255 - inks()[..., 3:]], -1), "CMYK")
    return adobe(encoded(stored, "JPEG", quality=95), 0, 2)


def adobe(jpeg, before, after):
    """The JPEG with another kind of colors in its marker: 0 is CMYK, 2 is YCCK."""
    at = jpeg.index(b"Adobe") + 11
    assert jpeg[at] == before
    return jpeg[:at] + bytes([after]) + jpeg[at + 1 :]


def with_exif(payload):
    """IMAGE with a block where EXIF blocks are, behind the first marker."""
    jpeg = encoded(IMAGE, "JPEG", quality=95)
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload + jpeg[2:]


def indexed():
    """A palette image whose left half has color 0, and its colors [H, W, 3]."""
    index = Image.fromarray(np.where(LEFT, 0, 1 + X % 4).astype(np.uint8)[..., 0], "P")
    index.putpalette([9, 9, 9, 250, 0, 0, 0, 250, 0, 0, 0, 250, 80, 80, 80])
    return index, np.asarray(index.convert("RGB"))


TURNED = Image.Exif()
TURNED[0x0112] = 6  # orientation: by a quarter
INDEX, COLORS = indexed()
GOOD = {  # the file, what it shows [H, W, 1 or 3], and how many levels it may be off
    **{kind: (encoded(IMAGE, kind), RGB, 0) for kind in ("PNG", "BMP", "TIFF", "PPM")},
    **{kind: (encoded(IMAGE, kind, quality=95), RGB, 3) for kind in ("JPEG", "WEBP")},
    "progressive JPEG": (encoded(IMAGE, "JPEG", quality=95, progressive=True), RGB, 2),
    "gray JPEG": (encoded(GRAY_IMAGE, "JPEG", quality=95), GRAY, 2),
    "CMYK JPEG": (adobe(encoded(Image.fromarray(inks(), "CMYK"), "JPEG", quality=95), 0, 0), RGB, 3),
    "YCCK JPEG": (ycck(), RGB, 3),
    "turned by EXIF": (encoded(IMAGE, "JPEG", quality=95, exif=TURNED), RGB, 2),
    **{
        f"broken EXIF {payload[:6]!r}": (with_exif(b"Exif\0\0" + payload), RGB, 2)
        for payload in (b"", b"garbage", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff" + bytes(40))
    },
    "gray PNG": (encoded(GRAY_IMAGE, "PNG"), GRAY, 0),
    "palette": (encoded(INDEX, "PNG"), COLORS, 0),
    "palette, a color transparent": (encoded(INDEX, "PNG", transparency=0), np.where(LEFT, 255, COLORS), 0),
    "palette, a color half transparent": (
        encoded(INDEX, "PNG", transparency=bytes([0, 255, 255, 255, 128])),
        np.where(LEFT, 255, np.where(X % 4 == 3, 167, COLORS)),
        1,
    ),
    "RGBA": (encoded(joined(RGB, ALPHA), "PNG"), np.where(LEFT, 255, RGB), 0),
    "RGBA, half transparent": (encoded(joined(RGB, np.full_like(ALPHA, 102)), "PNG"), 153 + RGB * 0.4, 1),
    "LA": (encoded(joined(GRAY, ALPHA), "PNG"), np.where(LEFT, 255, GRAY), 0),
    "RGB, a color transparent": (
        encoded(Image.fromarray(np.where(LEFT, np.uint8([1, 2, 3]), RGB)), "PNG", transparency=(1, 2, 3)),
        np.where(LEFT, 255, RGB),
        0,
    ),
    **{
        f"16-bit {kind}": (encoded(Image.fromarray(DEEP), kind), np.round(DEEP / 257)[..., None], 0)
        for kind in ("PNG", "TIFF", "PPM")
    },
    "16-bit TIFF, high byte first": (
        encoded(Image.frombytes("I;16B", (W, H), DEEP.astype(">u2").tobytes()), "TIFF"),
        np.round(DEEP / 257)[..., None],
        0,
    ),
    "16-bit RGB": (deep_color(), RGB, 0),
    "real numbers": (
        encoded(Image.fromarray((Y / (H - 1) * 1000).astype(np.float32)[..., 0]), "TIFF"),
        Y / (H - 1) * 255,
        0.5,
    ),
    **{
        f"1-bit {kind}": (encoded(Image.fromarray(ALPHA[..., 0]).convert("1"), kind), ALPHA, 0)
        for kind in ("PNG", "TIFF")
    },
    **{
        f"animated {kind}": (
            encoded(FRAMES[0], kind, save_all=True, append_images=FRAMES[1:]),
            (255, 0, 0),
            2,
        )
        for kind in ("GIF", "WEBP", "PNG")
    },
}


@pytest.mark.parametrize("data, expected, levels", GOOD.values(), ids=GOOD)
@pytest.mark.parametrize("name", ["image.JPEG", "image.png"])
def test_every_kind_of_file_becomes_rgb(tmp_path, name, data, expected, levels, recwarn):
    """Levels are a mean over the pixels; no pixel is off by eight times as much."""
    (tmp_path / name).write_bytes(data)
    image = decode(tmp_path / name)
    difference = np.abs(np.asarray(image).astype(float) - expected)  # [H, W, 3]
    assert image.mode == "RGB" and image.size == (W, H) and not recwarn.list
    assert difference.mean() <= levels and difference.max() <= 8 * levels


# Files that cannot be decoded, and the cause in the message.


def spoilt(data, at):
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


def half(data):
    return data[: len(data) // 2]


PHOTO = IMAGE.resize((400, 300))
JPEG, PNG = encoded(PHOTO, "JPEG", quality=95), encoded(PHOTO, "PNG")
DAMAGED = {
    "JPEG": (half(JPEG), "cut short"),
    "JPEG without its last bytes": (JPEG[:-20], "cut short"),
    "JPEG's header": (JPEG[:200], "cut short"),
    "progressive JPEG": (half(encoded(PHOTO, "JPEG", progressive=True)), "cut short"),
    "CMYK JPEG": (half(encoded(PHOTO.convert("CMYK"), "JPEG")), "cut short"),
    "gray JPEG": (half(encoded(PHOTO.convert("L"), "JPEG")), "cut short"),
    "PNG": (half(PNG), "cut short"),
    "PNG with alpha": (half(encoded(PHOTO.convert("RGBA"), "PNG")), "cut short"),
    "PNG with a palette": (half(encoded(PHOTO.quantize(64), "PNG")), "cut short"),
    "deep PNG": (
        half(encoded(Image.fromarray(np.asarray(PHOTO.convert("L")).astype(np.uint16) * 250), "PNG")),
        "cut short",
    ),
    "PNG, pixels": (spoilt(PNG, len(PNG) // 2), "damaged"),
    "PNG, checksum of its header": (spoilt(PNG, 30), "not an image"),
    "PNG, width and checksum do not agree": (spoilt(PNG, 18), "not an image"),
    "GIF": (half(encoded(PHOTO, "GIF")), "cut short"),
    "WebP": (half(encoded(PHOTO, "WEBP")), "damaged"),
    "TIFF": (half(encoded(PHOTO, "TIFF")), "cut short"),
    "BMP": (half(encoded(PHOTO, "BMP")), "cut short"),
    "PPM": (half(encoded(PHOTO, "PPM")), "cut short"),
    "nothing": (b"", "the file is empty"),
    "text": (b"<html>404</html>", "not an image"),
    "zeros": (bytes(5000), "not an image"),
}


@pytest.mark.parametrize("data, words", DAMAGED.values(), ids=DAMAGED)
def test_damaged_files_are_bad_images(tmp_path, data, words, recwarn):
    (tmp_path / "image.jpg").write_bytes(data)
    with pytest.raises(BadImage, match=f"^[^\n]*{words}[^\n]*$"):
        decode(tmp_path / "image.jpg")
    assert not recwarn.list


def test_paths_without_a_file_are_bad_images(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    for name, words in (("none.jpg", "does not exist"), ("folder.jpg", "directory")):
        with pytest.raises(BadImage, match=words):
            decode(tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_a_bad_image(tmp_path):
    (tmp_path / "image.jpg").write_bytes(JPEG)
    (tmp_path / "image.jpg").chmod(0)
    with pytest.raises(BadImage, match="no permission"):
        decode(tmp_path / "image.jpg")


def test_what_is_not_a_file_is_a_bad_image(tmp_path):
    """A FIFO would be waited for, and a device read without end."""
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    for path, words in (
        (tmp_path, "it is a directory, not an image file"),
        (tmp_path / "fifo.jpg", "it is a FIFO, not an image file"),
        (tmp_path / "zero.jpg", "it is a device or a socket, not an image file"),
    ):
        with pytest.raises(BadImage, match=words):
            decode(path)


def test_an_error_of_the_disk_is_not_called_damage(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(source.Image, "open", broken)
    with pytest.raises(BadImage) as error:
        decode(tmp_path / "image.jpg")
    assert "Input/output error" in str(error.value) and "damaged" not in str(error.value)


def test_an_image_with_too_many_pixels_is_refused(tmp_path, monkeypatch, recwarn):
    (tmp_path / "image.png").write_bytes(PNG)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    monkeypatch.setattr(source, "MAX_PIXELS", 2000)
    with pytest.raises(BadImage, match="more than 2,000 pixels"):
        decode(tmp_path / "image.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400 * 300 - 1)  # up to twice as many, Pillow only warns
    assert decode(tmp_path / "image.png").size == (400, 300) and not recwarn.list


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_errors_of_unsupported_formats_are_bad_images(tmp_path):
    """Pillow raises RuntimeError for damaged AVIF files."""
    data, raised = encoded(PHOTO, "AVIF"), 0
    for at in range(0, len(data), max(1, len(data) // 60)):
        (tmp_path / "image.jpg").write_bytes(spoilt(data, at))
        try:
            decode(tmp_path / "image.jpg")
        except BadImage:
            raised += 1
    assert raised


def test_no_file_starts_a_program(tmp_path, monkeypatch):
    """Pillow runs Ghostscript for PostScript, whatever the extension is."""
    started = []
    monkeypatch.setattr(
        EpsImagePlugin, "Ghostscript", lambda *_, **__: started.append(1) or Image.new("RGB", (1, 1)).im
    )
    (tmp_path / "image.jpg").write_bytes(encoded(PHOTO, "EPS"))
    with pytest.raises(BadImage, match="not supported"):
        decode(tmp_path / "image.jpg")
    assert not started


# Sources.


class Means(Dataset):
    """row -> mean of the image, or the cause of its error."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, row):
        try:
            return float(np.asarray(self.images[row]).mean())
        except BadImage as error:
            return f"{self.images.name(row)}: {error}"


@pytest.fixture
def files(tmp_path):
    """40 gray images, of which number 7 is empty."""
    for k in range(40):
        Image.new("L", (8, 8), 5 * k).save(tmp_path / f"{k}.png")
    (tmp_path / "7.png").write_bytes(b"")
    return Files(tmp_path, Names(np.array([f"{k}.png".encode() for k in range(40)])))


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_read_files(files, workers):
    expected = [5.0 * k for k in range(40)]
    expected[7] = f"{files.root}/7.png: the file is empty"
    assert list(PrefetchLoader(Means(files), range(40), workers, pin_memory=False)) == expected


def test_a_large_list_is_sent_compactly():
    """A worker gets one array of names, and not an object for each."""
    names = Names(np.array([b"n01440764/n01440764_%08d.JPEG" % k for k in range(100_000)]))
    files = Files("/images", names)
    assert len(files) == 100_000 and files.name(99_999) == "/images/n01440764/n01440764_00099999.JPEG"
    message = pickle.dumps(files)
    assert len(message) < 1.01 * names.array.nbytes
    again = pickle.loads(message)
    assert again.name(12_345) == files.name(12_345) and again.root == files.root


def test_file_names_may_hold_any_bytes(tmp_path):
    path = os.path.join(os.fsencode(tmp_path), b"\xff \xc3\xa9.png")
    with open(path, "wb") as file:
        file.write(PNG)
    files = Files(tmp_path, Names(np.array([os.path.basename(path)])))
    assert files[0].size == PHOTO.size and os.fsencode(files.name(0)) == path


def test_arrays_are_images():
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    plain, pil = Arrays(images), Arrays(images, pil=True)
    assert len(plain) == len(pil) == 3 and plain.name(2) == "image 2"
    assert (plain[1] == images[1]).all() and pil[1].mode == "RGB" and (np.asarray(pil[1]) == images[1]).all()
