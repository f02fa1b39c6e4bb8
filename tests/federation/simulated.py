"""A simulation of sites whose files a test has laid out; a process of its own, as Ray wants one.

python -m tests.federation.simulated FOLDER RUN UNRELIABILITY SITE...
"""

from __future__ import annotations

import sys
from pathlib import Path

from demo.simulation import SimulatedSite, simulate
from server.checkpoint import RunFolder


def main(folder: Path, run: str, unreliability: float, names: list[str]) -> None:
    """Run a run folder under FOLDER/simulated/runs; the last site is the unreliable one."""
    opened = RunFolder(folder / "simulated" / "runs" / run)
    simulate(
        opened,
        [
            SimulatedSite(
                name=name,
                data=folder / "data" / name,
                policy=folder / f"{name}.toml",
                keys=folder / "certs" / "sites" / name / "current",
                state=folder / "simulated" / name,
                unreliability=unreliability if name == names[-1] else 0.0,
            )
            for name in names
        ],
        models=folder / "models",
        certs=folder / "certs",
        held_out=folder / "held-out" if opened.config().evaluation.enabled else None,
        workers=2,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), sys.argv[4:])
