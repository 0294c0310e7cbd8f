"""Packing of small unsigned integers into 32-bit words, without gaps."""
