"""A page in the browser: a finetuned model chats, a base model continues text.

    python -m space.app --checkpoint=out/chat/best.pt
    python -m space.app --checkpoint=out/chat/best.pt --assemble=out/space

The page needs no internet, except that tiktoken downloads GPT-2's vocabulary
once. It reports to nobody and writes nothing; Ctrl-C stops it. With --assemble
it writes a folder instead: a complete Hugging Face Space, which also runs
anywhere else with `python app.py`.
"""

import os
import re
import shutil
import sys
import tempfile
import threading
import time
from functools import partial
from hashlib import sha1
from html import escape, unescape
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # for `python space/app.py`; a Space has all beside it

from configurator import BadInput, configure

import torch

import run
from sample import fit_into_context, prompt_ids
from tokenizer import tokenizer_of_checkpoint

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
try:
    import gradio as gr
    from gradio_client.utils import is_file_obj_with_meta, traverse
    from starlette.middleware import Middleware
    from starlette.requests import Request
    from starlette.responses import PlainTextResponse

    HAS_GRADIO = True
except ImportError:  # main says so; --assemble does not need it
    HAS_GRADIO = False

checkpoint = ""  # file of train.py, finetune.py or dpo.py; empty: best.pt beside this file, as on a Space
host = ""  # address to listen at, 0.0.0.0 for all; empty: 127.0.0.1 (or GRADIO_SERVER_NAME, which a Space sets)
port = 7860  # where the browser finds the page
queue_size = 20  # answers that may wait; further ones are refused with a message
device = ""  # cpu, cuda, ...; empty: cuda where there is one
dtype = ""  # float32 or bfloat16; empty: bfloat16 where it is faster
assemble = ""  # write the folder of a Space here instead of showing the page; a dtype of bfloat16 halves its weights

HERE = Path(__file__).resolve().parent
VOCABULARY = "gpt2_vocabulary"  # folder of a Space with GPT-2's vocabulary
MODULES = ("configurator.py", "model.py", "muon.py", "run.py", "sample.py", "tokenizer.py")  # what this file imports
GPT2_FILES = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"  # tiktoken names its copies by these
N_BARS = 10
UPDATE_SECONDS = 0.05  # between updates of the page: with one for each token, a small model was three times slower
COMPUTING = threading.Lock()  # held during each step of the model: a step outlives the answer that was stopped
VISIBLE = str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥"})
UNITS = {"pretrain": "token", "finetune": "answer token", "dpo": "pair"}  # what each stage counts
METRICS = {
    "val_loss": "validation loss {:.3f} nats per {unit}",
    "val_bpb": "{:.3f} bits per byte",
    "val_preference_accuracy": "preference accuracy {:.1%}",
    "hellaswag_acc": "HellaSwag acc {:.1%}",
    "hellaswag_acc_norm": "acc_norm {:.1%}",
}
ASKED_FOR = re.compile(  # what the pages ask their server for, of all that Gradio serves
    r"(GET|HEAD) /?"
    r"|GET /(favicon\.ico|manifest\.json|theme\.css|(assets|static)/[\w./-]{1,200})"
    r"|GET /gradio_api/(app_id|queue/data|startup-events|heartbeat/\w+)"
    r"|POST /gradio_api/(cancel|reset|queue/join|run/predict)"
)
CSS = """
.chat .message-content * {white-space: pre-wrap}
.column:has(.stop-button) .chat [aria-label=Clear] {display: none} /* what is being written would come back */
.bars .text {overflow-wrap: anywhere}
.bars .confidence {display: none}
"""
# Edits of the text are caught here: the input event of Gradio's Textbox misses what is pasted or cut, and its change
# event also comes with each streamed token.
EDIT_JS = """
document.addEventListener('input', event => {
    if (event.target.matches('textarea')) setTimeout(() => trigger('input'));
});
"""


def main():
    if not 0 < port < 65536:
        raise BadInput(f"port must be 1 to 65535, not {port}")
    if not HAS_GRADIO and not assemble:
        raise BadInput("gradio is not installed: pip install -e '.[app]'")
    if (HERE / VOCABULARY).exists():
        os.environ["TIKTOKEN_CACHE_DIR"] = str(HERE / VOCABULARY)
    path = Path(checkpoint or HERE / "best.pt")
    chosen_device = run.pick_device(device)
    # on "meta", where weights need no memory: a missing vocabulary is reported before they are read
    tokenizer = tokenizer_of_checkpoint(run.load_checkpoint(path, "meta"))
    model, stored = run.load_model(path, chosen_device)
    chosen_dtype = run.pick_dtype(dtype, chosen_device, model.config.n_embd, run.BF16_WIDTH_DECODING)
    if assemble:
        write_space(model.bfloat16() if dtype == "bfloat16" else model, stored, Path(assemble))
        size = Path(assemble, "best.pt").stat().st_size
        print(f"{assemble}: a Space, best.pt has {size / 1e6:,.1f} MB; python app.py there shows the page")
        return
    with run.autocast_for(chosen_device, chosen_dtype)():
        model.for_decoding()  # converts the weights: autocast is off in the threads in which Gradio computes
    page, address = launch(model, tokenizer, stored, queue_size, host, port)
    print(f"{path}: open {address} in a browser, Ctrl-C stops it", flush=True)
    page.block_thread()


