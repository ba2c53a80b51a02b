"""What the user hands over: arguments of the model, batches of data, and which examples two sets share."""
