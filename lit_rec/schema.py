"""Every configuration key of the recipes: its type, its default and what it means.

Hydra composes the YAML files over these dataclasses, so a misspelt key or a wrong type is an error before anything
runs. This module imports nothing heavy: `show-config` and `--help` must stay fast.
"""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class RunConfig:
    """Where a run keeps everything it makes."""

    dir: str = "runs/${name}"  # the run folder; a second start with the same folder resumes
    cache: str = ""  # downloaded and converted assets; empty: LIT_REC_CACHE or ~/.cache/lit_rec
    answers: str = "${run.dir}/answers"  # the store of LLM answers; name a shared folder to reuse it between runs


@dataclass
class ListsConfig:
    """How candidate lists are made from ratings (KAR's protocol or the strict one)."""

    protocol: str = "strict"  # strict | kar
    history: int = 30  # at most this many first interactions go to the prompt, and are never targets
    real: int = 4  # interactions per list
    size: int = 10  # candidates per list: the real ones and sampled negatives
    negatives: str = "uniform"  # uniform | popularity | retrieved
    initial_ranker: str | None = None  # null (shuffled) | popularity | bpr
    time_zone: str = "UTC"  # whose calendar protocol kar cuts time by
    item_core: int = 0  # keep items with at least this many ratings (0: all)


@dataclass
class ControlsConfig:
    """Control rows of the result table; each can be switched off."""

    no_knowledge: bool = True
    item_only: bool = True
    history_only: bool = True
    history_shuffled: bool = False  # somebody else's history: what having any user vector is worth
    shuffled: bool = True
    zero_shot: bool = True
    random_pairs: bool = True
    best_of_n: bool = False


@dataclass
class EvaluationConfig:
    """Who is held out, and what is measured on them."""

    folds: int = 1  # 1: one split; 5: five complete runs of the loop, every user a test user once
    only_folds: list[int] | None = None  # run just these folds (a cluster array job); null: all
    test: float = 0.1  # share of users held out for the final numbers (folds: 1)
    validation: float = 0.1  # share of users that every choice is made on
    seeds: int = 1  # rerankers trained per row, with different seeds
    ks: list[int] = field(default_factory=lambda: [1, 3, 5, 10])
    inputs: list[str] = field(default_factory=lambda: ["answer", "both"])  # answer | kar | both, side by side
    selection: str = "validation"  # validation | last | test_kar: how the epoch of a row's reranker is chosen
    rounds: bool = True  # measure every round, not only the last
    controls: ControlsConfig = field(default_factory=ControlsConfig)


@dataclass
class PromptConfig:
    """What the LLM is asked."""

    template: str = "preferences_v1"  # a name in lit_rec/llm/templates.yaml
    history: int = 30  # at most this many of the history's last interactions are shown
    factors: str = ""  # what to consider; empty: the template's own list for the data set's item noun


@dataclass
class WheelConfig:
    """A model that travels inside a Python wheel."""

    package: str = MISSING
    version: str = MISSING
    sha256: str = MISSING
    member: str = MISSING  # file or folder inside the wheel


@dataclass
class ServerConfig:
    """An OpenAI-compatible server that answers instead of a model in process."""

    model: str = MISSING  # the name the server knows the model by
    urls: list[str] = MISSING  # base URLs of one or more replicas, such as http://localhost:8000/v1
    revision: str = ""  # part of the answers' keys: change it when the server's model changes under the same name
    key_env: str | None = "OPENAI_API_KEY"  # environment variable that holds the key; null: none is sent
    concurrency: int = 16  # requests under way at a time, over all URLs
    timeout: float = 120.0  # seconds
    retries: int = 6
    run_folder: str | None = None  # the run folder as servers see it, which load adapters from it; null: the same path


@dataclass
class LLMConfig:
    """The language model, and how it is sampled."""

    name: str = MISSING
    hub: str | None = None  # a Hugging Face repository or a local folder
    revision: str | None = None  # commit or tag of the repository
    wheel: WheelConfig | None = None
    server: ServerConfig | None = None  # servers write the answers (Re2LLM: and rank); DPO trains in process
    dtype: str = "auto"  # auto: bfloat16 where the processor computes in it, else float32
    quantization: str | None = None  # null | nf4 (bitsandbytes 4 bit, QLoRA)
    batch_size: int = 32  # answers written at a time
    max_new_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 0.95


@dataclass
class EncoderConfig:
    """The text encoder that turns knowledge into vectors."""

    name: str = MISSING
    hub: str | None = None
    revision: str | None = None
    wheel: WheelConfig | None = None
    batch_size: int = 32
    max_tokens: int = 512  # longer texts are cut into chunks of this many tokens and their means averaged
    dtype: str = "auto"


@dataclass
class KnowledgeConfig:
    """How texts become the reranker's knowledge."""

    encode: str = "answer"  # answer | kar (history + answer as one text) | both (two vectors side by side)
    item_text: str = "attributes"  # attributes (title and attributes) | llm (the LLM describes every item)
    item_tokens: int = 64  # new tokens of an item description


