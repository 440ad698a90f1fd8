"""The server under a mixed load for a long time: memory, descriptors, threads, tasks and slots."""
