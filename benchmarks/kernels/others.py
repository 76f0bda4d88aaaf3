"""The other functions that stand beside HSTU attention in its tables; an entry more is a column more.

An installed kernel that is not named here is measured by its dotted name on the command line (``--providers
package.module:name``): a function that computes the operator (see :mod:`benchmarks.kernels.hstu_attention`), or an
:class:`benchmarks.kernels.registry.Other` of the same form as these.
"""

from __future__ import annotations

from benchmarks.kernels.flex import flex, flex_packed
from benchmarks.kernels.registry import Other
from benchmarks.kernels.softmax import sdpa_cudnn, sdpa_flash, sdpa_varlen

COUNTED = "softmax attention, not HSTU's SiLU; FLOPs counted by HSTU's exact pairs, padding and hidden pairs not at all"
COMPILED = "compiled, block mask made before timing, tiles of torch's own choice"

OTHERS = (
    Other("sdpa_flash", f"torch's flash {COUNTED}; padded to the longest before timing", sdpa_flash),
    Other("sdpa_cudnn", f"cuDNN's {COUNTED}; padded to the longest before timing", sdpa_cudnn),
    Other("sdpa_varlen", f"torch's flash {COUNTED}; jagged, nothing padded", sdpa_varlen),
    Other("flex", f"flex_attention, {COMPILED}: {COUNTED}; same mask and bias, padded before timing", flex),
    Other("flex_packed", f"flex_attention, {COMPILED}: {COUNTED}; same bias, rows packed into one", flex_packed),
)
