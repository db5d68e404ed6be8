"""The trained reranker as reward model: how well would it rank with this answer as the user's knowledge?

METHODS 1.1: the reward of an answer is the metric of the user's lists, mean over those lists, with the
answer's vector in the place of the user's. Rewards on lists the reranker was trained on saturate; `cross_fit`
scores every user with a reranker that never saw that user. It did not choose its epoch by the users whom it judges
either: that would flatter the very texts it was chosen with, and no later text could gain as much as it is worth.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lit_rec import distributed
from lit_rec.data.lists import ListSet
from lit_rec.errors import UserError
from lit_rec.extensions import find, is_path
from lit_rec.metrics.ranking import Convention, ranking_metrics
from lit_rec.rerankers.features import ITEM, USER
from lit_rec.rerankers.losses import list_log_likelihood
from lit_rec.rerankers.module import RerankerModule, require_rows
from lit_rec.rerankers.training import FittedReranker, Selection, fit_reranker

Values = Callable[[Tensor, Tensor, Tensor, int], Tensor]  # logits, labels, mask [n, C] and k -> values [n]
Reward = Literal["ndcg", "map", "soft"] | str | Values  # or the path of a function


@torch.no_grad()
def score_lists(
    module: RerankerModule,
    lists: ListSet,
    index: Tensor,
    *,
    user_vectors: Tensor | None = None,
    batch_size: int = 8192,
) -> Tensor:
    """Score lists, every user and item adapted once.

    Args:
        module: a reranker; its mode is left as it was.
        lists: the candidate lists.
        index: [n] which of them.
        user_vectors: [U, d_u] knowledge of the users; None: that which the module holds.
        batch_size: lists at a time, which bounds the memory.

    Returns:
        Logits [n, C] on the CPU; those of padding mean nothing.

    Raises:
        UserError: when a candidate is scored with nan, or a user has no vector.
    """
    users, row = lists.user[index].unique(return_inverse=True)
    known = module.knowledge.user_vectors if user_vectors is None and USER in module.knowledge.towers else user_vectors
    require_rows(known, int(users[-1]) + 1 if len(users) else 0, "user_vectors")
    with _evaluating(module):
        if user_vectors is None:
            adapted = module.knowledge.adapt_rows(USER, users.to(module.device))
        else:
            adapted = module.knowledge.adapt(USER, user_vectors[users].float().to(module.device))
        scored = [logits for _, logits in _score_pairs(module, lists, index, adapted, row, batch_size)]
    return torch.cat([lists.labels.new_zeros(0, lists.items.shape[1]), *scored])


@torch.no_grad()
def answer_rewards(
    module: RerankerModule,
    lists: ListSet,
    answer_vectors: Tensor,
    answer_user: Tensor,
    *,
    reward: Reward = "ndcg",
    k: int = 5,
    convention: Convention = "standard",
    batch_size: int = 8192,
) -> Tensor:
    """Reward of every answer: the mean over its user's lists of the metric, in one pass.

    The items are adapted once, all answers together, and all (answer, list of its user) pairs are scored in
    batches.

    Args:
        module: the reward model; it must have been trained with user vectors of the answers' width.
        lists: the candidate lists; every list of an answer's user counts.
        answer_vectors: [M, d_u] encoded answers.
        answer_user: [M] the user row of each answer.
        reward: `ndcg` or `map` at k, or `soft`: the mean log-probability of a list's positives under the
            softmax of its scores (over the temperature, where the loss had one), which tells apart answers that rank
            alike. A list without positives counts 0 in all three. Or a function, or its path,
            `callbacks.mine.my_reward`: (logits [n, C], labels [n, C], mask [n, C], k) -> values [n].
        k: cut-off.
        convention: of the average precision.
        batch_size: pairs at a time, which bounds the memory.

    Returns:
        [M] float on the CPU; nan for an answer whose user has no list, since nothing is known about it.

    Raises:
        UserError: when the reranker has no user knowledge, or answers and users do not fit, when it scores a candidate
            with nan, or when a function of your own gives anything but a finite number per list.
    """
    own = None if isinstance(reward, str) else reward
    if own is None and reward not in ("ndcg", "map", "soft") and not is_path(reward):
        raise UserError(
            f"There is no reward {reward!r}.",
            fix="Write ndcg, map or soft, or the path of your own: callbacks.mine.my_reward.",
            where="reward.metric",
        )
    if isinstance(reward, str) and is_path(reward):
        own = find(reward, "reward.metric")
    if USER not in module.knowledge.towers:
        raise UserError(
            "This reranker reads no user knowledge, so every answer would get the same reward.",
            fix="Train the reward model with user vectors.",
        )
    width = module.knowledge.user_vectors.shape[1]
    if answer_vectors.shape != (len(answer_user), width):
        raise UserError(
            f"{len(answer_user)} answers need vectors [{len(answer_user)}, {width}], not {list(answer_vectors.shape)}.",
            why="The reward model knows another encoder, or vectors and users do not belong together.",
        )
    answer, index = _pairs(lists, answer_user)
    with _evaluating(module):
        step = _at_a_time(module, batch_size)
        adapted = torch.cat([module.knowledge.adapt(USER, v.to(module.device)) for v in answer_vectors.split(step)])
        total = torch.zeros(len(answer_user), dtype=torch.float64)
        for part, logits in _score_pairs(module, lists, index, adapted, answer, batch_size):
            labels, mask = lists.labels[index[part]], lists.items[index[part]] > 0
            if own is not None:
                values = _checked(own(logits, labels, mask, k), str(reward), len(logits))
            elif reward == "soft":
                values = list_log_likelihood(logits / module.score_temperature, labels, mask)
            else:
                values = ranking_metrics(logits, labels, mask, (k,), convention)[f"{reward}@{k}"]
            total.index_add_(0, answer[part], values.double())
    return (total / answer.bincount(minlength=len(answer_user))).float()


@dataclass
class CrossFit:
    """Rerankers over user folds.

    Attributes:
        fitted: one reranker per fold; reranker f never saw the users of fold f.
        fold_of: [U] the fold of each training user, -1 for all other users, whom no reranker was trained on.
    """

    fitted: list[FittedReranker]
    fold_of: Tensor

    def reranker_of(self, users: Tensor) -> Tensor:
        """Return which reranker judges each user [N]; users outside all folds take turns."""
        return torch.where(self.fold_of[users] < 0, _turn(users, len(self.fitted)), self.fold_of[users])

    def answer_logits(self, lists: ListSet, answer_vectors: Tensor, answer_user: Tensor) -> tuple[Tensor, Tensor]:
        """Lists [n] of ONE user and their logits [n, C], with an answer [1, d_u] as the knowledge of that user [1]."""
        module = self.fitted[int(self.reranker_of(answer_user))].module
        answer, index = _pairs(lists, answer_user)
        with torch.no_grad(), _evaluating(module):
            adapted = module.knowledge.adapt(USER, answer_vectors.to(module.device))
            return index, torch.cat([found for _, found in _score_pairs(module, lists, index, adapted, answer, 8192)])

    def answer_rewards(self, lists: ListSet, answer_vectors: Tensor, answer_user: Tensor, **arguments: Any) -> Tensor:
        """Reward answers as the function of that name does, each by a reranker that never saw its user."""
        judge = self.reranker_of(answer_user)
        rewards = torch.full((len(answer_user),), torch.nan)
        for number in judge.unique().tolist():
            mine = (judge == number).nonzero().squeeze(1)
            module = self.fitted[number].module
            rewards[mine] = answer_rewards(module, lists, answer_vectors[mine], answer_user[mine], **arguments)
        return rewards


def cross_fit(
    *,
    lists: ListSet,
    train_users: Tensor,
    validation_users: Tensor | None = None,
    folds: int = 5,
    seed: int = 1,
    selection: Selection = "validation",
    health: Callable[[], Callback] | None = None,
    **fit_arguments: Any,
) -> CrossFit:
    """Train one reranker per user fold, each without that fold's users.

    Args:
        lists: the candidate lists of all users.
        train_users: user rows to divide into folds.
        validation_users: user rows that choose the epochs, each in all folds but the one that judges it.
        folds: number of folds. 1 is the paper's own way: one reranker, trained on the users it judges, but for a tenth
            of them who choose its epoch; the validation users are judged alone.
        seed: of the folds and of the rerankers.
        selection: how `fit_reranker` chooses the epoch. Under `validation`, a reranker that would have nobody to choose
            by (a single validation user, whom it judges) is left as it is in its last epoch.
        health: makes a callback that looks after one fit.
        **fit_arguments: the other arguments of `fit_reranker`.

    Raises:
        UserError: when there are fewer users than folds.
    """
    if not 1 <= folds <= len(train_users):
        raise UserError(f"{len(train_users)} training users cannot make {folds} folds.", where="reward.folds")
    shuffled = train_users[torch.randperm(len(train_users), generator=torch.Generator().manual_seed(seed))]
    fold_of = torch.full((len(lists.history_items),), -1)
    fold_of[shuffled] = torch.arange(len(shuffled)) % folds

    def fit(fold: int) -> FittedReranker:
        seen = train_users[fold_of[train_users] != fold] if folds > 1 else train_users
        choosing, how = validation_users, selection
        if selection == "validation" and validation_users is not None and len(lists.of_users(validation_users)):
            choosing = _others(validation_users, fold, folds) if folds > 1 else _tenth(shuffled, lists)
            seen = seen[~torch.isin(seen, choosing)]
            how = "validation" if len(lists.of_users(choosing)) else "last"
        callbacks = [health()] if health else []
        people: dict[str, Any] = {"train_users": seen, "validation_users": choosing}
        return fit_reranker(
            lists=lists, seed=seed + fold, selection=how, callbacks=callbacks, **people, **fit_arguments
        )

    return CrossFit(distributed.divide([partial(fit, fold) for fold in range(folds)]), fold_of)


def _turn(users: Tensor, folds: int) -> Tensor:
    """Which reranker judges each user [N] whom none was trained on."""
    return users % folds


def _others(validation_users: Tensor, fold: int, folds: int) -> Tensor:
    """The validation users whom another reranker judges."""
    return validation_users[_turn(validation_users, folds) != fold]


def _tenth(shuffled: Tensor, lists: ListSet) -> Tensor:
    """A tenth of the users who have lists, from two users up at least one.

    From the end: `pairs.users` draws by the same seed from the beginning.
    """
    known = shuffled[torch.isin(shuffled, lists.user)]
    return known[len(known) - (-(-len(known) // 10) if len(known) > 1 else 0) :]


def _checked(values: Any, path: str, many: int) -> Tensor:
    """What a reward function of your own has given for so many lists, if that can be used."""
    shaped = isinstance(values, Tensor) and values.shape == (many,) and not values.is_complex()
    if shaped and bool(values.isfinite().all()):
        return values.detach().cpu()
    if shaped:
        found = f"{int((~values.isfinite()).sum())} of {many} values that are nan or infinite"
    else:
        found = f"a tensor {list(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
    raise UserError(
        f"{path} is no reward that can be used.",
        where="config key reward.metric",
        why=f"for {many} lists it gave {found}",
        fix="Return a tensor [n] with one finite number per list: 0, not nan, where a list says nothing.",
    )


def _pairs(lists: ListSet, answer_user: Tensor) -> tuple[Tensor, Tensor]:
    """Pair every answer with all lists of its user: answer [P] and list index [P]."""
    by_user = lists.user.argsort(stable=True)
    owners = lists.user[by_user]
    start = torch.searchsorted(owners, answer_user)
    count = torch.searchsorted(owners, answer_user, right=True) - start
    answer = torch.arange(len(answer_user)).repeat_interleave(count)
    within = torch.arange(len(answer)) - (count.cumsum(0) - count)[answer]
    return answer, by_user[start[answer] + within]


def _score_pairs(
    module: RerankerModule, lists: ListSet, index: Tensor, adapted: Tensor, row: Tensor, batch_size: int
) -> Iterator[tuple[slice, Tensor]]:
    """Score list index[p] with the adapted user knowledge adapted[row[p]], for every pair p.

    Yields:
        Consecutive slices of the pairs and their logits [n, C] on the CPU.
    """
    device = module.device
    occurring = lists.items[index.unique()].unique().to(device)
    by_item = module.knowledge.adapt_rows(ITEM, occurring)
    item_knowledge = by_item.new_zeros(module.hparams["n_items"] + 1, by_item.shape[1])
    item_knowledge[occurring] = by_item
    step = _at_a_time(module, batch_size)
    for at in range(0, len(index), step):
        part = slice(at, at + step)
        items = lists.items[index[part]].to(device)
        history: Sequence[Tensor] = ()
        if module.uses_history:
            users = lists.user[index[part]]
            history = (lists.history_items[users].to(device), lists.history_ratings[users].to(device))
        logits = module.score(items, adapted[row[part].to(device)], item_knowledge[items], *history)
        logits = logits.float().cpu()
        nan = (logits.isnan() & (lists.items[index[part]] > 0)).any(dim=1)
        if nan.any():
            raise _no_numbers(module, int(lists.user[index[part]][nan][0]), int(nan.sum()), len(nan))
        yield part, logits


def _no_numbers(module: RerankerModule, user: int, lists: int, of: int) -> UserError:
    """A list with a nan among its scores has no order; sorted all the same, it would look like any other."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    spoilt = [name for name, t in tensors if t.is_floating_point() and not t.isfinite().all()]
    return UserError(
        f"The reranker {module.hparams['architecture']!r} scores candidates with nan, so it ranks nothing.",
        where=f"{lists} of {of} lists, the first one of user row {user}",
        why=f"{spoilt[0]} holds values that are no finite numbers"
        if spoilt
        else "its weights and the knowledge it holds are finite: its forward pass goes wrong, or the vectors given",
        fix="A smaller learning rate (reranker.lr), 32-bit precision, or vectors without nan; in a reranker of your "
        "own look for divisions by 0 and for padding.",
    )


def _at_a_time(module: RerankerModule, limit: int) -> int:
    """Rows per pass: on a CPU what a pass computes shall stay in the cache, 1.2 (DLCM) to 1.7 (PRM) times as fast."""
    return min(limit, 1024) if module.device.type == "cpu" else limit


class _evaluating:
    """Put a module in evaluation mode for a while."""

    def __init__(self, module: RerankerModule) -> None:
        self.module, self.was = module, module.training

    def __enter__(self) -> None:
        self.module.eval()

    def __exit__(self, *_: object) -> None:
        self.module.train(self.was)
