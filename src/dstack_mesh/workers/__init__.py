"""Several worker processes that share the listeners of one sidecar (`MESH_WORKERS`)."""
