"""Placement policies: plain numpy functions of (snapshot, ask, mix). This package imports nothing of ours."""
