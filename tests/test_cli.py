"""What a user meets at the command line when something is wrong: one message, exit code 2, nothing half-written."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
from huggingface_hub.errors import GatedRepoError
from omegaconf import OmegaConf

from lit_rec.cli import main
from lit_rec.data.assets import cache_dir
from lit_rec.llm import loading
from lit_rec.run import commands
from lit_rec.run.folder import RunFolder
from tests.worlds import BARE, World, assert_told, make_world, write_data

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def line(world: World, tmp_path: Path) -> list[str]:
    """`fit` in a run folder of the test's own, one round and one row."""
    return ["fit", "--config", world.config, f"run.dir={tmp_path}/run", f"run.answers={world.root}/answers", *BARE]


def with_wheel(world: World, part: str, folder: Path, version: str = "1.0") -> list[str]:
    """The same experiment, its LLM or encoder in a wheel."""
    wheel = f"{{package: fake-model, version: '{version}', sha256: '{'0' * 64}', member: fake_model/model}}"
    text = Path(world.config).read_text().replace(f"hub: {world.root}/{part}\n", f"hub: null\n  wheel: {wheel}\n")
    path = folder / f"{part}_wheel.yaml"
    path.write_text(text)
    return ["--config", str(path)]


def nothing_half_written(folder: Path) -> None:
    assert not [p for p in folder.rglob("*") if p.name.endswith(".tmp")]
    for stage in folder.glob("stages/**/"):
        files = [p for p in stage.iterdir() if p.is_file()]
        assert not files or (stage / "manifest.json").is_file() or (stage.parent / "manifest.json").is_file()
    assert not (folder / "results.json").exists()


def run_python(code: str) -> tuple[str, float]:
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, time.perf_counter() - started


def test_help_and_show_config_are_fast_and_import_nothing_heavy() -> None:
    code = (
        "import sys\nfrom lit_rec.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit as stop: assert stop.code == 0\n"
        "assert main(['show-config', '--config', 'configs/quickstart.yaml', 'reranker=mir']) == 0\n"
        "heavy = {'torch', 'transformers', 'lightning', 'polars', 'peft', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    printed, seconds = run_python(code)
    assert "show-config" in printed
    assert "architecture: mir" in printed
    assert seconds < 10


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fit", "--config", "configs/quikstart.yaml"], ["not found", "quickstart.yaml"]),
        (["fit", "--config", "configs/quickstart.yaml", "polcy.rounds=3"], ["polcy.rounds", "policy.rounds"]),
        (["test", "--config", "configs/quickstart.yaml", "llm=gpt"], ["gpt", "smollm2_135m"]),
        (["show-config", "--config", "configs/quickstart.yaml", "seed=x"], ["seed"]),
    ],
)
def test_mistakes_in_the_configuration(arguments: list[str], words: list[str], capsys: Any) -> None:
    assert_told(capsys, main(arguments), *words)


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_no_finished_run(command: str, line: list[str], tmp_path: Path, capsys: Any) -> None:
    output = ["--output", str(tmp_path / "out.parquet")] if command == "predict" else []
    assert_told(capsys, main([command, *line[1:], *output]), "no finished run", "run.dir")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "export", "show-config"])
def test_one_of_config_and_run(command: str, tmp_path: Path, capsys: Any) -> None:
    output = ["--output", str(tmp_path / "out")] if command in ("predict", "export") else []
    refused = {"one of the arguments --config --run is required": []}
    if command in ("fit", "show-config"):  # where --run might be taken for the place of a new run
        both = ["--config", "configs/quickstart.yaml", "--run", "r"]
        refused["argument --run: not allowed with argument --config"] = both
    for words, given in refused.items():
        with pytest.raises(SystemExit) as stop:
            main([command, *given, *output])
        assert stop.value.code == 2
        assert words in capsys.readouterr().err
    assert_told(
        capsys,
        main([command, "--run", str(tmp_path / "none"), *output]),
        "no run folder",
        "where: --run",
        "no such folder",
    )
    assert list(tmp_path.iterdir()) == []


