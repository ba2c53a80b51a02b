"""One file a training method, and what they share."""
