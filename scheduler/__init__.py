"""Tessera: decide once on the whole cluster, commit once in a ledger, execute once in one API write."""

PREFIX = "tessera.dev/"
SCHEDULER_NAME = "tessera"
GATE = PREFIX + "hold"
ALLOCATION = PREFIX + "allocation"
REQUEST = PREFIX + "request"
TOUCH = PREFIX + "touch"
RETRY = PREFIX + "retry"
ADMITTED = PREFIX + "Admitted"  # the pod condition
AUTOSCALE = "WaitingForAutoscale"  # its reason, and the word, while a new node is asked for
GPU = "nvidia.com/gpu"
MIG_PREFIX = "nvidia.com/mig-"
SHARE = PREFIX + "share"