# ----------------------------------------------------------------------------------------------------------------------
# the folder of a Space


def write_space(model, stored, folder):
    """Write the folder of a Space: this file and what it imports, the weights, and what the Hub reads."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty: name another folder")
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
    names = ("stage", "tokenizer", "vocabulary", "step", "tokens", "metrics")
    public = {name: stored[name] for name in names if name in stored}
    run.save_checkpoint(folder / "best.pt", model, **public)


def questions():
    """The questions to try: questions.txt beside this file, as on a Space, or the ten of finetune.py."""
    if (HERE / "questions.txt").exists():
        return (HERE / "questions.txt").read_text(encoding="utf-8").splitlines()
    from finetune import QUESTIONS  # a Space has neither that file nor what it imports

    return QUESTIONS


def vocabulary_files():
    """Where tiktoken keeps GPT-2's two files, once it has downloaded them."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
    folder = Path(tempfile.gettempdir(), "data-gym-cache") if folder is None else Path(folder)
    return [folder / sha1((GPT2_FILES + name).encode()).hexdigest() for name in ("vocab.bpe", "encoder.json")]


# ----------------------------------------------------------------------------------------------------------------------
# how the pages look


def launch(model, tokenizer, stored, queue_size, host, port):
    """Start to serve the page of a checkpoint; returns (page, its address)."""
    make_page = completion_page if stored["stage"] == "pretrain" else chat_page
    page = make_page(model, tokenizer, about(model, stored), queue_size)
    page.queue(default_concurrency_limit=1, api_open=False)
    refuse_files(page)
    # fonts of the reader's machine; no history in the browser
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    try:
        _, address, _ = page.launch(
            server_name=host or None, server_port=port, share=False, ssr_mode=False, quiet=True,
            prevent_thread_lock=True, theme=theme, css=CSS, run_history=False, footer_links=[],
            app_kwargs=dict(middleware=[Middleware(only_what_is_asked_for, page)]),
        )  # fmt: skip
    except OSError:  # its text names settings of Gradio
        where = f"{host or 'this machine'}, port {port}"
        raise OSError(f"cannot listen at {where}: set another --port= or --host=") from None
    return page, address


def refuse_files(page):
    """Make a page refuse a request whose data name a file: Gradio would download it, or print a traceback."""
    preprocess_data = page.preprocess_data

    async def preprocess_without_files(function, inputs, *more, **options):
        files = []
        traverse(inputs, files.append, is_file_obj_with_meta)
        if files:
            raise gr.Error("This page takes no files.", print_exception=False)
        return await preprocess_data(function, inputs, *more, **options)

    page.preprocess_data = preprocess_without_files


def only_what_is_asked_for(app, page):
    """A middleware that answers 404 to requests that the page does not make, such as uploads and calls of the model."""

    async def serve(scope, receive, send):
        answer = app
        if scope["type"] == "http":
            request = Request(scope)
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            is_needed = ASKED_FOR.fullmatch(f"{request.method} {path}")
            if path == "/gradio_api/queue/data":  # Gradio prints tracebacks for a session that it does not know
                is_needed = request.query_params.get("session_hash") in page._queue.pending_messages_per_session
            if not is_needed:
                answer = PlainTextResponse("Not found", 404)
        await answer(scope, receive, send)

    return serve


def about(model, stored):
    """One line with the model's numbers, from its checkpoint."""
    config = model.config
    unit = UNITS[stored["stage"]]
    facts = [f"{model.n_params():,} parameters", f"{config.n_layer} layers of width {config.n_embd}"]
    facts.append(f"a context of {config.block_size:,} tokens")
    if stored.get("tokens"):  # an imported model has none
        facts.append(f"{stored['tokens']:,} {unit}s seen")
    metrics = stored.get("metrics", {})
    facts += [text.format(metrics[name], unit=unit) for name, text in METRICS.items() if name in metrics]
    return " · ".join(facts)


def sampling_controls(block_size):
    """Sliders, in the order in which `chat` and `complete` take them."""
    slider = partial(gr.Slider, min_width=250)
    return [
        slider(1, block_size, min(256, block_size), step=1, label="Length", info="new tokens at most"),
        slider(0, 2, 0.8, step=0.05, label="Temperature", info="0: always the most likely token"),
        slider(0, 200, 50, step=1, label="Top k", info="tokens to sample from; 0: all"),
    ]


