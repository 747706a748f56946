"""The tier distribution as a picture that the Dagster UI shows beside a materialization."""

import base64
import io
from collections.abc import Mapping

from PIL import Image, ImageDraw, ImageFont

_COLORS = ("#2da44e", "#54aeff", "#8c959f", "#d4a72c", "#cf222e")
_WIDTH, _LABEL_WIDTH, _ROW_HEIGHT, _FONT_SIZE = 760, 90, 34, 15


def distribution_image(counts: Mapping[str, Mapping[str, int]]) -> str:
    """A bar for each window, divided by tier, as Markdown.

    Args:
        counts: Number of tutors by window, then by tier from best to worst.

    Returns:
        An image with the picture in it as PNG, so that it needs no file.
    """
    font = ImageFont.load_default(_FONT_SIZE)
    height = _ROW_HEIGHT * (len(counts) + 1)
    # Drawn on white, since the UI has a light and a dark side.
    image = Image.new("RGB", (_WIDTH, height), "white")
    draw = ImageDraw.Draw(image)
    for row, (window, tiers) in enumerate(counts.items()):
        top = row * _ROW_HEIGHT + 6
        draw.text((8, top + 3), window, fill="black", font=font)
        total = max(sum(tiers.values()), 1)
        left = float(_LABEL_WIDTH)
        for color, count in zip(_COLORS, tiers.values(), strict=True):
            right = left + (_WIDTH - _LABEL_WIDTH - 8) * count / total
            if count:
                draw.rectangle((left, top, right, top + _ROW_HEIGHT - 10), fill=color)
            if right - left > 8 * (len(str(count)) + 1):
                draw.text((left + 5, top + 3), str(count), fill="white", font=font)
            left = right
    _draw_legend(
        draw, font, top=_ROW_HEIGHT * len(counts) + 8, tiers=next(iter(counts.values()), {})
    )
    png = io.BytesIO()
    # Each date of a range has a picture, and an octree is several times as fast as the default.
    image.quantize(32, method=Image.Quantize.FASTOCTREE).save(png, format="PNG")
    encoded = base64.b64encode(png.getvalue()).decode()
    return f"![Tutors by tier and window](data:image/png;base64,{encoded})"


def _draw_legend(
    draw: ImageDraw.ImageDraw,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    *,
    top: int,
    tiers: Mapping[str, int],
) -> None:
    left = float(_LABEL_WIDTH)
    for color, tier in zip(_COLORS, tiers, strict=False):
        draw.rectangle((left, top + 3, left + 12, top + 15), fill=color)
        draw.text((left + 17, top), tier, fill="black", font=font)
        left += 17 + draw.textlength(tier, font=font) + 18
