"""Front ends: from a model to a graph, and the proof that the graph does what the model does."""