@dataclass
class RerankerConfig:
    """The reranker and its training."""

    architecture: str = "dlcm"  # dlcm | prm | setrank | mir, or your own: callbacks.mine.MyReranker
    args: dict[str, Any] = field(default_factory=dict)  # keyword arguments of the architecture
    loss: str = "default"  # the architecture's own in KAR's code, or see lit_rec/rerankers/losses.py
    temperature: float = 0.03
    lr: float = 1e-3
    batch_size: int = 64
    max_epochs: int = 50
    patience: int = 5
    metric: str = "ndcg@5"  # user mean on validation users decides the epoch


@dataclass
class RewardConfig:
    """How an answer is scored."""

    metric: str = "ndcg"  # ndcg | map | soft (list log-likelihood), or your own: callbacks.mine.my_reward
    k: int = 5
    convention: str = "standard"  # standard | kar
    folds: int = 5  # cross-fit: a user is scored by a reranker that never saw that user; 1: as in the paper
    refresh: bool = False  # judge the answers after a round by a reranker retrained on the best ones before it


@dataclass
class PairsConfig:
    """How rewards become preference pairs."""

    samples: int = 10  # answers per training user and round
    users: int | None = None  # ask for so many of so many training users, drawn by the seed; null: of all
    rule: str = "best_worst"  # best_worst | random
    min_gap: float = 0.0  # a pair needs a reward gap above this; equal rewards (gap up to 1e-5) never make one
    max_pairs: int | None = None  # keep the widest gaps; null: all


@dataclass
class LoraConfig:
    """The trained adapter."""

    r: int = 8
    alpha: int = 16
    dropout: float = 0.0
    targets: str = "all-linear"


@dataclass
class PolicyConfig:
    """Preference optimisation of the LLM."""

    rounds: int = 2
    epochs: int = 3
    batch_size: int = 2  # pairs per step
    accumulate: int = 8  # steps per optimiser update
    lr: float = 5e-5
    weight_decay: float = 0.0
    warmup: float = 0.0  # share of a round's updates with rising learning rate
    schedule: str = "linear"  # linear | constant
    gradient_clip: float = 1.0
    beta: float = 0.01
    loss: str = "sigmoid"  # sigmoid | sigmoid_norm (per token) | ipo | hinge | robust | sft (on the chosen answer)
    label_smoothing: float = 0.0
    reference: str = "base"  # base | previous
    max_length: int = 2048  # prompt + answer tokens; longer prompts lose their start
    keep_optimizer: bool = False  # carry the optimiser's moments from round to round
    gradient_checkpointing: bool = False
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass
class TrainerConfig:
    """The Lightning Trainer."""

    accelerator: str = "auto"
    devices: int = 1  # processes on this machine, each with its GPU (-1: all); torchrun and srun start their own
    strategy: str = "ddp"  # ddp | fsdp (the LLM's frozen weights are cut among the processes)
    precision: str = "auto"  # auto: bf16-mixed where the processor computes in it, else 32-true
    threads: int | None = None  # CPU threads; null: as many as the process may use
    # stop | skip: what becomes of an update whose loss is no number or whose gradient explodes; it is never made
    bad_updates: str = "stop"


@dataclass
class LoggingConfig:
    """Where curves go."""

    to: list[str] = field(default_factory=lambda: ["tensorboard"])  # tensorboard | csv | wandb | mlflow, side by side
    project: str = "lit_rec"  # W&B project, MLflow experiment
    mlflow_uri: str = "file:${run.dir}/mlruns"  # a tracking server, or a folder
    offline: bool = False  # W&B: write below run.dir/wandb, to be sent later (`wandb sync`)


