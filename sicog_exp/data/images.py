"""Safe image loading: inside one root only, allowed formats only, never from the network, never too large.

Every image of training, generation and evaluation passes through `open_image`.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

SUFFIXES = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "BMP": ".bmp", "GIF": ".gif"}
FORMATS = tuple(SUFFIXES)
"""Formats that are decoded; any other is an ImageError."""
IMAGES = "images"
"""Folder of a data set directory that holds its images."""
EMBEDDED = "embedded in the row"
"""Name of an image that comes as bytes."""
LATEST = 64
"""Embedded images whose bytes a check remembers, for a look at them."""
FIRST_OF_MANY = {"MPO": "JPEG"}
"""What Pillow calls a file with further pictures inside (phones, HDR) -> the format of its first one, which is read."""
LYING = (5, 6, 7, 8)
"""EXIF orientations that swap width and height (EXIF 2.3, tag 274)."""


class ImageError(ValueError):
    """An image that cannot be used; the message names the file, what is wrong and the fix."""

    def __init__(self, name: str, reason: str, fix: str) -> None:
        super().__init__(f"image {_shown(name)}: {reason}; {fix}")
        self.reason = f"image {_shown(name)}: {reason}"
        self.fix = fix


def _shown(name: str) -> str:
    short = name if len(name) <= 120 else name[:117] + "..."
    return repr(short)


def local_name(name: str) -> str:
    """The path in file:///..., Qwen's usual form; any other name as it is."""
    return re.sub(r"(?i)^file://(?=/)", "", name)


def resolve(root: Path, name: str) -> Path:
    """The real path of an image under `root`. Raises ImageError for URLs, missing files and paths out of the root."""
    name = local_name(name)
    if re.match(r"(?i)[a-z][a-z0-9+.-]*://|data:|file:", name):
        raise ImageError(name, "is a URL, and no URL in data is fetched", "download it and name the file")
    if not name:
        raise ImageError(name, "the name is empty", "name a file or leave the image out")
    try:
        home, path = root.resolve(), (root / name).resolve()
        inside, exists, regular = path.is_relative_to(home), path.exists(), path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # null bytes, lone surrogates, overlong names, link loops
        raise ImageError(name, f"is no usable path ({error})", "name a file under the data root") from None
    if not inside:
        raise ImageError(name, f"lies outside the data root {root}", "move it under the root or set data.root")
    if not exists:
        raise ImageError(name, f"not found under {root}", "correct the name or set data.root")
    if not regular:
        raise ImageError(name, "is not a regular file", "name an image file")
    return path


def open_image(root: Path, name: str, max_pixels: int) -> Image:
    """The image `name` under `root`, fully decoded, upright, RGB; the first frame of an animation.

    Raises ImageError for anything else than a readable image of an allowed format with at most `max_pixels` pixels.
    """
    return _read(resolve(root, name), name, max_pixels)[0]


def open_bytes(content: bytes, max_pixels: int) -> Image:
    """An image file's bytes as `open_image` would open the file. Raises ImageError."""
    return _decode(io.BytesIO(content), EMBEDDED, max_pixels)[0]


def pixel_hash(image: Image) -> str:
    """sha256 of an RGB image's decoded pixels: equal for equal pictures, whatever their file."""
    return hashlib.sha256(f"{image.width}x{image.height} ".encode() + image.tobytes()).hexdigest()


def _read(path: Path, name: str, max_pixels: int) -> tuple[Image, str]:
    with _opened(path, name) as file:
        return _decode(file, name, max_pixels)


def _opened(path: Path, name: str) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise ImageError(name, f"cannot be opened ({error.strerror})", "check its permissions") from None


def _decode(file: BinaryIO, name: str, max_pixels: int) -> tuple[Image, str]:
    """The decoded image and its format. The header's size is checked before any pixel is decoded."""
    image, kind = _open(file, name, max_pixels)
    try:
        with _whole_files_only():
            return upright_rgb(image), kind
    except Exception as error:
        raise _damaged(name, error) from None


def _open(file: BinaryIO, name: str, max_pixels: int) -> tuple[Image, str]:
    """The image with its header read, and its format: an allowed one. It is not too large."""
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        raise _other_format(name) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(name, f"has too many pixels ({error})", "scale it down") from None
    except Exception as error:  # decoders meet hostile bytes here and raise what they like
        raise _damaged(name, error) from None
    if image.width * image.height > max_pixels:
        reason = f"has {image.width} x {image.height} pixels, more than {max_pixels}"
        raise ImageError(name, reason, "scale it down or raise data.max_pixels")
    kind = FIRST_OF_MANY.get(str(image.format), str(image.format))
    if kind not in SUFFIXES:  # a plugin may hand a file on to another one
        raise _other_format(name)
    return image, kind


