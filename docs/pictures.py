"""Which stored pictures are drawings on white paper: the dark theme darkens the paper of these alone."""
import base64
import io

import numpy as np
from PIL import Image

WHITE_SHARE = 0.6  # of a drawing's pixels, at least


def is_drawing(output: dict) -> bool:
    "Whether the PNG of an output, if it has one, is mostly white paper."
    png = "".join(output.get("data", {}).get("image/png", ""))
    if not png:
        return False
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")).reshape(-1, 3)
    return bool((pixels > 250).all(1).mean() >= WHITE_SHARE)
