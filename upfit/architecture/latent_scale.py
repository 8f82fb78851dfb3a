"""How small a latent must be for the norm behind it to be a constant, and which scale a stored one has.

The stock class divides the latent c by its root mean square before the heads read it (DeepSeek-V3, arXiv 2412.19437, section
4.2). A latent that is a linear map of the input must not be divided, so its rows are scaled by a power of two s so small that
the norm's own epsilon outweighs them:

    s c / sqrt(s² mean(c²) + ε) = s c / sqrt(ε) · (1 − s² mean(c²) / (2 ε) + ...)        ε = 1e-6

and the norm's weight sqrt(ε) / s gives c back. A power of two costs no bit of a weight, and taking it off gives the same bits
again. In bfloat16 the norm's weight itself is rounded, by 5.5e-4: one common factor of the latent.
"""

import math
from typing import TYPE_CHECKING

from upfit.errors import UpfitError

if TYPE_CHECKING:
    from torch import Tensor

EPS = 1e-6  # of kv_a_layernorm, whatever config.json says
LATENT_ERROR = 1e-7  # relative, of the latent: about what float32 rounds
STILL_HOLDS = 1.01 * LATENT_ERROR  # of a stored one: it and the norm before it may be rounded to bfloat16, 2^-9 each
ROUNDED = 2.0**-8  # relative; as far as bfloat16 may have moved the norm's weight
NORM = "kv_a_layernorm.weight"
FLOAT16 = "the scaled latent is too small for float16, which would make it zero; use bfloat16 or float32"


def latent_error(scale: float, mean_square: float) -> float:
    """s² · mean_square / (2 ε): the relative error that the norm makes in a latent of this mean square over its r numbers."""
    return scale**2 * mean_square / (2 * EPS)


def latent_scale(mean_square: float, error: float = LATENT_ERROR) -> float:
    """The largest power of two s with s² · mean_square / (2 ε) <= error (see `latent_error`)."""
    return 2.0 ** math.floor(math.log2(2 * EPS * error / mean_square) / 2) if mean_square > 0 else 1.0


def mean_square_bound(latent: "Tensor", norm: "Tensor") -> float:
    """What the mean square of the latent D (g ∘ x) cannot exceed, whatever the text: E / r · |D diag(g)|², Frobenius.

    latent [r, E] is D and norm [E] the scale g of the RMSNorm before it, behind which the squares of x sum to at most E.
    """
    rows, width = latent.shape
    return float((latent.double() * norm.double()).square().sum()) * width / rows


def scale_of(norm: "Tensor") -> float:
    """The power of two s of which the weight [r] of a kv_a_layernorm is sqrt(ε) / s. Raises UpfitError where it is none."""
    if norm.is_meta:
        return 1.0
    low, high = float(norm.min()), float(norm.max())
    scale = 2.0 ** round(math.log2(math.sqrt(EPS) / high)) if low == high and high > 0 else 0.0
    if not math.isclose(high * scale, math.sqrt(EPS), rel_tol=ROUNDED):
        raise UpfitError(
            "kv_a_layernorm is no constant of a scaled latent, so this latent is not linear; it was trained as it is"
        )
    return scale
