"""Vector: a site's weight, counts, figures and weighted delta as uint32 that add up.

    [weight, examples, tokens, per figure: how many sites give it, its value, then weight * delta]

Fixed point: a weighted value is scaled so that the largest that a site may send, times the number
of sites, stays below 2^31, and rounded up or down at random so that its mean is exact. For ten
sites that are 27 bits and a sign, for fifty 25.

Guarantees: sums of as many vectors as the scale has sites do not wrap; a site that would break
that is refused at its own side, before masking; a figure that a site withholds counts as not
given.

Edge cases: no tensors is a valid delta; the order of tensors is that of their sorted names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from fedqlora.adapter import Adapter, AdapterSpec, check_update, chunks
from fedqlora.config import RunConfig
from fedqlora.errors import UpdateError
from fedqlora.privacy.noise import SecureNoise
from fedqlora.secure.masks import Ring

FIGURES = {"train_loss": 2**16, "validation_loss": 2**16, "step_seconds": 2**6}
"""Figures that may be in a sum, and the steps of one unit of each."""

_HEAD = 3 + 2 * len(FIGURES)
_HALF = 2**31

Draw = Callable[[int], NDArray[np.float64]]
"""Independent uniform values in [0, 1), so many."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What everybody in a round knows about the size of a vector's values.

    Attributes:
        sites: the number of sites in the round.
        most_weight: the largest weight of a site.
        largest: the largest magnitude of a value of a delta.
    """

    sites: int
    most_weight: int
    largest: float

    @classmethod
    def of(cls, config: RunConfig, sites: int) -> Scale:
        """The scale of a run with so many sites in the round."""
        return cls(
            sites=sites,
            most_weight=config.most_weight,
            largest=(
                config.homomorphic_encryption.largest_value
                if config.homomorphic_encryption.enabled
                else config.secure_aggregation.largest_value
            ),
        )

    @property
    def most(self) -> int:
        """The largest number that each site may add without a sum that wraps."""
        return (_HALF - 1) // self.sites

    @property
    def steps(self) -> float:
        """Steps of the fixed point in a value of 1 with the largest weight."""
        return (self.most - 1) / self.largest


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What a site says beside its delta.

    Attributes:
        weight: of its delta, from 1.
        examples: trained on; 0 where withheld.
        tokens: trained on; 0 where withheld.
        figures: those of `FIGURES` that it gives.
    """

    weight: int = 1
    examples: int = 0
    tokens: int = 0
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Total:
    """What a sum of vectors says.

    Attributes:
        mean: the weighted mean delta.
        examples: of all sites that give them.
        tokens: of all sites that give them.
        figures: the mean of each figure over the sites that give it.
    """

    mean: Adapter
    examples: int
    tokens: int
    figures: Mapping[str, float]


def pack(delta: Adapter, counts: Counts, scale: Scale, draw: Draw) -> Ring:
    """A site's vector.

    Args:
        delta: its finite, unweighted delta.
        counts: what it says beside it.
        scale: of the round.
        draw: for the rounding, from a cryptographically secure generator.

    Raises:
        UpdateError: a value, weight or count is above what the scale allows.
    """
    if not 1 <= counts.weight <= scale.most_weight:
        raise UpdateError(
            f"an update of weight {counts.weight} has no place in a sum of weights from 1 to "
            f"{scale.most_weight}; train at least one example"
        )
    spec = AdapterSpec.of(delta)
    head = [counts.weight, counts.examples, counts.tokens]
    for name, steps in FIGURES.items():
        value = counts.figures.get(name)
        head += [0, 0] if value is None else [1, min(round(max(value, 0) * steps), scale.most)]
    if max(head) > scale.most:
        raise UpdateError(
            f"a count of {max(head)} is too large for a sum of {scale.sites} sites; lower "
            "training.steps or training.batch_examples"
        )
    vector = np.empty(vector_length(spec), dtype=np.uint32)
    vector[:_HEAD] = head
    start = _HEAD
    factor = counts.weight / scale.most_weight * scale.steps
    for name, _ in spec.shapes:
        found = float(np.abs(delta[name]).max(initial=0))
        if found > scale.largest:
            raise UpdateError(
                f"update tensor {name} has a value of magnitude {found:.3g}, above the run's "
                f"largest_value = {scale.largest:g}; raise that"
            )
        for part in chunks(delta[name]):
            # The random rounding: floor(x + u) is x in the mean.
            steps_ = np.floor(part.astype(np.float64) * factor + draw(part.size))
            vector[start : start + part.size] = steps_.astype(np.int32).view(np.uint32)
            start += part.size
    return vector


def pack_for(config: RunConfig, sites: int, delta: Adapter, counts: Counts) -> Ring:
    """A site's vector in a round of a run.

    Args:
        config: the run's weighting, scale and bound.
        sites: number of sites in the round.
        delta: the round's change.
        counts: beside it; its weight is set here from what the run weights by.

    Raises:
        UpdateError: a value is not finite or too large, or see `pack`.
    """
    check_update(delta, AdapterSpec.of(delta), config.aggregation.max_update_norm)
    weighted = replace(counts, weight=config.weight_of(counts.examples, counts.tokens))
    return pack(delta, weighted, Scale.of(config, sites), SecureNoise().uniform)


def unpack(total: Ring, spec: AdapterSpec, scale: Scale, survivors: int) -> Total:
    """What a sum says.

    Args:
        total: the sum of the survivors' vectors.
        spec: names and shapes of the delta.
        scale: as the sites used it.
        survivors: number of vectors in the sum.

    Raises:
        UpdateError: it cannot be such a sum: a site has sent what is no vector or a wrong share.
    """
    weight, examples, tokens = (int(value) for value in total[:3])
    pairs = total[3:_HEAD].reshape(-1, 2).tolist()
    if not survivors <= weight <= survivors * scale.most_weight or any(
        given > survivors for given, _ in pairs
    ):
        raise UpdateError(
            "the sum of the masked updates makes no sense, so a site has sent a wrong share or "
            "vector; start the run again without the sites that are in doubt"
        )
    mean: Adapter = {}
    start = _HEAD
    per_weight = scale.most_weight / (weight * scale.steps)
    for name, shape in spec.shapes:
        size = int(np.prod(shape))
        steps_ = total[start : start + size].view(np.int32)
        mean[name] = (steps_ * per_weight).astype(np.float32).reshape(shape)
        start += size
    figures = {
        name: value / steps / given
        for (name, steps), (given, value) in zip(FIGURES.items(), pairs, strict=True)
        if given
    }
    return Total(mean=mean, examples=examples, tokens=tokens, figures=figures)


def vector_length(spec: AdapterSpec) -> int:
    """Number of values in the vector of a delta."""
    return _HEAD + spec.parameters