def chat_page(model, tokenizer, description, queue_size):
    """The page for a finetuned model: Gradio's streaming, Stop, Retry, Undo, Clear and examples."""

    def check(question):
        block_size = model.config.block_size
        return verdict(page, queue_size, lambda: question_ids(model, tokenizer, question, [], block_size))

    chatbot = gr.Chatbot(
        render_markdown=False, latex_delimiters=[], buttons=[], show_label=False, scale=1, elem_classes="chat",
        placeholder="Ask a question, or try one of these",
    )  # fmt: skip
    show_exactly(chatbot)
    page = gr.ChatInterface(
        partial(chat, model, tokenizer), validator=check, chatbot=chatbot,
        textbox=gr.Textbox(
            label="Your question", placeholder="Your question", submit_btn="Send", stop_btn="Stop", autofocus=True
        ),
        examples=[[question] for question in questions()], run_examples_on_click=False, cache_examples=False,
        additional_inputs=sampling_controls(model.config.block_size),
        additional_inputs_accordion=gr.Accordion("Settings", open=False),
        title="fgpt: chat", description=description, api_visibility="private",
    )  # fmt: skip
    return page


def show_exactly(chatbot):
    """Make a gr.Chatbot show exactly the text of messages: even without Markdown, it takes them for HTML.

    Its methods are replaced because Gradio writes a file beside the source of each subclass of a component.
    """
    to_page = chatbot.postprocess

    def message(role, text):
        return {"role": role, "content": [{"type": "text", "text": text}]}  # a plain string would be dedented

    def postprocess(messages):
        return to_page([message(each["role"], escape(text_of(each))) for each in messages or []])

    def preprocess(shown):
        return [message(each.role, unescape(each.content[0].text)) for each in shown.root]

    chatbot.postprocess = postprocess
    chatbot.preprocess = preprocess


def text_of(message):
    """The text of a message of Gradio."""
    content = message["content"]
    return content if isinstance(content, str) else content[0]["text"]


def completion_page(model, tokenizer, description, queue_size):
    """The page for a base model: a text, and the ten most likely next tokens as bars."""

    def check(text, *controls):
        of_text = verdict(page, queue_size, lambda: text_ids(model, tokenizer, text))
        return [of_text, *(gr.validate(True, "") for _ in controls)]

    def append(text, additions, click: gr.SelectData):
        return text + additions[click.index]

    with gr.Blocks(title="fgpt: continue a text") as page:
        gr.Markdown(f"# fgpt: continue a text\n{description}")
        with gr.Row():
            with gr.Column(scale=3, min_width=300):
                text = gr.Textbox(label="Text", lines=11, max_lines=11, placeholder="Write a beginning", autofocus=True)
                with gr.Row():
                    go = gr.Button("Continue", variant="primary", min_width=80)
                    stop = gr.Button("Stop", min_width=80)
            with gr.Column(scale=2, min_width=300):
                edits = gr.HTML("Before temperature and top k. Click a token to append it.", js_on_load=EDIT_JS)
                likeliest = gr.Label(label="The most likely next tokens", num_top_classes=N_BARS, elem_classes="bars")
                additions = gr.State([])  # the text that each of them adds
        with gr.Row():
            controls = sampling_controls(model.config.block_size)

        show = dict(
            fn=partial(bars, model, tokenizer), inputs=text, outputs=[likeliest, additions], show_progress="hidden",
            trigger_mode="always_last", queue=False, api_visibility="private",
        )  # fmt: skip

        writing = go.click(
            partial(complete, model, tokenizer), [text, *controls], text, validator=check, show_progress="minimal",
            api_visibility="private",
        )  # fmt: skip
        writing.then(**show)  # also when it was stopped
        for event in (stop.click, edits.input, likeliest.select):  # one writer at a time
            event(None, cancels=writing)
        edits.input(**show)
        likeliest.select(append, [text, additions], text, queue=False, api_visibility="private").then(**show)
        page.load(**show)
    return page


# ----------------------------------------------------------------------------------------------------------------------
# what the pages do


def verdict(page, queue_size, read):
    """A gr.validate, which leaves a text in its box and says there why it is refused; read() raises BadInput.

    Gradio's own limit of the queue would also refuse the small events of ChatInterface, and its box stay locked.
    """
    try:
        if len(page._queue) >= queue_size:
            raise BadInput("too many answers are waiting: try again later")
        read()
    except BadInput as error:
        return gr.validate(False, sentence(error))
    return gr.validate(True, "")


def sentence(error):
    text = str(error)
    return f"{text[0].upper()}{text[1:]}."


