"""Losses added to the local ones, one file each."""
