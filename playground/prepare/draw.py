"""Draw one picture: icons on coloured ground, candlesticks, molecules, map tiles, enlarged grey pictures."""

from __future__ import annotations

import io
import itertools

import numpy as np
from PIL import Image, ImageDraw

import sources

SIDE = 72
GROUNDS = {
    "white": (255, 255, 255),
    "grey": (150, 150, 150),
    "black": (20, 20, 20),
    "red": (225, 90, 90),
    "green": (120, 200, 120),
    "blue": (100, 150, 235),
    "yellow": (245, 225, 110),
    "pink": (250, 185, 215),
}
FLAG_COLOURS = {
    "red": (216, 0, 39),
    "white": (238, 238, 238),
    "blue": (0, 82, 180),
    "green": (73, 110, 45),
    "yellow": (255, 218, 68),
    "black": (51, 51, 51),
}


def enlarge(pixels: np.ndarray) -> Image.Image:
    """Grey uint8 ``[28, 28]`` as the RGB picture a loader makes of it."""
    return Image.fromarray(pixels).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def ground(colour: str, rng: np.random.Generator) -> Image.Image:
    """An even ground of the named colour, its shade a little varied."""
    shade = np.clip(np.array(GROUNDS[colour]) + rng.integers(-10, 11, 3), 0, 255)
    return Image.new("RGB", (SIDE, SIDE), tuple(int(v) for v in shade))


def paste(
    canvas: Image.Image,
    collection: str,
    name: str,
    centre: tuple[float, float],
    size: int,
    turn: float = 0.0,
    mirror: bool = False,
) -> None:
    """Draw an icon of ``size`` pixels with its centre at ``centre``, turned by ``turn`` degrees, onto ``canvas``."""
    drawn = sources.icon(collection, name)
    if mirror:
        drawn = drawn.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if turn:
        drawn = drawn.rotate(turn, Image.Resampling.BICUBIC)
    drawn = drawn.resize((size, size), Image.Resampling.LANCZOS)
    canvas.paste(drawn, (round(centre[0] - size / 2), round(centre[1] - size / 2)), drawn)


def candlesticks(window: sources.Candles, start: int, days: int) -> Image.Image:
    """Candlestick chart of ``days`` days from index ``start``: green where the close is above the open, else red."""
    part = slice(start, start + days)
    low, high = window.low[part].min(), window.high[part].max()
    image = Image.new("RGB", (SIDE, SIDE), (255, 255, 255))
    pen = ImageDraw.Draw(image)
    step = (SIDE - 4) / days

    def row(price: float) -> float:
        return 4 + (SIDE - 9) * (1 - (price - low) / max(high - low, 1e-9))

    for k in range(days):
        left = 2 + k * step
        first, last = window.open[start + k], window.close[start + k]
        colour = (20, 150, 60) if last >= first else (210, 40, 40)
        middle = left + step / 2 - 0.5
        pen.line((middle, row(window.high[start + k]), middle, row(window.low[start + k])), fill=colour)
        top, bottom = sorted((row(first), row(last)))
        pen.rectangle((left + 0.5, top, left + step - 1.2, max(bottom, top + 1)), fill=colour)
    return image


def molecule(smiles: str, rng: np.random.Generator) -> Image.Image | None:
    """Structure drawing in the usual element colours, turned at random; None where the SMILES cannot be drawn."""
    from rdkit import Chem, RDLogger
    from rdkit.Chem import rdDepictor
    from rdkit.Chem.Draw import rdMolDraw2D

    RDLogger.DisableLog("rdApp.*")
    parsed = Chem.MolFromSmiles(smiles)
    if parsed is None or parsed.GetNumAtoms() < 3:
        return None
    rdDepictor.Compute2DCoords(parsed)
    pen = rdMolDraw2D.MolDraw2DCairo(2 * SIDE, 2 * SIDE)
    options = pen.drawOptions()
    options.bondLineWidth = 4
    options.minFontSize = 26
    options.rotate = float(rng.integers(0, 360))
    options.padding = 0.08
    rdMolDraw2D.PrepareAndDrawMolecule(pen, parsed)
    pen.FinishDrawing()
    drawn = Image.open(io.BytesIO(pen.GetDrawingText())).convert("RGB")
    return drawn.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def map_tile(west: float, north: float, degrees: float) -> tuple[Image.Image, np.ndarray]:
    """Tile of the earth whose north-west corner is given, with its land mask, bool ``[side, side]``."""
    left, top, side = round((west + 180) * 15), round((90 - north) * 15), round(degrees * 15)
    tile = sources.earth().crop((left, top, left + side, top + side))
    return tile.resize((SIDE, SIDE), Image.Resampling.LANCZOS), sources.land_mask()[
        top : top + side, left : left + side
    ]


def flag_shares(name: str) -> dict[str, float]:
    """Share of each of ``FLAG_COLOURS`` in a round flag (nearest colour of every opaque pixel)."""
    pixels = np.asarray(sources.icon("circle-flags", name)).reshape(-1, 4).astype(np.int64)
    pixels = pixels[pixels[:, 3] > 200][:, :3]
    table = np.array(list(FLAG_COLOURS.values()))
    nearest = ((pixels[:, None] - table) ** 2).sum(-1).argmin(1)
    return {c: float((nearest == k).mean()) for k, c in enumerate(FLAG_COLOURS)}


def scatter(count: int, rng: np.random.Generator) -> list[tuple[float, float]]:
    """``count`` (at most 9) well separated centres, drawn from a jittered 3 x 3 grid."""
    cells = list(itertools.product((12.5, 36.0, 59.5), repeat=2))
    chosen = rng.permutation(len(cells))[:count]
    return [(cells[k][0] + rng.uniform(-2, 2), cells[k][1] + rng.uniform(-2, 2)) for k in chosen]
