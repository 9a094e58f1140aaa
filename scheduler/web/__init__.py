"""HTTP faces: the extender for kube-scheduler, read-only views for people, metrics for Prometheus."""
