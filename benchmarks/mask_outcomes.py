"""What a grammar engine made of a schema, in `benchmarks.maskbench`."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Outcome:
    """What an engine made of one schema.

    what: served, refused, timeout, crash, or empty for a refusal because no value fits, where there
    is no valid instance: the grammar of nothing. seconds: until it had a grammar or said no.
    accepts_invalid, rejects_valid: numbers of instances that the grammar misjudges.
    passes_invalid, loses_valid: the same of everything together, final validation included.
    stopped: by instance, how many characters of a valid one the grammar took before it refused it.
    enforced: whether the engine says that no answer can violate the schema. enforced_alone: the same of
    the grammar, without what is counted beside it. None: it does not say.
    bytes, mask_s, slowest_s: of the instances that are valid and accepted.
    """

    what: str
    seconds: float
    reason: str = ""
    message: str = ""
    located: bool = False
    enforced: bool | None = None
    enforced_alone: bool | None = None
    accepts_invalid: list[int] = field(default_factory=list)
    rejects_valid: list[int] = field(default_factory=list)
    passes_invalid: list[int] = field(default_factory=list)
    loses_valid: list[int] = field(default_factory=list)
    stopped: dict[str, int] = field(default_factory=dict)
    bytes: int = 0
    mask_s: float = 0.0
    slowest_s: float = 0.0

    @property
    def exact(self) -> bool:
        """Whether the grammar judges every instance right."""
        return self.what == "empty" or (
            self.what == "served" and not (self.accepts_invalid or self.rejects_valid)
        )
