import base64
import hashlib
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import lit_rec.run.report
from lit_rec.agent.hints import Hint
from lit_rec.run.report import write_report
from lit_rec.run.session_report import SessionStory
from tests.pages import EVIL, VOID, Page

SCRIPT = Path(lit_rec.run.report.__file__).with_name("report.js")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed to open the page in")


def pairs(count: int, text: str = "", long: str = "") -> pl.DataFrame:
    """Pair k has the k-th smallest gap; its user, prompt, chosen and rejected text have words of their own."""
    return pl.DataFrame(
        {
            "round": 1,
            "user_id": [f"u{k:03}{text}" for k in range(count)],
            "prompt": [f"Watched  Film{k:03}\n{text}{long}" for k in range(count)],
            "chosen": [f"good{k:03} {text}{long}" for k in range(count)],
            "rejected": [f"bad{k:03} {text}{long}" for k in range(count)],
            "chosen_reward": [k / 1000 for k in range(count)],
            "rejected_reward": 0.0,
        }
    )


def story(text: str = "") -> SessionStory:
    def hint(number: int, fate: str) -> dict[str, Any]:
        return vars(Hint(number, f"advice{number} {text}", 1, 7, [f"seen{number} {text}"], "next", fate=fate))

    one = {"hint": f"advice1 {text}", "rank_no_hint": 3, "rank": 2, "best_hint": None, "best_rank": None}
    return SessionStory(
        hints=[hint(1, "kept"), hint(2, "kept"), hint(3, "no gain"), hint(4, f"odd {text}")],
        examples=[
            {"group": f"group {group}", "titles": [f"title{group}{k} {text}"], "target": f"goal{group}{k}", **one}
            for group in "ab"
            for k in range(2)
        ],
    )


def write(path: Path, **told: Any) -> str:
    write_report(path, title="search", **told)
    return path.read_text(encoding="utf-8")


def policy(text: str) -> dict[str, str]:
    content = re.findall(r'http-equiv="Content-Security-Policy" content="(.*?)"', text)
    assert len(content) == 1
    return dict(rule.strip().split(" ", 1) for rule in content[0].split(";"))


def scripts(text: str) -> list[str]:
    return re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)


@pytest.mark.parametrize("told", [{"pairs": pairs(3)}, {"hints": story()}, {"pairs": pairs(1), "hints": story()}])
def test_the_policy_lets_the_one_script_run_and_nothing_else(tmp_path: Path, told: dict[str, Any]) -> None:
    text = write(tmp_path / "report.html", **told)
    assert scripts(text) == [SCRIPT.read_text(encoding="utf-8")]
    assert text.count("<script") == 1
    digest = base64.b64encode(hashlib.sha256(scripts(text)[0].encode()).digest()).decode()
    assert policy(text) == {
        "default-src": "'none'",
        "script-src": f"'sha256-{digest}'",
        "style-src": "'unsafe-inline'",
        "img-src": "data:",
    }
    assert text.index("Content-Security-Policy") < text.index("<script")


def test_the_script_makes_no_markup_and_no_code() -> None:
    text = SCRIPT.read_text(encoding="utf-8")
    assert text.isascii()  # whatever a page's encoding, its hash is the same
    assert not re.findall(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|Function|fetch|import|</|<!--", text
    )


@pytest.mark.parametrize("told", [{}, {"hints": SessionStory(counts={"asked": 3})}, {"pairs": pairs(3).clear()}])
def test_a_page_with_nothing_to_search_has_neither_field_nor_script(tmp_path: Path, told: dict[str, Any]) -> None:
    text = write(tmp_path / "report.html", **told)
    assert scripts(text) == []
    assert "<input" not in text
    assert "script-src" not in policy(text)


def test_without_the_script_all_is_readable(tmp_path: Path) -> None:
    page = Page(write(tmp_path / "report.html", pairs=pairs(300), hints=story()))
    assert page.open == []
    assert [(tag, value) for tag, name, value in page.attributes if name == "hidden"] == [("p", "")] * 3  # the fields
    assert page.tags.count("input") == 3
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]


