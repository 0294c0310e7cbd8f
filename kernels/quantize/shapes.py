"""Sizes that the tests and the bench share."""

FORMATS = ('int8', 'int4', 'int2', 'sign', 'e3m0', 'e2m1', 'e4m3')
SIZES = (512, 1024, 2048, 4096)  # Numbers in a row.
WORKERS = (2, 8)  # Payloads that are added up.
