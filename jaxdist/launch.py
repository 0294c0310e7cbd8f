"""Starts a world of several processes on this machine.

python -m jaxdist.launch --processes 4 recipes/lm.py --workers 4
"""

import argparse
import sys

from jaxdist.hosts import launcher, world


def main() -> int:
  """The command line; returns its exit status."""
  parser = argparse.ArgumentParser(
    prog='python -m jaxdist.launch',
    description='Runs a script in several processes on this machine; '
    'jaxdist.initialize() in it joins them. When one fails, the others are '
    'stopped.',
  )
  parser.add_argument(
    '--processes', type=int, required=True, help='how many; one GPU for each'
  )
  parser.add_argument(
    '--timeout',
    type=float,
    default=world.TIMEOUT_SECONDS,
    help='longest wait of a process for another, in seconds (default: 30)',
  )
  parser.add_argument(
    '--restarts',
    type=int,
    default=0,
    help='how often to begin anew after a failure (default: 0), but for exit '
    'status 2, by which scripts refuse their arguments; jaxdist.initialize() '
    'returns how often that was, for the script to go on from its last '
    'checkpoint',
  )
  parser.add_argument('script', help='a Python file')
  parser.add_argument(
    'arguments', nargs=argparse.REMAINDER, help='its arguments'
  )
  given = parser.parse_args()
  for name, least in (('processes', 1), ('timeout', 1), ('restarts', 0)):
    if getattr(given, name) < least:
      parser.error(
        f'--{name} must be at least {least}, got {getattr(given, name)}'
      )
  command = [sys.executable, given.script, *given.arguments]
  return launcher.run(command, given.processes, given.timeout, given.restarts)


if __name__ == '__main__':
  sys.exit(main())