@pytest.mark.parametrize("count", [1, 12, 13, 40, 199, 200, 201, 1000])
def test_pairs_are_the_largest_gaps_and_others_that_were_drawn(tmp_path: Path, count: int) -> None:
    text = write(tmp_path / "report.html", pairs=pairs(count))
    body = text.split("<h3>Largest reward gaps")[1]
    groups = [re.findall(r">User u(\d+)<", part) for part in body.split("<h3>Drawn at random")]
    largest, drawn = ([int(k) for k in part] for part in (*groups, [])[:2])
    assert largest == list(range(count - 1, count - 1 - len(largest), -1))
    assert (len(largest), len(drawn)) == {
        1: (1, 0),
        12: (12, 0),
        13: (12, 1),
        40: (20, 20),
        199: (99, 100),
    }.get(count, (100, 100))
    assert len({*largest, *drawn}) == min(count, 200)
    if count == 1000:  # drawn from all the others, and the first of them as random as the rest
        assert min(drawn) < 100
        assert max(drawn) > 800
        assert drawn[:12] != sorted(drawn[:12])
    shown = "All" if count <= 200 else "200 of"
    assert f"{shown} {count:,} pairs are in this page." in Page(text).text
    folded = [int(n) for n in re.findall(r"<summary>Show (\d+) more", text)]
    assert folded == [n - 12 for n in (len(largest), len(drawn)) if n > 12]


