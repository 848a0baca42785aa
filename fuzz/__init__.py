"""Coverage-guided fuzzing of what reads hostile bytes; docs/fuzzing.md says how to run it."""
