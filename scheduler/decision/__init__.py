"""Masks, scores, verdicts and the choice of devices: pure functions on columns."""
