"""Pixels against the CLIP processor's on stored cases, against its PIL class on others, and refusals of bad files."""

import importlib
import importlib.util
import io
import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile
from PIL.PngImagePlugin import PngInfo

from llava_cl.data import check_image, load_image, load_thumbnail, preprocess_image
from llava_cl.data.augment import Plain
from llava_cl.data.images import CLIP_MEAN, CLIP_STD, MAX_SIDE, normalise, resize_and_crop
from llava_cl.errors import InputError

GOLDEN = Path(__file__).parents[1] / "golden" / "images"
CASES = json.loads((GOLDEN / "meta.json").read_text())["images"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["file"])
def test_golden_images(case):
    pixels = preprocess_image(load_image(case["file"], GOLDEN / "files"))
    assert pixels.dtype == np.float32
    assert pixels.shape == (3, 336, 336)
    with np.load(GOLDEN / "expected.npz") as expected:
        if case["stored"] == "full":
            difference = pixels - expected[f"{case['file']}/full"]
        else:
            channel, row, column = expected[f"{case['file']}/pos"].astype(int).T
            difference = pixels[channel, row, column] - expected[f"{case['file']}/val"]
    assert np.abs(difference).max() <= 1e-6
    assert pixels.sum(axis=(1, 2), dtype=np.float64) == pytest.approx(case["channel_sums"], abs=0.05)


