"""Measurements of the mesh, where one matters beside nginx in the same run."""