@pytest.mark.parametrize("words", ["Alien and Aliens, ", '["<&>"] ', "\u5929\u7a7a\u306e\u57ce\u3001"])
def test_long_texts_are_cut_and_say_so(tmp_path: Path, words: str) -> None:
    long = words * (13_000 // len(words))
    text = write(tmp_path / "report.html", pairs=pairs(250, long=long))
    assert (tmp_path / "report.html").stat().st_size < 2_000_000
    held = 200 if words.startswith("Alien") else len(re.findall(">User u", text))
    assert 24 <= held <= 200
    for shown, at in ((held, 17), (held, 8), (held, 7)):  # characters of a prompt, a chosen and a rejected text before
        assert text.count(f"The first 2,000 of {len(long) + at:,} characters.") == shown
    assert text.count("\u2026</div>") == 3 * held
    assert f"\n{held} of 250 pairs are in this page." in text
    folded = sum(int(n) for n in re.findall(r"<summary>Show (\d+) more", text))
    assert folded == held - 24


def test_a_text_is_cut_beyond_its_limit_and_not_at_it(tmp_path: Path) -> None:
    whole = pairs(1).with_columns(prompt=pl.lit("x" * 2000), chosen=pl.lit("y" * 2001))
    text = write(tmp_path / "report.html", pairs=whole)
    assert f">{'x' * 2000}</div>" in text
    assert f">{'y' * 2000}\u2026</div>" in text
    assert re.findall("The first .*? characters", text) == ["The first 2,000 of 2,001 characters"]


@pytest.mark.parametrize("evil", [*EVIL, "</script><script>document.title = 'x'</script>", "' unsafe-inline <!--"])
def test_hostile_texts_stay_texts(tmp_path: Path, evil: str) -> None:
    told = {"pairs": pairs(30, evil, evil * 300), "hints": story(evil)}
    text = write(tmp_path / "evil.html", **told)
    plain = write(tmp_path / "plain.html", pairs=pairs(30, long="x" * 2500), hints=story())
    assert sorted(Page(text).tags) == sorted(Page(plain).tags)
    assert scripts(text) == scripts(plain)
    assert policy(text) == policy(plain)
    assert evil.replace("\x00", "\ufffd")[1:20] in Page(text).text.replace("\x00", "\ufffd")


class Shown(HTMLParser):
    """The words of a page that are not within something hidden or folded away, its counts, and what is open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[tuple[str, bool]] = []
        self.text, self.counts = "", []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            names = dict(attrs)
            folded = tag == "details" and "data-group" in names and "open" not in names
            self.stack.append((tag, "hidden" in names or folded))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.stack.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        tags = [tag for tag, _ in self.stack]
        if not any(away for _, away in self.stack) and "script" not in tags and "style" not in tags:
            self.text += data
            self.counts += [data] * ("output" in tags)

    def found(self, pattern: str) -> set[str]:
        return set(re.findall(pattern, self.text))


def opened(page: Path, fragment: str, tmp_path: Path) -> Shown:
    """What Chromium makes of a page."""
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    command = [str(CHROMIUM), *flags.split(), f"--user-data-dir={tmp_path / 'chromium'}", "--dump-dom"]
    address = page.as_uri() + fragment
    done = subprocess.run(
        [*command, "--virtual-time-budget=2000", address], capture_output=True, check=True, timeout=120
    )
    return Shown(done.stdout.decode("utf-8"))


@in_browser
@pytest.mark.parametrize(
    ("query", "users", "counts"),
    [
        ("", 24, []),
        (
            "#q=watched%20FILM03",
            {f"u{k:03}" for k in range(30, 40)},
            ["10 of 60 match", "0 of 4 match", "0 of 4 match"],
        ),
        ("#q=bad011", {"u011"}, ["1 of 60 match", "0 of 4 match", "0 of 4 match"]),
        ("#q=advice1", set(), ["0 of 60 match", "1 of 4 match", "4 of 4 match"]),
        ("#q=no+gain", set(), ["0 of 60 match", "1 of 4 match", "0 of 4 match"]),
        ("#q=%3Cscript%3E", 60, ["60 of 60 match", "4 of 4 match", "4 of 4 match"]),
    ],
)
def test_a_browser_shows_what_matches(tmp_path: Path, query: str, users: Any, counts: list[str]) -> None:
    evil = EVIL[0] if "script" in query else ""
    page = tmp_path / "report.html"
    write(page, pairs=pairs(60, evil), hints=story(evil))
    shown = opened(page, query, tmp_path)
    assert shown.counts == counts
    found = shown.found(r"User (u\d{3})")
    assert (len(found) if isinstance(users, int) else found) == users
    if query == "#q=advice1":
        assert shown.found(r"advice\d") == {"advice1"}
        assert shown.found(r"goal\w\d") == {"goala0", "goala1", "goalb0", "goalb1"}
        assert "Largest reward gaps" not in shown.text
    if query == "#q=no+gain":
        assert shown.found(r"advice\d") == {"advice3"}
        assert "group a" not in shown.text
    if not counts:
        assert shown.found(r"advice\d") == {"advice1", "advice2"}  # what was not kept is folded away
        assert "Search users, prompts and answers" in shown.text


TYPE = """<script>
for (const input of document.querySelectorAll("input"))
  for (const text of ["bad011", "nothing has this", "bad011", ""]) {
    input.value = text;
    input.dispatchEvent(new Event("input"));
  }
document.body.append("typed");
</script>"""


@in_browser
def test_a_browser_runs_no_other_script_and_an_emptied_field_shows_all_again(tmp_path: Path) -> None:
    """The policy, not only the escaping: a script that got into the page does nothing until the policy is changed."""
    page = tmp_path / "report.html"
    text = write(page, pairs=pairs(60), hints=story()).replace("</main>", "</main>" + TYPE)
    page.write_text(text)
    before = opened(page, "", tmp_path)
    assert before.text.strip()
    assert "typed" not in before.text
    page.write_text(text.replace("script-src 'sha256-", "script-src 'unsafe-inline' 'x-"))
    after = opened(page, "", tmp_path)
    assert after.text.rstrip().endswith("typed")
    assert after.text.replace("typed", "").split() == before.text.split()
