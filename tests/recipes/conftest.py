"""A recipe finds its neighbours beside itself, as a script does."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / 'recipes'))
