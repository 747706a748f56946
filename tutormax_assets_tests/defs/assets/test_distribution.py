"""The picture of the tiers."""

import base64
import io

from PIL import Image

from tutormax_assets.defs.assets.distribution import distribution_image
from tutormax_assets.metrics.schemas import TIERS


def test_each_tier_has_its_share_of_the_bar_in_its_color() -> None:
    counts = {"7day": dict.fromkeys(TIERS, 20), "30day": dict.fromkeys(TIERS, 0)}

    markdown = distribution_image(counts)

    _, _, encoded = markdown.removesuffix(")").partition("data:image/png;base64,")
    image = Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")
    pixels = image.crop((90, 6, 760, 30)).getcolors(1000) or []
    counted = {color: count for count, color in pixels}
    bars = [color for color, count in counted.items() if count > 2000]
    assert len(bars) == len(TIERS)
    shares = [counted[color] for color in bars]
    assert max(shares) - min(shares) < 0.1 * max(shares)