def question_ids(model, tokenizer, question, history, max_new_tokens):
    """What fit_into_context returns. BadInput for a question that is empty or too long."""
    if not question.strip():
        raise BadInput("type a question first")
    check_length(tokenizer, question, model.config.block_size)
    return fit_into_context(tokenizer, question, history, model.config.block_size, max_new_tokens)


def check_length(tokenizer, text, block_size):
    """BadInput for a text that cannot fit, whatever its tokens are: nobody makes the server encode a whole book."""
    if len(text) > block_size * tokenizer.token_bytes().max():
        raise BadInput(f"that is {len(text):,} characters; the context holds {block_size:,} tokens: shorten the text")


def chat(model, tokenizer, question, history, max_new_tokens, temperature, top_k):
    """Answer a question that follows Gradio's history; yields the answer so far."""
    messages = [{"role": message["role"], "content": text_of(message)} for message in history]
    turns = []  # pairs of messages; a question that was stopped in the queue has no answer
    for pair in zip(messages, messages[1:], strict=False):
        if [message["role"] for message in pair] == ["user", "assistant"]:
            turns.append(pair)
    most = model.config.block_size // 4  # turns that can fit: each has at least 4 tokens
    recent = [message for pair in turns[-most:] for message in pair]
    ids, kept = question_ids(model, tokenizer, question, recent, int(max_new_tokens))
    n_forgotten = len(turns) - len(kept) // 2
    if n_forgotten:
        gr.Warning(f"The context is full: oldest turns forgotten: {n_forgotten}.")
    yield from grow(model, tokenizer, ids, max_new_tokens, temperature, top_k)


def grow(model, tokenizer, ids, max_new_tokens, temperature, top_k):
    """Continue ids; yields the text so far. A message on the page says why it ends, unless the model simply ended."""
    generated = model.generate([ids], int(max_new_tokens), temperature, int(top_k), stop=tokenizer.eot)
    tokens = []
    shown_at = 0.0
    yield ""  # so that an answer is in the conversation even if it is stopped at once
    while True:
        try:
            with COMPUTING:
                token = next(generated, None)
        except FloatingPointError as error:
            gr.Warning(sentence(error))
            return
        if token is None or token == tokenizer.eot:
            break
        tokens.append(int(token))
        if time.monotonic() > shown_at + UPDATE_SECONDS:
            yield tokenizer.decode(tokens).rstrip("\N{REPLACEMENT CHARACTER}")  # the first bytes of a character
            shown_at = time.monotonic()
    yield tokenizer.decode(tokens)
    if token is None:
        is_full = len(ids) + len(tokens) > model.config.block_size
        gr.Info("The context is full." if is_full else f"Cut after {len(tokens):,} tokens, the length that you set.")
    elif not tokens:
        gr.Info("The model ended at once.")


def complete(model, tokenizer, text, max_new_tokens, temperature, top_k):
    """Continue a text; yields the whole text so far."""
    ids = text_ids(model, tokenizer, text)
    for more in grow(model, tokenizer, ids, max_new_tokens, temperature, top_k):
        yield text + more


def text_ids(model, tokenizer, text):
    """The ids of a document that begins with the text. BadInput if it does not fit into the context."""
    check_length(tokenizer, text, model.config.block_size)
    ids = prompt_ids(tokenizer, text, is_chat=False)
    if len(ids) > model.config.block_size:
        raise BadInput(f"that is {len(ids):,} tokens; the context holds {model.config.block_size:,}: shorten the text")
    return ids


@torch.inference_mode()
def bars(model, tokenizer, text):
    """The most likely next tokens as a gr.Label, and a list of the text that each of them adds."""
    try:
        ids = torch.tensor([text_ids(model, tokenizer, text)], device=model.wte.weight.device)
    except BadInput as error:
        return gr.Label(sentence(error), show_heading=True), []
    with COMPUTING:
        logits = model.logits(model.hidden(ids)[:, -1])[0].float()
    top = logits.softmax(dim=-1).topk(N_BARS)
    shares = {}  # by what is shown: gr.Label itself would round them to whole percents
    additions = []
    for share, token in zip(top.values.tolist(), top.indices.tolist(), strict=True):
        name, addition = readable(tokenizer, token)
        shares[f"{share:.1%} {name}"] = share
        additions.append(addition)
    return gr.Label(shares, show_heading=False), additions


def readable(tokenizer, token):
    """(a token's name for the eye, the text it adds): no text for parts of a character and for control characters."""
    if token >= tokenizer.eot:
        return tokenizer.decode([token]), ""
    content = tokenizer.decode_bytes([token])
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return content.hex(" ").upper(), ""
    name = text.translate(VISIBLE)
    if not name.isprintable():
        name = ascii(name)[1:-1]
    if re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text):  # a text box changes or loses some of these
        text = ""
    return name, text


if __name__ == "__main__":
    configure(globals())
    main()
