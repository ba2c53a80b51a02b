"""Operators on tensors without numbers: what they give back, what they cost, and how it is remembered."""
