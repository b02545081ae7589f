"""3,000 damaged image files: decoded to RGB within the limits, or refused by name."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_cl.data import check_image, load_image
from llava_cl.data.images import MAX_SIDE
from llava_cl.errors import InputError
from mutations import damage, fuzz


def encoded(kind: str) -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (12, 20, 3), dtype=np.uint8)
    picture, stream = Image.fromarray(noise), io.BytesIO()
    if kind == "TIFF-LZW":
        picture.save(stream, "TIFF", compression="tiff_lzw")
    elif kind == "GIF":
        picture.save(stream, "GIF", save_all=True, append_images=[picture.rotate(180)])
    else:
        picture.save(stream, kind)
    return stream.getvalue()


@pytest.mark.filterwarnings("ignore")
def test_image_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Broken headers state huge sizes; they are to cost little here.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500_000)
    files = [encoded(kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "TIFF-LZW")]
    tried, decoded = [], []

    def make(choice: random.Random) -> bytes:
        content = choice.choice(files)
        for _ in range(choice.randrange(1, 4)):
            content = damage(content, choice)
        return content

    def check(content: bytes) -> None:
        (tmp_path / "x.png").write_bytes(content)
        tried.append(content)
        for read in (load_image, check_image):
            try:
                image = read("x.png", tmp_path)
            except InputError as error:
                assert str(tmp_path / "x.png") in str(error)
                assert len(str(error)) < 2000
            else:
                decoded.append(read)
                assert image is None or (image.mode == "RGB" and max(image.size) <= MAX_SIDE)

    fuzz(3000, make, check)
    assert decoded.count(load_image) > len(tried) / 10


@pytest.mark.parametrize(
    "path", ["\0", "a\0b.png", "a" * 300, "a/" * 3000, "loop", "loop/x.png", "\udc80", ".", "", "~", "//x"]
)
def test_paths_that_name_no_image(path: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for read in (load_image, check_image):
        with pytest.raises(InputError, match="image") as error:
            read(path, tmp_path)
        assert len(str(error.value)) < 8000
