"""GGUF bundles for llama.cpp: mapping, vocabulary, writing, quantising and cutting at the exits."""
