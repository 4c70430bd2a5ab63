# runs/quickstart.sh: the small assistant learns to prefer brief answers.
checkpoint = "out/quickstart/chat/best.pt"
data_dir = "out/quickstart/preferences"
out_dir = "out/quickstart/dpo"

learning_rate = 3e-5
warmup_steps = 3
eval_interval = 6
