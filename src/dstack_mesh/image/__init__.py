"""What runs inside the container image: the entry, its privileges, and nginx beside the mesh."""
