"""The ExecuTorch format: one .pte with a method per segment."""
