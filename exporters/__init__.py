"""Checkpoint → bundle: the only part of Skipstone that imports torch."""
