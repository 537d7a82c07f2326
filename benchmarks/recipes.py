"""Constants of main.py by name: the classic recipe, and what is compared with it."""

# The classic values spelled out, so that they stay classic when the defaults of main.py change.
# fmt: off
CLASSIC = {
    "STACK_SIZE": 4, "FRAME_SKIP": 4, "GAMMA": 0.99, "EPS_START": 1.0, "EPS_END": 0.1, "EPS_DECAY": 1_000_000,
    "BATCH_SIZE": 32, "POLICY_UPDATE": 4, "TARGET_UPDATE": 10_000, "WARM_STEPS": 50_000, "MEM_SIZE": 100_000,
    "LEARNING_RATE": 6.25e-5, "LEARNING_RATE_END_FACTOR": 1.0, "LEARNING_RATE_DECAY": 2_000_000, "ADAM_EPS": 1.5e-4,
    "PRIORITIZED": False, "ALPHA": 0.5, "BETA_START": 0.4, "BETA_STEPS": 2_000_000, "DOUBLE_DQN": False,
    "DUELING": False, "N_STEP": 1, "QUANTILES": 1, "ATOMS": 1, "V_MAX": 10.0, "LAYER_NORM": False, "AVERAGE_STEPS": 1,
}
# fmt: on
PRIORITIZED = CLASSIC | {"PRIORITIZED": True}
FAST = CLASSIC | {"WARM_STEPS": 20_000, "TARGET_UPDATE": 8_000, "EPS_END": 0.01, "EPS_DECAY": 250_000}
QUANTILES = {"QUANTILES": 64, "LEARNING_RATE": 1e-4, "LEARNING_RATE_END_FACTOR": 1.0}
FULL = FAST | QUANTILES | {"PRIORITIZED": True, "DOUBLE_DQN": True, "N_STEP": 3}
NORM = {"LAYER_NORM": True, "ADAM_EPS": 1e-8, "LEARNING_RATE": 2.5e-4, "LEARNING_RATE_END_FACTOR": 1.0}
CLASSIC_LOSS = FULL | {"QUANTILES": 1, "LEARNING_RATE": 2.5e-4}

RECIPES = {  # name: the constants of main.py that it changes, and the question it is to answer
    "shipped": {},  # what do the defaults reach?
    "shipped-uniform": {"PRIORITIZED": False},  # what do priorities add to the defaults, per step and per minute?
    "update-4": {"POLICY_UPDATE": 4},  # do twice as many updates, as is usual, bring more ...
    "update-16": {"POLICY_UPDATE": 16},  # ... or are half as many enough?
    # does a rate that falls learn as soon as a bold one ...
    "bold-rate": {"LEARNING_RATE": 5e-4, "LEARNING_RATE_END_FACTOR": 1.0},
    # ... and go on as long as one that was careful all along?
    "careful-rate": {"LEARNING_RATE": 2.5e-4, "LEARNING_RATE_END_FACTOR": 1.0},
    "layer-norm": NORM,  # do normalised layers let the same updates teach more?
    "layer-norm-c51": NORM | {"ATOMS": 51},  # and do distributions of the return go on where others stand still ...
    "shipped-quantiles": QUANTILES,  # ... and as quantiles, slow in their first 400k steps?
    "classic-uniform": CLASSIC,  # what does DQN reach without any of it, at the usual 4 steps per update?
    "classic-prioritized": PRIORITIZED,  # never below uniform, per step and per minute?
    "prioritized-alpha-0.6": PRIORITIZED | {"ALPHA": 0.6},  # stronger priorities, as Schaul et al. 2016?
    "prioritized-beta-1": PRIORITIZED | {"BETA_START": 1.0},  # full correction all along, nothing annealed?
    "prioritized-lr-1e-4": PRIORITIZED | {"LEARNING_RATE": 1e-4},  # is 6.25e-5 too careful ...
    "prioritized-lr-2.5e-4": PRIORITIZED | {"LEARNING_RATE": 2.5e-4},  # ... even a quarter of what would do?
    "uniform-lr-1e-4": CLASSIC | {"LEARNING_RATE": 1e-4},  # has uniform replay a better rate of its own ...
    "uniform-lr-2.5e-4": CLASSIC | {"LEARNING_RATE": 2.5e-4},  # ... four times the prioritized one?
    "fast": FAST,  # what do warm-up, target period and epsilon bring a short run by themselves?
    "fast-prioritized": FAST | {"PRIORITIZED": True},  # what do priorities add to that ...
    "double": FAST | {"DOUBLE_DQN": True},  # ... Double DQN ...
    "n-step-3": FAST | {"N_STEP": 3},  # ... returns over three steps ...
    "dueling": FAST | {"DUELING": True},  # ... the dueling head ...
    "quantiles": FAST | QUANTILES,  # ... and quantiles, each alone?
    "full": FULL,  # what do all reach together, but for the dueling head?
    "full-dueling": FULL | {"DUELING": True},  # does that head still add something ...
    "full-uniform": FULL | {"PRIORITIZED": False},  # ... and what is lost without priorities ...
    "full-one-step": FULL | {"N_STEP": 1},  # ... without the longer returns ...
    "full-classic-loss": FULL | {"QUANTILES": 1, "LEARNING_RATE": 6.25e-5},  # ... without quantiles ...
    "full-classic-loss-lr-2.5e-4": CLASSIC_LOSS,  # at 2.5e-4, and then with a fresher target?
    "full-classic-loss-target-2k": CLASSIC_LOSS | {"TARGET_UPDATE": 2_000},
    "full-memory-1M": FULL | {"MEM_SIZE": 1_000_000},  # do quantiles break away once nothing is forgotten?
    "full-lr-6.25e-5": FULL | {"LEARNING_RATE": 6.25e-5},  # do quantiles want the classic rate?
    "full-target-2k": FULL | {"TARGET_UPDATE": 2_000},  # does a fresher target pay in a short run?
    "full-epsilon-100k": FULL | {"EPS_DECAY": 100_000},  # does less exploration?
    "full-update-1": FULL | {"POLICY_UPDATE": 1},  # do more updates pay, per step or per minute ...
    "full-update-8": FULL | {"POLICY_UPDATE": 8},  # ... or fewer?
    "full-batch-64": FULL | {"BATCH_SIZE": 64},  # do larger batches pay ...
    "full-batch-128-update-16": FULL | {"BATCH_SIZE": 128, "POLICY_UPDATE": 16},  # ... as fewer, larger updates ...
    "full-batch-512-update-64": FULL | {"BATCH_SIZE": 512, "POLICY_UPDATE": 64},  # ... that see as much data?
}
