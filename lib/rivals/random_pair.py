"""A random pair, an ablation of stage 03 (--select random, as in the paper).

Does it matter to take the extremes? The candidates are drawn and ranked as ever. Two of the N are
taken at random, and the reward only says which of the two wins.
"""

import torch


def random_pair(rewards: torch.Tensor, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the pairs: (P, N) mean rewards -> indices (P,) of winners and losers.

    They are two random candidates of each prompt.
    """
    P, N = rewards.shape
    taken = []
    for _ in range(P):
        shuffled = torch.randperm(N, generator=rng)
        taken.append(shuffled[:2])
    two = torch.stack(taken)                                             # (P, 2)

    # The better of the two first.
    order = rewards.gather(1, two).argsort(1, descending=True)
    win, lose = two.gather(1, order).T
    return win, lose
