"""The report of several runs: a table on the terminal and one HTML file that needs nothing else."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from lit_rec.errors import UserError
from lit_rec.run.cost import amount
from lit_rec.run.figures import finite
from lit_rec.run.finished import FinishedRun, read_run, run_folders
from lit_rec.run.folder import write_atomic
from lit_rec.run.headline import Comparison, describe_difference
from lit_rec.run.many import Section, Setting, equal, sections
from lit_rec.run.many_figures import MOST_LINES, curves_figure, gaps_figure, row_figure
from lit_rec.run.many_lengths import length_context
from lit_rec.run.many_verdict import told_of
from lit_rec.run.progress import console
from lit_rec.run.report import duration, page_environment
from lit_rec.run.results import with_interval
from lit_rec.run.round_report import FLATTERED

TASKS = {"reranking": "Reranking", "session-ranking": "Session ranking"}
RECIPES = {"rlrf": "RLRF4Rec", "unified": "RLRF4Rec with hints", "re2llm": "Re2LLM"}


def report_runs(paths: Sequence[str | Path], output: Path, *, title: str = "") -> list[Section]:
    """Read finished runs, write their joint report and print its table.

    Args:
        paths: Run folders; that of a sweep stands for its finished runs.
        output: The HTML file.
        title: Of the page; empty: the runs' names.

    Raises:
        UserError: Something named is no finished run of this version, or the file cannot be written there.
    """
    if output.is_dir() or not output.parent.is_dir():
        raise UserError(
            f"cannot write {output}",
            where="--output",
            why="there is no such folder, or it is one",
            fix="name a file in one",
        )
    runs = [read_run(path) for path in run_folders(paths)]
    found = sections(runs)
    write_page(output, found, title=title or _title(runs))
    for section in found:
        console.print(section_table(section))
    console.print(f"Report: {output}", highlight=False, markup=False, soft_wrap=True)
    return found


def _title(runs: Sequence[FinishedRun]) -> str:
    names = list(dict.fromkeys(str(run.config.get("name") or run.path.name) for run in runs))
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def section_title(section: Section) -> str:
    """The task, and the recipes that its runs are of."""
    found = dict.fromkeys(_recipe(run) for one in section.settings for run in one.runs)
    return f"{TASKS[section.story.task]} ({', '.join(found)})"


def _recipe(run: FinishedRun) -> str:
    name = str(run.config["recipe"])
    alone = name == "unified" and (run.config.get("agent") or {}).get("pick") == "none"  # no agent, so no hints
    return RECIPES["rlrf"] if alone else RECIPES.get(name, name)


# --- the terminal -----------------------------------------------------------------------------------------------------


def section_table(section: Section) -> Group:
    """Make the terminal's summary of one section."""
    headline, story = section.headline, section.story
    several = len(section.settings) > 1
    settings = [f"{one.name} ({_count(len(one.runs), 'run')}; {_measured(section, one)})" for one in section.settings]
    table = Table(
        title=Text("\n".join([section_title(section), *settings])),
        title_justify="left",
        caption=Text(
            f"{headline.counting}; [low, high]: 95% interval over {headline.drawn}s. Differences: paired over "
            f"{headline.drawn}s, with training seeds where there are several, p Holm-corrected."
        ),
        caption_justify="left",
    )
    table.add_column("row")
    if several:
        table.add_column("")
    for name in (headline.label(), headline.label(story.second)):
        table.add_column(name, justify="right")
    table.add_column(f"difference in {headline.label()}")
    table.add_column(f"{headline.unit}s", justify="right")
    table.add_column("seeds", justify="right")
    seconds = {(line["setting"], line["row"]): line for line in section.picked(story.second)}
    before = None
    for line in section.picked():
        gaps = _gaps_of(section, line, several)
        texts = [Text(_vs(gap, headline.drawn), _style(gap)) for gap in gaps]
        table.add_row(
            Text(line["row"] if line["row"] != before else ""),
            *([Text(line["setting"])] if several else []),
            Text(with_interval(line)),
            Text(with_interval(seconds.get((line["setting"], line["row"])))),
            Text("\n").join(texts),
            f"{line['n']:,}",
            str(line["seeds"]),
            end_section=False,
        )
        before = line["row"]
    return Group(table, Text("\n".join(["", *_alone_lines(section), *section.verdict(), *section.notes])))


