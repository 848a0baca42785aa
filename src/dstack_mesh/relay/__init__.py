"""The message pump: one exchange after another between two connections, with backpressure."""
