"""Products of matrices whose transfers hide behind the products."""
