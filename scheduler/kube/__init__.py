"""The API server: the port everybody speaks to, the real one behind it, and the reflector on top."""
