"""
Fetch the published bAbI files, four books to train and choose with and four novels to evaluate in:
12, 3 and 7 MB, once.

    python -m data.download                      into data/babi, data/books and data/novels
    python -m data.download --out_dir DIR        into DIR/babi, DIR/books and DIR/novels

A download that breaks off is kept as FILE.part, and the same command continues it. All else is checked
before it is written: the archive's files by their SHA-256 (data/babi.sha256), each text by its title and its
size.

The SHA-256 of qa3's training file of en-10k was not at hand, so that file is not unpacked. Training
needs none of these files: stories are simulated, and there is a built-in background.
"""
import argparse
import hashlib
import http.client
import os
import re
import tarfile
import urllib.request
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


def fetch(url, path):
    """Download url to `path`, through path.part, where a broken one continues. ValueError if it fails."""
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "armt/1.0", **({"Range": f"bytes={have}-"} if have else {})}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
            have = have if answer.status == 206 else 0          # else the server sends all of it again
            length = answer.headers.get("Content-Length")
            total = have + int(length) if length else None
            with open(part, "ab" if have else "wb") as file, tqdm(
                    total=total, initial=have, desc=path.name, unit="B", unit_scale=True, leave=False) as bar:
                while block := answer.read(1 << 16):
                    file.write(block)
                    bar.update(len(block))
    except (OSError, http.client.HTTPException) as e:           # no network, a broken line, a full disk
        if getattr(e, "code", 0) == 416:                        # there is nothing after what we have
            part.unlink()
        raise ValueError(f"{url}: {e}; is there a network? The same command continues") from None
    if total is not None and part.stat().st_size != total:
        raise ValueError(f"{url}: broke off after {part.stat().st_size:,} of {total:,} bytes; "
                         f"the same command continues")
    os.replace(part, path)


def unpack(archive, wanted, folder):
    """The `wanted` files, {file: SHA-256}, to `folder`, checked, all or none. ValueError names one."""
    found = {}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                name = "/".join(Path(member.name).parts[-2:])
                if member.isfile() and name in wanted:
                    found[name] = tar.extractfile(member).read()
    except (tarfile.TarError, EOFError, OSError) as e:
        raise ValueError(f"{archive}: not a whole archive ({e}); the same command fetches it again") from None
    for name, digest in wanted.items():
        if hashlib.sha256(found.get(name, b"")).hexdigest() != digest:
            raise ValueError(f"{archive}: {name} is not the published file, or missing (its SHA-256 differs)")
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
        archive = out / "babi.tar.gz"
        sha = lambda path: path.exists() and hashlib.sha256(path.read_bytes()).hexdigest()
        if any(sha(out / "babi" / file) != digest for file, digest in wanted.items()):
            if not archive.exists():
                try:
                    fetch(BABI[0], archive)
                except ValueError as e:
                    print(f"{e}; trying another address")
                    fetch(BABI[1], archive)
            try:
                unpack(archive, wanted, out / "babi")
            finally:
                archive.unlink()                                # a bad one is fetched again by the next try
        print(f"{out / 'babi'}: bAbI v1.2, {len(wanted)} files of en-10k")
        for name, (number, title, size) in TEXTS.items():
            path, raw = out / name, out / f"{name}.raw"
            if not path.exists():
                fetch(GUTENBERG.format(number=number), raw)
                text = raw.read_bytes().decode("utf-8", errors="replace")
                raw.unlink()
                write(path, clean(text, title, size, path.name))
            print(f"{path}: {title}")
        print(f"next: python train.py --eval_only --out_dir data/pretrained --babi_dir {out / 'babi'} "
              f"--eval_text {out / 'novels' / 'middlemarch.txt'} --eval_lengths 0,1k,4k --eval_samples 100")


if __name__ == "__main__":
    main()
