"""Attention over a packed tree of segments."""
