"""Running blocks: forward, local loss, backward inside the block, and what happens to a loss that is not finite."""
