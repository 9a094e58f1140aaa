"""A cluster in memory behind the same port as the real one: API server, kube-scheduler, kubelet."""
