"""How long a ClientApp takes to import, and that it brings in no torch.

Prints a markdown table: wall time of `import client.app` in a fresh process, above that of
an empty one, beside `import torch, transformers`, which a client that trains would pay.
"""

from __future__ import annotations

import subprocess
import sys
import time

REPEATS = 5


def measure(statement: str) -> float:
    """Shortest wall time in seconds of a fresh process that runs one statement."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", statement], check=True)
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    """Measure and print."""
    empty = measure("pass")
    client = measure("import client.app, sys; assert 'torch' not in sys.modules") - empty
    heavy = measure("import torch, transformers, peft") - empty
    print("| import | seconds | ratio |\n|---|---|---|")
    print(f"| `client.app` | {client:.2f} | {client / heavy:.2f} |")
    print(f"| `torch, transformers, peft` | {heavy:.2f} | 1 |")


if __name__ == "__main__":
    main()
