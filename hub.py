"""The Hugging Face Hub over an unreliable network: list a dataset's files, download them, verify them.

    for file in list_hub("HuggingFaceFW/fineweb-edu", "sample/10BT"):
        path = download(file, Path("data"))

What breaks off is resumed, also by a later run; what the server cannot do now is tried again; what cannot be got is one
line with the URL and what to do. HF_ENDPOINT and HF_TOKEN name another Hub and a token for it.
"""

import fcntl
import hashlib
import os
import re
import sys
import threading
import time
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from urllib.parse import quote, urlsplit

import requests
from tqdm import tqdm
from urllib3.exceptions import InvalidHeader
from urllib3.util import Retry

STALL_SECONDS = 60  # a connection that is silent for so long is given up
FIRST_CONTACT, PATIENCE = 30, 600  # seconds without any progress: see `patiently`
FIRST_WAIT, LONGEST_WAIT = 1, 60  # seconds between tries: doubled each time
ADVICE = {  # what to do after an HTTP code of the Hub
    401: "no such dataset or model, or it asks for a token: check its name, set HF_TOKEN",
    403: "no access: accept the terms on its page, and set HF_TOKEN to a token of the account that did",
    404: "not there: check its name (a local path has to exist), folder and revision",
    451: "withheld for legal reasons: choose another source",
}


class Later(OSError):
    """A request failed that may succeed later. seconds: the wait that the server asks for; None: it did not answer."""

    def __init__(self, message, seconds=None):
        super().__init__(message)
        self.seconds = seconds


def hub_endpoint():
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def is_hub(url):
    return urlsplit(url).netloc == urlsplit(hub_endpoint()).netloc


