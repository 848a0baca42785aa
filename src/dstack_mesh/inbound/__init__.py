"""Requests from other CVMs: who calls, whether they may, and on to the backend."""
