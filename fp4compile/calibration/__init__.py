"""What a layer's inputs look like: collected by running batches, kept in one file, read by policies."""
