"""Operations on arrays, one a folder, behind one dispatcher.

Each folder has ``api.py``, which callers import, and ``reference.py``, the
definition in plain ``jnp``.
"""
