"""MSE-Adapter at the edge: sentiment and emotion from a clip and its transcript."""
