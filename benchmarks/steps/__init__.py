"""Whole training steps, written in several ways on the same weights and data."""
