"""What a quick start has reached: a table, and the same as JSON.

    python -m tools.summary --dir=out/quickstart

Reads the logs and checkpoints below `dir`, asks the base, the finetuned and the
preference-tuned model every held-out question, and writes dir/summary.json:
val_loss_before, val_loss_after (nats per byte), shares between 0 and 1
(hellaswag_before, hellaswag_after, hellaswag_finetuned, heldout_base,
heldout_finetuned, heldout_dpo, preference_before, preference_after) and seconds
(a dict, by stage).
"""

from collections import Counter
from pathlib import Path

from configurator import configure

from finetune import answers
from model import load_model, pick_device
from prepare_fineweb import read_json, write_json
from tokenizer import Tokenizer
from tools.plot import read_log

dir = "out/quickstart"  # the folder that runs/quickstart.sh filled
answer_tokens = 64  # longest answer, tokens


def held_out_accuracy(checkpoint, questions, answer_tokens):
    """Share of questions whose likeliest answer is the right one, but for case and outer blanks."""
    device, autocast = pick_device("cpu", "float32")
    model, stored = load_model(checkpoint, device)
    asked = [question["question"] for question in questions]
    given = answers(model, Tokenizer(stored["tokenizer"]), asked, answer_tokens, autocast)
    right = [a.strip().lower() == q["answer"].strip().lower() for a, q in zip(given, questions, strict=True)]
    return sum(right) / len(right)


def first_and_last(log, name):
    """The first and the last value of a column of a log.jsonl."""
    values = [row[name] for row in read_log(log)[1] if name in row]
    return values[0], values[-1]


def main():
    folder = Path(dir)
    if not (folder / "world/questions.json").exists():
        raise FileNotFoundError(f"{dir}: not the folder of a quick start (bash runs/quickstart.sh {dir})")
    questions = read_json(folder / "world/questions.json")
    losses = first_and_last(folder / "base/log.jsonl", "val_loss")
    scores = first_and_last(folder / "base/log.jsonl", "hellaswag_acc")
    _, score_finetuned = first_and_last(folder / "chat/log.jsonl", "hellaswag_acc")
    preference = first_and_last(folder / "dpo/log.jsonl", "val_preference_accuracy")
    runs = ("base", "chat", "dpo")
    held_out = [held_out_accuracy(folder / f"{run}/best.pt", questions, answer_tokens) for run in runs]
    seconds = Counter()
    for line in (folder / "seconds.txt").read_text().splitlines():
        seconds[line.split()[0]] += int(line.split()[1])  # a stage may have run twice
    result = {
        "val_loss_before": losses[0],
        "val_loss_after": losses[1],
        "hellaswag_before": scores[0],
        "hellaswag_after": scores[1],
        "hellaswag_finetuned": score_finetuned,
        "heldout_base": held_out[0],
        "heldout_finetuned": held_out[1],
        "heldout_dpo": held_out[2],
        "preference_before": preference[0],
        "preference_after": preference[1],
        "seconds": seconds,
    }
    write_json(folder / "summary.json", result)
    print(f"{'':46} before   after")
    print(f"{'validation loss (nats per byte)':44} {losses[0]:8.3f} {losses[1]:7.3f}   by pretraining")
    asked = f"{len(questions)} held-out questions answered right"
    rows = [
        ("HellaSwag format, right of four (chance 25%)", *scores, "pretraining"),
        (asked, *held_out[:2], "finetuning"),
        ("HellaSwag format", scores[1], score_finetuned, "finetuning"),
        ("preferences of held-out pairs (chance 50%)", *preference, "DPO"),
        (asked, *held_out[1:], "DPO"),
    ]
    for what, before, after, by in rows:
        print(f"{what:44} {before:8.1%} {after:7.1%}   by {by}")
    print("seconds: " + ", ".join(f"{name} {n}" for name, n in seconds.items()) + f"; in all {sum(seconds.values())}")
    print(f"checkpoints: best.pt in {dir}/base, {dir}/chat and {dir}/dpo; answers before and after: samples.md there")
    plot = folder / "loss.png"
    print(f"picture: {plot}" if plot.exists() else "picture: none, pip install -e '.[plot]' draws it")
    print(f"talk to it: python sample.py --checkpoint={dir}/dpo/best.pt")


if __name__ == "__main__":
    configure(globals())
    main()
