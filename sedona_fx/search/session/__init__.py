"""What a long search needs: data streams, a journal to resume from, progress, and timing.

Files

batches   Batches of a search: named by the inputs of a graph, and split into smaller ones
data      The data of a problem as streams: endless, seeded, and with a position that can be written down
journal   A folder in which a search saves its state, so that a search that was killed can resume
lock      The lock on the folder of a search: one search at a time writes to it, and a killed one leaves it free
progress  What a search shows and saves while it runs
stream    Endless data whose position can be saved: an epoch of a stream depends on (seed, name of the stream,
          epoch) alone
timing    How long the steps of a search take, measured before it starts
"""

__all__: list[str] = []  # internal
