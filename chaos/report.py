"""What a case gives: its figures, and what was wrong."""

import math
from dataclasses import dataclass, field

Figure = int | float | str


@dataclass
class Report:
    """The outcome of one case.

    Attributes:
        case: Name of the case.
        figures: What was counted and measured, by name.
        wrong: A sentence for each thing that was lost or not as promised; empty when all is well.
    """

    case: str
    figures: dict[str, Figure] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def count(self, figure: str, by: int = 1) -> None:
        """Add to a figure, which begins at 0."""
        self.figures[figure] = int(self.figures.get(figure, 0)) + by

    def add(self, other: "Report") -> None:
        """Take in a report of the same case: counts are added, of others the larger stays."""
        for name, value in other.figures.items():
            mine = self.figures.get(name)
            if isinstance(value, int) and isinstance(mine, int):
                self.figures[name] = mine + value
            elif mine is None or (isinstance(value, float) and value > float(mine)):
                self.figures[name] = value
        self.wrong += other.wrong


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least this share of the values does not exceed."""
    ordered = sorted(values)
    # A share such as 0.99 of 100 may come out just above the whole number that it is.
    return ordered[max(0, math.ceil(share * len(ordered) - 1e-9) - 1)]
