"""A whole mesh of two apps on this machine, and what becomes of requests in it."""
