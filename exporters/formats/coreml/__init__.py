"""The Core ML format: one package of functions that keep K and V as state and share their weights."""
