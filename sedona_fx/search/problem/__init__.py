"""What a search is given, what plans cost, and the exact optimisation over all of them."""
