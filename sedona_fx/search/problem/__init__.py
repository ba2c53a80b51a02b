"""What a search is given, what plans cost, and the exact search over all plans."""
