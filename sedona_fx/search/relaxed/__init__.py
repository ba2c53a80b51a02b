"""The mathematics of the relaxed net: its training step and the gradients through it."""
