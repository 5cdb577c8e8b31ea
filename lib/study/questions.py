"""What the study asks, as data: the arms, the questions, and how the arms' settings are tuned.

An arm is a run of the embedded world with some settings changed; a question compares arms over
several run seeds. To ask something else, add a line to ARMS and name it in QUESTIONS. How arms are
run is lib/study/runner.py's business.
"""

from dataclasses import dataclass

# Prompts for six rounds are set aside in every run, though most arms take only ROUNDS.
ROUNDS = 3
COMMON = "--iters 6 --eval-seeds 1"

# 16 times the human pairs, as the paper's 0.8M are of its 50K; and as many steps as the four
# trainings of SAIL take together.
FULL_DATA = "--seed-pairs 2048 --iter0-steps 220"

# Few pairs are gone through no more often than the preset's 128 are in its 100 steps.
PAIRS_32 = "--seed-pairs 32 --iter0-steps 25"
PAIRS_64 = "--seed-pairs 64 --iter0-steps 50"
PAIRS_512 = "--seed-pairs 512 --iter0-steps 100"

# A better self-judge: root errors, at high noise. (Plain errors there train as well.)
ROOT = "--reward-weights root --rank-t-min 500"

# Cheaper candidates. With half the prompts in the three rounds, six rounds still set aside as many
# in all, so that the human pairs stay the same.
FIVE_STEPS = "--candidate-sampler dpmsolver --candidate-steps 5"
THREE_STEPS = "--candidate-sampler dpmsolver --candidate-steps 3"
HALF_PROMPTS = "--iter-prompts 24,24,24,72,72,72"

# Two models that cost no training: further along Iter0's own update, in the weights and as
# guidance (lib/rivals/controls.py). They are rows of the arm "seed only", made from its Iter0.
CONTROLS = ("Iter0 extrapolated=extrapolate:Iter0:2", "Iter0 as guidance=guide:Iter0:1")


@dataclass(frozen=True)
class Arm:
    """One way to run the stages."""

    settings: str = ""              # beside COMMON; {out} and {seed} stand for the study's folder
                                    # and the run seed
    rounds: int = ROUNDS            # after Iter0
    method: str = ""                # the arm that this one varies: it takes its tuned settings,
                                    # and is drawn on its line; empty: it is a method of its own
    rows: tuple[str, ...] = ()      # further rows of its evaluation
    rival: str = ""                 # a rival that is trained in the run, with the prompts of ROUNDS
                                    # rounds and their forwards: it is then the arm's answer
    every_round: bool = False       # evaluates the model of every round, not of the last alone
    keeps_candidates: bool = False  # keeps pictures and latents of its candidates


