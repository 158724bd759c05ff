"""`python -m adaclip`, which torchrun can start too: `torchrun --nproc-per-node 2 -m adaclip train …`."""

import sys

from adaclip.cli import main

sys.exit(main())
