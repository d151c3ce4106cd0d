# SPDX-License-Identifier: MIT
"""Tests run their ranks as forked processes, or as threads of one process."""

import multiprocessing
import os
import sys
import tempfile
import threading
import traceback

import entrepot

_fork = multiprocessing.get_context("fork")


def _rank_main(function, rank, addresses, pipe, args):
    try:
        torch = sys.modules.get("torch")
        if torch is not None:
            torch.set_num_threads(1)
        group = entrepot.Group.from_addresses(addresses, rank)
        answer = True, function(group, *args)
    except BaseException:
        answer = False, traceback.format_exc()
    _settle_device()
    pipe.send(answer)


def _settle_device():
    """A process that ends while its kernels run keeps the device busy for the next ones."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def run_processes(num_ranks, function, *args, seconds=120):
    """Runs function(group, *args) on forked ranks; returns their results in rank order."""
    with tempfile.TemporaryDirectory() as folder:
        addresses = [os.path.join(folder, f"rank{r}") for r in range(num_ranks)]
        pipes, ranks = [], []
        for rank in range(num_ranks):
            mine, theirs = _fork.Pipe()
            process = _fork.Process(
                target=_rank_main, args=(function, rank, addresses, theirs, args)
            )
            process.start()
            theirs.close()
            pipes.append(mine)
            ranks.append(process)
        try:
            return _unpack([_answer(rank, pipe, seconds) for rank, pipe in enumerate(pipes)])
        finally:
            for process in ranks:
                process.join(5)
                if process.is_alive():
                    process.kill()
                    process.join()


def _answer(rank, pipe, seconds):
    if not pipe.poll(seconds):
        return False, f"rank {rank} did not answer within {seconds} s"
    try:
        return pipe.recv()
    except EOFError:
        return False, f"rank {rank} died"


def run_threads(num_ranks, function, *args, seconds=120):
    """Runs function(group, *args) on ranks that are threads."""
    world = entrepot.ThreadWorld(num_ranks)
    results = [(False, "did not end")] * num_ranks

    def main(rank):
        try:
            group = entrepot.Group(rank, num_ranks, world=world)
            results[rank] = (True, function(group, *args))
        except BaseException:
            results[rank] = (False, traceback.format_exc())

    threads = [threading.Thread(target=main, args=(r,), daemon=True) for r in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
    return _unpack(results)


def _unpack(results):
    failed = [f"rank {r}:\n{value}" for r, (ok, value) in enumerate(results) if not ok]
    assert not failed, "\n".join(failed)
    return [value for _, value in results]
