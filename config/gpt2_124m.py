# GPT-2's smallest size (OpenAI's 124M: 124,439,808 parameters without the chat tokens and padding rows).
data_dir = "data/fineweb"
out_dir = "out/gpt2_124m"

family = "gpt2"
block_size = 1024
n_layer = 12
n_head = 12
n_embd = 768

tokens_per_step = 524288
batch_size = 32
max_steps = 19073

# not yet tried at this size; config/fgpt_modern.py explains these values
learning_rate = 4e-3
muon_learning_rate = 0.02
weight_decay = 0.01
warmup_steps = 200

eval_interval = 250
checkpoint_interval = 500
hellaswag_interval = 1000
