"""Images that decode and images that do not; fingerprints of data sets."""

from __future__ import annotations

import io
import shutil
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from fednano.data import Dataset, Sample, decode_image, load_easy_vqa
from fednano.errors import DataError


def png_claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims any size."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def damaged(kind: str) -> bytes:
    source = load_easy_vqa("test")[0].image
    assert source is not None
    whole = source.read_bytes()
    return {
        "empty": b"",
        "text": b"this is no image",
        "cut off": whole[: len(whole) * 3 // 4],
        "header only": whole[:20],
        "large": png_claiming(12_000, 9_000),
        "huge": png_claiming(60_000, 60_000),
        "no pixels": png_claiming(0, 0),
    }[kind]


@pytest.mark.parametrize("kind", ["empty", "text", "cut off", "header only", "large", "huge", "no pixels"])
def test_an_image_that_does_not_decode_is_named(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.png"
    path.write_bytes(damaged(kind))
    with pytest.raises(DataError, match=r"broken\.png"):
        Sample("x", path, "q", "a").load_image()


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.png does not exist"):
        decode_image(tmp_path / "gone.png")
    with pytest.raises(DataError, match="does not decode"):
        decode_image(tmp_path)


def test_a_sample_without_image() -> None:
    assert Sample("x", None, "q", "a").load_image() is None


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1", "I;16", "CMYK"])
def test_every_mode_becomes_rgb_and_transparent_becomes_white(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
    if mode in ("RGBA", "LA"):
        Image.new(mode, (4, 3), (200, 10, 30, 0) if mode == "RGBA" else (10, 0)).save(path)
        expected = (255, 255, 255)
    elif mode == "P":
        image = Image.new("P", (4, 3), 1)
        image.putpalette([0, 0, 0, 200, 10, 30])
        image.save(path, transparency=b"\xff\x00")
        expected = (255, 255, 255)
    else:
        Image.new(mode, (4, 3), 0).save(path)
        expected = (255, 255, 255) if mode == "CMYK" else (0, 0, 0)
    image = decode_image(path)
    assert (image.mode, image.size) == ("RGB", (4, 3))
    assert image.getpixel((1, 1)) == expected


def test_photos_stand_upright(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    image = Image.new("RGB", (40, 20), "white")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(path, exif=exif)
    assert decode_image(path).size == (20, 40)


def copy_of(data: Dataset, folder: Path) -> Dataset:
    folder.mkdir()
    samples = []
    for sample in data:
        assert sample.image is not None
        target = folder / sample.image.name
        shutil.copy(sample.image, target)
        samples.append(Sample(sample.id, target, sample.question, sample.answer, sample.answers))
    return Dataset("elsewhere", data.split, tuple(samples))


def test_fingerprint_covers_content_and_not_place(tmp_path: Path) -> None:
    data = load_easy_vqa("test")[:40]
    print_of = data.fingerprint()
    twin = copy_of(data, tmp_path / "a")
    assert twin.fingerprint() == print_of
    assert data.subset(range(39, -1, -1)).fingerprint() != print_of
    assert data[:39].fingerprint() != print_of

    first = data[0]
    for changed in (
        Sample("other", first.image, first.question, first.answer),
        Sample(first.id, first.image, first.question + "?", first.answer),
        Sample(first.id, first.image, first.question, first.answer + "x"),
        Sample(first.id, first.image, first.question, first.answer, ("x",)),
        Sample(first.id, None, first.question, first.answer),
    ):
        other = Dataset("easy-vqa", "test", (changed, *data.samples[1:]))
        assert other.fingerprint() != print_of
        assert other.fingerprint(images=False) != data.fingerprint(images=False)

    image = twin[0].image
    assert image is not None
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, format="PNG")
    image.write_bytes(buffer.getvalue())
    assert twin.fingerprint() != print_of
    assert twin.fingerprint(images=False) == data.fingerprint(images=False)
    image.unlink()
    with pytest.raises(DataError, match=image.name):
        twin.fingerprint()


def test_rows_cannot_be_moved_between_fields() -> None:
    """Length is part of what is hashed: ("ab", "c") is not ("a", "bc")."""
    one = Dataset("d", "train", (Sample("1", None, "ab", "c"),))
    two = Dataset("d", "train", (Sample("1", None, "a", "bc"),))
    assert one.fingerprint() != two.fingerprint()


def test_subset_and_slices() -> None:
    data = load_easy_vqa("test")
    part = data.subset([5, 3])
    assert [sample.id for sample in part] == ["easy-vqa/test/00005", "easy-vqa/test/00003"]
    assert list(data[3:5]) == [data[3], data[4]]
    with pytest.raises(DataError, match=r"Index 9673 lies outside .* 9673 samples"):
        data.subset([0, len(data)])
    with pytest.raises(DataError, match="Index -1"):
        data.subset([-1])
