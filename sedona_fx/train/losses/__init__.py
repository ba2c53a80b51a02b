"""Extra losses that can be added to the local ones, one per file."""