def pil_clip_processor() -> type:
    """The class of transformers that resizes with Pillow; where it lives depends on the version."""
    clip = "transformers.models.clip"
    if importlib.util.find_spec(f"{clip}.image_processing_pil_clip"):
        return importlib.import_module(f"{clip}.image_processing_pil_clip").CLIPImageProcessorPil
    return importlib.import_module(f"{clip}.image_processing_clip").CLIPImageProcessor


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 1), (3, 3), (2, 3), (5, 2), (336, 336), (700, 500)])
def test_equals_clip_processor_also_for_tiny_images(size):
    generator = np.random.default_rng(sum(size))
    picture = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    side = max(size)
    square = np.empty((side, side, 3), np.uint8)
    square[:] = (122, 116, 104)
    top, left = (side - size[1]) // 2, (side - size[0]) // 2
    square[top : top + size[1], left : left + size[0]] = picture
    processor = pil_clip_processor()(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    expected = processor(Image.fromarray(square), input_data_format="channels_last", return_tensors="np")
    np.testing.assert_allclose(
        preprocess_image(Image.fromarray(picture)), expected["pixel_values"][0], rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("side", [1, 3])
def test_tiny_image_keeps_channel_order(side):
    pixels = preprocess_image(Image.new("RGB", (side, side), (255, 0, 128)))
    expected = (np.array([1, 0, 128 / 255]) - CLIP_MEAN) / CLIP_STD
    np.testing.assert_allclose(pixels, np.broadcast_to(expected[:, None, None], pixels.shape), atol=1e-6)


def test_size_mean_and_std_are_used():
    pixels = preprocess_image(Image.new("L", (8, 4), 255), size=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 0.5))
    assert pixels.shape == (3, 8, 8)
    np.testing.assert_allclose(pixels[:, 4, 4], [1, 2, 1], atol=1e-6)
    np.testing.assert_allclose(pixels[:, 0, 0], 2 * (127 / 255 - 0.5) * np.array([1, 2, 1]), atol=1e-6)


def square(image: Image.Image) -> Image.Image:
    side = max(image.size)
    padded = Image.new("RGB", (side, side), tuple(int(255 * value) for value in CLIP_MEAN))
    padded.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return padded


def picture(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(width * height)
    return Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("width", "height"),
    [
        (2, 300),
        (300, 2),
        (1500, 1100),
        (1100, 1500),
        (1, 2100),
        (37, 1025),
        (1024, 1024),
        (5, 4090),
        (4100, 3),
        (300, 4099),
    ],
)
@pytest.mark.parametrize("size", [336, 61])
def test_the_square_that_is_not_made_would_give_the_same_bytes(width: int, height: int, size: int) -> None:
    image = picture(width, height)
    whole = square(image).resize((size, size), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(preprocess_image(image, size=size), normalise(whole, CLIP_MEAN, CLIP_STD))


@pytest.mark.parametrize("width", [1, 2, 17, 255])
def test_a_long_thin_image_differs_from_the_square_by_one_at_most(width: int) -> None:
    image = picture(width, 4100)
    whole = np.asarray(square(image).resize((336, 336), Image.Resampling.BICUBIC), np.int16)
    padded = preprocess_image(image) * np.float32(CLIP_STD)[:, None, None] + np.float32(CLIP_MEAN)[:, None, None]
    assert np.abs(np.rint(255 * padded).astype(np.int16).transpose(1, 2, 0) - whole).max() <= 1


def pillow_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes in bytes of the images that Pillow makes from now on."""
    sizes: list[int] = []
    for name in ("new", "fill"):
        made = getattr(Image.core, name)

        def counted(mode, size, *rest, made=made):
            sizes.append(4 * size[0] * size[1])
            return made(mode, size, *rest)

        monkeypatch.setattr(Image.core, name, counted)
    resize = Image.Image.resize

    def resized(self, size, *rest, **options):
        sizes.append(4 * size[0] * size[1])
        return resize(self, size, *rest, **options)

    monkeypatch.setattr(Image.Image, "resize", resized)
    return sizes


@pytest.mark.parametrize("size", [(2, MAX_SIDE), (MAX_SIDE, 2), (1, MAX_SIDE), (300, MAX_SIDE), (MAX_SIDE, 1)])
def test_long_thin_images_take_little_memory(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.new("RGB", size, (255, 0, 0))
    sizes = pillow_bytes(monkeypatch)
    preprocess_image(image)
    Plain(224, 256, "bicubic", CLIP_MEAN, CLIP_STD)(image, 0)
    assert max(sizes) < 100e6


def test_of_a_long_thin_image_the_centre_is_kept(tmp_path: Path) -> None:
    image = Image.new("RGB", (3, 1001), (255, 0, 0))
    image.paste((0, 0, 255), (0, 490, 3, 511))
    pixels = np.asarray(resize_and_crop(image, 8, 8, Image.Resampling.BICUBIC))
    assert (pixels == (0, 0, 255)).all()
    wide = np.asarray(resize_and_crop(image.transpose(Image.Transpose.ROTATE_90), 8, 8, Image.Resampling.BICUBIC))
    assert (wide == (0, 0, 255)).all()


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def test_unreadable_files_are_named(tmp_path):
    whole = (GOLDEN / "files" / "big_smooth.jpg").read_bytes()
    noise = (GOLDEN / "files" / "noise_rgb.png").read_bytes()
    write(tmp_path / "short.jpg", whole[: len(whole) // 2])
    write(tmp_path / "short.png", noise[: len(noise) // 2])
    write(tmp_path / "text.jpg", b"not an image")
    write(tmp_path / "empty.png", b"")
    write(tmp_path / "damaged.png", noise[:100] + b"\x00" * 40 + noise[140:])
    (tmp_path / "folder.png").mkdir()
    for name in ("short.jpg", "short.png", "text.jpg", "empty.png", "damaged.png", "folder.png", "absent.png"):
        with pytest.raises(InputError, match=name):
            load_image(name, tmp_path)


def test_paths_cannot_leave_the_image_folder(tmp_path):
    root = tmp_path / "images"
    write(tmp_path / "outside.png", (GOLDEN / "files" / "flat_wide.png").read_bytes())
    write(root / "sub" / "inside.png", (GOLDEN / "files" / "flat_wide.png").read_bytes())
    (root / "link.png").symlink_to(tmp_path / "outside.png")
    (root / "linked").symlink_to(tmp_path)
    (root / "good.png").symlink_to(root / "sub" / "inside.png")
    (tmp_path / "root_link").symlink_to(root)
    for path in ("../outside.png", str(tmp_path / "outside.png"), "link.png", "linked/outside.png", "sub/../../x"):
        with pytest.raises(InputError, match="leaves the image folder"):
            load_image(path, root)
    inside = str(root / "sub" / "inside.png")
    for folder, path in (
        (root, "sub/inside.png"),
        (root, "sub/../good.png"),
        (tmp_path / "root_link", "good.png"),
        (root, inside),
        (tmp_path / "root_link", inside),
        (root, str(tmp_path / "root_link" / "good.png")),
    ):
        assert load_image(path, folder).size == (120, 60)


def test_huge_images_are_refused_before_decoding(tmp_path):
    Image.new("1", (MAX_SIDE + 1, 1)).save(tmp_path / "long.png")
    Image.new("1", (MAX_SIDE, 1)).save(tmp_path / "longest.png")
    Image.new("1", (MAX_SIDE - 1, MAX_SIDE - 1)).save(tmp_path / "bomb.png")
    with pytest.raises(InputError, match=r"long\.png has 16385 x 1 pixels"):
        load_image("long.png", tmp_path)
    with pytest.raises(InputError, match=r"bomb\.png is too large"):
        load_image("bomb.png", tmp_path)
    assert load_image("longest.png", tmp_path).mode == "RGB"


@pytest.mark.parametrize(
    ("asked", "there"),
    [
        ("Sub/Picture.png", "sub/Picture.png"),
        ("sub/picture.PNG", "sub/Picture.png"),
        ("sub/caf\u00e9.png", "sub/cafe\u0301.png"),
    ],
)
def test_a_name_that_differs_in_capitals_or_accents_alone_is_told(asked: str, there: str, tmp_path: Path) -> None:
    write(tmp_path / there, b"")
    with pytest.raises(InputError) as error:
        check_image(asked, tmp_path)
    differs = next(right for left, right in zip(asked.split("/"), there.split("/"), strict=True) if left != right)
    assert str(error.value).endswith(
        f"does not exist: check the image folder and the record's path. Did you mean {differs!r}?"
    )
    with pytest.raises(InputError) as error:
        check_image("sub/other.png", tmp_path)
    assert "Did you mean" not in str(error.value)


def test_what_is_in_place_of_an_image_is_told(tmp_path: Path) -> None:
    write(tmp_path / "a.jpg", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    write(tmp_path / "b.jpg", b"<!DOCTYPE html><html>")
    for name, said in (("a.jpg", "git lfs pull"), ("b.jpg", "a web page")):
        for read in (load_image, check_image):
            with pytest.raises(InputError, match=rf"{name} cannot be decoded: is .*{said}"):
                read(name, tmp_path)


def chunks(content: bytes) -> Iterator[tuple[int, bytes, int]]:
    """Place, name and length of the parts of a PNG."""
    place = 8
    while place < len(content):
        (length,) = struct.unpack(">I", content[place : place + 4])
        yield place, content[place + 4 : place + 8], length
        place += 12 + length


def test_a_png_with_a_wrong_checksum_is_refused(tmp_path: Path) -> None:
    text, stream = PngInfo(), io.BytesIO()
    text.add_text("key", "value")
    picture(40, 30).save(stream, "PNG", pnginfo=text)
    content = stream.getvalue()
    write(tmp_path / "x.png", content)
    check_image("x.png", tmp_path)
    places = [(place, name, length) for place, name, length in chunks(content) if name != b"IEND"]
    assert {name for _, name, _ in places} == {b"IHDR", b"tEXt", b"IDAT"}
    for place, _, length in places:
        damaged = bytearray(content)
        damaged[place + 8 + length] ^= 1
        write(tmp_path / "x.png", bytes(damaged))
        for read in (load_image, check_image):
            with pytest.raises(InputError, match=r"x\.png cannot be decoded"):
                read("x.png", tmp_path)


def test_other_pixels_under_an_old_checksum_are_refused(tmp_path: Path) -> None:
    """They unpack well, and only the part's checksum tells of it."""
    stream = io.BytesIO()
    Image.new("L", (4, 4), 7).save(stream, "PNG")
    content = stream.getvalue()
    place, _, length = next(part for part in chunks(content) if part[1] == b"IDAT")
    packed = zlib.compress(zlib.decompress(content[place + 8 : place + 8 + length]).replace(b"\x07", b"\x09"))
    end = place + 8 + length
    write(tmp_path / "x.png", content[:place] + struct.pack(">I", len(packed)) + b"IDAT" + packed + content[end:])
    for read in (load_image, check_image):
        with pytest.raises(InputError, match=r"x\.png cannot be decoded"):
            read("x.png", tmp_path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"])
def test_files_cut_short_are_refused_whatever_a_library_asked_pillow_for(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.BytesIO()
    picture(40, 30).save(stream, kind)
    content = stream.getvalue()
    for part in (0.4, 0.7, 0.9):
        write(tmp_path / "x", content[: int(part * len(content))])
        for read in (load_image, check_image):
            monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
            with pytest.raises(InputError, match=r"x cannot be decoded"):
                read("x", tmp_path)


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_the_check_finds_what_decoding_would(kind, tmp_path):
    rng = np.random.default_rng(0)
    file = tmp_path / f"picture.{kind}"
    Image.fromarray(rng.integers(0, 255, (64, 48, 3), dtype=np.uint8)).save(file)
    check_image(file.name, tmp_path)
    content = file.read_bytes()
    for part in (0.3, 0.6, 0.95):
        file.write_bytes(content[: int(len(content) * part)])
        for read in (load_image, check_image):
            with pytest.raises(InputError, match="cannot be decoded"):
                read(file.name, tmp_path)
    Image.new("RGB", (9, 7)).save(file)
    check_image(file.name, tmp_path)  # smaller than the eighth that a JPEG is checked at
    with pytest.raises(InputError, match="does not exist"):
        check_image("none.png", tmp_path)
    with pytest.raises(InputError, match="leaves the image folder"):
        check_image("../none.png", tmp_path)


def saved(folder: Path, name: str, image: Image.Image, **options: object) -> np.ndarray:
    """The pixels of an image once it is saved and loaded."""
    image.save(folder / name, **options)
    check_image(name, folder)
    return np.asarray(load_image(name, folder))


def test_the_content_of_a_file_decides_not_its_suffix(tmp_path):
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    names = {"PNG": "png.jpg", "BMP": "bmp.png", "GIF": "gif", "TIFF": "tiff.webp", "WEBP": "webp.txt"}
    for kind, name in names.items():
        pixels = saved(tmp_path, name, red, format=kind, **({"lossless": True} if kind == "WEBP" else {}))
        assert (pixels == (255, 0, 0)).all(), kind


def test_formats_that_are_not_listed_are_refused_and_no_program_is_started(tmp_path, monkeypatch):
    def never(*arguments, **options):
        raise AssertionError("a program was started")

    monkeypatch.setattr("subprocess.Popen", never)
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    for kind in ("EPS", "PPM", "ICO", "TGA", "PCX"):
        red.save(tmp_path / "picture.png", format=kind)
        for read in (load_image, check_image):
            with pytest.raises(InputError, match=r"picture\.png cannot be decoded: none of BMP, GIF, JPEG"):
                read("picture.png", tmp_path)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_of_an_animation_the_first_image_counts(kind, tmp_path):
    first, second = (Image.new("RGB", (6, 5), colour) for colour in ((255, 0, 0), (0, 0, 255)))
    pixels = saved(tmp_path, "moving", first, format=kind, save_all=True, append_images=[second, second])
    assert pixels.shape == (5, 6, 3)
    assert np.abs(pixels.astype(int) - (255, 0, 0)).max() <= 3


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_of_16_bits_the_upper_eight_count(kind, tmp_path):
    values = np.array([[0, 255, 256, 0x1234], [0x7FFF, 0x8000, 0xFEFF, 0xFFFF]], np.uint16)
    pixels = saved(tmp_path, "deep", Image.fromarray(values), format=kind)
    assert (pixels == (values >> 8)[..., None]).all()
    assert (np.asarray(load_thumbnail("deep", tmp_path, 4)) == (values >> 8)[..., None]).all()


def test_of_16_bits_the_upper_eight_become_the_pixels_that_a_model_sees():
    deep = np.random.default_rng(0).integers(0, 65536, (20, 20), np.uint16)
    image, shallow = Image.fromarray(deep), Image.fromarray((deep >> 8).astype(np.uint8))
    assert image.mode == "I;16"
    np.testing.assert_array_equal(preprocess_image(image, size=9), preprocess_image(shallow, size=9))
    plain = Plain(8, 12, "bilinear", CLIP_MEAN, CLIP_STD)
    np.testing.assert_array_equal(plain(image, 0), plain(shallow, 0))


@pytest.mark.parametrize("values", [np.float32([[0.5, 1]]), np.int32([[1, 70_000]])])
def test_values_of_32_bits_are_refused(values, tmp_path):
    Image.fromarray(values).save(tmp_path / "deep.tif")
    for read in (load_image, check_image):
        with pytest.raises(InputError, match=r"deep\.tif has values of 32 bits"):
            read("deep.tif", tmp_path)


def test_cmyk_grey_and_transparency_become_rgb(tmp_path):
    cmyk = saved(tmp_path, "c.tif", Image.new("CMYK", (2, 2), (0, 255, 255, 51)))
    assert (cmyk == (204, 0, 0)).all()
    assert (saved(tmp_path, "l.png", Image.new("L", (2, 2), 77)) == 77).all()
    assert (saved(tmp_path, "a.png", Image.new("RGBA", (2, 2), (9, 8, 7, 0))) == (9, 8, 7)).all()


def test_an_exif_turn_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by a quarter
    assert saved(tmp_path, "turned.jpg", Image.new("RGB", (8, 4)), exif=exif).shape == (4, 8, 3)


def test_text_that_unpacks_to_too_much_is_refused(tmp_path):
    text = PngInfo()
    for number in range(80):
        text.add_text(f"k{number}", "x" * 1_000_000, zip=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "bomb.png", pnginfo=text)
    assert (tmp_path / "bomb.png").stat().st_size < 200_000
    with pytest.raises(InputError, match=r"bomb\.png cannot be decoded"):
        load_image("bomb.png", tmp_path)
