"""Training data: sources, mixing, batches and hard negatives."""
