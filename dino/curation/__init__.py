"""From a heap of images to a balanced pre-training set: embed, de-duplicate, cluster, rebalance."""
