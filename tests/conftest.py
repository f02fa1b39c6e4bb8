"""Before anything imports torch: tiny models are fastest on one thread."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
