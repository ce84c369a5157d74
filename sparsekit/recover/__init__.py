"""Recovery: training what is left of a pruned model, pruned weights staying zero bit for bit."""