def is_repo(name):
    """Whether a name has the form of a dataset or model of the Hub, owner/name."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def list_hub(repo, subset="", revision="main", wanted=lambda path: True, kind="datasets"):
    """Files of a Hub dataset (or kind="models"): those in a folder of it whose path is `wanted`, sorted; a dict each.

    name, url, size; checksum: sha256 (files in LFS) or git blob hash (small files); revision: a branch, tag or commit
    is resolved to a commit, at which the files are listed and fetched (a server that does not name it is asked for the
    one given). ValueError when no file is wanted, OSError as `fetch`.
    """
    subset, ref = subset.strip("/"), quote(revision, safe="")
    url = f"{hub_endpoint()}/api/{kind}/{repo}/tree/{ref}{'/' * bool(subset)}{quote(subset)}?recursive=true"
    files, endings = [], set()
    while url:  # the listing comes in pages
        response = fetch(url)
        for entry in json_of(response):
            path = entry["path"]
            endings.add(Path(path).suffix)
            if entry["type"] == "file" and wanted(path):
                link = f"{hub_endpoint()}/{'datasets/' * (kind == 'datasets')}{repo}/resolve/{ref}/{quote(path)}"
                file = {"name": f"{repo}/{path}", "url": link, "size": entry["size"], "revision": revision}
                files.append({**file, "checksum": entry.get("lfs", entry)["oid"]})
        url = response.links.get("next", {}).get("url")
    if not files:
        raise ValueError(
            f"{repo}: no file that can be used in {subset or 'it'} (it has {', '.join(sorted(endings)) or 'none'}): "
            "name another folder or repository"
        )
    if not is_commit(revision):
        commit = fetch(files[0]["url"], method="HEAD", allow_redirects=False).headers.get("X-Repo-Commit", "")
        if is_commit(commit):
            return list_hub(repo, subset, commit, wanted, kind)  # listed again, as the branch may have moved
    return sorted(files, key=lambda file: file["name"])


def json_of(response):
    """What a listing holds. OSError where it is not JSON."""
    try:
        return response.json()
    except ValueError:
        setting = ", check HF_ENDPOINT" * is_hub(response.url)
        raise OSError(f"{response.url}: no listing came: is there a proxy in between?{setting}") from None


def is_commit(revision):
    return re.fullmatch("[0-9a-f]{40}", revision) is not None


def patiently(attempt, patience=None, progress=lambda: 0):
    """attempt(), again and again while it raises Later, waiting as long as the server asks for, else ever longer.

    OSError after `patience` seconds without progress(); None: FIRST_CONTACT without any answer, else PATIENCE.
    """
    since, best, wait = time.monotonic(), progress(), FIRST_WAIT
    while True:
        try:
            return attempt()
        except Later as error:
            if progress() > best:
                since, best, wait = time.monotonic(), progress(), FIRST_WAIT
            limit = patience or (FIRST_CONTACT if error.seconds is None else PATIENCE)
            seconds = max(wait, error.seconds or 0)
            if time.monotonic() + seconds - since > limit:
                raise OSError(f"{error}: no progress: run the same command later, it goes on from there") from None
            tqdm.write(f"{error}: trying again in {seconds:,.0f} s", file=sys.stderr)
            time.sleep(seconds)
            wait = min(2 * wait, LONGEST_WAIT)


def fetch(url, **options):
    """The response to a request that is tried again with patience. OSError, one line with the URL and what to do."""
    return patiently(partial(request, url, **options))


def request(url, start=0, method="GET", **options):
    """The response to one request, from byte `start` on where the server can do that.

    The token goes to the Hub alone: requests drops it when a redirect leads to another host. Raises Later where it
    makes sense to try again, else OSError, one line with the URL and what to do.
    """
    token, headers = os.environ.get("HF_TOKEN", "").strip(), {"Accept-Encoding": "identity"}
    if token and is_hub(url):
        headers["Authorization"] = f"Bearer {token}"
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        response = requests.request(method, url, headers=headers, timeout=(10, STALL_SECONDS), **options)
    except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
        stalled = isinstance(error, requests.ReadTimeout)  # there is a server
        setting = " and HF_ENDPOINT" * is_hub(url)
        message = f"{url}: no answer ({type(error).__name__}): check the network{setting}"
        raise Later(message, 0 if stalled else None) from None
    except requests.RequestException as error:  # whose text may hold the token
        what = "HF_ENDPOINT and HF_TOKEN" if is_hub(url) else "the network"
        raise OSError(f"{url}: {type(error).__name__}: check {what}") from None
    code, after = response.status_code, response.headers.get("Retry-After")
    if code in (408, 429) or code >= 500:
        try:
            seconds = Retry().parse_retry_after(after or "0")  # seconds, or a date
        except InvalidHeader:
            seconds = 0
        raise Later(f"{url}: HTTP {code}", seconds)
    if code >= 400 and not (code == 416 and start):
        elsewhere = "refused, perhaps because too many requests came: try again later"
        advice = ADVICE.get(code, "check the name, folder and revision") if is_hub(url) else elsewhere
        raise OSError(f"{url}: HTTP {code}: {advice}")
    if "text/html" in response.headers.get("Content-Type", ""):
        raise OSError(f"{url}: a web page came instead of data: is there a proxy or sign-in page in between?")
    return response


def receive(url, path, size, bar):
    """Get what is missing of the file over one connection. Raises Later when that breaks off."""
    start = size_of(path)
    if size is not None and start == size:
        return
    with request(url, start, stream=True) as response:
        sent = response.headers.get("Content-Range", "")
        if response.status_code == 416 and sent.endswith(f"/{start}"):
            return  # it was whole
        if response.status_code == 416 or response.status_code == 206 and not sent.startswith(f"bytes {start}-"):
            path.unlink()
            raise Later(f"{url}: {start:,} bytes are there, the server cannot go on from them: begins anew", 0)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open_alone(path, keep=response.status_code == 206) as target:
                for chunk in response.iter_content(1 << 16):  # of a chunk that breaks off nothing is kept
                    target.write(chunk)
                    bar.update(target.tell() - bar.n)
        except requests.RequestException as error:
            raise Later(f"{url}: broke off at {size_of(path):,} bytes ({type(error).__name__})") from None
    if size_of(path) < (size or 0):
        raise Later(f"{url}: ended at {size_of(path):,} of {size:,} bytes")


def open_alone(path, keep=False):
    """The file open to write, empty or (keep) at its end. OSError while another process has it open so."""
    file = open(path, "r+b", opener=lambda name, flags: os.open(name, flags | os.O_CREAT, 0o666))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that ends
    except BlockingIOError:
        file.close()
        raise OSError(f"{path}: another process is writing it: wait until it is done") from None
    if file.seek(0, os.SEEK_END) and not keep:
        file.seek(0)
        file.truncate()
    return file


def size_of(path):
    """Bytes of a file, 0 where there is none."""
    return path.stat().st_size if path.exists() else 0


def place(file, folder):
    """Paths of a file that `download` has verified, and of what it has of it so far."""
    name = file.get("save_as") or file.get("name", urlsplit(file["url"]).path).rsplit("/", 1)[-1]
    return folder / name, folder / f"{name}.tmp"


def download(file, folder):
    """Path of the file in `folder`, fetched and verified; what is there already is used, in parts too.

    file: dict of url and checksum (sha256, or git blob hash), and optionally size, name, and save_as (what to call it).
    A file that is not what was meant is fetched again, twice. Raises OSError, one line with the URL and what to do.
    """
    path, temporary = place(file, folder)
    size, expected = file.get("size"), file["checksum"]
    is_git = len(expected) == 40
    if path.exists() and checksum(path, is_git) == expected:
        return path
    bar = tqdm(total=size, desc=path.name, unit="B", unit_scale=True, leave=False, disable=None)
    for n_left in (2, 1, 0):
        patiently(partial(receive, file["url"], temporary, size, bar), PATIENCE, partial(size_of, temporary))
        found = checksum(temporary, is_git)
        if found == expected:
            os.replace(temporary, path)
            bar.close()
            return path
        temporary.unlink()
        if n_left:
            tqdm.write(f"{file['url']}: checksum {found}, not {expected}: fetching it again", file=sys.stderr)
    raise OSError(
        f"{file['url']}: three times the wrong content, checksum {found}, not {expected}: the server or a proxy in "
        "between has a damaged copy: run the same command later"
    )


def fetch_ahead(files, folder):
    """Yield the path of each file; while it is used, the next one downloads. An error comes when its turn comes."""

    def start(file):
        def work():
            try:
                future.set_result(file["path"] if "path" in file else download(file, folder))
            except BaseException as error:
                future.set_exception(error)

        future = Future()
        threading.Thread(target=work, daemon=True).start()  # an executor's would keep a process that ends alive
        return future

    future = start(files[0]) if files else None
    for following in files[1:] + [None]:
        path = future.result()
        future = start(following) if following else None
        yield path


def checksum(path, is_git=False):
    """sha256 of a file, or its git blob hash."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size) if is_git else hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
