"""Files of the Hugging Face Hub over an unreliable network: list them, download them, verify them.

    for file in list_hub("HuggingFaceFW/fineweb-edu", "sample/10BT"):
        path = download(file, Path("data"))

Needs requests and tqdm. A download that breaks off is resumed, also by a later run; a server that is busy is asked
again; everything else is an OSError of one line with the URL and what to do. HF_ENDPOINT and HF_TOKEN name another Hub
and a token for it.
"""

import hashlib
import logging
import os
import re
import sys
import time
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

import requests
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from urllib3.exceptions import InvalidHeader
from urllib3.util import Retry

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

STALL_SECONDS = 60  # without data, before a connection is dropped
RETRIES = 11  # ten minutes of waiting: retries without any progress
CONTACT_RETRIES = 5  # half a minute: retries of the first connection, few as the address may be wrong
FIRST_WAIT = 1  # seconds: the first retry follows at once, the next ones after 2, 4, 8, ... times this
LONGEST_WAIT = 300  # seconds, if a server asks for more; the Hub limits the requests of five minutes
RETRY_CODES = (408, 429, *range(500, 600))  # HTTP codes of a server that is busy or out of order
CHECK = "check the network (a proxy in between?) and, for the Hub, HF_ENDPOINT and HF_TOKEN"
ADVICE = {  # what to do about an HTTP code of the Hub
    401: "no such dataset or model, or it needs a token: check its name, set HF_TOKEN",
    403: "no access: accept the terms on its page, and set HF_TOKEN to a token of the account that did",
    404: "not found: check its name (a local path must exist), folder and revision",
    451: "withheld for legal reasons: choose another source",
}

logging.getLogger("urllib3").setLevel(logging.ERROR)  # AnnouncedRetry says the same, without signed links


class AnnouncedRetry(Retry):
    """urllib3's retries, which say what they wait for, and wait at most LONGEST_WAIT seconds."""

    def sleep(self, response=None):
        seconds = self.get_backoff_time()
        if response is not None:
            with suppress(InvalidHeader, ValueError, OverflowError):  # neither seconds nor a date, or too large
                seconds = self.get_retry_after(response) or seconds
        seconds = min(seconds, LONGEST_WAIT)
        failure = self.history[-1]
        reason = f"HTTP {failure.status}" if failure.status else f"no answer ({type(failure.error).__name__})"
        path = urlsplit(failure.url).path  # without the query, where signatures are
        tqdm.write(f"{path}: {reason}: trying again in {seconds:,.0f} s", file=sys.stderr)
        time.sleep(seconds)


def hub_endpoint():
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def is_hub(url):
    return urlsplit(url).netloc == urlsplit(hub_endpoint()).netloc


