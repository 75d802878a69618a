"""From the index of a data set to batches on a device."""
