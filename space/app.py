"""A page in the browser for a checkpoint: a finetuned model chats, a base model
continues text and shows its bars.

    python -m space.app --checkpoint=out/chat/best.pt
    python -m space.app --checkpoint=out/chat/best.pt --assemble=out/space

The page needs no internet (but for GPT-2's vocabulary, which tiktoken fetches
once) and reports to nobody; stop it with Ctrl-C. It writes nothing. With
--assemble it writes instead a folder that is a whole Hugging Face Space, and
runs anywhere with `python app.py`.
"""

import os
import re
import shutil
import tempfile
import threading
import time
from functools import partial
from hashlib import sha1
from html import escape
from pathlib import Path

from configurator import configure

import torch

from model import load_checkpoint, load_model, pick_device, save_checkpoint
from sample import fit_into_context, prompt_ids, stream
from tokenizer import Tokenizer

checkpoint = ""  # file of train.py, finetune.py or dpo.py; empty: best.pt beside this file, as on a Space
host = ""  # address to listen at, 0.0.0.0 for all; empty: 127.0.0.1 (or GRADIO_SERVER_NAME, which a Space sets)
port = 7860  # where the browser finds the page
queue_size = 20  # answers that may wait; further ones are told to come back later
device = ""  # cpu, cuda, ...; empty: cuda where there is one
dtype = ""  # float32, bfloat16 or native (bfloat16 where it is fast); empty: float32 on CPUs, else native
assemble = ""  # folder to write for a Space, instead of showing the page; a dtype of bfloat16 halves its weights

HERE = Path(__file__).resolve().parent
VOCABULARY = "gpt2_vocabulary"  # folder beside this file, on a Space: GPT-2's vocabulary
MODULES = ("configurator.py", "model.py", "sample.py", "tokenizer.py")  # what this file needs of the others
N_BARS = 10
UPDATE_SECONDS = 0.05  # between updates of the page: one for each token made a small model three times slower
LONGEST_TOKEN = 128  # characters, of GPT-2's vocabulary: longer texts need not be encoded to be refused
GPT2_FILES = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"  # tiktoken names its copies by these
UNITS = {  # of a checkpoint's tokens and of its val_loss
    "pretrain": ("tokens seen", "token"),
    "finetune": ("answer tokens seen in finetuning", "answer token"),
    "dpo": ("pairs seen in preference tuning", "pair"),
}
UNCHANGED = {"__type__": "update"}  # gr.skip(): a component stays as it is
COMPUTING = threading.Lock()  # held for each step of the model: a step under way outlives its cancelled answer
VISIBLE = str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥"})
CSS = """
.notice {min-height: 1.6em}
.chat .message-content * {white-space: pre-wrap}
.bars .html-container {padding: 0}
.bars button {
    display: flex; gap: .8em; align-items: center; width: 100%; padding: .2em 0; border: 0; background: none;
    font-weight: normal; cursor: pointer}
.bars button:disabled {cursor: default; opacity: .6}
.bars code {
    flex: 0 0 8em; padding: 0; border: 0; background: none; text-align: left; white-space: pre; overflow: hidden;
    text-overflow: ellipsis}
.bars i {flex: 1; background: var(--background-fill-secondary)}
.bars b {display: block; height: 1em; min-width: 1px; background: var(--color-accent)}
.bars span {flex: 0 0 4em; white-space: nowrap; text-align: right; font-variant-numeric: tabular-nums}
"""
# A click on a bar reaches Python with what its token adds to the text. Whatever a person does to the text is an input:
# the event of this name of Gradio's Textbox misses what is pasted or cut, and `change` comes with each streamed token.
BARS_JS = """
element.addEventListener('click', event => {
    const bar = event.target.closest('button:enabled');
    if (bar) trigger('click', {text: bar.dataset.text});
});
document.addEventListener('input', event => {
    if (event.target.matches('textarea')) setTimeout(() => trigger('input'));
});
"""


