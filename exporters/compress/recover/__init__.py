"""Training that gives back what compression took: the small model learns from the one it came from."""
