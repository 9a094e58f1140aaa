"""What is promised to whom: the life cycle, the journal and the rules that keep them true. Pure."""
