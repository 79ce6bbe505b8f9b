"""Training: a frozen language model, an adapter, a data set in; a checkpoint out."""
