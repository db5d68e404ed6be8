"""What every setting of several runs shows by itself: the sentences of a single run's report, and what its runs cost.

Settings can only be held against each other where each is known to do something: DPO may help in none of them.
"""

from dataclasses import dataclass, replace

from lit_rec.run.cost import cost_sentence, summed
from lit_rec.run.many import Section, Setting
from lit_rec.run.reranking_story import ONE_SEED, SEVERAL_SEEDS


@dataclass(frozen=True)
class Told:
    """What one setting shows.

    Attributes:
        setting: The setting.
        lines: Sentences about its rows, one fact each; empty where no two of them can be compared.
        cost: What DPO and hints cost, all its runs together; empty where nothing was tuned.
    """

    setting: Setting
    lines: list[str]
    cost: str

    @property
    def claims(self) -> str:
        """What the sentences come to, without their numbers."""
        return "; ".join(line.partition(":")[0] for line in self._facts)

    @property
    def brief(self) -> list[str]:
        """The sentences without what limits them."""
        return [line.split(". ")[0].removesuffix(".") + "." for line in self._facts]

    @property
    def _facts(self) -> list[str]:
        return [line for line in self.lines if not line.startswith(SEVERAL_SEEDS)]


def told_of(section: Section) -> list[Told]:
    """Every setting that has something to tell, in their order."""
    found = [_told(section, one) for one in section.settings]
    return [one for one in found if one.lines or one.cost]


def _told(section: Section, one: Setting) -> Told:
    name = str(one.runs[0].results[0]["reranker"])  # in a section's comparisons the letter stands for it
    mine = [replace(c, reranker=name) for c in section.within if c.reranker == one.letter]
    rows = [line for line in section.lines if line["setting"] == one.letter]
    parts = summed(part for run in one.runs for part in run.cost["parts"])
    lines = section.story.verdict(mine, section.headline, rows, runs=len(one.runs))
    lines = [line for line in lines if not line.startswith(ONE_SEED)]  # the section's notes say it of all settings
    return Told(one, lines, cost_sentence(parts, runs=len(one.runs)))
