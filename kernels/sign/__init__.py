"""Signs and mean magnitude of rows."""
