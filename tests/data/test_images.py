"""Images are opened safely or refused with a clear error."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import struct
import zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from sicog_exp.data.images import ImageError, ImageFolder, ImageHeaders, open_image, pixel_hash

LIMIT = 50_000_000


def photographs() -> Path:
    """The folder of real photographs inside scikit-image (found without importing it)."""
    spec = find_spec("skimage")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "data"


def picture(size: tuple[int, int] = (8, 6)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("name", ["astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg"])
def test_real_photographs_open_as_rgb(name: str) -> None:
    image = open_image(photographs(), name, LIMIT)
    assert image.mode == "RGB"


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_allowed_formats(tmp_path: Path, format: str) -> None:
    picture().save(tmp_path / "x", format)
    assert open_image(tmp_path, "x", LIMIT).size == (8, 6)


def save_phone_picture(path: Path) -> None:
    """A JPEG with a second picture behind the first, which Pillow calls MPO."""
    picture().save(path, "MPO", save_all=True, append_images=[Image.new("RGB", (3, 3))])


def test_of_a_jpeg_with_more_pictures_inside_the_first_is_read(tmp_path: Path) -> None:
    """By all who open it: headers, decoding, and the folder that a data set keeps."""
    save_phone_picture(tmp_path / "x.jpg")
    folder, headers, decoded = ImageFolder(tmp_path / "out", LIMIT), ImageHeaders(LIMIT), ImageHeaders(LIMIT, True)
    stored = folder.add(tmp_path, "x.jpg")
    assert stored.endswith(".jpg")
    assert open_image(tmp_path / "out", stored, LIMIT).size == (8, 6)
    assert folder.add(tmp_path, (tmp_path / "x.jpg").read_bytes()) == stored
    for one in (headers, decoded):
        assert one.add(tmp_path, "x.jpg") == "x.jpg"
        assert one.sizes == {"x.jpg": (8, 6)}


def test_a_format_that_no_folder_keeps_is_refused_by_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `sicog data check` calls usable, a run can keep."""
    monkeypatch.setattr("sicog_exp.data.images.FIRST_OF_MANY", {})
    save_phone_picture(tmp_path / "x.jpg")
    for images in (ImageHeaders(LIMIT), ImageHeaders(LIMIT, True), ImageFolder(tmp_path / "out", LIMIT)):
        with pytest.raises(ImageError, match="no image of an allowed format"):
            images.add(tmp_path, "x.jpg")


@pytest.mark.parametrize("format", ["TIFF", "PPM", "ICO", "PDF", "TGA"])
def test_other_formats_are_refused(tmp_path: Path, format: str) -> None:
    picture((16, 16)).save(tmp_path / "x.png", format)
    with pytest.raises(ImageError, match="convert it to one of PNG"):
        open_image(tmp_path, "x.png", LIMIT)


@pytest.mark.parametrize(
    "name",
    ["http://example.org/a.png", "HTTPS://example.org/a.png", "file://host/a.png", "file:a.png", "s3://bucket/a.png",
     "data:image/png;base64,AAAA"],
)  # fmt: skip
def test_a_url_is_never_fetched(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a network connection was opened"))
    with pytest.raises(ImageError, match="URL"):
        open_image(tmp_path, name, LIMIT)


@pytest.mark.parametrize("name", ["../outside.png", "a/../../outside.png", "link.png", "folder_link/outside.png"])
def test_no_path_leaves_the_root(tmp_path: Path, name: str) -> None:
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    picture().save(tmp_path / "outside.png")
    (root / "link.png").symlink_to(tmp_path / "outside.png")
    (root / "folder_link").symlink_to(tmp_path)
    with pytest.raises(ImageError, match="outside the data root"):
        open_image(root, name, LIMIT)
    with pytest.raises(ImageError, match="outside the data root"):
        open_image(root, str(tmp_path / "outside.png"), LIMIT)
    with pytest.raises(ImageError, match="outside the data root"):
        open_image(root, (tmp_path / "outside.png").as_uri(), LIMIT)


def test_a_file_s_address_under_the_root_is_its_path(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    for address in (f"file://{tmp_path}/a.png", f"FILE://{tmp_path}/a.png"):
        assert open_image(tmp_path, address, LIMIT).size == (8, 6)


def test_a_link_inside_the_root_is_fine(tmp_path: Path) -> None:
    picture().save(tmp_path / "real.png")
    (tmp_path / "link.png").symlink_to("real.png")
    assert open_image(tmp_path, "link.png", LIMIT).size == (8, 6)


@pytest.mark.parametrize(
    "name", ["", "missing.png", "a\0b.png", "\ud800.png", "x" * 5000, "loop.png", "pipe", "folder"]
)
def test_unusable_names(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ImageError) as caught:
        open_image(tmp_path, name, LIMIT)
    assert caught.value.fix in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"hello", b"<svg></svg>", b"%PDF-1.4", b"\x89PNG\r\n\x1a\n"])
