"""Auxiliary heads: what a head is built for, the built-in heads, and the registry for heads of the user."""
