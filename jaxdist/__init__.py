"""Communication-efficient distributed training, as Optax transformations."""

from jaxdist.compressors import Compressor as Compressor
from jaxdist.compressors import global_top_k as global_top_k
from jaxdist.compressors import identity as identity
from jaxdist.compressors import quantize as quantize
from jaxdist.compressors import top_k as top_k
from jaxdist.state import PerWorker as PerWorker
from jaxdist.state import local as local
from jaxdist.state import specs as specs
from jaxdist.state import stacked as stacked
