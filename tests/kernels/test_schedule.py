"""Times read from schedules: of a made-up one, and of the compiler's."""

import json
import subprocess
import sys

import pytest
from needs import needs_tpu_compiler

from jaxdist.kernels import schedule

# A grid of 4 steps (and two rounds more), with a loop of 8 rounds in it.
PROGRAM = """\
LB: loop body
   0x0   :  { %s1 = smov 0 }
   0x1 LB: > { %s2 = sadd.s32 1, %s1 } /* Start region 9 :: Start region 4 */
   0x2   :  {}
   0x3 LB: >> { %v1 = vld [vmem:[%s2]] } /* Start region 7 :: Start region 5 */
   0x4   : >> { %p1_p0 = scmp.ge.s32.totalorder (%p9_p1), %s3_s4, 8 /* loop exit test */ }
   0x5   : >> { %5 = sbr.rel (!%p1_p0) target = $region7 }
   0x6   : > { %p2_p0 = scmp.ge.s32.totalorder %s8_s9, 6 /* loop exit test */  ;;  %7 = sbr.rel (%p2_p1) target = $region12 }
   0x7   : > { %8 = sbr.rel (!%p2_p0) target = $region9 }
   0x8   :  { %9 = vsyncpa [#allocation3], 1 }
"""  # noqa: E501


def test_loops_count_by_their_trips():
  # Two outside; in each of 4 steps 4 bundles, and 3 that run 8 times.
  assert schedule.count_bundles(PROGRAM) == 2 + 4 * (4 + 3 * 8)
  assert schedule.count_bundles('') == 0


def test_clocks_follow_from_the_rates():
  clocks = {name: chip.clock / 1e9 for name, chip in schedule.CHIPS.items()}
  known = {'v4': 1.05, 'v5e': 1.5, 'v5p': 1.75, 'v6e': 1.75, 'tpu7x': 2.2}
  assert clocks == pytest.approx(known, rel=0.01)


@needs_tpu_compiler
def test_feedback_is_bound_by_memory_on_v5e(tmp_path):
  path = tmp_path / 'table.json'
  only = '^with feedback (int2|top-10)$'
  options = ['--tpu', 'v5e', '--only', only, '--json', str(path)]
  subprocess.run(
    [sys.executable, '-m', 'jaxdist.kernels.bench', *options],
    check=True,
    timeout=300,
  )
  int2, top_10 = json.loads(path.read_text())
  assert 0 < int2['ratio'] < 1
  assert 0 < top_10['ratio'] < 1
  # The kernel was told which chip it is for.
  assert int2['tiles'] == 'tpu-v5-lite: quantize int2'
