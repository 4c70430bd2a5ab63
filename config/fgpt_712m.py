# The 712M model on FineWeb-Edu, on one GPU. Exactly 712,035,360 parameters; GPT-2's architecture, so the weights load
# into GPT2LMHeadModel. 19,073 steps of 524,288 tokens are 10 billion tokens. Not yet trained to the end with this code.
data_dir = "data/fineweb"
out_dir = "out/fgpt_712m"

family = "gpt2"
block_size = 1024
n_layer = 32
n_head = 24
n_embd = 1296

tokens_per_step = 524288
batch_size = 16
max_steps = 19073

# Scaled from width 128 (docs/experiments.md) and not yet tried at this size. Muon's rate is the same for every width,
# because its step is scaled by the shape of the matrix (Jordan's rule). AdamW's is 1e-2 at width 128, a cautious choice
# (in short runs 2e-2 was better by 0.01 nats, at width 256 too), and falls with 1 / sqrt(width). A long decay to zero
# was measured to be best. Weight decay and warm-up are the usual values, not measured; nor is there a measured rule for
# the batch, which is 256 times as large as there.
learning_rate = 3e-3  # 1e-2 sqrt(128 / 1296) = 3.1e-3
muon_learning_rate = 0.02
weight_decay = 0.1
warmup_steps = 200
decay_fraction = 0.7

eval_interval = 250
checkpoint_interval = 200  # at 40% of its peak, 20 minutes on an H100 and two hours on an RTX 4090
hellaswag_interval = 1000
sample_interval = 1000
