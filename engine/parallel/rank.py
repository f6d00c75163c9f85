"""A rank of a group: a process that loads its share of a model and runs the steps that its leader sends.

    python -m engine.parallel.rank FD

FD is a socket to the leader (engine.parallel.wire). The process ends when that does, whatever it is doing.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import sys
import threading
from dataclasses import replace

import torch

from core.errors import InternalError, SlipstreamError
from engine.likeliest import likeliest
from engine.model_config import ModelConfig
from engine.parallel.group import connect
from engine.parallel.lending import lend
from engine.parallel.wire import Channel, Done, Failed, Lend, Ready, Refused, Resize, Run, Setup
from engine.runner import ModelRunner
from engine.step import StepBatch, StepOutput

logger = logging.getLogger(__name__)

LEADER_LOST = 3
"""Exit status of a rank whose leader is gone."""


def main() -> int:
    end = socket.socket(fileno=int(sys.argv[1]))
    threading.Thread(target=_exit_with, args=(end,), name="leader-watch", daemon=True).start()
    channel = Channel(end)
    setup = channel.receive_from_leader()
    assert isinstance(setup, Setup)
    logging.basicConfig(format=f"rank {setup.split.rank}: %(message)s")
    try:
        runner = load(setup)
    except SlipstreamError as error:
        channel.send(Refused(type(error).__name__, error.message))
        return 1
    except Exception as error:  # the leader can't see it otherwise
        logger.exception("the model could not be loaded")
        channel.send(Refused(InternalError.__name__, f"{type(error).__name__}: {error}"))
        return 1
    channel.send(Ready(runner.pool.num_blocks))
    return run(channel, runner, answers=setup.split.tp_rank == 0)


def load(setup: Setup) -> ModelRunner:
    """This rank's share of the model, connected to the others."""
    torch.set_num_threads(setup.threads)
    config = ModelConfig.from_folder(setup.plan.folder)
    device = torch.device(setup.plan.device)
    if device.type == "cuda":  # the leader's process was given as many as there are ranks
        device = torch.device("cuda", setup.split.rank)
        torch.cuda.set_device(device)
    group = connect(setup.split, setup.meeting, device)
    return ModelRunner.build(setup.plan, config, group=group, device=str(device), memory=setup.memory)


def run(channel: Channel, runner: ModelRunner, *, answers: bool) -> int:
    """Carry out what comes in, in its order. Ranks with tp_rank 0 answer in full; what the others know, those know too.
    Returns when the leader is gone."""
    failed = False
    while True:
        try:
            message = channel.receive_from_leader()
        except EOFError:
            return LEADER_LOST
        if isinstance(message, Resize):
            runner.resize(message.num_blocks)
        elif isinstance(message, Lend):
            channel.send(lend(runner.pool.data))
        elif isinstance(message, Run) and not failed:
            answer = step(runner, message, answers=answers)
            failed = isinstance(answer, Failed)
            channel.send(answer)


def step(runner: ModelRunner, message: Run, *, answers: bool) -> Done | Failed:
    future = runner.submit(message.batch)
    if error := future.exception():
        logger.error("step %d failed", message.step, exc_info=error)
        return Failed(message.step, f"{type(error).__name__}: {error}")
    output = future.result()
    if answers:
        return Done.of(message.step, _likeliest_only(output, message.batch))
    return Done(step=message.step, token_ids=output.token_ids[:0], seconds=output.seconds)


def _likeliest_only(output: StepOutput, batch: StepBatch) -> StepOutput:
    """With as much of the logits as is asked for."""
    if batch.return_logits or output.logits is None:
        return output
    ids, logprobs = likeliest(output.logits, torch.arange(len(output.logits)), batch.num_top)
    return replace(output, logits=None, top=(ids.cpu().numpy(), logprobs.cpu().numpy()))


def _exit_with(leader: socket.socket) -> None:
    """End this process when the leader's end is closed: the main thread may be waiting for another rank."""
    watch = select.poll()
    watch.register(leader, select.POLLRDHUP)
    watch.poll()
    os._exit(LEADER_LOST)


if __name__ == "__main__":
    os._exit(main())  # whatever of the group is still under way has nobody to go on for
