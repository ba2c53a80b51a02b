"""Judging plans: by training them, or by comparing their gradients with those of backpropagation."""