def test_help_lists_groups_choices_and_exit_codes(capsys: Any) -> None:
    for arguments in (["--help"], ["fit", "--help"]):
        with pytest.raises(SystemExit):
            main(arguments)
        out = capsys.readouterr().out
        for group in ("data", "encoder", "llm", "reranker", "trainer"):
            listed = sorted(p.stem for p in (ROOT / "configs" / group).glob("*.yaml"))
            assert f"  {group}={'|'.join(listed)}\n" in out
        assert "Exit codes: 0 done, 1" in out


def test_show_config_with_origins(capsys: Any) -> None:
    more = ["trainer=fsdp", "trainer.devices=2"]
    assert (
        main(["show-config", "--config", "configs/quickstart.yaml", "--origins", "seed=5", "reranker=mir", *more]) == 0
    )
    lines = {line.split(":")[0]: line.split("# ")[1] for line in capsys.readouterr().out.splitlines()}
    assert lines["seed"] == "command line"
    written = (ROOT / "configs/quickstart.yaml").read_text().splitlines()
    policy = written.index("policy:")
    epochs = next(n for n, line in enumerate(written, 1) if n > policy and line.startswith("  epochs:"))
    assert lines["policy.epochs"].endswith(f"configs/quickstart.yaml:{epochs}")
    assert lines["reranker.architecture"].endswith("mir.yaml:1 (reranker=mir on the command line)")
    assert lines["trainer.strategy"].endswith("fsdp.yaml:4 (trainer=fsdp on the command line)")
    assert lines["trainer.devices"] == "command line"
    assert lines["llm.top_p"] == "schema default"


