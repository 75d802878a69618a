"""From a file of weights to a model, whoever wrote it."""