ARMS = {
    # The rows of the paper's table. "Equal exposure" is to human pairs: of SAIL's 40 steps a round,
    # three quarters are theirs.
    "SAIL": Arm(keeps_candidates=True),
    "seed only": Arm("--alpha 0", rows=CONTROLS),
    "seed only, equal exposure": Arm("--alpha 0 --iter-steps 30", method="seed only"),
    "DiffusionDPO": Arm(FULL_DATA, rounds=0),
    "MaPO": Arm(f"{FULL_DATA} --loss mapo", rounds=0),
    "SPO": Arm(rounds=0, method="SAIL", rival="spo"),
    "SPO, 2048": Arm(FULL_DATA, rounds=0, method="DiffusionDPO", rival="spo"),
    "online DPO": Arm("--reward world"),
    "online DPO, aesthetics": Arm("--reward world-aesthetics", method="online DPO"),
    "SAIL*": Arm("--start {out}/DiffusionDPO-{seed}/iter0/unet"),

    # Which pair, the mixup, the settings of the reward. The anchor of round 1 stays the base: Iter0
    # against itself says nothing.
    "random pair": Arm("--select random"),
    "no mixup": Arm("--alpha 1"),
    "1 draw": Arm("--draws 1"),
    "4 draws": Arm("--draws 4"),
    "30 draws": Arm("--draws 30"),
    "N = 4": Arm("--candidates 4"),
    "N = 16": Arm("--candidates 16"),
    "t below 500": Arm("--rank-t-max 500"),
    "t above 500": Arm("--rank-t-min 500"),
    "balanced": Arm("--reward-weights balanced"),
    "anchor Iter0": Arm("--anchor iter0"),

    # Other self-judges: SOLACE's, and roots of the errors.
    "self-confidence": Arm("--reward self-confidence"),
    "root, t above 500": Arm(ROOT),

    # The better of these with less computing.
    "root, 4 draws": Arm(f"{ROOT} --draws 4"),
    "root, 2 draws": Arm(f"{ROOT} --draws 2"),
    "root, N = 4": Arm(f"{ROOT} --candidates 4"),
    "root, 5 steps": Arm(f"{ROOT} {FIVE_STEPS}"),
    "root, 3 steps": Arm(f"{ROOT} {THREE_STEPS}"),
    "root, half the prompts": Arm(f"{ROOT} {HALF_PROMPTS}"),
    "root, 5 steps, 4 draws": Arm(f"{ROOT} {FIVE_STEPS} --draws 4"),
    "root, 5 steps, 2 draws, N = 4": Arm(f"{ROOT} {FIVE_STEPS} --draws 2 --candidates 4"),
    "root, 5 steps, 2 draws, N = 4, half": Arm(
        f"{ROOT} {FIVE_STEPS} --draws 2 --candidates 4 {HALF_PROMPTS}"),
    "root, 3 steps, 2 draws, N = 4, half": Arm(
        f"{ROOT} {THREE_STEPS} --draws 2 --candidates 4 {HALF_PROMPTS}"),

    # The share of self-made pairs, with three judges.
    "SAIL, alpha 0.5": Arm("--alpha 0.5", method="SAIL"),
    "SAIL, alpha 1": Arm("--alpha 1", method="SAIL"),
    "balanced, alpha 0.5": Arm("--reward-weights balanced --alpha 0.5", method="balanced"),
    "balanced, alpha 1": Arm("--reward-weights balanced --alpha 1", method="balanced"),
    "online DPO, alpha 0.5": Arm("--reward world --alpha 0.5", method="online DPO"),
    "online DPO, alpha 1": Arm("--reward world --alpha 1", method="online DPO"),

    # The number of human pairs.
    "SAIL, 32 pairs": Arm(PAIRS_32, method="SAIL"),
    "SAIL, 64 pairs": Arm(PAIRS_64, method="SAIL"),
    "SAIL, 512 pairs": Arm(PAIRS_512, method="SAIL"),
    "seed only, 32 pairs": Arm(f"{PAIRS_32} --alpha 0", method="seed only"),
    "seed only, 64 pairs": Arm(f"{PAIRS_64} --alpha 0", method="seed only"),
    "seed only, 512 pairs": Arm(f"{PAIRS_512} --alpha 0", method="seed only"),

    # Noise in the labels.
    "SAIL, noise 0": Arm("--label-noise 0", method="SAIL"),
    "SAIL, noise 0.4": Arm("--label-noise 0.4", method="SAIL"),
    "SAIL, noise 1": Arm("--label-noise 1", method="SAIL"),
    "seed only, noise 0": Arm("--label-noise 0 --alpha 0", method="seed only"),
    "seed only, noise 0.4": Arm("--label-noise 0.4 --alpha 0", method="seed only"),
    "seed only, noise 1": Arm("--label-noise 1 --alpha 0", method="seed only"),

    # More rounds: these go on from the runs of three.
    "SAIL, 6 rounds": Arm(rounds=6, method="SAIL", every_round=True),
    "seed only, 6 rounds": Arm("--alpha 0", rounds=6, method="seed only", every_round=True),
    "no mixup, 6 rounds": Arm("--alpha 1", rounds=6, method="no mixup", every_round=True),
}


def method_of(arm: str) -> str:
    """The arm that this one varies, or itself."""
    return ARMS[arm].method or arm


# ---- the questions ----

@dataclass(frozen=True)
class Question:
    """Arms side by side: the first is what the others are compared with."""

    title: str
    arms: tuple[str, ...]
    seeds: int                  # run seeds: 0, 1, ...
    over: str = ""              # what the figure shows gains against: "rounds", "forwards", or what
                                # the arms of a method vary, a column of runs.csv; empty: all arms
                                # side by side


QUESTIONS = {
    "rivals": Question("The rows of the paper's table", seeds=10, arms=(
        "SAIL", "seed only", "seed only, equal exposure", "DiffusionDPO", "MaPO", "SPO",
        "SPO, 2048", "online DPO", "online DPO, aesthetics", "SAIL*")),
    "pairs": Question("Which pair, and the mixup", seeds=5, arms=(
        "SAIL", "random pair", "no mixup", "SAIL, alpha 0.5")),
    "better": Question("Better than the paper's ranking", seeds=10, arms=(
        "SAIL", "random pair", "balanced", "t above 500", "root, t above 500",
        "self-confidence", "online DPO")),
    "cheap": Question("What SAIL's gain must cost", seeds=5, arms=(
        "SAIL", "root, t above 500", "root, 4 draws", "root, 2 draws", "root, N = 4",
        "root, 5 steps", "root, 3 steps", "root, half the prompts", "root, 5 steps, 4 draws",
        "root, 5 steps, 2 draws, N = 4", "root, 5 steps, 2 draws, N = 4, half",
        "root, 3 steps, 2 draws, N = 4, half", "seed only"), over="forwards"),
    "thrift": Question("Its two cheapest rows on as many run seeds as the rivals", seeds=10, arms=(
        "SAIL", "root, t above 500", "root, 5 steps, 2 draws, N = 4, half",
        "root, 3 steps, 2 draws, N = 4, half", "seed only"), over="forwards"),
    "reward": Question("The reward's settings", seeds=3, arms=(
        "SAIL", "1 draw", "4 draws", "30 draws", "N = 4", "N = 16", "t below 500", "t above 500",
        "anchor Iter0")),
    "alpha": Question("The share of self-made pairs that a judge is good for", seeds=5, arms=(
        "SAIL", "SAIL, alpha 0.5", "SAIL, alpha 1",
        "balanced", "balanced, alpha 0.5", "balanced, alpha 1",
        "online DPO", "online DPO, alpha 0.5", "online DPO, alpha 1"), over="alpha"),
    "size": Question("Utility against the number of human pairs", seeds=3, arms=(
        "SAIL", "seed only", "DiffusionDPO", "SAIL, 32 pairs", "SAIL, 64 pairs", "SAIL, 512 pairs",
        "seed only, 32 pairs", "seed only, 64 pairs", "seed only, 512 pairs"), over="pairs"),
    "noise": Question("Utility against label noise", seeds=3, arms=(
        "SAIL", "seed only", "SAIL, noise 0", "SAIL, noise 0.4", "SAIL, noise 1",
        "seed only, noise 0", "seed only, noise 0.4", "seed only, noise 1"), over="label_noise"),
    "rounds": Question("Six rounds", seeds=3, arms=(
        "SAIL, 6 rounds", "seed only, 6 rounds", "no mixup, 6 rounds"), over="rounds"),
    "judge": Question("What the judge of round 1 knows (lib/study/judge.py)", seeds=10, arms=(
        "SAIL", "SPO", "root, t above 500", "self-confidence")),
}


