"""Memory banks, queues and moving averages, and the communication that keeps all processes equal."""
