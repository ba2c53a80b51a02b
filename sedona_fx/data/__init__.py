"""The user's data: arguments of the model, batches, and which examples two data sets have in common."""
