"""`python -m dstack_mesh` is the command `dstack-mesh`."""

import sys

from dstack_mesh.cli import main

if __name__ == "__main__":
    sys.exit(main())
