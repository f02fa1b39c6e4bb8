"""ContinualConfig: a further task on a finished run, and what keeps the earlier tasks."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fedqlora.section import Section

TaskName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")]
"""Also the name, without its ending, of the task's file in the held-out set."""


class ContinualConfig(Section):
    """Which task this is, what it continues, and how earlier tasks are kept."""

    task: TaskName | None = None
    """This run's task; without it the run's name."""
    starts_from: str | None = None
    """The run folder whose adapter this run starts from; `make continue` writes it."""
    earlier: tuple[TaskName, ...] = ()
    """The tasks that were learned before, oldest first; `make continue` writes them."""
    frozen_rank: int = Field(default=0, ge=0, le=4096)
    """Rank of what lies frozen beside the adapter in the whole run; `make continue` writes it."""
    replay_fraction: float = Field(default=0.0, ge=0, le=1)
    """Share of the patients in the folder `earlier` of a site's records whose records are trained
    on again, beside the new ones. In a private run they are charged to the ledger again."""
    penalty: float = Field(default=0.0, ge=0)
    """lambda of lambda |W - W0|^2, added to the loss: W is what adapter and residual add to the
    base's weights, W0 what they added when this task began."""
    orthogonal: bool = False
    """Freeze what was learned before, and start an adapter whose rows of A stay orthogonal to it
    (O-LoRA, arXiv 2310.14152)."""
    figure: str | None = None
    """The accuracy of the held-out set that tasks are compared by; without it the first by name."""
    max_forgetting: float | None = Field(default=None, ge=0, le=1)
    """A run is not promoted if an earlier task's accuracy falls by more than this from its best."""
    max_general_loss: float | None = Field(default=None, ge=0, le=1)
    """The same for the accuracy of `evaluation.probe`, compared with the untuned base's."""
