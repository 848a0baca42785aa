"""A dstack world on one machine for development and tests: KMS, guest agents, gateway, backend.

Real sockets and real certificates; only the hardware evidence is a mock, and says so.
Nothing of the data plane imports this package, and it imports nothing of the data plane.
"""
