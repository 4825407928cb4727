"""A judge on plain tensors, in verl's trainer: a table of words whose mean is two scores; a teacher of its own ids."""

from pathlib import Path

import torch
from torch import nn

TEACHER = {0: [40, 41], 1: [45]}  # ids by record


class PlainJudge:
    def __init__(self, words, lr):
        torch.manual_seed(0)
        self.table = nn.Embedding(words, 2)
        self.optimizer = torch.optim.SGD(self.table.parameters(), lr=lr)
        self.seen = []

    def score(self, ids):
        return self.table(torch.tensor(ids)).mean(0)

    def __call__(self, *, completion_ids, record, log_metric):
        self.seen = list(record)
        student = torch.stack([self.score(ids) for ids in completion_ids])
        teacher = torch.stack([self.score(TEACHER[number]) for number in record])
        loss = nn.functional.softplus(student - teacher).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        log_metric("discriminator/loss", loss.item())
        perception, reasoning = student.detach().unbind(1)
        return {"perception": perception.tolist(), "reasoning": reasoning.tolist(), "format_valid": [1.0] * len(record)}

    def save(self, folder):
        Path(folder).mkdir(parents=True)
        torch.save(self.table.state_dict(), Path(folder) / "table.pt")

    def load(self, folder):
        self.table.load_state_dict(torch.load(Path(folder) / "table.pt"))
