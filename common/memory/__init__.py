"""Banks, queues and moving averages, and the gathers that keep them equal on all processes."""
