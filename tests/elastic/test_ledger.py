"""The books of elastic replicas, against random schedules."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip('ray', reason='needs jaxdist[ray]')

from jaxdist.elastic import Ledger, Tag, Verdict

REPLICAS = 3
replica = st.integers(0, REPLICAS - 1)
ACTIONS = st.lists(
  st.one_of(
    st.tuples(st.just('give'), replica),
    st.tuples(st.just('admit'), replica),
    st.tuples(st.just('fence'), replica),
    st.tuples(st.just('close'), st.none()),
    # A change that was given at some time, perhaps again, perhaps broken.
    st.tuples(st.just('judge'), st.integers(0, 30), st.booleans()),
  ),
  max_size=80,
)


@settings(max_examples=300)
@given(ACTIONS, st.integers(0, 3))
def test_any_schedule(actions, most):
  ledger = Ledger(most)
  given, applied, current = [], [], {}
  for kind, which, *sound in actions:
    if kind == 'give':
      had = (which, current.get(which), ledger.round) in given
      if which in current and which not in ledger.under_way and not had:
        given.append(ledger.give(which))
    elif kind == 'admit':
      current[which] = ledger.admit(which)
    elif kind == 'fence':
      ledger.fence(which)
      current.pop(which, None)
    elif kind == 'close':
      ledger.close()
    elif kind == 'judge' and given:
      tag = given[which % len(given)]
      verdict = ledger.judge(tag, *sound)
      if verdict.applies:
        applied.append(tag)
        assert sound == [True]
        assert tag.incarnation == current[tag.replica]
        assert 0 <= ledger.age(tag) <= most
        assert (verdict == Verdict.LATE) == (ledger.age(tag) > 0)
      if tag.incarnation != current.get(tag.replica):
        assert verdict == Verdict.FENCED
  assert len(set(applied)) == len(applied)
  counts = ledger.counts
  assert counts['given'] == len(given) == len(set(given))
  assert counts['fresh'] + counts['late'] == len(applied)
  ended = ('fresh', 'late', 'stale', 'unsound', 'lost')
  under_way = len(ledger.under_way)
  assert counts['given'] == sum(counts[name] for name in ended) + under_way


def test_what_was_never_given():
  ledger = Ledger(1, round=5)
  assert ledger.judge(Tag(0, 1, 5)) == Verdict.FENCED
  ledger.admit(0)
  assert ledger.judge(Tag(0, 1, 5)) == Verdict.UNKNOWN
  tag = ledger.give(0)
  for other in (tag._replace(round=6), tag._replace(round=4)):
    assert ledger.judge(other) == Verdict.UNKNOWN
  with pytest.raises(ValueError, match='replica must be idle, got 0'):
    ledger.give(0)
  ledger.admit(0)
  assert ledger.judge(tag) == Verdict.FENCED
  assert ledger.counts['lost'] == 1