class TestRun:
    """One finished run, named by its folder."""

    @pytest.fixture(scope="class")
    def run(self, world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("finished") / "run"
        arguments = [f"run.dir={folder}", f"run.answers={world.root}/answers", *BARE, "policy.beta=0.3"]
        assert main(["fit", "--config", world.config, *arguments]) == 0
        return folder

    def lines(self, text: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in text.splitlines()]

    def test_is_opened_and_resumed_without_its_experiment(self, run: Path, tmp_path: Path, capsys: Any) -> None:
        assert main(["show-config", "--run", str(run)]) == 0
        assert capsys.readouterr().out == (run / "config.yaml").read_text()
        assert main(["test", "--run", str(run)]) == 0
        assert "final reranker: round_1" in capsys.readouterr().out
        ranked = tmp_path / "ranked.parquet"
        assert main(["predict", "--run", str(run), "--output", str(ranked)]) == 0
        assert pl.read_parquet(ranked)["rank"].min() == 1
        moved = run.rename(tmp_path / "moved")
        try:
            assert main(["test", "--run", str(moved)]) == 0
            capsys.readouterr()
            assert main(["fit", "--run", str(moved)]) == 0
            out = capsys.readouterr().out
            assert "The LLM has nothing left to do." in out
            assert "0 LLM answers written" in out
            assert_told(capsys, main(["fit", "--run", str(moved), "policy.beta=0.4"]), "policy.beta: 0.3 -> 0.4")
        finally:
            moved.rename(run)

    def test_named_by_both_its_folder_and_its_experiment(
        self, run: Path, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
    ) -> None:
        """The run's own configuration counts; an experiment beside it has to describe the same run."""
        both = ["--config", world.config, "--run", str(run), "--output", str(tmp_path / "ranked.parquet")]
        made_with = [*BARE, "policy.beta=0.3"]
        for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():  # as torchrun numbers them
            monkeypatch.setenv(name, value)
        assert main(["predict", *both]) == 0
        assert "left to process 0 of 2, and this is process 1" in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []
        monkeypatch.setenv("RANK", "0")
        assert main(["predict", *both, *made_with]) == 0
        assert pl.read_parquet(tmp_path / "ranked.parquet").height > 0
        capsys.readouterr()
        told = assert_told(
            capsys,
            main(["predict", *both, *made_with[:-1], "seed=9"]),
            f"{run} holds a run with another configuration",
            "policy.beta: 0.3 -> 0.1",
            f"--config {world.config}",
            "leave --config out",
        )
        assert "run.dir" not in told
        assert "seed" not in told  # an override changes both

    @pytest.mark.parametrize("override", ["+reranker=prm", "reranker.architecture=prm", "policy.beta=0.4"])
    def test_an_override_that_would_make_another_run_is_refused(
        self, override: str, run: Path, tmp_path: Path, capsys: Any
    ) -> None:
        line = ["--run", str(run), override, "--output", f"{tmp_path}/ranked.parquet"]
        assert_told(capsys, main(["predict", *line]), "holds a run with another configuration", "where: overrides")

    @pytest.mark.parametrize(
        ("file", "content"),
        [
            ("row.json", None),
            ("row.json", b"{"),
            ("row.json", b'{"row": "x"}'),
            ("reranker.json", b"{}"),
            ("reranker.json", b"\xff"),
            ("reranker.safetensors", b"cut"),
            ("knowledge.safetensors", b"cut"),
        ],
    )
    def test_a_damaged_reranker_is_told(
        self, file: str, content: bytes | None, run: Path, tmp_path: Path, capsys: Any
    ) -> None:
        copied = Path(shutil.copytree(run, tmp_path / "copied"))
        (copied / "reranker" / file).unlink() if content is None else (copied / "reranker" / file).write_bytes(content)
        output = ["--output", f"{tmp_path}/ranked.parquet"]
        told = assert_told(capsys, main(["predict", "--run", str(copied), *output]), f"{copied}/reranker", "fit")
        assert "cannot be read" in told

    def test_a_configuration_that_is_no_text_is_told(self, run: Path, tmp_path: Path, capsys: Any) -> None:
        copied = Path(shutil.copytree(run, tmp_path / "copied"))
        with (copied / "config.yaml").open("ab") as file:
            file.write(b"\xff")
        assert_told(capsys, main(["test", "--run", str(copied)]), f"{copied}/config.yaml")
        assert_told(capsys, main(["report", str(copied), "--output", f"{tmp_path}/all.html"]), "cannot be read")

    def test_in_quiet(self, run: Path, capsys: Any) -> None:
        assert main(["fit", "--run", str(run), "--quiet"]) == 0
        out = capsys.readouterr().out
        assert "round_1" in out
        for words in ("Plan", "lit_rec", "Report:", "answers written"):
            assert words not in out

    def test_as_json(self, run: Path, tmp_path: Path, capsys: Any) -> None:
        results = json.loads((run / "results.json").read_text())
        assert main(["fit", "--run", str(run), "--json"]) == 0
        captured = capsys.readouterr()
        plan, *_, last = self.lines(captured.out)
        assert (plan["event"], plan["at_most"]) == ("plan", {"answers": 0, "tokens": 0, "titles": 0})
        assert {part["state"] for part in plan["parts"]} == {"finished"}
        assert (last["event"], last["results"]) == ("results", f"{run}/results.json")
        rows = results if isinstance(results, list) else results["rows"]
        assert last["rows"] == [
            row
            for row in rows
            if (row["metric"], row["unit"], row["split"], row["convention"]) == ("ndcg@5", "user", "test", "standard")
        ]
        assert [row["row"] for row in last["rows"]] == ["round_1"]
        assert main(["predict", "--run", str(run), "--json", "--output", f"{tmp_path}/ranked.parquet"]) == 0
        assert self.lines(capsys.readouterr().out)[-1]["output"] == f"{tmp_path}/ranked.parquet"
        assert main(["fit", "--run", str(run), "--json", "reranker.lr=0.5"]) == 2
        captured = capsys.readouterr()
        told = json.loads(captured.err.splitlines()[-1])
        assert (told["event"], told["code"]) == ("error", 2)
        assert "reranker.lr" in told["why"]
        assert told["fix"]
        self.lines(captured.out)

    def test_json_of_what_ends_a_command(self, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        for raised, code, event in ((ZeroDivisionError(), 1, "error"), (KeyboardInterrupt(), 130, "interrupted")):

            def broken(*_: object, error: BaseException = raised) -> None:
                raise error

            monkeypatch.setitem(commands.COMMANDS, "fit", broken)
            assert main(["fit", "--run", str(run), "--json"]) == code
            captured = capsys.readouterr()
            told = json.loads(captured.err)
            assert (told["event"], told["code"]) == (event, code)
            assert captured.out == ""
            assert code != 1 or "ZeroDivisionError" in told["traceback"]

    def test_fast_dev_run_leaves_it_alone(self, run: Path, capsys: Any) -> None:
        before = {p: p.read_bytes() for p in run.glob("*.json")} | {run: (run / "config.yaml").read_bytes()}
        own = run.parent / "run-dev"
        for overrides, beta in ((["pairs.samples=3"], 0.3), (["pairs.samples=3", "policy.beta=0.2"], 0.2)):
            assert main(["fit", "--run", str(run), "--fast-dev-run", *overrides]) == 0  # a second one starts anew
            out = capsys.readouterr().out
            assert "fast dev run in" in out
            assert "users=8" in out
            cfg = OmegaConf.load(own / "config.yaml")
            assert (cfg.users, cfg.policy.rounds, cfg.pairs.samples, cfg.policy.beta) == (8, 1, 3, beta)
            assert (own / "report.html").is_file()
        assert before == {p: p.read_bytes() for p in run.glob("*.json")} | {run: (run / "config.yaml").read_bytes()}


@pytest.mark.parametrize(
    ("line", "wanted", "unwanted"),
    [
        ("lit_rec va", {"validate", "validate-data"}, {"fit"}),
        ("lit_rec fit --f", {"--fresh", "--fast-dev-run"}, {"--json"}),
        ("lit_rec fit --config configs/quickstart_", {"configs/quickstart_re2llm.yaml"}, {"README.md"}),
        ("lit_rec fit --config configs/quickstart.yaml rer", {"reranker=dlcm", "reranker=mir"}, {"llm=hub"}),
        ("lit_rec fit --config configs/quickstart.yaml llm=s", {"llm=server", "llm=smollm2_135m"}, {"llm=hub"}),
        ("lit_rec fit --config configs/quickstart.yaml trai", {"trainer=ddp", "trainer=fsdp"}, {"llm=hub"}),
    ],
)
def test_completion(line: str, wanted: set[str], unwanted: set[str], tmp_path: Path) -> None:
    """As a shell asks, with "=" no break between words."""
    asked = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "out"),
        "_ARGCOMPLETE_IFS": "\n",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "COMP_TYPE": "9",
        "_ARGCOMPLETE_COMP_WORDBREAKS": " ",
    }
    code = "from lit_rec.cli import main; main()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | asked, capture_output=True, check=False)
    found = {word.strip() for word in (tmp_path / "out").read_text().splitlines()}
    assert wanted <= found
    assert not unwanted & found


