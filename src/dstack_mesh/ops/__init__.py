"""Operating the mesh: logs, readiness, the admin listener."""
