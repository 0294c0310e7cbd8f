"""What goes wrong between processes, found before a wrong number is made."""


class DesyncError(RuntimeError):
  """Processes that should run the same program on the same state do not."""


class MissingProcessError(RuntimeError):
  """A process did not come where the others wait for it, within the timeout."""
