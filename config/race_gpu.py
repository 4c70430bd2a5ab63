# The learning race of config/race.py at 124M parameters with GPT-2's tokenizer, for a GPU: one epoch of 30M tokens, so
# that no recipe overfits (with more data, increase max_steps). Not yet run: the rates are cautious.
exec(open(str(__file__).replace("race_gpu", "race")).read())  # the recipes; the sizes are replaced below

tokenizer = "gpt2"
block_size = 1024
n_layer = 12
n_head = 12
n_embd = 768
mlp_dim = 2048 if family == "modern" else 3072
tied = True  # an untied head would be 39M parameters more than gpt2 has

tokens_per_step = 65536
batch_size = 32
max_steps = 450
weight_decay = 0.1  # more than in the real run, as these runs are short
if optimizer == "adamw":
    warmup_steps = 50
else:
    learning_rate = 3e-3
    decay_fraction = 0.7

eval_interval = 25
eval_tokens = 131072
log_interval = 25
checkpoint_interval = 450