# What `study` asks of itself; the others are asked by name. These five are under four hours on two
# cores, all of them six.
MAIN_QUESTIONS = ("rivals", "better", "cheap", "thrift", "judge")


# ---- the primary comparisons ----

# What the study was made to tell: utility of the first row over that of the second, over the ten
# run seeds of "rivals" and "better". Stated before these runs were made; of several looks some find
# something by luck alone, so their p-values are corrected together (Holm). All else that the tables
# show is secondary. Run seeds 0 to 4 of the rows but SPO and root had been looked at before.
PRIMARY = (
    ("SAIL", "Iter0"),
    ("SAIL", "seed only"),
    ("SAIL", "Iter0 extrapolated"),
    ("SAIL", "Iter0 as guidance"),
    ("balanced", "SAIL"),
    ("root, t above 500", "SAIL"),
    ("SPO", "SAIL"),
)

# What one wants to know next, once these are told; some were added when the answers were known.
SECONDARY = (
    ("balanced", "seed only"),
    ("t above 500", "seed only"),
    ("root, t above 500", "seed only"),
    ("root, t above 500", "Iter0 extrapolated"),
    ("root, t above 500", "Iter0 as guidance"),
    ("root, t above 500", "balanced"),
    ("root, t above 500", "t above 500"),
    ("root, t above 500", "random pair"),
    ("t above 500", "random pair"),
    ("SPO", "root, t above 500"),
    ("online DPO", "root, t above 500"),
    ("SAIL*", "DiffusionDPO"),
)


# ---- tuning: `study --tune` ----

# Every arm of TUNE_ARMS is tried with every setting of GRID, on development prompts and a run seed
# that is used for nothing else. The best in utility wins among those that lose no more alignment
# than this against the base.
TUNE_ARMS = ("SAIL", "seed only", "random pair", "no mixup", "online DPO", "DiffusionDPO", "MaPO")
GRID = (
    "--beta 2000 --lr 1e-5",
    "--beta 1000 --lr 1e-5",
    "--beta 500 --lr 1e-5",
    "--beta 2000 --lr 2e-5",
)
TUNE_SEED = 100
TUNE_PROMPTS = "--eval-prompts dev --eval-count 160"
ALIGNMENT_LOSS = 0.01

# A rival trained in a run has its own settings (lib/rivals/), which are tried in a run of its arm.
RIVAL_GRID = {
    "SPO": ("--spo-lr 5e-7", "--spo-lr 1e-6", "--spo-lr 2e-6"),
}

# The controls' gamma and w are tried on every Iter0 of "seed only".
CONTROL_GRID = {
    "extrapolated": (
        "extrapolated x1.5=extrapolate:Iter0:1.5",
        "extrapolated x2=extrapolate:Iter0:2",
        "extrapolated x3=extrapolate:Iter0:3",
        "extrapolated x4=extrapolate:Iter0:4",
    ),
    "guided": (
        "guided 0.5=guide:Iter0:0.5",
        "guided 1=guide:Iter0:1",
        "guided 2=guide:Iter0:2",
        "guided 3=guide:Iter0:3",
    ),
}

# What was found better than the preset's beta and learning rate, which are SAIL's own, by method.
# "no mixup" loses more alignment than allowed with all four: it has the one that loses least.
TUNED = {
    "seed only": "--beta 1000 --lr 1e-5",
    "DiffusionDPO": "--beta 500 --lr 1e-5",
    "no mixup": "--lr 1e-5",
}
