"""Stopping when asked to, after a step that all processes stop after."""

import os
import signal

from jax.experimental import multihost_utils
from rich.console import Console

import jaxdist as jd


class Interrupt:
  """Ctrl-C ends the run after the current step; the second one ends it now.

  So does SIGTERM. Of several processes, each hears of it from JAX, which finds
  a step that none of them has passed yet.
  """

  def __init__(self, console: Console, world: jd.World):
    self.asked = None
    self.console = console
    self.alone = world.processes == 1
    self.last = 0
    signal.signal(signal.SIGINT, self.ask)
    if self.alone:  # Else JAX waits for it.
      signal.signal(signal.SIGTERM, self.ask)

  def ask(self, number, frame) -> None:
    del frame
    self.asked = number
    signal.signal(number, signal.SIG_DFL)
    self.console.show_cursor(True)  # In case that the second one follows.
    self.console.print('Stopping after this step. Ctrl-C again quits at once.')
    if not self.alone:
      os.kill(os.getpid(), signal.SIGTERM)

  def stops_after(self, step: int) -> bool:
    """Whether to stop after a step of a run, the same on all processes."""
    if self.alone:
      return self.asked is not None
    # JAX stops at the step after the last that a process has asked about, when
    # the signal comes. Where steps leap, before the first and between two runs,
    # that one has to be asked about too.
    leap = step != self.last + 1
    stop = leap and multihost_utils.reached_preemption_sync_point(self.last + 1)
    self.last = step
    return multihost_utils.reached_preemption_sync_point(step) or stop
