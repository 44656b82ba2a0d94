"""Where images come from: arrays in memory, or files that may be anything."""

import warnings
from pathlib import Path
from typing import Protocol, Sequence

import numpy as np
from PIL import Image, UnidentifiedImageError

Image.MAX_IMAGE_PIXELS = (
    150_000_000  # Pillow refuses twice as many: above a scan of 17,000 × 17,000, memory is at risk
)
# Formats of data sets. Pillow knows more, of which some are damaged in ways of their own, and PostScript
# starts a program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


class BadImage(Exception):
    """An image that cannot be used; str() is the cause."""


class Source(Protocol):
    """A row number -> an image. `name` is what an error message calls it; `at_once`: how many a worker holds
    at a time.
    """

    max_decoded: int

    def __len__(self) -> int: ...
    def __getitem__(self, row: int) -> object: ...  # raises BadImage
    def name(self, row: int) -> str: ...


class Arrays:
    """Images [N, ...] uint8 in memory; [row] is one of them, as a PIL image when `pil`."""

    max_decoded = 4096

    def __init__(self, images: np.ndarray, pil: bool = False):
        self.images, self.pil = images, pil

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> object:
        return Image.fromarray(self.images[row]) if self.pil else self.images[row]

    def name(self, row: int) -> str:
        return f"image {row}"


class Files:
    """Image files below `root`; [row] is a decoded RGB PIL image."""

    max_decoded = 8  # a telephone's photograph takes 40 MB decoded

    def __init__(self, root: Path, names: Sequence[str]):
        """names: paths relative to root; a compact sequence (dataset/listing.py): every worker gets a copy."""
        self.root, self.names = Path(root), names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, row: int) -> Image.Image:
        return decode(self.root / self.names[row])

    def name(self, row: int) -> str:
        return str(self.root / self.names[row])


def decode(path: Path) -> Image.Image:
    """The file as an RGB image, its pixels decoded; BadImage with the cause where that cannot be.

    What the file holds counts, not its name. Gray, palette, CMYK, 16-bit and transparent images become RGB,
    transparency over white; of an animation the first frame. Pixels stay in the file's own orientation, as in
    torchvision's loader.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # about EXIF blocks and palettes: of no consequence for the pixels
            with Image.open(path, formats=FORMATS) as image:
                return to_rgb(image)
    except FileNotFoundError:
        cause = "the file does not exist"
    except UnidentifiedImageError:
        cause = "the file is empty" if _is_empty(path) else "it is not an image, or of an unknown format"
    except IsADirectoryError:
        cause = "it is a directory"
    except PermissionError:
        cause = "no permission to read it"
    except Image.DecompressionBombError:
        cause = f"it has more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels"
    except (
        OSError,
        ValueError,
        SyntaxError,
        IndexError,
        EOFError,
        TypeError,
    ) as error:  # Pillow's ways to say "damaged"
        if isinstance(error, OSError) and error.errno:  # the system's own word: the file may be sound
            cause = f"it cannot be read ({error.strerror})"
        else:
            cause = f"it is damaged or cut short ({' '.join(str(error).split())})"
    raise BadImage(cause)


def _is_empty(path: Path) -> bool:
    try:
        return path.stat().st_size == 0
    except OSError:  # it has gone meanwhile
        return False


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode -> RGB, 8 bits a channel."""
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    if image.mode.startswith(("I", "F")):  # 16 bits and more: Pillow's convert would clip at 255
        gray = np.asarray(image, np.float64)  # [h, w]
        top = 65535 if image.mode.startswith("I") else max(1.0, gray.max(initial=0))
        return Image.fromarray((gray * (255 / top)).clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
