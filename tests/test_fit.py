"""Whole runs of the recipe on a tiny world: what they leave behind, and every variant of the method."""

import json
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from omegaconf import OmegaConf
from peft import PeftModel
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from callbacks.rounds import RoundCallback
from lit_rec.cli import main
from lit_rec.config import load_config
from lit_rec.llm.sampler import Sampler
from lit_rec.recipes import rlrf
from lit_rec.run.results import FIELDS
from lit_rec.run.sweep import is_finished
from tests.worlds import BARE, USERS, World, assert_told, make_world

CONTROLS = ["no_knowledge", "item_only", "history_only"]
STATES = ["zero_shot", "random_pairs", "round_1", "round_2"]
ROWS = {*CONTROLS, *(f"{name}{kind}" for name in ("shuffled", *STATES) for kind in ("", "_both"))}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = make_world(tmp_path_factory.mktemp("world"))
    assert main(["fit", "--config", made.config]) == 0
    return made


def results(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "results.json").read_text())


def rows(run: Path) -> set[str]:
    return {r["row"] for r in results(run)}


def tags(folder: Path) -> dict[str, Any]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events.Tags()


class TestWhatARunLeaves:
    def test_results(self, world: World) -> None:
        found = results(world.run)
        assert all(tuple(r) == FIELDS for r in found)
        assert rows(world.run) == ROWS
        for r in found:
            assert (r["task"], r["dataset"], r["protocol"], r["reranker"]) == ("reranking", "tiny", "strict", "dlcm")
            assert (r["seeds"], r["published"]) == (1, None)
            low, high = r["ci95"]
            assert 0 <= r["mean"] <= (5 if r["metric"].startswith("click") else 1)  # clicks are counted
            assert low <= r["mean"] <= high
            assert r["n"] == 6 if r["unit"] == "user" else r["n"] > 6
        cells = {tuple(r[k] for k in ("split", "row", "metric", "convention", "unit")) for r in found}
        assert len(cells) == len(found)
        metrics = {r["metric"] for r in found}
        assert {f"{m}@{k}" for m in ("ndcg", "map", "hr", "mrr") for k in (1, 3, 5, 10)} <= metrics
        assert len(found) == 2 * 2 * 2 * len(ROWS) * len(metrics)  # splits, conventions, units

    def test_report(self, world: World) -> None:
        text = (world.run / "report.html").read_text()
        assert all(row in text for row in ROWS)
        assert "http://" not in text.replace("http://www.w3.org", "")
        assert "<script src" not in text

    def test_rounds(self, world: World) -> None:
        rounds = json.loads((world.run / "rounds.json").read_text())
        assert [(one["round"], one["name"]) for one in rounds] == [
            (0, "zero_shot"),
            (1, "round_1"),
            (2, "round_2"),
            (1, "random_pairs"),
        ]
        for one in rounds:
            assert 0 < one["heldout_reward"]["mean"] < 1
            assert ("train" in one) == ("heldout_gain" in one) == (one["name"] != "zero_shot")
        assert all("tie_rate" in one for one in rounds[:2])

    def test_adapter_loads_with_peft(self, world: World) -> None:
        base = AutoModelForCausalLM.from_pretrained(world.root / "llm", dtype=torch.float32)
        ids = torch.tensor([[5, 9, 11]])
        plain = base(ids).logits
        tuned = PeftModel.from_pretrained(base, world.run / "adapter")
        assert not torch.allclose(tuned(ids).logits, plain)
        state = world.run / "stages/fold_0/round_2/policy/adapter/adapter_model.safetensors"
        assert (world.run / "adapter/adapter_model.safetensors").read_bytes() == state.read_bytes()

    def test_curves(self, world: World) -> None:
        main_tags = tags(world.run / "tensorboard/fold_0")
        wanted = {f"policy/{name}" for name in ("loss", "margin", "accuracy", "chosen_reward", "rejected_reward", "lr")}
        wanted |= {f"rounds/{name}" for name in ("kl", "heldout_reward", "train_reward_mean", "reward_spread")}
        wanted |= {f"rounds/{name}" for name in ("tie_rate", "unique_answer_rate", "answer_tokens_mean")}
        assert wanted <= set(main_tags["scalars"])
        assert {"rewards/train", "rewards/validation"} <= set(main_tags["histograms"])
        assert any(tag.startswith("pairs/user_u") for tag in main_tags["tensors"])
        control = tags(world.run / "tensorboard/fold_0_random_pairs")
        assert {"policy/loss", "rounds/heldout_reward", "rounds/kl"} <= set(control["scalars"])

    def test_rounds_start_at_zero_and_are_told_once_each(self, world: World) -> None:
        events = EventAccumulator(str(world.run / "tensorboard/fold_0"))
        events.Reload()
        assert {e.step for e in events.Scalars("rounds/heldout_reward")} == {0, 1, 2}

    def test_configuration_and_environment(self, world: World) -> None:
        assert "rounds: 2" in (world.run / "config.yaml").read_text()
        environment = json.loads((world.run / "environment.json").read_text())
        assert environment["torch"]
        assert environment["device"]

    def test_only_training_users_have_several_answers_and_nobody_tests_the_reward(self, world: World) -> None:
        stages = world.run / "stages/fold_0"
        answers = pl.read_parquet(stages / "zero_shot/answers/answers.parquet")
        counts = answers.group_by("user", "split").len()
        assert len(counts) == USERS
        assert set(counts.filter(pl.col("split") == "train")["len"]) == {3}
        assert set(counts.filter(pl.col("split") != "train")["len"]) == {1}
        for state in STATES:
            rewards = pl.read_parquet(stages / f"{state}/rewards/rewards.parquet")
            assert set(rewards["split"]) == {"train", "validation"}
        train = set(answers.filter(pl.col("split") == "train")["user"])
        for pairs in ("zero_shot/pairs_best_worst", "zero_shot/pairs_random", "round_1/pairs_best_worst"):
            ids = pl.read_parquet(stages / pairs / "pairs.parquet")["user_id"]
            assert {int(i.removeprefix("u")) for i in ids} <= train