def _other_format(name: str) -> ImageError:
    return ImageError(name, "is no image of an allowed format", f"convert it to one of {', '.join(FORMATS)}")


@contextmanager
def _whole_files_only() -> Iterator[None]:
    """lmms-eval tells Pillow, for the whole process, to fill what a truncated file lacks with grey."""
    from PIL import ImageFile

    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _damaged(name: str, error: Exception) -> ImageError:
    return ImageError(name, f"is truncated or damaged ({error or type(error).__name__})", "replace the file")


def upright_rgb(image: Image) -> Image:
    """EXIF orientation applied, transparency over white, 16-bit greys scaled (Pillow would clip them to white)."""
    import numpy as np
    from PIL import Image, ImageOps

    image.load()
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):
        return Image.fromarray((np.asarray(upright).clip(0, 65535) // 256).astype(np.uint8)).convert("RGB")
    if "A" in upright.mode or "transparency" in upright.info:
        picture = upright.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return upright.convert("RGB")


class Images(Protocol):
    """Where readers put images, and what checks them on the way."""

    def add(self, root: Path, image: str | bytes) -> str:
        """The name by which a record knows an image: a name under `root`, or a file's bytes. Raises ImageError."""
        ...


@dataclass
class ImageHeaders:
    """Checks images without keeping them: that they are there, of an allowed format and not too large.

    A file cut behind its header shows only where pixels are decoded (`decode`), which takes twenty times as long and
    more.
    """

    max_pixels: int
    decode: bool = False
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Name -> width and height, upright; bytes are named by their hash."""
    latest: dict[str, bytes] = field(default_factory=dict)
    """The embedded images that came last."""

    def add(self, root: Path, image: str | bytes) -> str:
        if isinstance(image, str):
            if image not in self.sizes:
                with _opened(resolve(root, image), image) as file:
                    self.sizes[image] = self._size(file, image)
            return image
        name = f"{EMBEDDED}:{hashlib.sha256(image).hexdigest()[:32]}"
        if name not in self.sizes:
            self.sizes[name] = self._size(io.BytesIO(image), EMBEDDED)
        self.latest.pop(name, None)
        self.latest[name] = image
        if len(self.latest) > LATEST:
            del self.latest[next(iter(self.latest))]
        return name

    def _size(self, file: BinaryIO, name: str) -> tuple[int, int]:
        if self.decode:
            return _decode(file, name, self.max_pixels)[0].size
        image, _ = _open(file, name, self.max_pixels)
        try:
            lies = "exif" in image.info and image.getexif().get(0x0112) in LYING
        except Exception as error:
            raise _damaged(name, error) from None
        return (image.height, image.width) if lies else image.size


@dataclass
class ImageFolder:
    """Collects a data set's images in `directory/images`, so that the data set holds all its pixels.

    A file added from outside is checked, decoded and copied as it is, under the hash of its decoded pixels.
    """

    directory: Path
    max_pixels: int
    hashes: dict[str, str] = field(default_factory=dict)
    """Path relative to the directory -> pixel hash, of every image added."""
    _known: dict[str, str] = field(default_factory=dict)
    _by_hash: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        (self.directory / IMAGES).mkdir(parents=True, exist_ok=True)

    def add(self, root: Path, image: str | bytes) -> str:
        """The relative path of a copied image: a name under `root`, or a file's bytes. Raises ImageError."""
        if isinstance(image, bytes):
            return self._store(image, *_decode(io.BytesIO(image), EMBEDDED, self.max_pixels))
        path = resolve(root, image)
        if str(path) not in self._known:
            decoded, kind = _read(path, image, self.max_pixels)
            self._known[str(path)] = self._store(path.read_bytes(), decoded, kind)
        return self._known[str(path)]

    def _store(self, content: bytes, decoded: Image, kind: str) -> str:
        digest = pixel_hash(decoded)
        if digest not in self._by_hash:
            path = f"{IMAGES}/{digest[:32]}{SUFFIXES[kind]}"
            (self.directory / path).write_bytes(content)
            self._by_hash[digest], self.hashes[path] = path, digest
        return self._by_hash[digest]

    def add_pixels(self, name: str, pixels: NDArray[np.uint8]) -> str:
        """The relative path of a new PNG of RGB pixels (height, width, 3)."""
        from PIL import Image

        image = Image.fromarray(pixels)
        path = f"{IMAGES}/{name}.png"
        image.save(self.directory / path, compress_level=1)  # noise hardly compresses; level 1 is several times faster
        self.hashes[path] = pixel_hash(image)
        return path

    def prune(self, used: set[str]) -> None:
        """Remove images that no record uses, those of a killed run of the same step included."""
        for file in (self.directory / IMAGES).iterdir():
            if f"{IMAGES}/{file.name}" not in used:
                file.unlink()
