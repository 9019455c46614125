"""Probabilities, rules and labels -> counts, scores, comparisons and files of results."""
