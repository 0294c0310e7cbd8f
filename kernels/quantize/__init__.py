"""Quantization of rows to integer grids."""
