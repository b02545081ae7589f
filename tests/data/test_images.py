"""Pixels against the CLIP processor's on stored cases, against its PIL class on others, and refusals of bad files."""

import importlib
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from llava_cl.data import check_image, load_image, preprocess_image
from llava_cl.data.images import CLIP_MEAN, CLIP_STD, MAX_SIDE
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
    for folder, path in ((root, "sub/inside.png"), (root, "sub/../good.png"), (tmp_path / "root_link", "good.png")):
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