def _alone_lines(section: Section) -> list[str]:
    """What every setting shows by itself, in brief; of several, without the numbers."""
    found = told_of(section)
    if len(section.settings) == 1:
        return [line for one in found for line in (*one.brief, one.cost) if line]
    return [f"{one.setting.name}: {'. '.join(part for part in (one.claims, one.cost) if part)}" for one in found]


def measured_on(section: Section, one: Setting) -> dict[str, str]:
    """On what a setting was measured: data, protocol, how many users there are, and how many of them are counted."""
    first, unit = one.runs[0].results[0], section.headline.drawn
    tested = max((r["n"] for r in section.lines if r["setting"] == one.letter and r["unit"] == unit), default=0)
    sizes = sorted({run.size for run in one.runs if run.size is not None})
    sample = "" if one.runs[0].config.get("users") is None else "a sample of "
    people = {f"{unit}s": sample + " or ".join(f"{size:,}" for size in sizes)} if sizes else {}
    return {
        "data": first["dataset"],
        "protocol": first["protocol"],
        **people,
        f"{section.headline.split} {unit}s": f"{tested:,}",
    }


def _measured(section: Section, one: Setting) -> str:
    """`measured_on` in one line."""
    found = measured_on(section, one).items()
    return ", ".join(value if name in ("data", "protocol") else f"{value} {name}" for name, value in found)


def _gaps_of(section: Section, line: dict[str, Any], several: bool) -> list[Comparison]:
    """The differences beside a line: to other settings, or to other rows where there is one setting."""
    gaps = section.gaps if several else section.within
    return [gap for gap in gaps if (gap.reranker, gap.row) == (line["setting"], line["row"])]


def _vs(gap: Comparison, drawn: str) -> str:
    return f"as {gap.against} for every {drawn}" if equal(gap.difference) else f"{_told(gap, drawn)} vs {gap.against}"


def _told(gap: Comparison, drawn: str) -> str:
    return f"the same for every {drawn}" if equal(gap.difference) else describe_difference(gap, drawn)


def _style(gap: Comparison) -> str:
    if not gap.sure:
        return ""
    return "green" if gap.difference.mean > 0 else "red"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


# --- the page ---------------------------------------------------------------------------------------------------------


def write_page(path: Path, found: Sequence[Section], *, title: str) -> None:
    """Write the HTML file, atomically."""
    context = {
        "title": title,
        "count": sum(len(one.runs) for section in found for one in section.settings),
        "sections": [_context(section) for section in found],
    }
    page = page_environment().get_template("many.html.j2").render(context)
    write_atomic(path, page.encode("utf-8", errors="replace"))


def _context(section: Section) -> dict[str, Any]:
    headline, story = section.headline, section.story
    several = len(section.settings) > 1
    seconds = {(line["setting"], line["row"]): line for line in section.picked(story.second)}
    rows = section.rows()
    main = section.main_row()
    drawn = [row for row in rows if _differs(section, row)]
    return {
        "title": section_title(section),
        "headline": headline,
        "story": story,
        "several": several,
        "told": told_of(section),
        "verdict": section.verdict(),
        "notes": section.notes,
        "named_by": section.keys,
        "measured": dict.fromkeys(name for one in section.settings for name in measured_on(section, one)),
        "settings": [_setting(section, n) for n in range(len(section.settings))],
        "rows": [
            {
                "row": row,
                "mark": story.marks.get(row),
                "lines": [
                    {
                        "setting": line["setting"],
                        "main": with_interval(line),
                        "second": with_interval(seconds.get((line["setting"], row))),
                        "n": line["n"],
                        "seeds": line["seeds"],
                        "gaps": [_gap(gap, section) for gap in _gaps_of(section, line, several)],
                    }
                    for line in section.picked()
                    if line["row"] == row
                ],
            }
            for row in rows
        ],
        "main": main,
        "bars": gaps_figure(section, [gap for gap in section.gaps if gap.row == main]) if several else None,
        "figures": [(row, row_figure(section, row)) for row in drawn] if several else [],
        "alone": None if several else _alone(section),
        "within": _within(section) if several else [],
        "published": _published(section),
        "curves": curves_figure(section),
        "flattered": FLATTERED if any(run.flattered for one in section.settings for run in one.runs) else "",
        "lengths": length_context(section),
        "not_drawn": max(0, len(section.settings) - MOST_LINES),
        "costs": _costs(section),
        "parts": _parts(section),
        "tokens_known": any(run.cost["tokens"] for one in section.settings for run in one.runs),
        "differing": section.differing,
    }


