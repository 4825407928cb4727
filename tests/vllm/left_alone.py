"""A trainer that starts an engine and waits to be killed: `python -m tests.vllm.left_alone MODEL`."""

import sys
import time

import torch

from prism_fast.config import VLLMConfig
from prism_fast.data.chat import Chat
from prism_fast.models.policy import Policy
from prism_fast.steps.sampler_vllm import VLLMEngine
from tests.vllm.engine import SETTINGS


def main(folder):
    torch.set_num_threads(1)
    chat = Chat.load(folder)
    policy = Policy.load(folder, forbidden=chat.forbidden_ids, words=chat.vocab_size)
    engine = VLLMEngine(folder, policy, chat, VLLMConfig(**SETTINGS), longest=1024)
    (core,) = engine.engine.engine_core.resources.engine_manager.processes
    print("core", core.pid, flush=True)
    time.sleep(600)


if __name__ == "__main__":
    main(sys.argv[1])
