"""What some tests need that is not everywhere."""

import importlib.util

import pytest

from jaxdist.accounting import gpus


def _missing():
  try:
    gpus.compiler('h100:8')
  except ImportError as error:
    return str(error)
  return ''


needs_gpu_compiler = pytest.mark.skipif(bool(_missing()), reason=_missing())
needs_tpu_compiler = pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None,
  reason='needs the TPU compiler, libtpu, which is for Linux on x86-64 only',
)
