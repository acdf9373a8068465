"""Unpack chosen members of a wheel or .tar.gz, running nothing that is in it.

Arguments: archive, destination folder, rules as a JSON list of
{"members": [glob], "except": [glob], "strip": prefix, "append_to": path or null, "rows": form or null}.
A glob's * also matches /. Every glob of `members` must match something. With `rows`, a member is
rewritten as JSONL rows with the fields `prompt` and `completion`, and those of its own that help to score.
"""
import fnmatch
import gzip
import io
import json
import os
import shutil
import sys
import tarfile
import zipfile
import zlib


def jsonl(stream):
    return (json.loads(line) for line in io.TextIOWrapper(stream, "utf-8") if line.strip())


def question_answer(stream):
    for row in jsonl(stream):
        yield {"prompt": row["question"], "completion": row["answer"]}


def alpaca(stream):
    for row in json.load(stream):
        parts = [row["instruction"], row.get("input", "")]
        yield {"prompt": "\n\n".join(part for part in parts if part), "completion": row["output"]}


def bigbench(stream):
    task = json.load(stream)
    for row in task["examples"]:
        targets = row["target"] if isinstance(row["target"], list) else [row["target"]]
        prompt = task["task_prefix"].strip() + "\n\n" + row["input"].strip()
        yield {"prompt": prompt, "completion": targets[0], "targets": targets}


def choices(stream):
    """One scoring request per choice there, one row per question here."""
    seen = set()
    for row in jsonl(gzip.GzipFile(fileobj=stream)):
        if row["doc_id"] in seen:
            continue
        seen.add(row["doc_id"])
        doc = row["doc"]
        prompt = doc["query"]
        if "question" in doc:
            prompt = f"Question: {doc['question']}\nAnswer:"
        if doc.get("support"):
            prompt = f"{doc['support'].strip()}\n{prompt}"
        right = doc["choices"][doc["gold"]]
        yield {"prompt": prompt, "completion": " " + right, "choices": doc["choices"], "gold": doc["gold"]}


FORMS = {"question-answer": question_answer, "alpaca": alpaca, "bigbench": bigbench, "choices": choices}

archive, destination, rules = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
unmatched = {glob for rule in rules for glob in rule["members"]}


def rule_for(name):
    for rule in rules:
        hits = [glob for glob in rule["members"] if fnmatch.fnmatchcase(name, glob)]
        if hits and not any(fnmatch.fnmatchcase(name, glob) for glob in rule["except"]):
            unmatched.difference_update(hits)
            return rule
    return None


def target(name, rule):
    if rule["append_to"]:
        return rule["append_to"]
    if not name.startswith(rule["strip"]):
        sys.exit(f"{name}: does not start with {rule['strip']!r}")
    relative = name[len(rule["strip"]):]
    if rule["rows"] == "bigbench":
        relative = relative.replace("/task.json", ".jsonl")
    return relative


def write(name, rule, stream):
    relative = target(name, rule)
    parts = relative.split("/")
    if not relative or relative.startswith("/") or ".." in parts or "\\" in relative:
        sys.exit(f"{name}: unsafe path {relative!r}")
    path = os.path.join(destination, *parts)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "ab" if rule["append_to"] else "wb") as out:
        if rule["rows"]:
            for row in FORMS[rule["rows"]](stream):
                out.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        else:
            shutil.copyfileobj(stream, out, 1 << 20)
        # Thousands of headers are not worth a sync each; the large files are what a crash would cut.
        if out.tell() > 1 << 20:
            out.flush()
            os.fsync(out.fileno())


try:
    if archive.endswith(".whl"):
        with zipfile.ZipFile(archive) as wheel:
            for info in wheel.infolist():
                rule = None if info.is_dir() else rule_for(info.filename)
                if rule:
                    with wheel.open(info) as stream:
                        write(info.filename, rule, stream)
    else:
        with tarfile.open(archive, "r:gz") as sdist:
            for info in sdist:
                # Regular files only: a link could point outside the folder.
                rule = rule_for(info.name) if info.isreg() else None
                if rule:
                    write(info.name, rule, sdist.extractfile(info))
except (OSError, EOFError, KeyError, ValueError, zlib.error, zipfile.BadZipFile, tarfile.TarError) as error:
    sys.exit(f"{type(error).__name__}: {error}")
if unmatched:
    sys.exit("no member matches " + ", ".join(sorted(unmatched)))