class TestAfterwards:
    def test_second_fit_asks_nothing_and_says_the_same(
        self, world: World, monkeypatch: pytest.MonkeyPatch, capsys: Any
    ) -> None:
        def never(*_: Any) -> None:
            raise AssertionError("the model was asked")

        before = (world.run / "results.json").read_bytes()
        store = (world.run / "answers/answers.jsonl").read_bytes()
        rules = {}

        def spied(loop: Any, name: str, *more: Any) -> RoundCallback:
            made = RoundCallback(loop, name, *more)
            rules[name] = made.key["pairs"]["rule"]
            return made

        monkeypatch.setattr(Sampler, "sample", never)
        monkeypatch.setattr(rlrf, "RoundCallback", spied)
        assert main(["fit", "--config", world.config]) == 0
        assert rules == {"random_pairs": "random", "round": "best_worst"}  # no checkpoint goes on with other pairs
        assert (world.run / "results.json").read_bytes() == before
        assert (world.run / "answers/answers.jsonl").read_bytes() == store
        assert "0 LLM answers written" in capsys.readouterr().out
        # with every stage gone the answers are still there, and everything made from them is the same
        assert main(["fit", "--config", world.config, "--fresh"]) == 0
        assert (world.run / "results.json").read_bytes() == before

    @pytest.mark.parametrize("command", ["validate", "test"])
    def test_measures(self, command: str, world: World, capsys: Any) -> None:
        assert main([command, "--config", world.config]) == 0
        split = {"validate": "validation"}.get(command, command)
        kept = {
            f"{r['mean']:.4f}"
            for r in results(world.run)
            if (r["row"], r["split"], r["metric"], r["convention"], r["unit"])
            == ("round_2", split, "ndcg@5", "standard", "user")
        }
        printed = capsys.readouterr().out
        assert f"final reranker: round_2, fold 0, {split} users" in printed
        assert kept.pop() in printed

    def test_predict_own_lists(self, world: World, tmp_path: Path) -> None:
        output = tmp_path / "ranked.parquet"
        assert main(["predict", "--config", world.config, "--output", str(output)]) == 0
        ranked = pl.read_parquet(output)
        assert ranked.columns == ["list_id", "user_id", "rank", "item_id", "title", "score", "knowledge"]
        assert ranked["user_id"].n_unique() == 6
        for _, one in ranked.group_by("list_id"):
            assert one["rank"].to_list() == [*range(1, len(one) + 1)]
            assert one["score"].is_sorted(descending=True)
        answers = pl.read_parquet(world.run / "stages/fold_0/round_2/answers/answers.parquet")
        known = dict(answers.filter(pl.col("sample") == 0).select("user", "text").rows())
        told = {int(user.removeprefix("u")): text for user, text in ranked.select("user_id", "knowledge").rows()}
        assert told == {user: known[user] for user in told}

    def test_predict_given_lists(self, world: World, tmp_path: Path) -> None:
        given, output = tmp_path / "given.csv", tmp_path / "ranked.parquet"
        lines = [f"{u},{i}" for u in ("u3", "u1") for i in range(1, 19)]  # longer than the lists of the training
        given.write_text("\n".join(["user_id,item_id", *lines]) + "\n")
        arguments = ["predict", "--config", world.config, "--input", str(given), "--output", str(output)]
        assert main(arguments) == 0
        ranked = pl.read_parquet(output)
        assert ranked["user_id"].unique(maintain_order=True).to_list() == ["u3", "u1"]
        assert sorted(ranked["item_id"].cast(int)) == sorted([*range(1, 19)] * 2)
        assert ranked["title"][0] == f"film{ranked['item_id'][0]}"
        again = tmp_path / "again.parquet"
        given.write_text("\n".join(["user_id,item_id", *lines[18:]]) + "\n")
        assert main([*arguments[:-1], str(again)]) == 0
        alone = pl.read_parquet(again)
        assert alone["item_id"].to_list() == ranked.filter(pl.col("user_id") == "u1")["item_id"].to_list()

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ("user_id,item_id\nnobody,1\n", ["unknown user_id 'nobody'", "given.csv:2"]),
            ("user_id,item_id\nu1,1\nu1,999\n", ["unknown item_id '999'", "given.csv:3"]),
            ("user_id,movie\nu1,1\n", ["no column item_id", "user_id, movie"]),
            (None, ["not found"]),
        ],
    )
    def test_predict_mistakes(
        self, content: str | None, words: list[str], world: World, tmp_path: Path, capsys: Any
    ) -> None:
        given, output = tmp_path / "given.csv", tmp_path / "ranked.parquet"
        if content is not None:
            given.write_text(content)
        arguments = ["predict", "--config", world.config, "--input", str(given), "--output", str(output)]
        assert_told(capsys, main(arguments), *words)
        assert [p.name for p in tmp_path.iterdir()] == ([] if content is None else ["given.csv"])

    def test_predict_into_a_folder_that_is_not_there(self, world: World, tmp_path: Path, capsys: Any) -> None:
        output = tmp_path / "none" / "ranked.parquet"
        assert_told(
            capsys, main(["predict", "--config", world.config, "--output", str(output)]), "--output", str(output)
        )

    def test_predict_writes_over_nothing_and_as_the_file_is_called(
        self, world: World, tmp_path: Path, capsys: Any
    ) -> None:
        given, output = tmp_path / "given.csv", tmp_path / "ranked.csv"
        given.write_text("user_id,item_id\nu1,1\nu1,2\n")
        line = ["predict", "--config", world.config, "--input", str(given), "--output"]
        assert_told(capsys, main([*line, str(given)]), "--input and --output", str(given))
        assert_told(capsys, main([*line, str(tmp_path / "ranked.json")]), "--output", "ranked.parquet")
        assert given.read_text().startswith("user_id")
        assert main([*line, str(output)]) == 0
        assert sorted(pl.read_csv(output)["item_id"].to_list()) == [1, 2]

    def test_predict_that_fails_leaves_nothing(
        self, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
    ) -> None:
        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(pl.DataFrame, "write_parquet", full)
        arguments = ["predict", "--config", world.config, "--output", str(tmp_path / "ranked.parquet")]
        assert_told(capsys, main(arguments), "No space left")
        assert list(tmp_path.iterdir()) == []


