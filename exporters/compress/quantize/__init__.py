"""Quantisation: storage layouts (`grid`), ways to choose codes in them, and the step that carries both out (`step`)."""
