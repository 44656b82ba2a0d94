"""Sources of images: arrays in memory, or files, whose content is not trusted."""

import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from util.files import reason, special_file

# Pillow refuses images of more than twice as many pixels: those above 17,000 × 17,000 may exhaust the memory.
MAX_PIXELS = 300_000_000
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2
# The formats of data sets. Pillow reads more, but damaged files of some of them raise errors of other types,
# and a PostScript file starts a program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


class BadImage(Exception):
    """An image that cannot be used; str() is the cause."""


class Source(Protocol):
    """A sequence of images, indexed by row."""

    max_decoded: int  # the number of decoded images that a worker holds at a time

    def __len__(self) -> int: ...
    def __getitem__(self, row: int) -> Any: ...  # raises BadImage
    def name(self, row: int) -> str: ...  # the name of the image in messages


class Arrays:
    """Images [N, ...] uint8 in memory; [row] is an array, or a PIL image if `pil`."""

    max_decoded = 4096

    def __init__(self, images: np.ndarray, pil: bool = False):
        self.images, self.pil = images, pil

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> np.ndarray | Image.Image:
        return Image.fromarray(self.images[row]) if self.pil else self.images[row]

    def name(self, row: int) -> str:
        return f"image {row}"


class Names:
    """A sequence of file names in one array. Every worker gets a copy; a list of strings would take three
    times the memory.
    """

    def __init__(self, array: np.ndarray):
        self.array = array  # [N] bytes of one width, that of the longest name

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, row: int) -> str:
        return os.fsdecode(self.array[row])

    def __iter__(self) -> Iterator[str]:
        return map(os.fsdecode, self.array.tolist())


class Files:
    """Image files below `root`, or wherever `read` finds them; [row] is a decoded RGB PIL image."""

    max_decoded = 8  # a decoded photograph of 12 megapixels takes 36 MB

    def __init__(self, root: Path, names: Names):
        """names: paths relative to root."""
        self.root, self.names = Path(root), names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, row: int) -> Image.Image:
        return decode(self.encoded(row))

    def name(self, row: int) -> str:
        return str(self.root / self.names[row])

    def encoded(self, row: int) -> Path | bytes:
        """Return what `read` returns for an image. Raises BadImage if it cannot be found or read."""
        try:
            return self.read(self.names[row])
        except (OSError, KeyError) as error:  # archives raise KeyError for a name that they do not have
            raise BadImage(f"it cannot be read ({reason(error)})") from None

    def read(self, name: str) -> Path | bytes:
        """Return the path of the image file `name`, or its content. A subclass may read it from anywhere."""
        return self.root / name


class LabeledFiles(Files):
    """Image files with labels [N] int64 (−1: the image has none) and the names of the classes [C]."""

    def __init__(self, root: Path, names: Names, labels: np.ndarray, classes: list[str]):
        super().__init__(root, names)
        self.labels, self.classes = labels, classes

    def select(self, rows: np.ndarray) -> "LabeledFiles":
        """Return the images of these rows [n], with the same classes."""
        return LabeledFiles(self.root, Names(self.names.array[rows]), self.labels[rows], self.classes)


def decode(file: Path | bytes) -> Image.Image:
    """Decode an image file as RGB. Raises BadImage with the cause if this is not possible.

    file: its path, or its content.

    The content decides the format, not the extension. Gray, palette, CMYK and 16-bit images are converted to
    RGB, transparent images are put on white, and of an animation the first frame is taken. EXIF orientation
    is not applied, as in torchvision's loader.
    """
    if isinstance(file, Path) and (special := special_file(file)):
        raise BadImage(f"it is {special}, not an image file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of EXIF blocks and palettes; the pixels are right
            with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS) as image:
                return to_rgb(image)
    except FileNotFoundError:
        cause = "the file does not exist"
    except UnidentifiedImageError:
        cause = (
            "the file is empty" if _is_empty(file) else "it is not an image, or its format is not supported"
        )
    except PermissionError:
        cause = "no permission to read it"
    except Image.DecompressionBombError:
        cause = f"it has more than {MAX_PIXELS:,} pixels"
    # Pillow raises all of these for damaged files.
    except (OSError, ValueError, SyntaxError, IndexError, EOFError, TypeError) as error:
        if isinstance(error, OSError) and error.errno:  # an error of the disk: the file may be sound
            cause = f"it cannot be read ({error.strerror})"
        else:
            cause = f"it is damaged or cut short ({' '.join(str(error).split())})"
    raise BadImage(cause)


def _is_empty(file: Path | bytes) -> bool:
    try:
        return (len(file) if isinstance(file, bytes) else file.stat().st_size) == 0
    except OSError:  # the file was removed in the meantime
        return False


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any Pillow mode to RGB with 8 bits per channel."""
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    if image.mode.startswith(("I", "F")):  # 16 bits or more: Pillow's convert would clip at 255
        gray = np.asarray(image, np.float64)  # [h, w]
        top = 65535 if image.mode.startswith("I") else max(1.0, gray.max(initial=0))
        return Image.fromarray((gray * (255 / top)).clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
