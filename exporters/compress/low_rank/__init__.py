"""Linear layers as two smaller ones: which matrices at which rank, and the pair that keeps their outputs best."""
