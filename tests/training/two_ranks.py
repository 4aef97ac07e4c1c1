"""Two processes compute the gradient of one batch between them.

Usage: two_ranks.py FOLDER; FOLDER/batch.pt holds the batch, FOLDER/learner.pt the learner, and what rank N found is
written to FOLDER/N.pt. A process of its own, without threads, because it forks.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed
from torch.nn.parallel import DistributedDataParallel

RANKS = 2


def work(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=RANKS)
    learner = torch.load(folder / "learner.pt", weights_only=False)
    batch = {key: value[rank::RANKS] for key, value in torch.load(folder / "batch.pt", weights_only=True).items()}
    module = DistributedDataParallel(learner)
    terms, (_, everyone) = module(batch, {"t": batch["target"]})
    loss = torch.stack(list(terms.values())).sum()
    loss.backward()
    gradients = [parameter.grad for parameter in learner.parameters()]
    torch.save({"gradients": gradients, "loss": loss.detach(), "rows": len(everyone["t"])}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def main(folder: Path) -> int:
    torch.set_num_threads(1)
    children = []
    for rank in range(RANKS):
        child = os.fork()
        if child == 0:
            work(rank, folder)
            os._exit(0)
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
