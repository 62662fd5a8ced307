"""Several hosts of one model behind one list of addresses: who is away is passed over, and nothing is mixed."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from tiny_host import D, make_batch, take_step, tiny_part

from fednano.errors import ConfigError, HostRefused, HostUnavailable
from fednano.host import RemoteLLM, serve
from fednano.models.factored import FactoredBatch, StreamFactors
from fednano.models.language import LocalLLM

BATCH = make_batch([4, 6])


def begin_at(remote: RemoteLLM, index: int) -> None:
    """Clients begin anywhere in their list; tests say where."""
    remote._channel._at = index


def test_steps_go_on_at_the_next_host_with_the_same_bits(local: LocalLLM) -> None:
    want = take_step(local, BATCH)
    with ExitStack() as stack:
        first, second = ExitStack(), stack.enter_context(serve(local, threads=1, grace=0.5))
        gone = first.enter_context(serve(local, threads=1, grace=0.5))
        addresses = f"{gone.address}, {second.address}"
        remote = stack.enter_context(RemoteLLM(addresses, insecure=True, retry_seconds=0))
        begin_at(remote, 0)
        assert all(map(torch.equal, take_step(remote, BATCH), want))
        assert gone.stats()["step_done"] == 1
        assert remote.address == gone.address
        first.close()
        assert all(map(torch.equal, take_step(remote, BATCH), want))
        assert remote.address == second.address
        assert torch.equal(remote.generate(*BATCH[:2], 3), local.generate(*BATCH[:2], 3))
        assert second.stats()["step_done"] == 1
        copy = stack.enter_context(RemoteLLM(*remote.__reduce__()[1][:1], insecure=True, retry_seconds=0))
        begin_at(copy, 0)
        assert all(map(torch.equal, take_step(copy, BATCH), want))


def test_clients_share_the_hosts_of_a_list() -> None:
    remotes = [RemoteLLM("localhost:1,localhost:2", insecure=True) for _ in range(64)]
    assert {remote.address for remote in remotes} == {"localhost:1", "localhost:2"}


def test_nobody_at_any_address_is_told() -> None:
    with (
        RemoteLLM("localhost:9,localhost:10", insecure=True, retry_seconds=0) as remote,
        pytest.raises(HostUnavailable, match="answers at localhost:9, localhost:10: tried 2 times"),
    ):
        remote.describe()


def factored(samples: int) -> FactoredBatch:
    x, mask, labels = make_batch([5] * samples, seed=3)
    z, up = torch.randn(int(mask.sum()), 2), torch.randn(2, D)
    return FactoredBatch(x, mask, labels, (StreamFactors(mask, z.requires_grad_(), up.requires_grad_()),))


def test_kept_samples_are_never_mixed(local: LocalLLM) -> None:
    """What one host keeps is asked of that host alone; the next one asks for it, and gets it."""
    batch = factored(3)
    want = local.loss(batch.embeds(), batch.mask, batch.labels)
    with serve(local, threads=1, grace=0.5) as second:
        with serve(local, threads=1, grace=0.5) as first:
            remote = RemoteLLM(
                f"{first.address},{second.address}", insecure=True, retry_seconds=0, factored=True
            )
            begin_at(remote, 0)
            torch.testing.assert_close(remote.factored_loss(batch), want)
            assert first.stats()["kept_samples"] == 3
            assert "kept_samples" not in second.stats() or second.stats()["kept_samples"] == 0
        torch.testing.assert_close(remote.factored_loss(batch), want)
        assert second.stats()["refused_missing"] == 1
        assert second.stats()["kept_samples"] == 3
        remote.close()


def test_another_model_in_the_list_is_refused(local: LocalLLM) -> None:
    with serve(LocalLLM(tiny_part(seed=1)), threads=1, grace=0.5) as other:
        with serve(local, threads=1, grace=0.5) as first:
            remote = RemoteLLM(f"{first.address},{other.address}", insecure=True, retry_seconds=0)
            begin_at(remote, 0)
            take_step(remote, BATCH)
        with pytest.raises(HostRefused, match="this host serves model"):
            take_step(remote, BATCH)
        remote.close()


@pytest.mark.parametrize(
    ("address", "says"),
    [("127.0.0.1:1,", "several with commas"), ("127.0.0.1:1,10.0.0.1:1", "refusing to talk to 10.0.0.1:1")],
)
def test_a_bad_list_is_told(address: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        RemoteLLM(address, insecure=True)
