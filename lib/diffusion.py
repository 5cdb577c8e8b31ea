"""The textbook, on one page: noise a latent, predict the noise, measure the error, sample.

Nothing of SAIL is here. Notation (DDPM, Ho et al. 2020): x_0 is a latent in the UNet's units,
(B, C, h, w); t its timestep, 0 to 999; abar_t the share of the signal's variance that is left at t;

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps,    eps ~ N(0, 1)

A condition is what the UNet knows of the prompt: {"embeds": (B, T, width)} and, for SDXL,
{"pooled": (B, width)} as well.
"""

import torch

Condition = dict[str, torch.Tensor]


def predict(unet, x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
    """The UNet's output (B, C, h, w), in float32.

    It is computed for noisy latents x_t (B, C, h, w) and timesteps t, (B,) or one for all.
    """
    dtype = next(unet.parameters()).dtype

    # SDXL was trained on pictures of many sizes and crops, and wants to be told both. We ask for an
    # uncropped picture of its own size: original height and width, crop corner, target height and
    # width. A side of a latent stands for 8 times as many pixels.
    added = None
    if "pooled" in condition:
        pixels = x_t.shape[-1] * 8
        sizes = [[pixels, pixels, 0, 0, pixels, pixels]]
        sizes = torch.tensor(sizes, device=x_t.device, dtype=dtype)
        added = {
            "text_embeds": condition["pooled"].to(dtype),
            "time_ids": sizes.repeat(len(x_t), 1),
        }

    embeds = condition["embeds"].to(dtype)
    output = unet(x_t.to(dtype), t, embeds, added_cond_kwargs=added).sample

    # Errors and sampling steps are computed in float32, whatever the UNet is in.
    return output.float()


def denoising_error(unet, schedule, x_0: torch.Tensor, t: torch.Tensor, noise: torch.Tensor,
                    condition: Condition) -> torch.Tensor:
    """e(x_0) = mean over C, h, w of (target - prediction)^2 at x_t: (B,) in float32.

    x_0 and noise are (B, C, h, w), t is (B,). A mean and not a sum, as in every Diffusion-DPO code,
    so that beta means the same at every resolution. `schedule` is a diffusers scheduler; where its
    prediction_type is v_prediction the target is the velocity (Salimans and Ho 2022), else the
    noise.
    """
    x_t = schedule.add_noise(x_0, noise, t)

    target = noise
    if schedule.config.prediction_type == "v_prediction":
        target = schedule.get_velocity(x_0, noise, t)

    prediction = predict(unet, x_t, t, condition)
    return (prediction - target).square().mean((1, 2, 3))


@torch.no_grad()
def sample(unet, scheduler, noise: torch.Tensor, condition: Condition, empty: Condition,
           steps: int, cfg_scale: float, generators: list[torch.Generator]) -> torch.Tensor:
    """Latents x_0 (B, C, h, w), drawn from noise (B, C, h, w) of unit variance in `steps` steps.

    `empty` is the condition (1, ...) of no prompt, from which classifier-free guidance leads away
    (Ho and Salimans 2022); `generators` feed a sampler that adds noise at its steps. Each picture
    uses its own noise and its own generator, so it does not depend on the others in its batch.
    """
    # The timesteps stay on the CPU: a step then never waits for the device.
    scheduler.set_timesteps(steps)
    x_t = noise * scheduler.init_noise_sigma

    # With guidance the UNet sees every latent twice, without and with its prompt, in one batch. A
    # scale of 1 or less means none, as in diffusers.
    guided = cfg_scale > 1
    if guided:
        condition = join(repeat(empty, len(noise)), condition)

    for t in scheduler.timesteps:
        inputs = x_t
        if guided:
            inputs = torch.cat([x_t, x_t])
        inputs = scheduler.scale_model_input(inputs, t)
        prediction = predict(unet, inputs, t, condition)

        # Guidance goes on beyond the prediction with the prompt, away from the one without.
        if guided:
            without, with_prompt = prediction.chunk(2)
            prediction = without + cfg_scale * (with_prompt - without)

        # One step of the sampler towards x_0.
        x_t = scheduler.step(prediction, t, x_t, generator=generators).prev_sample
    return x_t


def repeat(condition: Condition, times: int) -> Condition:
    """Each row of a condition `times` times in a row."""
    return {name: rows.repeat_interleave(times, 0) for name, rows in condition.items()}


def join(*conditions: Condition) -> Condition:
    """The rows of several conditions, one after the other."""
    joined = {}
    for name in conditions[0]:
        rows = [condition[name] for condition in conditions]
        joined[name] = torch.cat(rows)
    return joined
