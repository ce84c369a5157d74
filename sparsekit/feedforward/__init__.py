"""The mathematics of pruning a feed-forward part as a whole (SparseLLM)."""
