# The 712M model on FineWeb-Edu, on one GPU, in GPT-2's architecture: exactly 712,035,360 parameters, and the weights
# load into GPT2LMHeadModel. Its reference points are in README.md; config/fgpt_modern.py is recommended.
# 19,073 steps of 524,288 tokens are 10 billion tokens. Not yet trained to the end with this code.
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

# None of these was tried at this size: config/fgpt_modern.py explains them.
learning_rate = 3e-3
muon_learning_rate = 0.02
weight_decay = 0.01
warmup_steps = 200
decay_fraction = 0.7

eval_interval = 250
checkpoint_interval = 200  # at the computed speeds 19 minutes on an H100 and 86 on an RTX 4090
hellaswag_interval = 1000
sample_interval = 1000
