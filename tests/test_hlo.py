"""Forms of program text, those too that this CPU compiler does not print."""

import math
from typing import NamedTuple

import pytest

from jaxdist.accounting import (
  chips,
  hlo,
  links,
  schedule,
  transfers,
  walk,
  work,
)


@pytest.mark.parametrize(
  ('printed', 'groups'),
  [
    ('{{0,3},{2,1}}', ((0, 3), (2, 1))),
    ('{}', ((0, 1, 2, 3, 4, 5, 6, 7),)),
    ('[2,4]<=[8]', ((0, 1, 2, 3), (4, 5, 6, 7))),
    ('[4,2]<=[2,4]T(1,0)', ((0, 4), (1, 5), (2, 6), (3, 7))),
    ("mesh['data'=8] {'data'}", ((0, 1, 2, 3, 4, 5, 6, 7),)),
    ('mesh[dcn=2,data=4] {data}', ((0, 1, 2, 3), (4, 5, 6, 7))),
    (
      "mesh['dcn'=2,'data'=4] {'data','dcn'}",
      ((0, 4, 1, 5, 2, 6, 3, 7),),
    ),
    (
      "mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'b'}",
      ((0, 1, 2, 3), (4, 5, 6, 7)),
    ),
    (
      "mesh['a'=4,'b'=2], device_ids=(7,6,5,4,3,2,1,0) {'b'}",
      ((7, 6), (5, 4), (3, 2), (1, 0)),
    ),
    ("mesh['data'=8] {'data':(2)4}", ((0, 1, 2, 3), (4, 5, 6, 7))),
    ("mesh['data'=8] {'data':(1)2}", ((0, 4), (1, 5), (2, 6), (3, 7))),
    ("mesh['data'=8] {'data':(2)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
    (
      "mesh['data'=8] {'data':(1)2,'data':(4)2}",
      ((0, 1, 4, 5), (2, 3, 6, 7)),
    ),
  ],
)
def test_replica_groups(printed, groups):
  attributes = f', channel_id=1, replica_groups={printed}, dimensions={{0}}'
  assert hlo.replica_groups(attributes, 8) == groups


@pytest.mark.parametrize(
  ('array', 'num_bytes'),
  [('u4[7]', 4), ('f8e4m3fn[8]', 8), ('bf16[3,5]{1,0:T(8,128)}', 30)],
)
def test_num_bytes(array, num_bytes):
  assert hlo.arrays(array)[0].num_bytes == num_bytes


LOOP = """\
HloModule m, is_scheduled=true, replica_count=4

%sum (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}}

%wrapped (p.0: s32[], p.1: s32[]) -> s32[] {{
  %p.0 = s32[] parameter(0)
  %p.1 = s32[] parameter(1)
  ROOT %next = s32[] add(%p.0, %p.1)
}}

%body (carry: (s32[], f32[10])) -> (s32[], f32[10]) {{
  %carry = (s32[], f32[10]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %x = f32[10]{{0}} get-tuple-element(%carry), index=1
  %step = s32[] constant({step})
  %fused = s32[] fusion(%i, %step), kind=kLoop, calls=%wrapped
  %start = f32[10]{{0}} all-reduce-start(%x), to_apply=%sum
  %done = f32[10]{{0}} all-reduce-done(%start)
  ROOT %out = (s32[], /*index=1*/f32[10]{{0}}) tuple(%fused, %done)
}}

%condition (carry.1: (s32[], f32[10])) -> pred[] {{
  %carry.1 = (s32[], f32[10]{{0}}) parameter(0)
  %i.1 = s32[] get-tuple-element(%carry.1), index=0
  %bound = s32[] constant({bound})
  ROOT %go = pred[] compare(%i.1, %bound), direction={direction}
}}

%wrapped_gather (p.2: f32[10]) -> f32[40] {{
  %p.2 = f32[10]{{0}} parameter(0)
  ROOT %gather = f32[40]{{0}} all-gather(%p.2), dimensions={{0}}
}}

ENTRY %main (x.1: f32[10]) -> f32[10] {{
  %x.1 = f32[10]{{0}} parameter(0)
  %zero = s32[] constant({start})
  %copied = s32[] copy(%zero)
  %init = (s32[], f32[10]{{0}}) tuple(%copied, %x.1)
  %while = (s32[], f32[10]{{0}}) while(%init), condition=%condition, body=%body
  %async = ((f32[10]{{0}}), f32[40]{{0}}) async-start(%x.1), calls=%wrapped_gather
  %async-done = f32[40]{{0}} async-done(%async), calls=%wrapped_gather
  ROOT %result = f32[10]{{0}} get-tuple-element(%while), index=1
}}
"""  # noqa: E501


@pytest.mark.parametrize(
  ('start', 'bound', 'step', 'direction', 'times'),
  [
    (0, 7, 1, 'LT', 7),
    (3, 10, 2, 'LT', 4),
    (0, 7, 1, 'LE', 8),
    (9, 0, -1, 'GT', 9),
    (9, 0, -2, 'GE', 5),
    (7, 7, 1, 'LT', 0),
  ],
)
def test_trip_count_of_the_condition(start, bound, step, direction, times):
  program = hlo.parse(
    LOOP.format(start=start, bound=bound, step=step, direction=direction)
  )
  assert program.num_devices == 4
  reduced, gathered = walk.collectives(program)
  assert (reduced.transfer.kind, reduced.times) == ('all-reduce', times)
  assert not reduced.in_unknown_loop
  assert reduced.transfer.arrays == (hlo.Array('f32', (10,)),)
  # The asynchronous one is counted once.
  assert (gathered.transfer.kind, gathered.times) == ('all-gather', 1)


def test_trip_count_that_cannot_be_known():
  values = {'start': 0, 'bound': 7, 'step': -1, 'direction': 'LT'}
  reduced, _ = walk.collectives(hlo.parse(LOOP.format(**values)))
  assert reduced.in_unknown_loop
  assert reduced.times == 1


def test_send_of_unknown_size_is_refused():
  text = LOOP.format(start=0, bound=7, step=1, direction='LT').replace(
    ' copy(%zero)', ' ragged-all-to-all(%zero)'
  )
  with pytest.raises(NotImplementedError, match='ragged-all-to-all'):
    list(walk.collectives(hlo.parse(text)))


def test_not_a_program():
  with pytest.raises(ValueError, match='text must be an HLO module'):
    hlo.parse('nothing')


# Two steps of compute, 4096 bytes in and out each, with a transfer beside the
# first. What GPUs print is from XLA's documents: none was at hand.
BESIDE = """\
HloModule m, is_scheduled=true, num_partitions=4

%sum (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}}
{called}
ENTRY %main (p: f32[1024]) -> f32[1024] {{
  %p = f32[1024] parameter(0)
  %t = s32[] parameter(1)
{start}
  %first = f32[1024] negate(%p)
{end}
  ROOT %second = f32[1024] negate(%first)
}}
"""

GPU_FORMS = {
  'all-reduce': (
    '',
    '%s = f32[1024] all-reduce-start(%p), replica_groups={{0,1},{2,3}},'
    ' to_apply=%sum',
    '%d = f32[1024] all-reduce-done(%s)',
  ),
  'all-gather': (
    '',
    '%s = (f32[1024], f32[2048]) all-gather-start(%p),'
    ' replica_groups=[2,2]<=[4], dimensions={0}',
    '%d = f32[2048] all-gather-done(%s)',
  ),
  'reduce-scatter': (
    '%async (q: f32[1024]) -> f32[512] {\n'
    '  %q = f32[1024] parameter(0)\n'
    '  ROOT %r = f32[512] reduce-scatter(%q), replica_groups={{0,1},{2,3}},'
    ' dimensions={0}, to_apply=%sum\n}\n',
    '%s = ((f32[1024]), f32[512]) async-start(%p), calls=%async',
    '%u = ((f32[1024]), f32[512]) async-update(%s)\n'
    '  %d = f32[512] async-done(%u)',
  ),
  'collective-permute': (
    '',
    '%s = (f32[1024], f32[1024], u32[], u32[]) collective-permute-start(%p),'
    ' source_target_pairs={{0,1},{1,0}}',
    '%d = f32[1024] collective-permute-done(%s)',
  ),
}
# What TPUs print, shortened.
TPU_FORMS = {
  'all-gather': (
    '%called (q: f32[1024]) -> f32[2048] {\n'
    '  %q = f32[1024] parameter(0)\n'
    '  ROOT %g = f32[2048] all-gather(%q), replica_groups={{0,1},{2,3}},'
    ' dimensions={0}\n}, execution_thread="sparsecore"\n',
    '%s = ((f32[1024]), f32[2048]) call-start(%p), to_apply=%called',
    '%d = f32[2048] call-done(%s)',
  ),
  'all-reduce': (
    '',
    '%s = (f32[1024], u32[], token[]) send(%p, %t), channel_id=2,'
    ' is_host_transfer=true, frontend_attributes={'
    '_xla_host_transfer_rendezvous="psum.7_0",'
    '_xla_megascale_target="{1,2}x{0:1}",'
    '_xla_megascale_transfer_type="ALL_REDUCE"}\n'
    '  %v = (f32[1024], u32[], token[]) recv(%t), channel_id=1,'
    ' is_host_transfer=true, frontend_attributes={'
    '_xla_host_transfer_rendezvous="psum.7_0"}',
    '%e = token[] send-done(%s), is_host_transfer=true\n'
    '  %d = (f32[1024], token[]) recv-done(%v), is_host_transfer=true',
  ),
}


def read(called, start, end):
  text = BESIDE.format(called=called, start='  ' + start, end='  ' + end)
  return hlo.parse(text)


def clock(program):
  estimate = work.Estimate(program, chips.Chip(1e12, 1e9))
  return schedule.Clocks(program, estimate).of(program.entry)


@pytest.mark.parametrize(
  ('kind', 'form'), [*GPU_FORMS.items(), *TPU_FORMS.items()]
)
def test_transfer_beside_compute(kind, form):
  program = read(*form)
  (run,) = walk.collectives(program)
  assert run.transfer.kind == kind
  assert run.transfer.arrays == (hlo.Array('f32', (1024,)),)
  times = clock(program)
  interval = times.interval(run.transfer.start, run.transfer.end)
  assert interval == pytest.approx((0, 0.5))
  assert times.schedule('program').seconds == pytest.approx(4 * 4096 / 1e9)


CHAIN = """\
%fused.1 (q: f32[1024]) -> (f32[1024], f32[2048]) {
  %q = f32[1024] parameter(0)
  %g.1 = f32[2048] all-gather(%q), channel_id=4, replica_groups={{0,1},{2,3}}, \
dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %x.1 = (f32[1024], f32[2048]) custom-call(%g.1), \
custom_call_target="AsyncCollectiveStart"
}

%fused.2 (q.2: f32[1024], k: f32[32,32]) -> (f32[32,32], f32[2048]) {
  %q.2 = f32[1024] parameter(0)
  %k = f32[32,32] parameter(1)
  %g.2 = f32[2048] all-gather(%q.2), channel_id=4, \
replica_groups={{0,1},{2,3}}, dimensions={0}, \
frontend_attributes={chain_id="0"}
  %m = f32[32,32] dot(%k, %k), lhs_contracting_dims={1}, \
rhs_contracting_dims={0}
  ROOT %x.2 = (f32[32,32], f32[2048]) tuple(%m, %g.2)
}

%fused.3 (q.3: f32[1024], o: f32[2048]) -> f32[2048] {
  %q.3 = f32[1024] parameter(0)
  %o = f32[2048] parameter(1)
  %g.3 = f32[2048] all-gather(%q.3), channel_id=4, \
replica_groups={{0,1},{2,3}}, dimensions={0}, \
frontend_attributes={chain_id="0"}
  ROOT %x.3 = f32[2048] custom-call(%g.3, %o), \
custom_call_target="AsyncCollectiveDone"
}

%scatter (i: f32[1024]) -> f32[512] {
  %i = f32[1024] parameter(0)
  %r = f32[1024] all-reduce(%i), channel_id=7, replica_groups={{0,1},{2,3}}, \
to_apply=%sum
  %z = s32[] partition-id()
  ROOT %y = f32[512] dynamic-slice(%r, %z), dynamic_slice_sizes={512}
}
"""


def test_fusions_of_a_chain_are_one_transfer():
  start = """\
%s = (f32[1024], f32[2048]) fusion(%p), kind=kCustom, calls=%fused.1
  %s.0 = f32[1024] get-tuple-element(%s), index=0
  %w = f32[32,32] bitcast(%p)
  %s.1 = (f32[32,32], f32[2048]) fusion(%s.0, %w), kind=kCustom, calls=%fused.2
  %s.2 = f32[2048] get-tuple-element(%s.1), index=1"""
  end = """\
%d = f32[2048] fusion(%s.0, %s.2), kind=kCustom, calls=%fused.3
  %f = f32[512] fusion(%p), kind=kCustom, calls=%scatter"""
  program = read(CHAIN, start, end)
  gather, scatter = walk.collectives(program)
  assert (gather.transfer.start, gather.transfer.end) == ('s', 'd')
  assert gather.transfer.kind == 'all-gather'
  assert clock(program).matmuls_between('s', 'd') == 1
  # Each device keeps its part of the sum, and need not be sent the others.
  assert scatter.transfer.kind == 'reduce-scatter'
  assert scatter.transfer.start == scatter.transfer.end == 'f'
  assert scatter.transfer.arrays == (hlo.Array('f32', (1024,)),)


def test_transfer_that_stays_open():
  program = read('', GPU_FORMS['all-reduce'][1], '%d = s32[] add(%t, %t)')
  (run,) = transfers.find(program, program.computations[program.entry])
  assert run.end is None
  assert clock(program).interval(run.start, None) == (0, 1)


def test_unknown_transfer_between_slices_is_refused():
  called, start, end = TPU_FORMS['all-reduce']
  program = read(called, start.replace('ALL_REDUCE', 'RAGGED'), end)
  with pytest.raises(NotImplementedError, match='a transfer RAGGED'):
    list(walk.collectives(program))


@pytest.mark.parametrize(
  ('text', 'elements'),
  [
    ('f32[24,20]{1,0:T(8,128)}', 24 * 128),
    ('f32[24,20]{0,1:T(8,128)}', 24 * 128),  # 20 rows of 24
    ('bf16[3,5,300]{2,1,0:T(8,128)(2,1)S(1)}', 3 * 8 * 384),
    ('u32[]{:T(128)}', 128),
    ('s8[300]{0:T(512)(128)(4,1)}', 512),
    ('f32[24,20]{1,0}', 24 * 20),
  ],
)
def test_padding_of_tiles(text, elements):
  (array,) = hlo.arrays(text)
  width = array.num_bytes // max(1, math.prod(array.shape))
  assert array.memory_bytes == elements * width


def test_sliced_operands_count_by_their_slices():
  """A loop over layers reads one of the stacked weights, not all."""
  program = hlo.parse("""\
HloModule m, num_partitions=1

%fused (w: f32[64,1024], i: s32[]) -> f32[1,1024] {
  %w = f32[64,1024] parameter(0)
  %i = s32[] parameter(1)
  %o = s32[] constant(0)
  ROOT %y = f32[1,1024] dynamic-slice(%w, %i, %o), dynamic_slice_sizes={1,1024}
}

ENTRY %main (w.1: f32[64,1024], i.1: s32[]) -> f32[1,1024] {
  %w.1 = f32[64,1024] parameter(0)
  %i.1 = s32[] parameter(1)
  ROOT %f = f32[1,1024] fusion(%w.1, %i.1), kind=kLoop, calls=%fused
}
""")
  total = work.Estimate(program, chips.Chip(1e12, 1e9)).computation('main')
  assert total.num_bytes == 4096 + 4 + 4096  # the slice, its index, the result


class Device(NamedTuple):
  platform: str
  id: int
  process_index: int
  slice_index: int | None = None


def link(*devices):
  places = links.Places(devices, (), len(devices))
  return places.link(range(len(devices)))


def test_links():
  tpus = [
    Device('tpu', i, process_index=i, slice_index=i // 2) for i in range(4)
  ]
  assert link(*tpus[:2]) == 'chip links'
  assert link(*tpus) == 'between slices'
  cpus = [Device('cpu', i, i // 2, i // 2) for i in range(4)]
  assert link(*cpus[:2]) == 'inside a host'
  assert link(*cpus) == 'between hosts'
  assert links.Places((), (), 2).link((0, 1)) == '?'
