"""Which images a data set has, their labels and splits, and whether they can be read."""