class TestVariants:
    """Each in a run folder of its own, answers shared: what is asked twice is written once."""

    def fit(self, world: World, run: Path, *overrides: str, bare: bool = True) -> Path:
        places = [f"run.dir={run}", f"run.answers={world.run}/answers"]
        arguments = ["--config", world.config, *places, *(BARE if bare else []), *overrides]
        assert main(["fit", *arguments]) == 0
        assert main(["test", *arguments]) == 0
        assert main(["predict", *arguments, "--output", str(run / "ranked.parquet")]) == 0
        return run

    @pytest.mark.parametrize(
        "overrides",
        [
            ["lists.protocol=kar", "evaluation.selection=test_kar", "evaluation.validation=0"],
            ["knowledge.encode=both", "evaluation.inputs=[]", "evaluation.validation=0", "evaluation.selection=last"],
            ["reward.metric=soft", "users=16", "trainer.precision=bf16-mixed"],
            ["reward.metric=map", "reward.folds=1", "reward.convention=kar"],
            [
                "policy.reference=previous",
                "policy.rounds=2",
                "policy.gradient_checkpointing=true",
                "policy.keep_optimizer=true",
            ],
            ["pairs.rule=random", "policy.loss=ipo", "pairs.max_pairs=3"],
            ["evaluation.seeds=2", "evaluation.rounds=false", "lists.protocol=kar"],
            [
                "knowledge.item_text=llm",
                "knowledge.item_tokens=3",
                "lists.negatives=retrieved",
                "lists.initial_ranker=bpr",
            ],
            ["llm.quantization=nf4"],
        ],
        ids=" ".join,
    )
    def test_one_row(self, overrides: list[str], world: World, tmp_path: Path) -> None:
        run = self.fit(world, tmp_path, *overrides)
        last = "round_2" if "policy.rounds=2" in overrides else "round_1"
        assert last in rows(run) <= {"round_1", "round_2"}
        assert len(pl.read_parquet(run / "ranked.parquet")) > 0

    @pytest.mark.parametrize(
        "architecture", ["dlcm", *(pytest.param(name, marks=pytest.mark.slow) for name in ("prm", "setrank")), "mir"]
    )
    def test_architectures(self, architecture: str, world: World, tmp_path: Path) -> None:
        run = self.fit(world, tmp_path, f"+reranker={architecture}")
        assert {r["reranker"] for r in results(run)} == {architecture}
        given = tmp_path / "given.csv"
        given.write_text("\n".join(["user_id,item_id", *(f"u2,{i}" for i in range(1, 26)), "u1,4"]) + "\n")
        arguments = ["--config", world.config, f"run.dir={run}", f"run.answers={world.run}/answers", *BARE]
        more = ["--input", str(given), "--output", str(tmp_path / "given.parquet")]
        assert main(["predict", *arguments, f"reranker.architecture={architecture}", *more]) == 0
        assert len(pl.read_parquet(tmp_path / "given.parquet")) == 26

    def test_folds_make_everybody_a_test_user_once(self, world: World, tmp_path: Path) -> None:
        run = self.fit(world, tmp_path, "evaluation.folds=2")
        test = {r["n"] for r in results(run) if (r["split"], r["unit"]) == ("test", "user")}
        assert test == {USERS}
        assert (run / "stages/fold_1/rows/round_1/manifest.json").is_file()
        texts = [
            pl.read_parquet(run / f"stages/fold_{n}/zero_shot/answers/answers.parquet")
            .filter(pl.col("sample") == 0)
            .sort("user")["text"]
            for n in (0, 1)
        ]
        assert texts[0].equals(texts[1])  # the untrained LLM's: not the one that was tuned on the other fold's users
        assert (run / "tensorboard/fold_1").is_dir()

    def test_knowledge_in_kars_encoding_beside_the_others(self, world: World, tmp_path: Path) -> None:
        run = self.fit(world, tmp_path, "knowledge.encode=kar", "evaluation.inputs=[answer,both]")
        assert rows(run) == {"round_1", "round_1_answer", "round_1_both"}

    def test_pairs_of_a_sample_of_users(self, world: World, tmp_path: Path) -> None:
        run = self.fit(world, tmp_path, "pairs.users=5", "policy.rounds=2")
        for state, most in (("zero_shot", 3), ("round_1", 3), ("round_2", 1)):
            answers = pl.read_parquet(run / f"stages/fold_0/{state}/answers/answers.parquet")
            by_user = answers.group_by("user", "split").len()
            assert len(by_user) == USERS  # everybody is described
            assert len(by_user.filter(pl.col("len") == 3)) == (5 if most == 3 else 0)
            assert set(by_user.filter(pl.col("len") > 1)["split"]) <= {"train"}
        counts = json.loads((run / "stages/fold_0/zero_shot/pairs_best_worst/counts.json").read_text())
        assert counts["users"] == 5

    def test_answers_that_are_made_again_are_those_of_their_state(self, world: World, tmp_path: Path) -> None:
        """The advice on a damaged stage, followed: the texts of round 1 are not written by the untrained LLM."""
        run = tmp_path / "run"
        line = ["fit", "--config", world.config, *BARE, f"run.dir={run}", f"run.answers={tmp_path}/answers"]
        assert main(line) == 0
        folder = run / "stages/fold_0/round_1/answers"
        before = pl.read_parquet(folder / "answers.parquet")
        untrained = pl.read_parquet(run / "stages/fold_0/zero_shot/answers/answers.parquet")
        shutil.rmtree(folder)
        shutil.rmtree(tmp_path / "answers")
        assert main(line) == 0
        assert pl.read_parquet(folder / "answers.parquet").equals(before)
        first = untrained.filter(pl.col("sample") == 0).sort("user")["text"]
        assert not first.equals(before.sort("user")["text"])  # else any LLM would do

    def test_random_pairs_have_their_counterpart(self, world: World, tmp_path: Path) -> None:
        given = ["policy.rounds=2", "evaluation.rounds=false", "evaluation.controls.random_pairs=true"]
        assert rows(self.fit(world, tmp_path, *given)) == {"random_pairs", "round_1", "round_2"}

    def test_another_encoding_is_another_row(
        self, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        given = ["policy.rounds=0", "evaluation.controls.zero_shot=true"]
        run = self.fit(world, tmp_path, *given)
        capsys.readouterr()
        line = ["fit", "--config", world.config, *BARE, *given, f"run.dir={run}", f"run.answers={world.run}/answers"]
        assert_told(capsys, main([*line, "knowledge.encode=both"]), "another configuration", "encode")

    def test_killed_at_its_end_a_run_is_not_finished(
        self, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its folder holds the files of the run before, whose configuration was another one."""
        line = ["fit", "--config", world.config, f"run.dir={tmp_path}/run", f"run.answers={world.run}/answers", *BARE]
        line += ["policy.rounds=0", "evaluation.controls.item_only=true"]
        assert main(line) == 0
        more = [*line, "evaluation.controls.history_only=true"]

        def killed(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("lit_rec.run.outcome.write_results", killed)
            main(more)
        cfg = OmegaConf.to_container(load_config(world.config, more[3:]))
        assert not is_finished(tmp_path / "run", cfg)
        assert main(more) == 0
        assert is_finished(tmp_path / "run", cfg)

    def test_refreshed_reward(self, world: World, tmp_path: Path) -> None:
        run = self.fit(world, tmp_path, "reward.refresh=true", "policy.rounds=2")
        judges = {
            state: [name for name in manifest["key"] if name.endswith("_model")]
            for state in ("zero_shot", "round_1", "round_2")
            for manifest in [json.loads((run / f"stages/fold_0/{state}/rewards/manifest.json").read_text())]
        }
        assert judges == {  # the answers that round 2 learns from are judged by a reranker that round 0 has taught
            "zero_shot": ["stage fold_0/zero_shot/reward_model"],
            "round_1": ["stage fold_0/zero_shot/refreshed_model"],
            "round_2": ["stage fold_0/round_1/refreshed_model"],
        }
        first, again = (
            load_file(run / f"stages/fold_0/zero_shot/{kind}_model/folds.safetensors")
            for kind in ("reward", "refreshed")
        )
        assert torch.equal(first["fold_of"], again["fold_of"])
        assert not torch.equal(first["user_vectors"], again["user_vectors"])

    def test_best_of_n_by_supervised_training(self, world: World, tmp_path: Path) -> None:
        run = self.fit(world, tmp_path / "dpo", "evaluation.controls.best_of_n=true")
        supervised = self.fit(world, tmp_path / "supervised", "policy.loss=sft")
        assert rows(run) == {"best_of_n", "round_1"}
        control, tuned, same = (
            (one / f"stages/fold_0/{state}/policy/adapter/adapter_model.safetensors").read_bytes()
            for one, state in ((run, "best_of_n"), (run, "round_1"), (supervised, "round_1"))
        )
        assert control == same  # the same pairs, the same loss, the same seed
        assert control != tuned

    def test_no_rounds(self, world: World, tmp_path: Path) -> None:
        run = self.fit(world, tmp_path, "policy.rounds=0", bare=False)
        assert rows(run) == {*CONTROLS, "shuffled", "shuffled_both", "zero_shot", "zero_shot_both"}
        assert not (run / "adapter").exists()
        assert json.loads((run / "reranker/row.json").read_text())["row"] == "zero_shot"
        assert any(pl.read_parquet(run / "ranked.parquet")["knowledge"])

    @pytest.mark.parametrize(
        "control", ["no_knowledge", "item_only", "history_shuffled", "history_only", "shuffled", "zero_shot"]
    )
    def test_one_control_alone(self, control: str, world: World, tmp_path: Path) -> None:
        run = self.fit(world, tmp_path, "policy.rounds=0", f"evaluation.controls.{control}=true")
        assert rows(run) == {control}

    def test_own_callback_takes_part(self, world: World, tmp_path: Path) -> None:
        target = "lightning.pytorch.callbacks.LearningRateMonitor"
        run = self.fit(world, tmp_path, f"+callbacks.mine._target_={target}")
        assert any("AdamW" in tag for tag in tags(run / "tensorboard/fold_0")["scalars"])