def is_repo(name):
    """Whether a name has the form of a dataset or model of the Hub, owner/name."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def is_commit(revision):
    return re.fullmatch("[0-9a-f]{40}", revision) is not None


# ----------------------------------------------------------------------------------------------------------------------
# requests and listings


def list_hub(repo, subset="", revision="main", wanted=lambda path: True, kind="datasets"):
    """Files of a Hub dataset (or kind="models") in a folder of it, those whose path is `wanted`, sorted: a dict each.

    name, url, size; checksum: sha256 (files in LFS) or git blob hash (small files); revision: a branch or tag is
    resolved to a commit, at which the files are listed and fetched (if the server reports no commit, the branch is
    used). FileNotFoundError when no file is wanted, OSError as `fetch_json`.
    """
    ref = quote(revision, safe="")
    folder = quote(subset.strip("/"))
    site = hub_endpoint() if kind == "models" else f"{hub_endpoint()}/{kind}"
    page = f"{hub_endpoint()}/api/{kind}/{repo}/tree/{ref}/{folder}".rstrip("/") + "?recursive=true"
    entries = {}
    while page:
        some, next_page = fetch_json(page)
        check_listing(some, page)
        n_before = len(entries)
        entries |= {entry["path"]: entry for entry in some}
        if next_page and len(entries) == n_before:
            raise OSError(f"{page}: the listing repeats itself: {CHECK}")
        page = next_page
    files = []
    for path, entry in entries.items():
        if entry["type"] == "file" and wanted(path):
            url = f"{site}/{repo}/resolve/{ref}/{quote(path)}"
            file = {"name": f"{repo}/{path}", "url": url, "size": entry["size"], "revision": revision}
            files.append({**file, "checksum": entry.get("lfs", entry)["oid"]})
    if not files:
        endings = ", ".join(sorted({Path(path).suffix for path in entries})) or "none"
        raise FileNotFoundError(
            f"{repo}/{subset}: no usable file (it has {endings}): name another folder or repository"
        )
    if not is_commit(revision):
        commit = request(files[0]["url"], method="HEAD", allow_redirects=False).headers.get("X-Repo-Commit", "")
        if is_commit(commit):
            return list_hub(repo, subset, commit, wanted, kind)  # list again, as the branch may have moved
    return sorted(files, key=lambda file: file["name"])


def fetch_json(url):
    """(content, URL of the next page or None) of a listing. OSError of one line with the URL and what to do."""
    for _ in range(3):
        response = request(url)
        try:
            return response.json(), response.links.get("next", {}).get("url")
        except (ValueError, RecursionError):
            raise OSError(f"{url}: the answer is not a listing: {CHECK}") from None
        except requests.RequestException as error:
            tqdm.write(f"{url}: the answer broke off ({type(error).__name__})", file=sys.stderr)
    raise OSError(f"{url}: the answer broke off three times: run the same command later")


def check_listing(entries, url):
    """OSError unless this is a list of entries."""
    if not isinstance(entries, list):
        raise OSError(f"{url}: the answer is not a listing: {CHECK}")
    for entry in entries:
        if not is_entry(entry):
            raise OSError(f"{url}: a damaged entry in the listing, {entry!r:.300}: {CHECK}")


def is_entry(entry):
    """Whether an entry of a listing has a path and a type and, if it is a file, a size and a checksum."""
    if not isinstance(entry, dict):
        return False
    path = entry.get("path")
    if not isinstance(path, str) or not re.fullmatch(r"[^\x00-\x1f\ud800-\udfff]+", path):  # surrogates cannot be UTF-8
        return False
    if entry.get("type") != "file":
        return isinstance(entry.get("type"), str)
    size = entry.get("size")
    if type(size) is not int or size < 0:  # not isinstance: True is no size
        return False
    blob = entry.get("lfs", entry)
    oid = blob.get("oid") if isinstance(blob, dict) else None
    return isinstance(oid, str) and re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", oid) is not None


def request(url, start=0, method="GET", contact_retries=CONTACT_RETRIES, **options):
    """The response to a request, whose content is still to be read: from byte `start` on, if the server can do that.

    The token goes to the Hub alone: requests drops it when a redirect leads to another host. OSError as `fetch_json`.
    """
    timeout = (10, STALL_SECONDS)  # seconds to connect, and of silence after that
    retries = AnnouncedRetry(RETRIES, connect=contact_retries, status_forcelist=RETRY_CODES, backoff_factor=FIRST_WAIT)
    try:
        with requests.Session() as session:
            session.mount("http://", HTTPAdapter(max_retries=retries))
            session.mount("https://", HTTPAdapter(max_retries=retries))
            headers = headers_for(url, start)
            response = session.request(method, url, headers=headers, timeout=timeout, stream=True, **options)
    except requests.exceptions.RetryError as error:
        reason = error.args[0].reason  # "too many 503 error responses"
        raise OSError(f"{url}: {reason}: run the same command later, it resumes") from None
    except (requests.RequestException, ValueError) as error:  # a ValueError is that of a malformed address
        raise OSError(f"{url}: no answer ({type(error).__name__}): {CHECK}") from None  # its text may contain the token
    code = response.status_code
    has_answered = code in (200, 206) or response.next  # a redirect that was not to be followed
    if not has_answered and not (code == 416 and start):  # 416: the server has no such range
        advice = "refused, perhaps because of too many requests: try again later"
        if is_hub(url):
            advice = ADVICE.get(code, "check the name, folder and revision")
        raise OSError(f"{url}: HTTP {code}: {advice}")
    if "text/html" in response.headers.get("Content-Type", ""):
        raise OSError(f"{url}: a web page came instead of data: {CHECK}")
    return response


def headers_for(url, start):
    headers = {"Accept-Encoding": "identity"}  # ranges and sizes are those of the file
    token = os.environ.get("HF_TOKEN", "").strip()
    if token and is_hub(url):
        headers["Authorization"] = f"Bearer {token}"
    if start:
        headers["Range"] = f"bytes={start}-"
    return headers


# ----------------------------------------------------------------------------------------------------------------------
# downloads


def download(file, folder):
    """Path of the file in `folder`, downloaded and verified; what is there already is used, partial content too.

    file: dict of url, size, checksum (sha256, or git blob hash) and perhaps save_as, a name other than that in the URL.
    If the content is wrong, it is downloaded again, twice. OSError of one line with the URL and what to do.
    """
    path, temporary = place(file, folder)
    expected = file["checksum"]
    is_git = len(expected) == 40
    if path.exists() and checksum(path, is_git) == expected:
        return path
    with tqdm(total=file["size"], desc=path.name, unit="B", unit_scale=True, leave=False, disable=None) as bar:
        for _ in range(3):
            receive(file["url"], temporary, file["size"], bar)
            found = checksum(temporary, is_git)
            if found == expected:
                os.replace(temporary, path)
                return path
            temporary.unlink()
            message = f"{file['url']}: wrong content, checksum {found}, not {expected}"
            tqdm.write(message, file=sys.stderr)
    raise OSError(f"{message}, three times: the server or a proxy has a damaged copy: run the same command later")


def place(file, folder):
    """Paths of a file that `download` has verified, and of the partial content of it."""
    name = file.get("save_as") or Path(unquote(urlsplit(file["url"]).path)).name
    return folder / name, folder / f"{name}.tmp"


def receive(url, path, size, bar):
    """Get what is missing of a file, over as many connections as it takes. OSError after RETRIES without progress."""
    path.parent.mkdir(parents=True, exist_ok=True)
    longest = size_of(path)
    n_in_vain = 0
    while size_of(path) < size:
        receive_some(url, path, size, bar)
        n_bytes = size_of(path)
        if n_bytes >= size:
            return
        n_in_vain += 1
        if n_bytes > longest:
            longest = n_bytes
            n_in_vain = 0
        message = f"{url}: broke off at {n_bytes:,} of {size:,} bytes"
        if n_in_vain > RETRIES:
            raise OSError(f"{message}, no progress: run the same command later, it resumes")
        seconds = FIRST_WAIT * 2 ** min(n_in_vain, 6)
        tqdm.write(f"{message}: resuming in {seconds:,.0f} s", file=sys.stderr)
        time.sleep(seconds)
    path.touch()  # nothing is asked for where the size is 0


def receive_some(url, path, size, bar):
    """Append the data of one connection to a file; start over if the server cannot continue where it ends."""
    start = size_of(path)
    with request(url, start, contact_retries=RETRIES) as response:
        if response.status_code != 200 and not continues(response, start):
            path.unlink(missing_ok=True)
            return
        with open_alone(path, keep=response.status_code == 206) as target, suppress(requests.RequestException):
            for chunk in response.iter_content(1 << 16):  # of a chunk that breaks off nothing is kept
                target.write(chunk[: size - target.tell()])
                bar.update(target.tell() - bar.n)
                if target.tell() == size:  # whatever else the server sends
                    break


def continues(response, start):
    """Whether a response is a part of the file itself, not of compressed content, from byte `start` on."""
    headers = response.headers
    is_plain = headers.get("Content-Encoding", "identity") == "identity"
    return is_plain and headers.get("Content-Range", "").startswith(f"bytes {start}-")


def open_alone(path, keep=False):
    """The file opened for writing, empty or (keep) at its end. OSError while another process has opened it so.

    On Windows nothing keeps another process from writing it too.
    """
    file = open(path, "r+b", opener=lambda name, flags: os.open(name, flags | os.O_CREAT, 0o666))
    try:
        if fcntl is not None:
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


def checksum(path, is_git=False):
    """sha256 of a file, or its git blob hash."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size) if is_git else hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
