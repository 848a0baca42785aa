"""The races, by the names that the command line takes.

A part is a function from a `Plan` to what it found: rows for the tables, and notes.
"""
