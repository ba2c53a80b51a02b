"""What a long search needs: data streams, a journal to resume from, progress, and timing."""
