"""What a search that takes long needs: data streams, a journal to go on from, progress, and timing."""
