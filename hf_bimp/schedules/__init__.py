"""When to prune and at which learning rate: plain numbers."""
