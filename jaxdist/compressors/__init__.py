"""Codes for blocks of numbers: what travels in place of them."""

from jaxdist.compressors.base import Compressor as Compressor
from jaxdist.compressors.base import Packed as Packed
from jaxdist.compressors.chained import chained as chained
from jaxdist.compressors.codebook import Codebook as Codebook
from jaxdist.compressors.codebook import codebook as codebook
from jaxdist.compressors.float4 import float4 as float4
from jaxdist.compressors.float8 import float8 as float8
from jaxdist.compressors.identity import identity as identity
from jaxdist.compressors.natural import natural as natural
from jaxdist.compressors.quantize import quantize as quantize
from jaxdist.compressors.random_k import random_k as random_k
from jaxdist.compressors.rotated import rotated as rotated
from jaxdist.compressors.sign import sign as sign
from jaxdist.compressors.sketch import sketch as sketch
from jaxdist.compressors.ternary import ternary as ternary
from jaxdist.compressors.top_k import Sparse as Sparse
from jaxdist.compressors.top_k import global_top_k as global_top_k
from jaxdist.compressors.top_k import top_k as top_k
