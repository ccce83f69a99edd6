"""
Fetch the published bAbI files, four public-domain books and the four texts in English of the Canterbury corpus (parts of
Alice in Wonderland, As You Like It, Paradise Lost, and the report of a workshop): 12, 3 and 1 MB, once.

    python -m data.download                      into data/babi, data/books and data/canterbury
    python -m data.download --out_dir DIR        into DIR/babi, DIR/books and DIR/canterbury

A download that breaks off is kept as FILE.part, and the same command goes on with it. Nothing else is written before it
was checked: what comes in an archive by its SHA-256 (data/*.sha256), each book by its title and its size.

The SHA-256 of qa3's training file of en-10k was not at hand, so that file is left in the archive. Training on qa1 to
qa5 needs none of these files: their stories are simulated.
"""
import argparse
import hashlib
import http.client
import os
import re
import sys
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

HERE = Path(__file__).parent
ARCHIVES = {      # folder: what it is, where to get it
    "babi": ("bAbI v1.2, 39 of the 40 files of en-10k", [
        "https://s3.amazonaws.com/text-datasets/babi_tasks_1-20_v1-2.tar.gz",
        "https://www.thespermwhale.com/jaseweston/babi/tasks_1-20_v1-2.tar.gz"]),
    "canterbury": ("four texts of the Canterbury corpus", [
        "https://corpus.canterbury.ac.nz/resources/cantrbry.tar.gz"])}
BOOKS = "https://www.gutenberg.org/cache/epub/{number}/pg{number}.txt"
CHOSEN = {       # file: number at Project Gutenberg, title, bytes of our copy without the frame of the publisher
    "moby_dick.txt": (2701, "Moby Dick", 1_215_120),
    "pride_and_prejudice.txt": (1342, "Pride and Prejudice", 684_707),
    "log_school_house_on_the_columbia.txt": (14881, "The Log School-House on the Columbia", 252_873),
    "adventures_of_sherlock_holmes.txt": (1661, "The Adventures of Sherlock Holmes", 562_338)}


def fetch(url, path):
    """
    Download url to `path`, through path.part, from which a broken download goes on. ValueError, one line, when the
    server cannot be reached, breaks off, or sends another number of bytes than it said.
    """
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "armt/1.0", **({"Range": f"bytes={have}-"} if have else {})}
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            goes_on = answer.status == 206                              # else the server sends all of it again
            have = have if goes_on else 0
            length = answer.headers.get("Content-Length")
            total = have + int(length) if length else None
            with open(part, "ab" if goes_on else "wb") as file, tqdm(
                    total=total, initial=have, desc=path.name, unit="B", unit_scale=True, leave=False) as bar:
                while block := answer.read(1 << 16):
                    file.write(block)
                    bar.update(len(block))
    except urllib.error.HTTPError as e:
        if e.code == 416:                                               # there is nothing after what we have
            part.unlink()
        raise ValueError(f"{url}: the server says {e.code} {e.reason}") from None
    except (OSError, http.client.HTTPException) as e:                   # no network, a broken line, a full disk
        raise ValueError(f"{url}: {getattr(e, 'reason', e)}; is there a network? The same command goes on") from None
    size = part.stat().st_size
    if total is not None and size != total:
        raise ValueError(f"{url}: broke off after {size:,} of {total:,} bytes; the same command goes on")
    os.replace(part, path)


def hashes(name):
    """{file: SHA-256} of what an archive has to hold."""
    return dict(line.split()[::-1] for line in (HERE / f"{name}.sha256").read_text().splitlines())


def unpack(archive, wanted, folder):
    """
    The `wanted` files, {file: SHA-256}, from the archive to `folder`, checked, all or none. ValueError names the file
    that is missing or not the published one.
    """
    found = {}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                for name in wanted:
                    if member.isfile() and f"/{member.name}".endswith(f"/{name}"):
                        found[name] = tar.extractfile(member).read()
    except (tarfile.TarError, EOFError, OSError) as e:
        raise ValueError(f"{archive}: not a whole archive ({e}); the same command fetches it again") from None
    for name, digest in wanted.items():
        if name not in found:
            raise ValueError(f"{archive}: {name} is missing in it")
        if hashlib.sha256(found[name]).hexdigest() != digest:
            raise ValueError(f"{archive}: {name} is not the published file (its SHA-256 differs)")
    for name, content in found.items():
        write(folder / name, content)


def clean_book(text, title, size, name):
    """The book without the frame that the publisher puts around it. ValueError if it is another one or not whole."""
    frame = re.search(r"\*\*\* ?START OF .*?\*\*\*(.*)\*\*\* ?END OF ", text, re.DOTALL)
    if title.lower() not in re.sub(r"\s+", " ", text[:3000]).lower():
        raise ValueError(f"{name}: its beginning does not say '{title}'")
    if not frame or not 0.9 * size < len(frame[1].encode()) < 1.2 * size:
        raise ValueError(f"{name}: expected about {size:,} bytes between the lines *** START and *** END")
    return frame[1].replace("\r\n", "\n").strip() + "\n"


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def first_that_works(urls, path):
    """Fetch from the first address that answers. ValueError with all that went wrong."""
    wrong = []
    for url in urls:
        try:
            return fetch(url, path)
        except ValueError as e:
            wrong.append(str(e))
    raise ValueError("; ".join(wrong))


def main(argv=None):
    """The program. `argv` is a list of arguments; None takes those of the command line."""
    parser = argparse.ArgumentParser(prog="python -m data.download", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out_dir", type=Path, default=HERE, help="where to put babi, books and canterbury (data)")
    out = parser.parse_args(argv).out_dir
    try:
        for name, (what, urls) in ARCHIVES.items():
            wanted, archive = hashes(name), out / f"{name}.tar.gz"
            if not all((out / name / file).exists() for file in wanted):
                if not archive.exists():
                    first_that_works(urls, archive)
                try:
                    unpack(archive, wanted, out / name)
                except ValueError:
                    archive.unlink()                                    # so that the next try fetches it again
                    raise
                archive.unlink()
            print(f"{out / name}: {what}")
        for name, (number, title, size) in CHOSEN.items():
            path, raw = out / "books" / name, out / "books" / f"{name}.raw"
            if not path.exists():
                fetch(BOOKS.format(number=number), raw)
                text = raw.read_bytes().decode("utf-8", errors="replace")
                raw.unlink()
                write(path, clean_book(text, title, size, name).encode())
            print(f"{path}: {title}")
    except (ValueError, OSError) as e:
        sys.exit(f"data.download: {e}")
    print(f"next: python train.py --eval_only --out_dir data/pretrained/joint-armt-seed0 --babi_dir {out / 'babi'} "
          f"--background {out / 'books' / 'adventures_of_sherlock_holmes.txt'} --eval_lengths 0,1k,4k")


if __name__ == "__main__":
    main()
