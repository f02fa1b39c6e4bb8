"""Prints the development cluster's compose file, or the overlay that gives it GPUs.

    python3 -m deploy.render --sites 5                       # the file itself
    python3 -m deploy.render --sites 3 --gpus 0,1,2,3        # overlay: a device each
    python3 -m deploy.render --sites 3 --shared-gpu 0        # overlay: one device for all

Nothing but the standard library: it runs before anything is installed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from deploy.cluster import RenderError, render_cluster
from deploy.overlay import choose_devices, render_overlay


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the file, or one sentence about what cannot be; returns the exit status."""
    parser = argparse.ArgumentParser(prog="deploy.render", description=__doc__.split("\n")[0])
    parser.add_argument("--sites", type=int, default=3, help="1 to 26 (default %(default)s)")
    devices = parser.add_mutually_exclusive_group()
    devices.add_argument(
        "--gpus", help="overlay: a device id per site, then the evaluator's; empty: 0,1,..."
    )
    devices.add_argument("--shared-gpu", help="overlay: the device id that all share")
    options = parser.parse_args(arguments)
    try:
        if options.gpus is not None:
            text = render_overlay(
                options.sites, choose_devices(options.sites, options.gpus), shared=False
            )
        elif options.shared_gpu is not None:
            text = render_overlay(options.sites, options.shared_gpu.split(","), shared=True)
        else:
            text = render_cluster(options.sites)
    except RenderError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