@dataclass
class RLRFConfig:
    """The RLRF4Rec recipe, whole."""

    recipe: str = "rlrf"
    name: str = MISSING
    seed: int = 1
    users: int | None = None  # work on a random sample of this many users; null: all
    run: RunConfig = field(default_factory=RunConfig)
    data: dict[str, Any] = field(default_factory=dict)  # a reader: _target_ and its arguments
    lists: ListsConfig = field(default_factory=ListsConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    llm: LLMConfig = field(default_factory=LLMConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    knowledge: KnowledgeConfig = field(default_factory=KnowledgeConfig)
    reranker: RerankerConfig = field(default_factory=RerankerConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    callbacks: dict[str, Any] = field(default_factory=dict)  # more callbacks for the policy's Trainer


@dataclass
class RankingConfig:
    """How the frozen LLM ranks the candidates of a session."""

    method: str = "likelihood"  # likelihood (of the candidates' titles) | generate (a numbered list)
    templates: list[str] = field(default_factory=lambda: ["next_v1"])  # below `ranking:` in templates.yaml
    priors: list[float] = field(default_factory=lambda: [0.0])  # weight of the title's likelihood without the session
    lengths: list[float] = field(default_factory=lambda: [0.0])  # 0: sum over a title's tokens, 1: mean
    # where several templates, priors or lengths are given, the best is used throughout: on this many sessions, those of
    # validation first, then those of training
    choose_on: int = 300
    years: bool = True  # write titles with their year where it is known
    history: int = 10  # at most this many of the session's last items are shown
    top: int = 10  # length of the list
    # likelihood: with a hint only so many candidates are scored again, the best without it; null: all of them
    shortlist: int | None = None
    rotations: int = 1  # orders of the candidates that scores are averaged over, where the prompt shows them
    max_new_tokens: int = 200  # generate: longest list
    batch_tokens: int = 4096  # likelihood: tokens of a forward pass, about


@dataclass
class HintWritingConfig:
    """How hints are written and which are kept."""

    template: str = "reflect_v1"  # below `reflection:` in templates.yaml
    sessions: int = 30  # error sessions (unified: users) reflected on per round
    hints: int = 3  # hints asked for per conversation
    max_new_tokens: int = 128  # per turn
    temperature: float = 0.7
    top_p: float = 0.95
    tried: int = 60  # hints that are tried on sessions per round
    others: int = 10  # further sessions each hint is tried on
    min_gain: float = 0.0  # a kept hint gains more than this on them, on average
    similarity: float = 0.9  # cosine of embeddings from which two hints are the same
    ask_redundancy: bool = True  # ask the LLM too whether a hint is new
    size: int = 20  # hints in the base after the last round


@dataclass
class ReflectionConfig(HintWritingConfig):
    """What is reflected on, too."""

    error_rank: int = 10  # a session is an error when its target ranks below this


@dataclass
class UserReflectionConfig(HintWritingConfig):
    """Hints on describing users."""

    template: str = "describe_v1"


@dataclass
class PolicyGradientConfig:
    """How an agent learns to pick a hint."""

    rewards: str = "matrix"  # matrix (every hint is asked for every training session first) | online (when tried)
    epochs: int = 30  # passes over the training sessions per round
    batch_size: int = 32  # sessions per rollout
    update_epochs: int = 10  # passes over a rollout
    minibatches: int = 1
    lr: float = 3e-4
    clip: float = 0.05
    entropy_coef: float = 0.1  # with less, hints of a later round are hardly tried
    value_coef: float = 0.5
    max_grad_norm: float = 0.5
    target_kl: float | None = None
    weight_decay: float = 0.0
    samples_per_session: int = 1
    exploration: float = 0.0
    state_noise: float = 0.0
    normalize_advantage: bool = True
    reward_scale: float = 1.0
    hidden: int = 64
    rank: int = 32


@dataclass
class AgentConfig(PolicyGradientConfig):
    """The agent that picks a hint for each session."""

    reward: str = "ndcg"  # ndcg | mrr | soft (log-probability of the target among the candidates)
    k: int | None = None  # ranks beyond k earn nothing; null: every rank counts (generate: every place of a list)
    rounds: int = 1  # reflection and training, again and again
    seeds: int = 1  # agents of different seeds; the first leads the reflection, the others learn the same bases in turn


@dataclass
class UserAgentConfig(PolicyGradientConfig):
    """Who picks the hint for each user's description; the reward is that of `reward:`, over the text without a hint."""

    # ppo | full_information (learns from every reward) | best_fixed (the best on training users, for all) | random |
    # none (no hints: the recipe rlrf)
    pick: str = "ppo"


@dataclass
class SessionRowsConfig:
    """Rows of the result table; each can be switched off."""

    random: bool = True
    popularity: bool = True
    item_knn: bool = True
    sasrec: bool = True
    empty_prompt: bool = True
    no_hint: bool = True
    random_hint: bool = True
    best_fixed_hint: bool = True
    ppo: bool = True
    full_information: bool = True
    oracle: bool = True


@dataclass
class SessionEvaluationConfig:
    """What is measured on the test sessions."""

    ks: list[int] = field(default_factory=lambda: [5, 10])
    test: int | None = None  # a random sample of this many test sessions; null: all
    rows: SessionRowsConfig = field(default_factory=SessionRowsConfig)
    # ask the test sessions with every hint; false: with those that some row needs (no oracle; random_hint is one draw)
    matrix: bool = True
    sasrec: dict[str, Any] = field(default_factory=dict)  # keyword arguments of fit_sasrec


@dataclass
class Re2LLMConfig:
    """The Re2LLM recipe, whole."""

    recipe: str = "re2llm"
    name: str = MISSING
    seed: int = 1
    run: RunConfig = field(default_factory=RunConfig)
    data: dict[str, Any] = field(default_factory=dict)  # a source of sessions: _target_ and its arguments
    llm: LLMConfig = field(default_factory=LLMConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    ranking: RankingConfig = field(default_factory=RankingConfig)
    reflection: ReflectionConfig = field(default_factory=ReflectionConfig)
    agent: AgentConfig = field(default_factory=AgentConfig)
    evaluation: SessionEvaluationConfig = field(default_factory=SessionEvaluationConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    callbacks: dict[str, Any] = field(default_factory=dict)  # more callbacks for the agent's Trainer


@dataclass
class UnifiedConfig(RLRFConfig):
    """The unified recipe, whole: RLRF4Rec with hints, which an agent picks, in the prompts."""

    recipe: str = "unified"
    reflection: UserReflectionConfig = field(default_factory=UserReflectionConfig)
    agent: UserAgentConfig = field(default_factory=UserAgentConfig)
