"""Cuts by rule: balanced, uniform, latest."""
