"""Atomic writes, damage reported by name, one process in a folder at a time."""
import json
import os
import re
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:          # Windows has none; there, nothing keeps two processes out of one folder
    fcntl = None

RANK = int(os.environ.get("RANK", 0))        # set by torchrun; of several processes, 0 writes
FREE = ("eval_lengths", "eval_samples", "eval_text", "babi_dir", "device", "dtype", "compile", "threads",
        "out_dir")              # settings that may change when a run is continued, or differ between seeds


def read_text(file):
    """The text of a UTF-8 file. Errors are ValueErrors that name the file."""
    try:
        if Path(file).exists() and not Path(file).is_file():
            raise ValueError(f"{file} is not a file with text")         # a folder, or a device without end
        text = Path(file).read_bytes().decode("utf-8-sig")
    except OSError as e:
        fetch = "python -m data.download fetches books and novels"
        raise ValueError(f"cannot read {file}: {e.strerror} ({fetch})") from None
    except UnicodeDecodeError as e:
        raise ValueError(f"{file} is not UTF-8 text (byte {e.start})") from None
    if not text.strip():
        raise ValueError(f"{file} is empty")
    return text


def write_atomically(path, write):
    """`path` holds its old content or its new one, never a part; a failure leaves no temporary file."""
    temporary = Path(f"{path}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except RuntimeError as e:                            # of torch.save, where a disk is full
        raise OSError(f"cannot write {path}: {e}") from None
    finally:
        temporary.unlink(missing_ok=True)


def read_rows(folder):
    """The rows of metrics.jsonl, without half a last line (a power cut). ValueError names other damage."""
    path, rows = Path(folder, "metrics.jsonl"), []
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for n, line in enumerate(lines, start=1):
        try:
            rows += [row for row in [json.loads(line)] if row["kind"]] if line else []
        except (ValueError, TypeError, KeyError):
            if n < len(lines):
                raise ValueError(f"{path}, line {n}: damaged; delete the line to go on without it") from None
            print(f"{path}: the last line is cut off, and left out")
    return rows


def write_rows(folder, rows):
    """Rewrite metrics.jsonl with these rows only."""
    path, text = Path(folder, "metrics.jsonl"), "".join(json.dumps(row) + "\n" for row in rows)
    if RANK == 0 and path.exists():
        write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def add_row(folder, **row):
    if RANK == 0:
        with open(Path(folder, "metrics.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


@contextmanager
def only_user(folder):
    """ValueError if another process works in this folder. The lock of a process that died is free."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder, "lock"), "a+") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise ValueError(f"--out_dir: process {file.read()} is working in {folder}; wait for it, or "
                             f"choose another folder") from None
        file.truncate(0)
        print(os.getpid(), end="", file=file, flush=True)
        yield


@contextmanager
def one_line_errors(program, stopped="stopped"):
    """Whatever the user can mend ends a program with one line, not with a traceback."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")             # a console without some character shows another
    try:
        yield
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)         # pressed again, it would print a traceback
        sys.exit(f"{program}: {stopped}")
    except BrokenPipeError:                                  # as of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)                                        # as a shell calls what ended like this
    except (ValueError, OSError, ImportError) as e:
        sys.exit(f"{program}: {' '.join(str(e).split())}")
    except (MemoryError, RuntimeError) as e:
        if isinstance(e, MemoryError) or re.search("out of memory|allocate memory", str(e)):
            sys.exit(f"{program}: out of memory; try a smaller model, batch or text")
        if re.search(r"working (C\+\+ compiler|triton)", str(e), re.IGNORECASE):
            sys.exit(f"{program}: --compile 1 needs a C++ compiler and, on a GPU, Triton")
        raise
