"""verl's synchronous trainer with its GPU workers played: what makes it, and a step of it over verl's own queue."""

from pathlib import Path

import hydra
import torch
import transfer_queue as tq
import verl
from verl.trainer.ppo.v1 import get_trainer_cls
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from prism_kernels import multi_reward_advantage

CONFIG = str(Path(verl.__file__).parent / "trainer" / "config")
PRISM = ["trainer.v1.trainer_mode=prism", "algorithm.adv_estimator=prism"]
LENGTHS = {"a_0_0": 3, "a_0_1": 4, "a_1_0": 5, "b_0_0": 2, "b_1_0": 4}  # a's first session gave two rows
SCORES = {"a_0_1": (0.5, 1.0, 1.0), "a_1_0": (-0.2, 0.3, 1.0), "b_0_0": (2.0, 0.1, 0.0), "b_1_0": (1.0, 0.2, 1.0)}


def composed(*overrides):
    with hydra.initialize_config_dir(config_dir=CONFIG, version_base=None):
        return hydra.compose("ppo_trainer", overrides=[*PRISM, *overrides])


class Workers:
    """The worker group, the replicas and the reward loop of a trainer, as far as a step calls them."""

    _dispatch_info = {"actor": [0]}  # noqa: RUF012
    reward_loop_worker_handles = ()
    eos_token_id = 2

    def __init__(self):
        self.updates = []

    def sleep_replicas(self):
        pass

    def update_actor(self, batch):
        fields = ["advantages", "response_mask"]
        found = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
        self.updates.append((list(batch.keys), found))
        return {"metrics": {"mfu": [0.5], "pg_loss": [0.1]}}

    def save_checkpoint(self, path, *args, **options):
        Path(path).mkdir(parents=True)

    def load_checkpoint(self, *args, **options):
        pass

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def made(*overrides):
    """The trainer that main_ppo would make, after a set-up that played its workers."""
    sizes = [
        "data.train_batch_size=2",
        "actor_rollout_ref.rollout.n=2",
        "actor_rollout_ref.actor.ppo_mini_batch_size=3",
    ]
    bypass = ["algorithm.rollout_correction.bypass_mode=True"]
    trainer = get_trainer_cls("prism")(composed(*sizes, *bypass, *overrides))
    trainer.workers = Workers()
    for name in ("actor_rollout_wg", "checkpoint_manager", "reward_loop_manager", "tokenizer", "train_dataloader"):
        setattr(trainer, name, trainer.workers)
    trainer.ref_in_actor, trainer.curr_step_profile, trainer.global_steps, trainer.timing_raw = False, False, 1, {}
    trainer.distillation_config = None
    return trainer


def ids_of(key):
    """The tokens of a row's response."""
    uid, session, _ = key.split("_")
    return torch.arange(LENGTHS[key]) + 10 * (uid == "b") + 20 * int(session)


def unlogged(name, value):
    pass


def roll_out(scores=None, ids_of=ids_of):
    """Two prompts of two responses, as verl's agent loop puts them into the queue."""
    tags = [{"is_prompt": True, "status": "finished", "global_steps": 1}] * 2
    tq.kv_batch_put(keys=["a", "b"], partition_id="train", tags=tags)
    rows = []
    lengths = []
    for key in LENGTHS:
        uid, session, _ = key.split("_")
        ids = ids_of(key)
        length = len(ids)
        lengths.append(length)
        extra = {"min_global_steps": 1, "max_global_steps": 1}
        if scores is not None:
            given = dict(zip(("perception", "reasoning", "format_valid"), scores.get(key, (9.0, 9.0, 1.0))))
            extra["reward_extra_info"] = given
        row = {
            "uid": uid, "session_id": int(session), "index": "ab".index(uid), "prompts": torch.tensor([1, 2, 3]),
            "responses": ids, "input_ids": torch.cat([torch.tensor([1, 2, 3]), ids]),
            "position_ids": torch.arange(3 + length), "response_mask": torch.ones(length, dtype=torch.int64),
            "loss_mask": torch.ones(length, dtype=torch.int64), "rm_scores": torch.zeros(length),
            "rollout_log_probs": -torch.ones(length), "num_turns": 1, "extra_fields": extra,
        }  # fmt: skip
        rows.append(row)
    tags = [{"status": "success", "seq_len": 3 + n, "global_steps": 1, "response_len": n} for n in lengths]
    fields = list_of_dict_to_tensordict(rows)
    tq.kv_batch_put(keys=list(LENGTHS), partition_id="train", fields=fields, tags=tags)


def step(trainer):
    """verl's step -> its metrics, and the advantages that the actor was updated with, by key."""
    metrics = {}
    batch = trainer._step_once(metrics, trainer.timing_raw, 2)
    keys, found = trainer.workers.updates.pop()
    rows = dict(zip(keys, found["advantages"].unbind()))
    tq.kv_clear(keys=batch.keys, partition_id="train")
    return metrics, rows


def expected(scores, **rule):
    """Advantages by session of {key: (perception, reasoning, format_valid)}."""
    perception, reasoning, valid = (torch.tensor(values) for values in zip(*scores.values()))
    groups = torch.tensor([key[0] == "b" for key in scores]).long()
    found = multi_reward_advantage(perception, reasoning, groups, format_valid=valid > 0, **rule)
    return {key.rpartition("_")[0]: value for key, value in zip(scores, found)}
