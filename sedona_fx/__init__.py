"""Decoupled training for any PyTorch model."""
