"""Judging plans by training them, or by comparing their gradients with backpropagation's."""
