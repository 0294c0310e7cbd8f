"""What a step really sends, read from its compiled program."""
