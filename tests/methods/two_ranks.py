"""Two processes compute the gradients of one batch between them, for one method after the other.

Usage: two_ranks.py FOLDER; FOLDER/NAME.pt holds (method, regulariser, views, targets), and what rank N found of it is
written to FOLDER/NAME-N.pt: (loss, gradients by parameter, state after the next epoch has begun). A process of its own,
without threads, because it forks.
"""

import os
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed
from torch.nn.parallel import DistributedDataParallel

from mvmr.methods.regulariser import regularise
from mvmr.training.trainer import share_state

RANKS, WIDTH = 2, 12


def work(rank: int, folder: Path, names: list[str]) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=RANKS)
    for name in names:
        method, regulariser, views, targets = torch.load(folder / f"{name}.pt", weights_only=False)
        mine = [{key: value.chunk(RANKS)[rank] for key, value in rows.items()} for rows in (views, targets)]
        module = DistributedDataParallel(method)
        terms, h, _ = module(*mine)
        terms |= regularise(regulariser, h, mine[1])
        loss = torch.stack(list(terms.values())).sum()
        loss.backward()
        gradients = {key: value.grad for key, value in method.named_parameters() if value.requires_grad}
        loss = loss.detach() / RANKS
        torch.distributed.all_reduce(loss)  # the mean of what the ranks say
        method.before_epoch(1, partial(torch.randn, 16, WIDTH, generator=torch.Generator().manual_seed(rank)))
        share_state(method)
        torch.save((loss, gradients, method.state_dict()), folder / f"{name}-{rank}.pt")
    torch.distributed.destroy_process_group()


def main(folder: Path) -> int:
    torch.set_num_threads(1)
    names = sorted(path.stem for path in folder.glob("*.pt"))
    children = []
    for rank in range(RANKS):
        child = os.fork()
        if child == 0:
            work(rank, folder, names)
            os._exit(0)
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
