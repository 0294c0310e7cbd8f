"""Selection of the largest numbers of each row."""
