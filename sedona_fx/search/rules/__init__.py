"""Searches that choose cuts by rule: balanced, uniform, latest."""
