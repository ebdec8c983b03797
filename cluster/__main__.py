"""``python -m cluster``. No class may be defined here: Ray's workers would see another class of the same name."""

import sys

from cluster.cli import main

if __name__ == "__main__":
    sys.exit(main())
