"""A make-believe libnvidia-ml: a machine with GPUs that fails where it is told to."""
