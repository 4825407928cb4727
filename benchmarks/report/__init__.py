"""RESULTS.md, targets and pictures, all from the results as JSON."""
