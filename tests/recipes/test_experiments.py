"""The orderings that the recipes' experiments show, in seconds.

Fewer seeds and steps than the recipes take, at learning rates that they found;
the margins are those of the specification of each method.
"""

import json
import warnings

import cellm
import digits
import federated
import fedzip
import feedback
import jax
import lgreco
import lgreco_page
import numpy as np
import saddle
import sketch
import trials
from rich.console import Console

import jaxdist as jd

CODE = jd.global_top_k(0.1)


def ends(method, problem, rate, steps, seeds=2):
  """Each seed's median over the last tenth of the evaluations."""
  curve = trials.run(method, problem, [rate], seeds, steps, 10)[:, 0]
  return np.median(curve[:, -max(1, steps // 100) :], axis=1)


def test_changes_converge_where_workers_differ_and_errors_do_not():
  problem = feedback.quadratic(spread=10, noise=0)
  methods = feedback.methods(CODE)
  # Float32 has seven digits of gradients of norm ten.
  assert ends(methods['EF21'], problem, 0.3, 800).max() < 1e-5
  assert ends(methods['EControl'], problem, 0.3, 800).max() < 1e-5
  assert ends(methods['error feedback'], problem, 0.03, 800).min() > 1e-3


def test_errors_and_momentum_average_noise_and_changes_do_not():
  problem = feedback.quadratic(spread=10, noise=1)
  methods = feedback.methods(CODE)
  found = {
    name: ends(methods[name], problem, 0.01, 2000).mean()
    for name in ('dense', 'EF21', 'EF21-SGDM', 'EControl')
  }
  assert found['EF21'] > 2 * found['dense']
  assert found['EF21-SGDM'] < 1.3 * found['dense']
  assert found['EControl'] < 1.3 * found['dense']


def test_too_much_control_diverges():
  with warnings.catch_warnings(action='ignore'):
    tx = jd.econtrol(jd.mean(trials.AXIS, CODE, 'gather'), control=1.0)
  problem = feedback.quadratic(spread=10, noise=0)
  for rate in (0.003, 0.3):
    end = ends(trials.scaled(tx), problem, rate, 600)
    assert not np.any(end < 100)


def test_newer_theory_of_ef21_is_faster_by_its_larger_step():
  problem = feedback.unequal_digits(1.0)
  code = jd.global_top_k(1 / 64)
  rates = feedback.theory_rates(problem, code.contraction)
  method = trials.scaled(jd.ef21(jd.mean(trials.AXIS, code, 'gather')))
  curves = trials.run(method, problem, rates, 2, 3000, 20)
  assert rates[1] / rates[0] > 1.4
  np.testing.assert_allclose(
    feedback.times_to_level(curves), rates[1] / rates[0], rtol=0.1
  )
  assert np.all(curves[:, :, -1] < curves[:, :, 0])


def test_fresh_sketches_converge_and_a_fixed_one_does_not():
  dense = sketch.ends('dense', seeds=2, rounds=60)
  fresh = sketch.ends('SRHT', seeds=2, rounds=60)
  # At equal bytes, nearly as many digits.
  assert np.all(np.log(fresh) < np.log(dense) / 2)
  assert sketch.ends('SRHT, fixed', seeds=2, rounds=60).min() > 0.5
  assert not np.any(sketch.ends('SRHT, rate 1 / L', seeds=2, rounds=60) < 100)


def test_momentum_bears_one_bit_and_gradients_before_adam_do_not():
  sign = jd.mean(trials.AXIS, jd.sign(), 'two_shot')
  one_bit = lambda rate: jd.one_bit_adam(rate, sign, 30, b2=0.99, eps=1e-5)
  behind = digits.adam_methods(steps=150)['feedback, then Adam']
  problem = digits.digits(batch=16)
  found = [ends(method, problem, 3e-3, 150) for method in (one_bit, behind)]
  assert found[0].max() < 0.7 * found[1].min()


def test_momentum_built_up_on_workers_is_ahead_of_gradient_dropping():
  methods, problem = digits.momentum_methods(1e-3), digits.digits(batch=16)
  built_up = ends(methods['DGC, no masking'], problem, 0.1, 150)
  dropped = ends(methods['gradient dropping'], problem, 0.1, 150)
  assert built_up.max() < dropped.min()


def test_controls_converge_where_clients_differ_and_averages_do_not():
  problem = federated.quadratic(noise=0)
  methods = federated.methods(0.1, 0.5, server=0.1)
  rates = {
    'Fed-EF, largest': 0.01,
    'SCALLION, random': 0.003,
    'SCAFCOM, largest': 0.003,
  }
  found = {
    name: ends(methods[name], problem, rate, 3000)
    for name, rate in rates.items()
  }
  assert found['Fed-EF, largest'].min() > 0.3
  # They go on falling: the recipe takes five times as many rounds.
  assert found['SCALLION, random'].max() < 0.1
  assert found['SCAFCOM, largest'].max() < 1e-3


def test_changes_of_operators_bear_compression_and_operators_do_not():
  problem = saddle.bilinear()
  end = lambda name, rate, messages: saddle.ends(
    name, problem, [rate], messages, seeds=2
  )
  assert end('MASHA1, random', 0.01, 500).max() < 0.01
  assert end('MASHA2, largest', 0.01, 1000).max() < 0.001
  # These have come to rest by then.
  assert end('extragradient, random', 0.003, 200).min() > 0.015
  assert end('descent-ascent, random', 0.001, 200).min() > 0.015


def test_levels_by_leaf_lose_less_than_one_level_of_more_bytes(monkeypatch):
  # All seeds choose the same levels, so that they share a compiled step.
  monkeypatch.setattr(lgreco, 'UNITS', (64, 256, 10))
  sparse = lambda k: jd.mean(
    trials.AXIS, jd.top_k(k / 512, block_size=512), 'gather'
  )
  leveled, uniform = (
    lgreco.Trainer({k: sparse(k) for k in ks}) for ks in ((1, 4, 8), (3,))
  )
  own = [leveled.run(seed, 4, 150, every=150) for seed in range(3)]
  same = [uniform.run(seed, 3, 150) for seed in range(3)]
  for a, b in zip(own, same, strict=True):
    assert a['sent'] < 0.85 * b['sent']
  # About 0.08 and 0.23.
  assert max(run['loss'] for run in own) < 0.7 * min(r['loss'] for r in same)


def test_bytes_saved_are_read_at_equal_loss(tmp_path):
  run = lambda loss, sent: {'loss': loss, 'sent': sent, 'chosen': {}}
  runs = lambda way, *ends: {('top-k', way): [run(*end) for end in ends]}
  found = {
    ('', 'dense'): [run(1.0, 1e4)] * 2,
    **runs('all 1', (4.0, 100), (4.0, 100)),
    **runs('all 2', (2.0, 400), (2.0, 400)),
    **runs('own, errors', (2.0, 100), (4.0, 50)),
    **runs('own, squares', (1.5, 100), (1.5, 100)),
  }
  *_, errors, squares = lgreco_page.rows_of(found)
  equal = 100 * 4 ** (np.log(4 / 3) / np.log(2))
  np.testing.assert_allclose(errors.saved, [1 - 75 / equal, 0.75, 0.5])
  assert np.isnan(squares.saved).all()
  lgreco_page.write(tmp_path, lgreco_page.rows_of(found), found, {'steps': 3})
  assert json.loads((tmp_path / 'results.json').read_text())['ways'][-1] == {
    'kind': 'top-k',
    'way': 'own, squares',
    'losses': [1.5, 1.5],
    'sent': [100, 100],
    'saved': [None, None, None],
    'chosen': [{}, {}],
  }
  assert '>top-k, own, errors<' in (tmp_path / 'report.html').read_text()


def test_sparse_adapters_nearly_keep_up_with_whole_ones(tmp_path):
  config = cellm.Config(
    seeds=1, steps=40, base_steps=40, lr=1e-2, layers=1, width=32, out=tmp_path
  )
  manual, ways = cellm.Manual(), cellm.ways()
  base = cellm.base_model(config, Console())
  before = float(jax.jit(cellm.next_byte_loss)(base, manual.held_out))

  def gain(name):
    return before - cellm.tune(base, ways[name], config, manual)[0]

  def sent(name):
    _, adapters = cellm.start(base, ways[name], config, 0)
    return ways[name].communicator.bytes_sent(adapters, cellm.CLIENTS)

  whole, sparse, few = 'whole', 'a quarter, both ways', 'whole, of rank 1'
  assert 10 * sent(sparse) < sent(whole) and sent(sparse) < sent(few)
  found = gain(whole)
  assert gain(sparse) > 0.8 * found > 0.03
  assert gain(few) < 0.7 * found


def test_fedzip_sends_far_less_than_places_and_values():
  methods = fedzip.methods()
  top, zipped = (
    fedzip.run(methods[name], 0, 10)
    for name in ('top 20%, feedback', 'FedZip 20%, feedback')
  )
  assert top.num_bytes.mean() > 6 * zipped.num_bytes.mean()
  # Both still climb by five points a round; in the end it is half a point.
  assert fedzip.end(zipped) > fedzip.end(top) - 0.1
  # Well under the two bits a number that travel in a mesh.
  assert zipped.num_bytes.mean() < 0.6 * zipped.payload_bytes


def test_packed_codes_are_near_their_entropy_and_below_the_papers_codes():
  rng = np.random.default_rng(0)
  for density in (0.2, 0.05):
    bits = fedzip.sizes(rng.normal(size=100_000), density)
    assert bits['entropy'] < bits['jd.pack'] < bits['Huffman']
    assert bits['jd.pack'] < min(bits['places'], bits['gaps'])
  # Heavy tails leave a level to almost nothing but zeros: hundreds of times
  # fewer bits, as the paper has it, of which most is sparsity.
  bits = fedzip.sizes(rng.standard_t(3, 100_000), 0.2)
  assert bits['entropy'] < bits['jd.pack'] < 0.1
