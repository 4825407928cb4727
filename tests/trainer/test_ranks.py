"""What a process can tell of its place among others, a wrong environment in one line; which GPU is whose."""

import os
import socket

import pytest
import torch
import torch.distributed as dist

from prism_fast import cli, ranks
from prism_fast.records import DataError

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
SLURM = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}


def test_a_place_is_what_the_launcher_says():
    assert ranks.place({}) == ranks.ALONE
    assert ranks.place(TORCHRUN) == (1, 2, 1)
    assert ranks.place({"RANK": "0", "WORLD_SIZE": "1"}) == ranks.ALONE
    assert ranks.place(SLURM) == ranks.ALONE  # a shell in an allocation
    assert ranks.place({**SLURM, "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}) == (1, 2, 0)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"WORLD_SIZE": "two"}, r"RANK, WORLD_SIZE, LOCAL_RANK are \['1', 'two', '1'\], expected three numbers"),
        ({"WORLD_SIZE": ""}, "expected three numbers"),
        ({"RANK": "²"}, "expected three numbers"),
        ({"RANK": "-1"}, "expected three numbers"),
        ({"RANK": "2"}, "RANK = 2 of WORLD_SIZE = 2"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK = 0 of WORLD_SIZE = 0"),
        ({"MASTER_ADDR": ""}, "RANK is set and MASTER_ADDR is not"),
        ({"MASTER_PORT": ""}, "RANK is set and MASTER_PORT is not"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http', expected a number below 65536"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT is '99999', expected a number below 65536"),
    ],
)
def test_half_an_environment_is_refused(changes, says):
    with pytest.raises(DataError, match=says):
        ranks.place({**TORCHRUN, **changes})


def test_a_port_in_use_is_one_line(monkeypatch, capfd):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        for name, value in {**TORCHRUN, "RANK": "0", "MASTER_PORT": str(taken.getsockname()[1])}.items():
            monkeypatch.setenv(name, value)
        says = r"rank 0 of 2: does not reach .* take another MASTER_PORT"
        with pytest.raises(DataError, match=says), ranks.joined(timeout_minutes=0.05):
            pass
    assert capfd.readouterr().err == ""  # torch's own lines are dropped
    assert ranks.world() == 1 and not ranks.grouped()


def test_the_place_where_processes_meet_is_on_the_address_that_was_given_alone():
    with socket.socket(fileno=ranks._listening("127.0.0.1", 0, False)) as found:
        host, port = found.getsockname()
        assert host == "127.0.0.1" and found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        with pytest.raises(OSError, match="in use"):
            ranks._listening("127.0.0.1", port, False)
    assert ranks._listening("203.0.113.7", 0, False) is None  # of documentation: no machine has it
    assert ranks._interface("127.0.0.1", 1, False) == "lo"
    assert ranks._interface("no such host", 1, True) is None


def test_a_name_that_stands_for_this_machine_only_here_is_not_taken(monkeypatch):
    """As in /etc/hosts of many: others would not hear who listens at 127.0.1.1."""

    def found(host, port, **_):
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", found)
    assert ranks._listening("node1", 0, False) is None
    with socket.socket(fileno=ranks._listening("node1", 0, True)) as listening:
        assert listening.getsockname()[0] == "127.0.0.1"
    assert [ranks._means("127.0.1.1", host, False) for host in ("node1", "localhost", "127.0.0.1", "::1")] == [
        False,
        True,
        True,
        True,
    ]
    assert ranks._means("192.0.2.1", "node1", False) and ranks._means("fe80::1%eth0", "node1", False)


def test_what_is_written_while_a_group_forms_is_kept_where_it_forms(capfd):
    with ranks._quiet_failure():
        os.write(2, b"a warning\n")
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "a warning\nafter\n"


@pytest.mark.parametrize("words", [["demo", "--out", "demo"], ["eval", "--config", "eval"], ["data", "filter"]])
def test_what_runs_in_one_process_is_refused_under_torchrun(words, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for name, value in {**TORCHRUN, "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    if words[0] == "eval":
        words = [*words, "model.path=m", "data.files=[a.parquet]", "out=o.json"]
    if words[0] == "data":
        words = [*words, "model.path=m", "data.files=[a.parquet]", "out=o.parquet"]
    with pytest.raises(SystemExit) as stop:
        cli.app(words, prog_name="prism-fast")
    err = capfd.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1
    assert "this command runs in one process, got 2; start it without torchrun" in err
    assert not list(tmp_path.iterdir())


def test_the_gpu_of_a_process():
    assert ranks.own_gpu(ranks.Place(13, 16, 5), visible=8) == 5
    assert ranks.own_gpu(ranks.Place(13, 16, 5), visible=1) == 0  # SLURM with --gpus-per-task=1
    with pytest.raises(DataError, match="rank 13: process 5 of its machine, which has 4 GPUs; start at most 4"):
        ranks.own_gpu(ranks.Place(13, 16, 5), visible=4)


def test_a_process_has_its_gpu_before_it_joins_and_a_backend_for_either_device(monkeypatch):
    """Models are loaded later, onto torch's current GPU; what is on the host needs gloo, as NCCL has none of it."""
    told = []

    def join(backend, **given):
        told.append((backend, given["rank"], given["world_size"]))
        raise dist.DistError("no more of it here")

    for name, value in {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", told.append)
    monkeypatch.setattr(ranks, "_meeting", lambda here, timeout: None)
    monkeypatch.setattr(dist, "init_process_group", join)
    with pytest.raises(DataError, match="does not reach the others"), ranks.joined():
        pass
    assert told == [1, ("cpu:gloo,cuda:nccl", 3, 4)]
