"""Operators on tensors without data: what they return, what they cost, and a memo of both."""