def _differs(section: Section, row: str) -> bool:
    """Whether a row is in two settings, and not the same in all of them."""
    gaps = [gap for gap in section.gaps if gap.row == row]
    several = sum(line["row"] == row for line in section.picked()) > 1
    return several and not (gaps and all(equal(gap.difference) for gap in gaps))


def _setting(section: Section, number: int) -> dict[str, Any]:
    one = section.settings[number]
    return {
        "letter": one.letter,
        "label": one.label,
        "measured": measured_on(section, one),
        "values": one.values,
        "runs": [str(run.path) for run in one.runs],
        "seeds": ", ".join(str(seed) for seed in dict.fromkeys(run.config["seed"] for run in one.runs)),
    }


def _gap(gap: Comparison, section: Section) -> dict[str, str]:
    sign = "better" if gap.difference.mean > 0 else "worse"
    text = _told(gap, section.headline.drawn)
    return {"against": gap.against, "text": text, "kind": sign if gap.sure else "unsure"}


def _alone(section: Section) -> Any:
    """The picture of a single setting: its rows."""
    from lit_rec.run.figures import rows_figure, seed_means

    one, lines = section.settings[0], section.picked()
    means = seed_means(one.frames, lines[0]["reranker"], section.headline) if lines else {}
    return rows_figure(lines, means, section.headline, section.story)


def _within(section: Section) -> list[dict[str, Any]]:
    """Rows against the rows they have to beat, rows down and settings across."""
    letters = [one.letter for one in section.settings]
    cells: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
    for gap in sorted(section.within, key=lambda gap: section.story.row_order(gap.row)):
        cells.setdefault((gap.row, gap.against), {})[gap.reranker] = _gap(gap, section)
    return [
        {"row": row, "against": other, "cells": [found.get(letter) for letter in letters]}
        for (row, other), found in cells.items()
    ]


def _published(section: Section) -> list[dict[str, Any]]:
    """The papers' numbers beside ours, counted as the papers count."""
    return [
        {
            "row": line["row"],
            "setting": line["setting"],
            "metric": line["metric"].upper(),
            "ours": with_interval(line),
            "paper": f"{line['published']:.5f}",
        }
        for line in sorted(section.lines, key=lambda line: (line["metric"], section.story.row_order(line["row"])))
        if line["published"] is not None
    ]


def _parts(section: Section) -> dict[str, Any] | None:
    """What the parts of the loop cost, parts down and runs across; None where nothing was tuned."""
    runs = [(one.letter, run) for one in section.settings for run in one.runs]
    names = {(part.name, part.of): part.order for _, run in runs for part in run.cost["parts"]}
    known = [{(part.name, part.of): amount(part) for part in run.cost["parts"]} for _, run in runs]
    lines = [
        {"name": name, "of": of, "cells": [one.get((name, of), "") for one in known]}
        for name, of in sorted(names, key=lambda key: names[key])
    ]
    heads = [f"{letter} (seed {run.config['seed']})" for letter, run in runs]
    return {"runs": heads, "lines": lines} if lines else None


def _costs(section: Section) -> list[dict[str, Any]]:
    found = []
    for one in section.settings:
        for run in one.runs:
            cost, made = run.cost, run.environment
            memory = made.get("peak_memory_gb")
            found.append(
                {
                    "setting": one.letter,
                    "run": str(run.path),
                    "seed": run.config["seed"],
                    "time": duration(cost["seconds"]),
                    "answers": f"{cost['answers']:,}" if cost["answers"] else "",
                    "tokens": f"{cost['tokens']:,}" if cost["tokens"] else "",
                    "memory": f"{memory:.1f} GB" if isinstance(memory, int | float) and finite(memory) else "",
                    "device": made.get("device", ""),
                    "threads": made.get("threads", ""),
                    "commit": made.get("commit", ""),
                }
            )
    return found
