# The 712M model on FineWeb-Edu, one GPU. Exactly 712,035,360 parameters; GPT-2's architecture, so the weights load into
# GPT2LMHeadModel. 19,073 steps of 524,288 tokens are 10 billion tokens. Not yet trained to the end with this code.
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

# Scaled from width 128 (docs/experiments.md), and not yet tried at this size. Muon's rate is the same at any width, as
# its step is scaled by the matrix's shape (Jordan's rule). AdamW's goes as 1 / sqrt(width) from 1e-2, the careful
# choice: in short runs 2e-2 was better by 0.01 nats, and still was at width 256. The decay is long and to zero, as was
# measured. Weight decay and warm-up are customary; nor was a rule for the batch measured, which is 256 times as large.
learning_rate = 3e-3  # 1e-2 sqrt(128 / 1296) = 3.1e-3
muon_learning_rate = 0.02
weight_decay = 0.1
warmup_steps = 200
decay_fraction = 0.7

eval_interval = 250
checkpoint_interval = 200  # at 40% of an H100's peak 20 minutes, of an RTX 4090's two hours
hellaswag_interval = 1000
sample_interval = 1000
