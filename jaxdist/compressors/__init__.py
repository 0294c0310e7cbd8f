"""Codes for blocks of numbers: what travels in place of them."""

from jaxdist.compressors.base import Compressor as Compressor
from jaxdist.compressors.base import Packed as Packed
from jaxdist.compressors.identity import identity as identity
from jaxdist.compressors.quantize import quantize as quantize
from jaxdist.compressors.top_k import global_top_k as global_top_k
from jaxdist.compressors.top_k import top_k as top_k
