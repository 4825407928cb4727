"""verl's commands of docs/embedding.md: verl's own configuration takes every word of them, and the trainer it."""

import hydra
import pytest
from verl.trainer.ppo.v1 import get_trainer_cls

from tests.embed.page import block, command
from tests.embed.verl.played import CONFIG


@pytest.mark.parametrize("number", [0, 1])
def test_the_pages_overrides_are_verls(number):
    words = command(block("verl", number), "python -m verl.trainer.main_ppo ")
    assert len(words) >= 2
    with hydra.initialize_config_dir(config_dir=CONFIG, version_base=None):
        config = hydra.compose("ppo_trainer", overrides=words)
    if number == 0:
        model = config.actor_rollout_ref.model
        assert model.use_fused_kernels and model.fused_kernel_options.impl_backend == "torch"
    else:
        trainer = get_trainer_cls(config.trainer.v1.trainer_mode)(config)
        assert trainer._prism_settings.rule == {"rule": "align", "format_penalty": 1.5}
