"""Forms of program text, those too that this CPU compiler does not print."""

import pytest

from jaxdist.accounting import hlo, walk


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
