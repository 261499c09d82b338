"""All quantisations. A new one is a file beside this one, and a name in the list."""

from __future__ import annotations

from wan.quantize.float8 import FLOAT8
from wan.quantize.gguf import GGUF
from wan.quantize.int4 import INT4
from wan.quantize.int8 import INT8
from wan.quantize.quantization import Quantization

# A plan tries those that have a cost in this order.
QUANTIZATIONS: dict[str, Quantization] = {one.key: one for one in (INT8, FLOAT8, INT4, GGUF)}