def gradio():
    """The module gradio, told not to report home. ValueError where it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError:
        raise ValueError("gradio is not installed: pip install -e '.[app]'") from None
    return gradio


# ----------------------------------------------------------------------------------------------------------------------
# what the pages do


def check_length(tokenizer, text, block_size):
    """ValueError for a text that cannot fit, whatever its tokens are: nobody makes the server encode a whole book."""
    if len(text) > block_size * (LONGEST_TOKEN if tokenizer.bpe else 1):
        raise ValueError(f"that is {len(text):,} characters; the context holds {block_size:,} tokens: shorten the text")


def grow(model, tokenizer, ids, max_new_tokens, temperature, top_k):
    """Continue ids; yields (text so far, notice), the notice at the end says why, unless the model simply ended."""
    seen, text, shown_at = [], "", 0.0

    def steps():
        generated = model.generate([ids], max_new_tokens, temperature, top_k, stop=tokenizer.eot)
        while True:
            with COMPUTING:
                token = next(generated, None)
            if token is None:
                return
            seen.append(int(token))
            yield token

    for piece in stream(tokenizer, steps()):
        text += piece
        if time.monotonic() > shown_at + UPDATE_SECONDS:
            yield text, ""
            shown_at = time.monotonic()
    if tokenizer.eot in seen:
        yield text, "" if text else "The model ended at once."
    elif len(ids) + len(seen) > model.config.block_size:
        yield text, "The context is full."
    else:
        yield text, f"Cut after {len(seen):,} tokens, the length that you set."


def new_talk():
    """A conversation: its messages, and the number of the first one that the model still sees."""
    return {"messages": [], "first": 0}


def chat(model, tokenizer, question, talk, max_new_tokens, temperature, top_k):
    """Answer a question; yields (messages on the page, what the question's box gets, notice).

    talk is changed in place: Clear gives the page another one, and what an answer still writes then is seen by nobody.
    The page shows messages as HTML, so `on_page` escapes what people and models write.
    """
    messages, first = talk["messages"], talk["first"]
    try:
        if not question.strip():
            raise ValueError("type a question first")
        check_length(tokenizer, question, model.config.block_size)
        ids, kept = fit_into_context(
            tokenizer, question, messages[first:], model.config.block_size, int(max_new_tokens)
        )
    except ValueError as error:
        yield on_page(messages), UNCHANGED, sentence(error)
        return
    dropped, talk["first"] = (len(messages) - len(kept) - first) // 2, len(messages) - len(kept)
    forgot = f"The context is full: oldest turns forgotten: {dropped}. " if dropped else ""
    answer = {"role": "assistant", "content": ""}
    messages += [{"role": "user", "content": question}, answer]
    yield on_page(messages), "", forgot
    try:
        for answer["content"], notice in grow(model, tokenizer, ids, int(max_new_tokens), temperature, int(top_k)):
            yield on_page(messages), UNCHANGED, forgot + notice
    except ValueError as error:
        yield on_page(messages), UNCHANGED, sentence(error)


def on_page(messages):
    """Messages as HTML that shows exactly their text. White space is spelt out, for Gradio would dedent it.

    Python's own idea of white space would not do: HTML takes the numbers 128 to 159 for other characters.
    """

    def spell(text):
        return re.sub("[ \t\n\r\f\v]", lambda space: f"&#{ord(space[0])};", escape(text))

    return [{**message, "content": spell(message["content"])} for message in messages]


def complete(model, tokenizer, text, max_new_tokens, temperature, top_k):
    """Continue a text; yields (text, notice)."""
    try:
        ids = text_ids(model, tokenizer, text)
        for more, notice in grow(model, tokenizer, ids, int(max_new_tokens), temperature, int(top_k)):
            yield text + more, notice
    except ValueError as error:
        yield text, sentence(error)


def text_ids(model, tokenizer, text):
    """The ids of a document that begins with the text. ValueError if it does not fit into the context."""
    check_length(tokenizer, text, model.config.block_size)
    ids = prompt_ids(tokenizer, text, is_chat=False)
    if len(ids) > model.config.block_size:
        raise ValueError(
            f"that is {len(ids):,} tokens; the context holds {model.config.block_size:,}: shorten the text"
        )
    return ids


def sentence(error):
    text = str(error)
    return f"{text[0].upper()}{text[1:]}."


@torch.inference_mode()
def bars(model, tokenizer, text):
    """HTML of the ten likeliest next tokens: buttons, which carry what the token adds to the text, if anything."""
    try:
        ids = torch.tensor([text_ids(model, tokenizer, text)], device=model.wte.weight.device)
    except ValueError as error:
        return escape(sentence(error))
    with COMPUTING:
        logits = model.logits(model.hidden(ids)[:, -1])[0].float()
    rows = []
    for p, token in zip(*(values.tolist() for values in logits.softmax(dim=-1).topk(N_BARS)), strict=True):
        name, adds = readable(tokenizer, token)
        share = f"{p:.1%}" if p >= 0.001 else "&lt; 0.1%"
        rows.append(
            f'<button data-text="{escape(adds)}"{"" if adds else " disabled"}><code>{escape(name)}</code>'
            f'<i><b style="width: {p:.2%}"></b></i><span>{share}</span></button>'
        )
    return "".join(rows)


def readable(tokenizer, token):
    """(a token's name for the eye, the text it adds): nothing for parts of a character, and for what controls."""
    if token >= tokenizer.eot:
        return tokenizer.decode([token]), ""
    try:
        text = tokenizer.decode_bytes([token]).decode("utf-8")
    except UnicodeDecodeError:
        return " ".join(f"{byte:02X}" for byte in tokenizer.decode_bytes([token])), ""
    name = text.translate(VISIBLE)
    controls = re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)  # HTML changes some, and a text box has none
    return name if name.isprintable() else ascii(name)[1:-1], "" if controls else text


def about(model, stored):
    """Markdown of the model's numbers, from its checkpoint."""
    config, metrics = model.config, stored.get("metrics", {})
    facts = [f"{model.n_params():,} parameters", f"{config.n_layer} layers of width {config.n_embd}"]
    facts += [f"a context of {config.block_size:,} tokens"]
    seen, unit = UNITS[stored["stage"]]
    facts += [f"{stored['tokens']:,} {seen}"] if stored.get("tokens") else []
    names = {"val_loss": f"validation loss {{:.3f}} nats per {unit}", "val_bpb": "{:.3f} bits per byte"}
    names |= {"val_preference_accuracy": "preference accuracy {:.1%}"}
    names |= {"hellaswag_acc": "HellaSwag acc {:.1%}", "hellaswag_acc_norm": "acc_norm {:.1%}"}
    facts += [text.format(metrics[name]) for name, text in names.items() if name in metrics]
    return " · ".join(facts)


# ----------------------------------------------------------------------------------------------------------------------
# how the pages look


def sampling_controls(gr, block_size):
    """Sliders, in the order in which `chat` and `complete` take them."""
    slider = partial(gr.Slider, min_width=250)
    with gr.Row():
        return [
            slider(1, block_size, min(256, block_size), step=1, label="Length", info="new tokens at most"),
            slider(0, 2, 0.8, step=0.05, label="Temperature", info="0: always the likeliest token"),
            slider(0, 200, 50, step=1, label="Top k", info="among so many tokens; 0: all"),
        ]


def chat_page(gr, model, tokenizer):
    """The components and events of the page for a finetuned model."""
    talk = gr.State(new_talk())
    shown = gr.Chatbot(
        render_markdown=False, latex_delimiters=[], buttons=[], show_label=False, height="48vh", elem_classes="chat",
        placeholder="Ask a question, or try one of those below",
    )  # fmt: skip
    notice = gr.Markdown(elem_classes="notice")
    with gr.Row():
        question = gr.Textbox(
            show_label=False, placeholder="Your question", scale=9, min_width=120, autofocus=True, container=False
        )
        send = gr.Button("Send", variant="primary", scale=1, min_width=70)
        stop = gr.Button("Stop", scale=1, min_width=70)
    gr.Examples(questions(), question, label="Questions to try")
    controls = sampling_controls(gr, model.config.block_size)
    answering = gr.on(
        [question.submit, send.click], partial(chat, model, tokenizer), [question, talk, *controls],
        [shown, question, notice], concurrency_id="generate", api_visibility="private", show_progress="minimal",
        show_progress_on=shown,
    )  # fmt: skip
    stop.click(None, cancels=answering)
    shown.clear(None, cancels=answering)  # first and alone: Gradio would run a function of the same listener before it
    shown.clear(
        lambda: ([], new_talk(), ""), None, [shown, talk, notice], queue=False, api_visibility="private",
        show_progress="hidden",
    )  # fmt: skip


def completion_page(gr, page, model, tokenizer):
    """The components and events of the page for a base model."""
    with gr.Row():
        with gr.Column(scale=3, min_width=300):
            text = gr.Textbox(
                label="Text", lines=11, max_lines=11, placeholder="Write a beginning, or click a token", autofocus=True
            )
            with gr.Row():
                go = gr.Button("Continue", variant="primary", min_width=80)
                stop = gr.Button("Stop", min_width=80)
            notice = gr.Markdown(elem_classes="notice")
        with gr.Column(scale=2, min_width=300):
            gr.Markdown("**The likeliest next tokens**, before temperature and top k. Click one to append it.")
            likeliest = gr.HTML(js_on_load=BARS_JS, elem_classes="bars")
    controls = sampling_controls(gr, model.config.block_size)

    show = dict(
        fn=partial(bars, model, tokenizer), inputs=text, outputs=likeliest, show_progress="hidden",
        trigger_mode="always_last", queue=False, api_visibility="private",
    )  # fmt: skip

    def append(text, click: gr.EventData):
        return text + click.text

    writing = go.click(
        partial(complete, model, tokenizer), [text, *controls], [text, notice], show_progress="minimal",
        show_progress_on=text, concurrency_id="generate", api_visibility="private",
    )  # fmt: skip
    writing.then(**show)  # when it was cancelled, too
    for ends in (stop.click, likeliest.input, likeliest.click):  # the text has one writer at a time
        ends(None, cancels=writing)
    likeliest.input(**show)
    likeliest.click(append, text, text, queue=False, api_visibility="private").then(**show)
    page.load(**show)


def questions():
    """The questions to try: of questions.txt beside this file, as on a Space, or the ten of finetune.py."""
    if (HERE / "questions.txt").exists():
        return (HERE / "questions.txt").read_text(encoding="utf-8").splitlines()
    from finetune import QUESTIONS  # a Space has neither that file nor what it imports

    return QUESTIONS


def launch(model, tokenizer, stored, queue_size, host, port):
    """Start to serve the page of a checkpoint; returns (page, its address)."""
    gr, is_chat = gradio(), stored["stage"] != "pretrain"
    with gr.Blocks(title="fgpt", analytics_enabled=False) as page:
        gr.Markdown(f"# fgpt: {'chat' if is_chat else 'continue a text'}\n{about(model, stored)}")
        if is_chat:
            chat_page(gr, model, tokenizer)
        else:
            completion_page(gr, page, model, tokenizer)
    page.queue(max_size=queue_size, default_concurrency_limit=1)
    # fonts of the reader's machine; no history in the browser, no statistics, no uploads
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    try:
        _, address, _ = page.launch(
            server_name=host or None, server_port=port, share=False, ssr_mode=False, quiet=True,
            prevent_thread_lock=True, theme=theme, css=CSS, run_history=False, enable_monitoring=False,
            max_file_size=1, footer_links=[],
        )  # fmt: skip
    except OSError:  # whose text names settings of Gradio
        raise OSError(
            f"cannot listen at {host or 'this machine'}, port {port}: name another --port= or --host="
        ) from None
    return page, address


# ----------------------------------------------------------------------------------------------------------------------


def vocabulary_files():
    """Where tiktoken keeps GPT-2's two files, once it has fetched them."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
    folder = Path(tempfile.gettempdir(), "data-gym-cache") if folder is None else Path(folder)
    return [folder / sha1((GPT2_FILES + name).encode()).hexdigest() for name in ("vocab.bpe", "encoder.json")]


def write_space(model, stored, folder):
    """Write the folder of a Space: this file and what it imports, the weights, and what the Hub wants to read."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there and not empty: name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for name in MODULES:
        shutil.copy(HERE.parent / name, folder)
    for name in ("app.py", "README.md", "requirements.txt"):
        shutil.copy(HERE / name, folder)
    (folder / "questions.txt").write_text("\n".join(questions()) + "\n", encoding="utf-8")
    if stored["tokenizer"] == "gpt2" and all(path.exists() for path in vocabulary_files()):
        (folder / VOCABULARY).mkdir()
        for path in vocabulary_files():
            shutil.copy(path, folder / VOCABULARY)
    # neither the optimizer's state nor the settings, which name folders of this machine
    public = {name: stored[name] for name in ("stage", "tokenizer", "step", "tokens", "metrics") if name in stored}
    save_checkpoint(folder / "best.pt", model, **public)


def main():
    compute, autocast = pick_device(device, dtype)
    path = Path(checkpoint or HERE / "best.pt")
    if not 0 < port < 65536:
        raise ValueError(f"port must be 1 to 65535, not {port}")
    if (HERE / VOCABULARY).exists():
        os.environ["TIKTOKEN_CACHE_DIR"] = str(HERE / VOCABULARY)
    tokenizer = Tokenizer(load_checkpoint(path, "meta")["tokenizer"])  # what is missing is told before weights are read
    if not assemble:
        gradio()
    model, stored = load_model(path, compute)
    if assemble:
        write_space(model.bfloat16() if dtype == "bfloat16" else model, stored, Path(assemble))
        size = Path(assemble, "best.pt").stat().st_size
        print(f"{assemble}: a Space, best.pt has {size / 1e6:,.1f} MB; python app.py there shows the page")
        return
    with autocast():  # the weights take its dtype: it belongs to a thread, and Gradio goes on in any
        model.for_decoding()
    page, address = launch(model, tokenizer, stored, queue_size, host, port)
    print(f"{path}: open {address} in a browser, Ctrl-C ends it", flush=True)
    page.block_thread()


if __name__ == "__main__":
    configure(globals())
    main()
