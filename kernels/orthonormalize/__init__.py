"""Orthonormal columns for tall matrices."""
