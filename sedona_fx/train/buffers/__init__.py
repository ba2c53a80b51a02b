"""What schedules keep between steps: replayed activations, stashed weights, batches in flight."""
