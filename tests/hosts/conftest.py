"""The scripts here find their neighbours beside themselves; so do the tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

collect_ignore = ['desync.py', 'faults.py', 'worlds.py', 'zombies.py']
