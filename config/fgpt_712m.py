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
warmup_steps = 200

eval_interval = 250
checkpoint_interval = 500
hellaswag_interval = 1000
sample_interval = 1000
