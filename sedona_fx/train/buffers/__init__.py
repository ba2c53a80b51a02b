"""What schedules keep between steps: buffers of activations, stashed weights, batches in flight."""
