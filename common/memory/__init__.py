"""Banks, queues and moving averages, kept between steps, and the gathers that keep them equal on all processes."""
