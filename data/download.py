"""
Fetch the published bAbI files, four books to train and choose with and four novels to evaluate in:
12, 3 and 7 MB, once.

    python -m data.download                      into data/babi, data/books and data/novels
    python -m data.download --out_dir DIR        into DIR/babi, DIR/books and DIR/novels

All is checked before it is written: the archive's files by their SHA-256 (data/babi.sha256), each text by its
title and its size. What is there already is not fetched again.

The SHA-256 of qa3's training file of en-10k was not at hand, so that file is not unpacked. Training
needs none of these files: stories are simulated, and there is a built-in background.
"""
import argparse
import hashlib
import http.client
import io
import re
import shutil
import tarfile
import urllib.request
import zlib
from pathlib import Path

from tqdm import tqdm

from .files import one_line_errors, write_atomically

HERE = Path(__file__).parent
BABI = ["https://s3.amazonaws.com/text-datasets/babi_tasks_1-20_v1-2.tar.gz",
        "https://www.thespermwhale.com/jaseweston/babi/tasks_1-20_v1-2.tar.gz"]
GUTENBERG = "https://www.gutenberg.org/cache/epub/{number}/pg{number}.txt"
TEXTS = {         # number at Project Gutenberg, title, bytes of our copy without the frame of the publisher
    "books/moby_dick.txt": (2701, "Moby Dick", 1_215_120),
    "books/pride_and_prejudice.txt": (1342, "Pride and Prejudice", 684_707),
    "books/log_school_house_on_the_columbia.txt": (14881, "The Log School-House on the Columbia", 252_873),
    "books/adventures_of_sherlock_holmes.txt": (1661, "The Adventures of Sherlock Holmes", 562_338),
    "novels/bleak_house.txt": (1023, "Bleak House", 1_941_372),
    "novels/david_copperfield.txt": (766, "David Copperfield", 1_934_512),
    "novels/middlemarch.txt": (145, "Middlemarch", 1_794_597),
    "novels/vanity_fair.txt": (599, "Vanity Fair", 1_715_864)}


def fetch(url):
    """The bytes at a url, with a bar. ValueError if they cannot be had, or not all of them."""
    content, request = io.BytesIO(), urllib.request.Request(url, headers={"User-Agent": "armt/1.0"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            total = int(answer.headers.get("Content-Length") or 0)
            with tqdm.wrapattr(answer, "read", total or None, desc=Path(url).name, leave=False) as stream:
                shutil.copyfileobj(stream, content)
    except (OSError, http.client.HTTPException) as e:           # no network, a broken line
        raise ValueError(f"{url}: {e}; is there a network? The same command continues") from None
    if (got := content.tell()) < total:
        raise ValueError(f"{url}: broke off after {got:,} of {total:,} bytes; the same command continues")
    return content.getvalue()


def unpack(archive, wanted, folder):
    """The `wanted` files, {file: SHA-256}, to `folder`, checked, all or none. ValueError names one."""
    found = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            for member in tar:
                name = "/".join(Path(member.name).parts[-2:])
                if member.isfile() and name in wanted:
                    found[name] = tar.extractfile(member).read()
    except (tarfile.TarError, zlib.error, EOFError, OSError) as e:
        raise ValueError(f"bAbI's archive is not whole ({e}); the same command fetches it again") from None
    for name, digest in wanted.items():
        if hashlib.sha256(found.get(name, b"")).hexdigest() != digest:
            raise ValueError(f"bAbI's archive: {name} is not the published file, or missing (its SHA-256 "
                             f"differs)")
    for name, content in found.items():
        write(folder / name, content)


def clean(text, title, size, name):
    """The text without the publisher's frame around it. ValueError if it is another text or not whole."""
    frame = re.search(r"\*\*\* ?START OF .*?\*\*\*(.*)\*\*\* ?END OF ", text, re.DOTALL)
    if title.lower() not in re.sub(r"\s+", " ", text[:3000]).lower():
        raise ValueError(f"{name}: its beginning does not say '{title}'")
    if not frame or not 0.9 * size < len(frame[1].encode()) < 1.2 * size:
        raise ValueError(f"{name}: expected about {size:,} bytes between the lines *** START and *** END")
    return (frame[1].replace("\r\n", "\n").strip() + "\n").encode()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def main(argv=None):
    """The program. `argv` is a list of arguments; None takes those of the command line."""
    parser = argparse.ArgumentParser(prog="python -m data.download", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out_dir", type=Path, default=HERE, help="where babi, books and novels go (data)")
    out = parser.parse_args(argv).out_dir
    with one_line_errors("data.download", "stopped; the same command continues"):
        wanted = dict(line.split()[::-1] for line in (HERE / "babi.sha256").read_text().splitlines())
        sha = lambda path: path.exists() and hashlib.sha256(path.read_bytes()).hexdigest()
        if any(sha(out / "babi" / file) != digest for file, digest in wanted.items()):
            try:
                archive = fetch(BABI[0])
            except ValueError as e:
                print(f"{e}; trying another address")
                archive = fetch(BABI[1])
            unpack(archive, wanted, out / "babi")
        print(f"{out / 'babi'}: bAbI v1.2, {len(wanted)} files of en-10k")
        for name, (number, title, size) in TEXTS.items():
            path = out / name
            if not path.exists():
                text = fetch(GUTENBERG.format(number=number)).decode("utf-8", errors="replace")
                write(path, clean(text, title, size, path.name))
            print(f"{path}: {title}")
        print(f"next: python train.py --eval_only --out_dir data/pretrained --babi_dir {out / 'babi'} "
              f"--eval_text {out / 'novels' / 'middlemarch.txt'} --eval_lengths 0,1k,4k --eval_samples 100")


if __name__ == "__main__":
    main()
