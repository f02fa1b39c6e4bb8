"""HomomorphicEncryptionConfig: encrypted updates, and who can decrypt their sum."""

from __future__ import annotations

from pydantic import Field, model_validator

from fedqlora.section import Section


class HomomorphicEncryptionConfig(Section):
    """Whether the coordinator adds updates up that it cannot read.

    Updates then travel as CKKS ciphertexts, 8 times float32, whatever `codec.update` says
    (docs/privacy.md).
    """

    enabled: bool = False
    """Encrypt every update."""
    key_site: str | None = Field(default=None, pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    """The site that makes each round's keys and decrypts the sum. Every other site's policy has to
    name it. With the coordinator's help it could read single updates."""
    largest_value: float = Field(default=1.0, gt=0)
    """Largest magnitude of a value in an update; a site with a larger one is left out of the round.
    A sum is exact to a few hundred-millionths of it."""

    @model_validator(mode="after")
    def _held(self) -> HomomorphicEncryptionConfig:
        if self.enabled and self.key_site is None:
            raise ValueError(
                "somebody has to hold the key, and never the coordinator; set key_site"
            )
        return self
