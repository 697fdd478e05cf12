"""Policies that choose, while text is generated, how the next round drafts."""
