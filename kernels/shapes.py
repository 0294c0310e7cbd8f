"""Sizes that the bench measures."""

NUMBERS = 2**24  # In all rows.
SIZES = (512, 1024, 2048, 4096)  # Of a row.
WORKERS = (1, 2, 8)  # Whose payloads are added up.
KEPT = (1, 10, 16, 51)  # Numbers of a row.
