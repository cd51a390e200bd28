"""Built-in architecture adapters; they come in by the same hook as a stranger's."""
