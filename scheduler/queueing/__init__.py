"""The queue: who waits in which order, who is next, and how fast reservations are let go. Pure."""