def test_report_of_the_newest_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda page: opened.append(page) or True)
    assert_told(capsys, main(["report", "--open"]), "no run below runs/ is finished")
    for age, name in enumerate(("b", "c", "a")):
        page = tmp_path / "runs" / name / "report.html"
        page.parent.mkdir(parents=True)
        page.touch()
        os.utime(page, (9, 9 - age))
    assert main(["report"]) == 0
    assert opened == []
    assert main(["report", "--open"]) == 0
    assert opened == [f"file://{tmp_path}/runs/b/report.html"]


def test_unknown_option_is_refused(line: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*line, "--frehs"])
    assert stop.value.code == 2
    assert "--frehs" in capsys.readouterr().err


class TestFit:
    """Every test leaves the run folder such that the same command can be started again."""

    @pytest.fixture(autouse=True)
    def _whole(self, tmp_path: Path) -> Any:
        yield
        nothing_half_written(tmp_path / "run")

    def test_missing_data(self, line: list[str], tmp_path: Path, capsys: Any) -> None:
        assert_told(capsys, main([*line, f"data.root={tmp_path}/none"]), f"{tmp_path}/none/tiny.inter")
        assert_told(capsys, main([*line, "~data"]), "data")

    def test_malformed_line(self, line: list[str], tmp_path: Path, capsys: Any) -> None:
        write_data(tmp_path / "data")
        inter = tmp_path / "data" / "tiny.inter"
        good = inter.read_text().splitlines()
        for bad in ("u1\t3\tfive\t1000", "u1\t3\t5"):
            inter.write_text("\n".join([*good[:10], bad, *good[10:]]) + "\n")
            assert_told(capsys, main([*line, f"data.root={tmp_path}/data"]), f"{inter}:11", bad.split("\t")[2])

    @pytest.mark.parametrize(
        ("overrides", "words"),
        [
            (["users=1"], ["sample of 1 users", "users"]),
            (["users=100"], ["24", "users"]),
            (["users=2"], ["leave no", "evaluation.test"]),
            (["evaluation.folds=2", "evaluation.only_folds=[7]"], ["[7]", "evaluation.only_folds"]),
            (["lists.item_core=1000"], ["no user has a candidate list"]),
        ],
    )
    def test_too_few_users_or_interactions(
        self, overrides: list[str], words: list[str], line: list[str], capsys: Any
    ) -> None:
        assert_told(capsys, main([*line, *overrides]), *words)

    def test_fewer_users_than_reward_folds(self, line: list[str], capsys: Any) -> None:
        assert_told(capsys, main([*line, "users=6", "reward.folds=5"]), "reward.folds")

    @pytest.mark.parametrize("part", ["llm", "encoder"])
    def test_no_model_there(self, part: str, line: list[str], tmp_path: Path, capsys: Any) -> None:
        told = assert_told(capsys, main([*line, f"{part}.hub={tmp_path}/none"]), f"{tmp_path}/none")
        assert f"config key {part}.hub" in told

    def test_an_encoder_that_does_not_load_is_told_before_the_llm_writes(
        self, world: World, line: list[str], tmp_path: Path, capsys: Any
    ) -> None:
        broken = shutil.copytree(world.root / "encoder", tmp_path / "encoder")
        (broken / "model.safetensors").unlink()
        assert_told(capsys, main([*line, f"encoder.hub={broken}", f"run.answers={tmp_path}/answers"]), str(broken))
        assert not (tmp_path / "answers" / "answers.jsonl").read_text()

    @pytest.mark.parametrize("name", ["EarlyStopping", "RichProgressBar", "Timer"])
    def test_a_callback_that_cannot_take_part(self, name: str, line: list[str], capsys: Any) -> None:
        more = ["+callbacks.mine.monitor=loss"] if name == "EarlyStopping" else []
        target = f"+callbacks.mine._target_=lightning.pytorch.callbacks.{name}"
        assert_told(capsys, main([*line, target, *more]), name, "config key callbacks.mine")

    def test_gated_model(self, line: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        answer: Any = SimpleNamespace(headers={}, request=None)

        def gated(source: str, *_: object, **__: object) -> None:
            raise OSError(f"cannot load {source}") from GatedRepoError("403 Client Error", response=answer)

        monkeypatch.setattr("transformers.utils.cached_file", gated)
        untuned = [*line, "llm.hub=meta/gated", "policy.rounds=0", "evaluation.controls.zero_shot=true"]
        told = assert_told(capsys, main(untuned), "meta/gated is a gated model", "HF_TOKEN")
        assert "https://huggingface.co/meta/gated" in told
        monkeypatch.setattr("transformers.utils.cached_file", lambda *_, **__: str(ROOT / "README.md"))
        load = loading.AutoTokenizer.from_pretrained
        monkeypatch.setattr(
            loading.AutoTokenizer,
            "from_pretrained",
            lambda source, **more: (gated if source == "meta/gated" else load)(source, **more),
        )
        assert_told(capsys, main([*line, "llm.hub=meta/gated", "--fresh"]), "gated model", "llm.hub = meta/gated")

    def test_wrong_wheel(
        self, world: World, line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
    ) -> None:
        index = tmp_path / "index"
        index.mkdir()
        wheel = index / "fake_model-1.0-py3-none-any.whl"
        info = "fake_model-1.0.dist-info"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("fake_model/model/config.json", "{}")
            archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: fake-model\nVersion: 1.0\n")
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", "")
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(index))
        cache = tmp_path / "cache"
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        arguments = [*line, *with_wheel(world, "llm", tmp_path), f"run.cache={cache}"]
        told = assert_told(capsys, main(arguments), found, "0" * 64)
        assert "fake-model==1.0" in told
        assert not list(cache.rglob("config.json"))
        arguments = [*line, *with_wheel(world, "llm", tmp_path, "2.0"), f"run.cache={cache}"]
        assert_told(capsys, main(arguments), "cannot fetch fake-model==2.0")

    def test_no_gpu(self, line: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        assert_told(capsys, main([*line, "trainer.accelerator=gpu"]), "GPU", "trainer.accelerator=auto")
        assert_told(capsys, main([*line, "trainer.accelerator=gpuu"]), "gpuu", "trainer.accelerator")

    def test_the_cache_is_that_of_data_sets_too(
        self, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[Path] = []
        monkeypatch.setitem(commands.COMMANDS, "validate-data", lambda *_: seen.append(cache_dir()))
        assert main(["validate-data", "--config", world.config, f"run.cache={tmp_path}/mine"]) == 0
        assert seen == [tmp_path / "mine"] != [cache_dir()]

    def test_run_folder_in_use(self, line: list[str], tmp_path: Path, capsys: Any) -> None:
        with RunFolder(tmp_path / "run"):
            assert_told(capsys, main(line), "another run is using", "run.dir")

    def test_prompt_longer_than_the_model(self, line: list[str], capsys: Any) -> None:
        assert_told(capsys, main([*line, "llm.max_new_tokens=500"]), "context is 512", "prompt.history")

    @pytest.mark.parametrize("key", ["run.dir", "run.answers", "run.cache"])
    def test_folder_that_cannot_be_made(
        self, key: str, world: World, line: list[str], tmp_path: Path, capsys: Any
    ) -> None:
        (tmp_path / "file").write_text("")
        more = with_wheel(world, "encoder", tmp_path) if key == "run.cache" else []
        assert_told(capsys, main([*line, *more, f"{key}={tmp_path}/file/below"]), f"{tmp_path}/file", key)

    @pytest.mark.parametrize("survives", [0, 1, 4, 9])
    def test_disk_full(self, survives: int, line: list[str], tmp_path: Path, capsys: Any) -> None:
        """The disk fills up at the first, the second, ... write that must be safe."""
        fsync, calls = os.fsync, []

        def full(descriptor: int) -> None:
            if len(calls) >= survives:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            calls.append(descriptor)
            fsync(descriptor)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(os, "fsync", full)
            assert_told(capsys, main([*line, f"run.answers={tmp_path}/answers"]), "No space left", "same command")

    def test_what_may_not_be_read_is_not_said_to_be_written(
        self, line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
    ) -> None:
        secret = tmp_path / "secret"
        secret.write_text("")

        def denied(*_: object, **__: object) -> None:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(secret))

        monkeypatch.setattr("lit_rec.run.commands.fit_rlrf", denied)
        monkeypatch.setattr("os.access", lambda *_: False)
        told = assert_told(capsys, main(line), "may not be read", str(secret))
        assert "run.dir" not in told

    def test_arguments_of_the_reranker_are_tried_before_the_llm(self, line: list[str], capsys: Any) -> None:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("lit_rec.run.commands.fit_rlrf", None)
            assert_told(capsys, main([*line, "+reranker.args.foo=1"]), "reranker.args", "foo")

    def test_more_folds_than_users(self, line: list[str], capsys: Any) -> None:
        assert_told(capsys, main([*line, "evaluation.folds=100"]), "config key evaluation.folds", "too few")

    def test_targets_of_the_adapter_that_are_not_there(self, line: list[str], capsys: Any) -> None:
        assert_told(capsys, main([*line, "policy.lora.targets=nope"]), "policy.lora.targets", "all-linear")

    def test_disk_full_in_the_words_of_polars(self, line: list[str], capsys: Any) -> None:
        def full(*_: object, **__: object) -> None:
            raise pl.exceptions.ComputeError("No space left on device (os error 28)")

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(pl.DataFrame, "write_parquet", full)
            assert_told(capsys, main(line), "No space left")

    def test_interrupted(self, line: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("lit_rec.recipes.loop.Loop.rewards", stop)
        assert main(line) == 130
        assert capsys.readouterr().err == "interrupted; the same command resumes\n"

    def test_no_pair(self, line: list[str], capsys: Any) -> None:
        assert_told(capsys, main([*line, "pairs.min_gap=9"]), "no preference pair", "pairs.samples")

    def test_nothing_to_evaluate(self, line: list[str], capsys: Any) -> None:
        assert_told(capsys, main([*line, "policy.rounds=0"]), "nothing to evaluate", "evaluation.controls")

    def test_wrong_architecture_argument(self, line: list[str], capsys: Any) -> None:
        assert_told(capsys, main([*line, "+reranker.args.haeds=3"]), "haeds", "reranker.args")
        assert_told(capsys, main([*line, "reranker.loss=no_such"]), "no_such", "reranker.loss")
        assert_told(capsys, main([*line, "reranker.metric=ndgc@5"]), "ndgc@5", "reranker.metric")


def test_defects_of_lit_rec_keep_their_traceback(line: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setitem(commands.COMMANDS, "fit", broken)
    with pytest.raises(ZeroDivisionError):
        main(line)


def test_changed_configuration_in_a_run_folder(line: list[str], tmp_path: Path, capsys: Any) -> None:
    assert main(line) == 0
    results = (tmp_path / "run/results.json").read_bytes()
    capsys.readouterr()
    for override, shown in (
        ("policy.beta=0.2", "policy.beta: 0.1 -> 0.2"),
        ("llm.temperature=0.9", "llm.temperature: 1.0 -> 0.9"),
        ("reranker.lr=0.5", "reranker.lr: 0.001 -> 0.5"),
        ("seed=4", "seed: 3 -> 4"),
        ("lists.size=9", "lists.size: 10 -> 9"),
        ("evaluation.test=0.3", "test: 0.25 -> 0.3"),
        ("reward.metric=soft", "reward.metric: ndcg -> soft"),
        ("pairs.min_gap=0.1", "min_gap: 0.0 -> 0.1"),
        ("prompt.history=5", "prompt.history: 6 -> 5"),
        ("+data.positive_above=2", "positive_above: 3 -> 2"),
    ):
        assert_told(capsys, main([*line, override]), shown, "--fresh", "stage ")
    assert (tmp_path / "run/results.json").read_bytes() == results
    assert main([*line, "policy.beta=0.2", "--fresh"]) == 0
    assert main(["test", *line[1:], "policy.beta=0.2"]) == 0
