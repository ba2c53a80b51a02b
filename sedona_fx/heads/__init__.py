"""Auxiliary heads: what one has to fit, the built-in ones, and how a user adds one."""
