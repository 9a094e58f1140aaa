"""Outside shapes to the model: pods, nodes, extender bodies. Pure; never raises on what a user wrote."""
