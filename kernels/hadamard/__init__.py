"""Random rotation of rows by Walsh-Hadamard matrices."""
