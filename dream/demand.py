"""Which template a round needs next: kinds of flaw stay balanced, and one that never passes does not eat the round."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from dream.templates import Template


@dataclass
class Demand:
    """How many pairs of one sort (contrast or general) a round wants, and which template it needs next.

    Accepted pairs count fully, those under way by half, failed attempts by a quarter: kinds of flaw stay balanced, and
    one that never passes does not eat the round.
    """

    templates: Sequence[Template]
    wanted: int
    accepted: Counter[str] = field(default_factory=Counter)
    attempts: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    """Attempts that gave no pair; one that succeeds may give two."""
    under_way: Counter[str] = field(default_factory=Counter)
    drawn: Counter[str] = field(default_factory=Counter)
    """The number of the last draw; more than the attempts where a kill came before a scenario was stored."""
    dice: str = ""
    """The seed of independent throws, where there is to be no plan."""

    @property
    def missing(self) -> int:
        """Pairs that are still to be accepted."""
        return max(0, self.wanted - self.accepted.total())

    @property
    def served(self) -> float:
        """What it got so far, in pairs; see above."""
        return sum(map(self._served, self.templates))

    @property
    def covered(self) -> bool:
        """Whether the scenarios under way will probably bring what is missing, by the acceptance rate so far."""
        ended = self.attempts.total() - self.under_way.total()
        hope = (self.accepted.total() + 2) / (ended + 3)
        return self.under_way.total() * hope >= self.missing

    def next(self) -> Template:
        """The template of the neediest kind, and within the kind the neediest template; any by chance with `dice`."""
        if self.dice:
            return random.Random(f"{self.dice}/{self.drawn.total()}").choice(self.templates)
        kinds: dict[str, list[Template]] = {}
        for template in self.templates:
            kinds.setdefault(template.front.flaw, []).append(template)
        kind = min(kinds.values(), key=lambda members: sum(map(self._served, members)) / len(members))
        return min(kind, key=self._served)

    def _served(self, template: Template) -> float:
        name = template.name
        return self.accepted[name] + 0.5 * self.under_way[name] + 0.25 * self.failed[name]
