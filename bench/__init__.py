"""Benches, and the real control plane that benches and tests start; may import everything, nothing imports it."""
