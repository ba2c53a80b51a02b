"""Training methods, one per file, and their base classes."""
