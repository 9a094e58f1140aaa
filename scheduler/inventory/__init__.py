"""Which nodes and devices there are, what is taken of them, and the columns made of that."""
