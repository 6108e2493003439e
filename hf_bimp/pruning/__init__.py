"""What of a model is pruned: the weights, their scores, how many of each layer, the masks."""