def test_non_images(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ImageError, match=r"x\.png"):
        open_image(tmp_path, "x.png", LIMIT)


@pytest.mark.parametrize("lenient", [False, True])
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP"])
def test_truncated_images(tmp_path: Path, format: str, lenient: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a library (lmms-eval does) has told Pillow to fill up what is lacking."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
    stream = io.BytesIO()
    picture((64, 64)).save(stream, format)
    (tmp_path / "x").write_bytes(stream.getvalue()[: len(stream.getvalue()) * 2 // 3])
    with pytest.raises(ImageError, match="replace the file"):
        open_image(tmp_path, "x", LIMIT)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is lenient


def _png_header(width: int, height: int) -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + body + b"\x00\x00\x00\x00IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


@pytest.mark.parametrize("side", [8_000, 100_000])
def test_huge_images_are_refused_by_their_header(tmp_path: Path, side: int) -> None:
    """The file holds no pixels at all, so only the header can have been read."""
    (tmp_path / "x.png").write_bytes(_png_header(side, side))
    with pytest.raises(ImageError, match="pixels"):
        open_image(tmp_path, "x.png", LIMIT)


def test_the_pixel_limit_is_exact(tmp_path: Path) -> None:
    picture().save(tmp_path / "x.png")
    assert open_image(tmp_path, "x.png", 48).size == (8, 6)
    with pytest.raises(ImageError, match=r"data\.max_pixels"):
        open_image(tmp_path, "x.png", 47)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = picture()
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "x.png", exif=exif)
    turned = open_image(tmp_path, "x.png", LIMIT)
    assert pixel_hash(turned) == pixel_hash(image.transpose(Image.Transpose.ROTATE_270))


def test_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (5, 5), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert open_image(tmp_path, "x.gif", LIMIT).getpixel((2, 2)) == (255, 0, 0)


def test_transparent_pixels_become_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "x.png")
    assert open_image(tmp_path, "x.png", LIMIT).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bit_greys_keep_their_shades(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 32768, 65535]], np.uint16)).save(tmp_path / "x.png")
    image = open_image(tmp_path, "x.png", LIMIT)
    assert [image.getpixel((i, 0)) for i in range(3)] == [(0, 0, 0), (128, 128, 128), (255, 255, 255)]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), format=st.sampled_from(["PNG", "JPEG", "WEBP", "BMP", "GIF"]))
def test_damaged_bytes_never_raise_anything_else(tmp_path: Path, data: st.DataObject, format: str) -> None:
    stream = io.BytesIO()
    picture((16, 16)).save(stream, format)
    content = bytearray(stream.getvalue())
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=8)):
        content[position] = data.draw(st.integers(0, 255))
    (tmp_path / "x").write_bytes(content)
    with contextlib.suppress(ImageError):
        assert open_image(tmp_path, "x", 10_000).mode == "RGB"


def test_a_folder_keeps_one_copy_of_equal_pictures(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    picture().save(tmp_path / "b.bmp")
    folder = ImageFolder(tmp_path / "out", LIMIT)
    first, second = folder.add(tmp_path, "a.png"), folder.add(tmp_path, "b.bmp")
    assert first == second == folder.add(tmp_path, (tmp_path / "b.bmp").read_bytes())
    assert list(folder.hashes) == [first]
    assert pixel_hash(open_image(tmp_path / "out", first, LIMIT)) == folder.hashes[first]


def test_pruning_removes_what_no_record_uses(tmp_path: Path) -> None:
    folder = ImageFolder(tmp_path, LIMIT)
    kept = folder.add_pixels("kept", np.zeros((4, 4, 3), np.uint8))
    folder.add_pixels("left-over", np.ones((4, 4, 3), np.uint8))
    folder.prune({kept})
    assert [file.name for file in (tmp_path / "images").iterdir()] == ["kept.png"]


def test_a_full_disk_is_no_bad_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reaches the store, which says so; the row is not blamed for it."""
    picture().save(tmp_path / "a.png")
    folder = ImageFolder(tmp_path / "out", LIMIT)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space") as caught:
        folder.add(tmp_path, "a.png")
    assert caught.value.errno == errno.ENOSPC
