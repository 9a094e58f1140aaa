"""The node agent: what GPUs a machine has, how they fare, and which pod uses them; it writes nothing to the cluster."""
