"""SAIL on one page, one picture at a time: no caches, nothing written.

It is the first thing to read, and the tests hold the stages' rewards and losses to it.

    .venv/bin/python tests/plain_sail.py            (the embedded world, on a CPU, in a minute)
"""

import copy
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from lib.world import captions, people  # noqa: E402

N, DRAWS, BETA, ALPHA = 4, 10, 2000., .25                     # the paper: 8, 10, 5000, .25
HUMAN_PAIRS, NEW_PROMPTS, BATCH, STEPS, LR = 16, 4, 8, 10, 4e-5
LATENT, LABEL_NOISE = (12, 8, 8), .15


def e(unet, schedule, x_0, y, t, eps):
    """The denoising error of a latent x_0 (C, h, w) at one (t, eps); y (1, T, width) is the prompt."""
    abar = schedule.alphas_cumprod[t]
    x_t = abar.sqrt() * x_0 + (1 - abar).sqrt() * eps
    return (eps - unet(x_t[None], t, y).sample[0]).square().mean()


def reward(theta, anchor, schedule, x_0, y, draws, beta=BETA):
    """SAIL's equation 8: the error that the model saves against the anchor, a mean over draws."""
    total = 0.
    for t, eps in draws:
        error = e(theta, schedule, x_0, y, t, eps)
        anchor_error = e(anchor, schedule, x_0, y, t, eps)
        total += -beta / 2 * (error - anchor_error)
    return total / len(draws)


def dpo_loss(theta, ref, schedule, x_w, x_l, y, t, eps, beta=BETA):
    """Diffusion-DPO on one pair, whose two pictures meet the same (t, eps)."""
    win = e(theta, schedule, x_w, y, t, eps) - e(ref, schedule, x_w, y, t, eps)
    lose = e(theta, schedule, x_l, y, t, eps) - e(ref, schedule, x_l, y, t, eps)
    return -F.logsigmoid(-beta / 2 * (win - lose))


def paint(pipe, unet, prompt, seed):
    """A latent sampled from a model, and its picture (1, 3, 32, 32) in 0..1."""
    pipe.unet = unet
    rng = torch.Generator().manual_seed(seed)
    x_0 = pipe(prompt, num_inference_steps=10, guidance_scale=2., generator=rng,
               output_type="latent").images[0]
    picture = pipe.vae.decode(x_0[None] / pipe.vae.config.scaling_factor).sample / 2 + .5
    return x_0, picture.clamp(0, 1)


def embed(pipe, prompt):
    tokens = pipe.tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
    return pipe.text_encoder(tokens).last_hidden_state


def random_draw(rng):
    """A timestep t and noise eps."""
    return torch.randint(1000, (), generator=rng), torch.randn(LATENT, generator=rng)


def train(pipe, unet, human, own, rng):
    """Some steps of Diffusion-DPO on the mix; policy and reference start from the current model."""
    policy, ref = copy.deepcopy(unet).requires_grad_(True), unet
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LR)
    for step in range(STEPS):
        loss = 0.
        for i in range(BATCH):
            pairs = human
            if own and i < ALPHA * BATCH:                                  # ranked preference mixup
                pairs = own
            prompt, x_w, x_l = pairs[torch.randint(len(pairs), (1,), generator=rng)]
            y = embed(pipe, prompt)
            t, eps = random_draw(rng)
            loss += dpo_loss(policy, ref, pipe.scheduler, x_w, x_l, y, t, eps) / BATCH
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"    step {step}: loss {loss:.3f}")
    return policy.requires_grad_(False)


def people_compare(pipe, base, prompt, seed, rng):
    """One human pair: an annotator of the embedded world prefers one of two pictures."""
    a, picture_a = paint(pipe, base, prompt, seed)
    b, picture_b = paint(pipe, base, prompt, seed + 1)
    u_a, u_b = people.score([prompt, prompt], torch.cat([picture_a, picture_b]))["utility"].split(1)
    if people.first_wins(u_a, u_b, LABEL_NOISE, rng):
        return prompt, a, b
    return prompt, b, a


@torch.no_grad()
def rank(pipe, theta, anchor, prompt, seed, rng):
    """One self-made pair: the best and the worst of N candidates by the model's own reward."""
    candidates = [paint(pipe, theta, prompt, seed + n)[0] for n in range(N)]
    draws = [random_draw(rng) for _ in range(DRAWS)]                       # the candidates share them
    y = embed(pipe, prompt)
    rewards = [reward(theta, anchor, pipe.scheduler, x_0, y, draws).item() for x_0 in candidates]
    best, worst = rewards.index(max(rewards)), rewards.index(min(rewards))
    print(f"    {prompt}: {' '.join(f'{r:+.2f}' for r in rewards)} -> {best} over {worst}")
    return prompt, candidates[best], candidates[worst]


@torch.no_grad()
def utility(pipe, unet, prompts):
    """What people would say of a model: mean true utility of new pictures."""
    pictures = torch.cat([paint(pipe, unet, prompt, i)[1] for i, prompt in enumerate(prompts)])
    return people.score(prompts, pictures)["utility"].mean().item()


def main():
    from diffusers import StableDiffusionPipeline
    torch.set_num_threads(1)                                   # one picture is too little to share
    pipe = StableDiffusionPipeline.from_pretrained(ROOT / "lib/world/base", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.eval().requires_grad_(False)
    base, rng = pipe.unet, torch.Generator().manual_seed(0)
    prompts = captions.permuted(captions.world_captions()["rest"], "plain")

    print(f"Seed: people compare two pictures of the base for {HUMAN_PAIRS} prompts")
    human = []
    for i, prompt in enumerate(prompts[:HUMAN_PAIRS]):
        human.append(people_compare(pipe, base, prompt, 2 * i, rng))

    print("Iter0: Diffusion-DPO on the human pairs; at first policy and reference are the same: log 2")
    iter0 = train(pipe, base, human, [], rng)

    print(f"Round 1: the model ranks its own {N} candidates for each of {NEW_PROMPTS} new prompts")
    own = []
    for i, prompt in enumerate(prompts[100:100 + NEW_PROMPTS]):            # no human pair's
        own.append(rank(pipe, iter0, base, prompt, 1000 + N * i, rng))

    print(f"Iter1: Diffusion-DPO on the mix, {ALPHA:.0%} of it self-made")
    iter1 = train(pipe, iter0, human, own, rng)

    # So little training proves nothing: run_sail.sh does more of it, and many at a time.
    for name, unet in (("base", base), ("Iter0", iter0), ("Iter1", iter1)):
        value = utility(pipe, unet, prompts[200:220])
        print(f"{name}: mean utility of 20 new pictures {value:.3f}")


if __name__ == "__main__":
    main()
