"""Unpack chosen members of a wheel or .tar.gz, running nothing that is in it.

Arguments: archive, destination folder, rules as a JSON list of
{"members": [glob], "except": [glob], "strip": prefix, "append_to": path or null, "rows": form or null}.
A glob's * also matches /. Every glob of `members` must match something. With `rows`, a member is
rewritten as JSONL rows with the fields `prompt` and `completion` (or judged completions), and those of its own that
help to score. Forms that split rows into training and validation name the files themselves.
"""
import fnmatch
import gzip
import hashlib
import io
import json
import os
import re
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
        # Numbers from a million on are the same questions again, for scores without the question.
        if row["doc_id"] in seen or row["doc_id"] >= 1000000:
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


def lot(*parts):
    """A number that depends on the texts alone: for splits and choices that come out the same everywhere."""
    return int(hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12], 16)


def side(key):
    """One key in ten is held out."""
    return "validation" if lot(key) % 10 == 0 else "train"


def choice_pairs(stream):
    """The right option, and one of the wrong ones."""
    for row in choices(stream):
        right = row.pop("completion")
        wrong = [choice for index, choice in enumerate(row["choices"]) if index != row["gold"] and choice != right[1:]]
        if wrong:
            rejected = " " + wrong[lot(row["prompt"]) % len(wrong)]
            yield {"prompt": row.pop("prompt"), "chosen": right, "rejected": rejected, **row}


def scored_pairs(stream):
    """A task of two answers to an input, scored 1 and 0; earlier turns in the input become messages."""
    task = json.load(stream)
    for row in task["examples"]:
        answers = {score: text for text, score in row["target_scores"].items()}
        turns = re.split(r"\n\n(Human|Assistant): ?", "\n\nHuman: " + row["input"])[1:]
        roles = {"Human": "user", "Assistant": "assistant"}
        prompt = [{"role": roles[who], "content": text.strip()} for who, text in zip(turns[::2], turns[1::2])]
        chosen, rejected = ([{"role": "assistant", "content": answers[score].strip()}] for score in (1, 0))
        yield {"prompt": prompt, "chosen": chosen, "rejected": rejected, "task": task["name"]}


def halueval(stream):
    """Answers to a question on a passage, right and hallucinated; split by passage."""
    for row in jsonl(stream):
        passage = row["knowledge"].strip()
        prompt = f"{passage}\nQuestion: {row['question'].strip()}\nAnswer:"
        right, wrong = row["right_answer"].strip(), row["hallucinated_answer"].strip()
        if right and wrong and right != wrong:
            yield side(passage) + ".jsonl", {"prompt": prompt, "chosen": " " + right, "rejected": " " + wrong}


def judged_pairs(stream):
    """AlpacaEval's judgements as pairs, ties left out, and as ranked lists; both split by the prompt's first paragraph,
    since instructions come with several inputs, and with an input as part of them or beside them.

    A prompt's outputs were each compared with one reference output. A list holds the output that was compared most
    often (the reference) and up to seven more, better and worse than it in turn, and ranks them by the share of
    comparisons among them that they won: so better than the reference, the reference, worse.
    """
    games = {}
    for row in json.load(stream):
        outputs = row["output_1"], row["output_2"]
        if row["preference"] not in (1, 2) or outputs[0] == outputs[1] or not all(text.strip() for text in outputs):
            continue
        chosen, rejected = outputs if row["preference"] == 1 else outputs[::-1]
        prompt = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
        games.setdefault(prompt, {})[chosen, rejected] = None
    for prompt, pairs in games.items():
        for chosen, rejected in pairs:
            yield side(prompt.split("\n\n")[0]) + ".jsonl", {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    for prompt, pairs in games.items():
        met = {}
        for output in (output for pair in pairs for output in pair):
            met[output] = met.get(output, 0) + 1
        reference = max(met, key=lambda output: (met[output], -lot(output)))
        better, worse = [], []
        for chosen, rejected in sorted(pairs, key=lambda pair: lot(*pair)):
            if rejected == reference and chosen not in worse:
                better.append(chosen)
            elif chosen == reference and rejected not in better:
                worse.append(rejected)
        completions = [reference]
        while len(completions) < 8 and (better or worse):
            completions += [group.pop(0) for group in (better, worse) if group][: 8 - len(completions)]
        if len(completions) < 3:
            continue
        completions.sort(key=lambda output: lot(prompt, output))
        rates = [win_rate(output, completions, pairs) for output in completions]
        steps = sorted(set(rates), reverse=True)
        ranks = [steps.index(rate) for rate in rates]
        name = "rankings_" + side(prompt.split("\n\n")[0]) + ".jsonl"
        yield name, {"prompt": prompt, "completions": completions, "ranks": ranks}


def win_rate(output, completions, pairs):
    won = sum((output, other) in pairs for other in completions)
    lost = sum((other, output) in pairs for other in completions)
    return won / (won + lost)


FORMS = {
    "question-answer": question_answer,
    "alpaca": alpaca,
    "bigbench": bigbench,
    "choices": choices,
    "choice-pairs": choice_pairs,
    "scored-pairs": scored_pairs,
}
# These yield the name of a file with each row.
SPLITTING_FORMS = {"halueval": halueval, "judged-pairs": judged_pairs}

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


def line(row):
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def write_split(rows):
    """Appends each row to the file that comes with it."""
    files = {}
    try:
        for name, row in rows:
            if name not in files:
                files[name] = open(os.path.join(destination, name), "ab")
            files[name].write(line(row))
    finally:
        for out in files.values():
            out.flush()
            os.fsync(out.fileno())
            out.close()


def write(name, rule, stream):
    if rule["rows"] in SPLITTING_FORMS:
        return write_split(SPLITTING_FORMS[rule["rows"]](stream))
    relative = target(name, rule)
    parts = relative.split("/")
    if not relative or relative.startswith("/") or ".." in parts or "\\" in relative:
        sys.exit(f"{name}: unsafe path {relative!r}")
    path = os.path.join(destination, *parts)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "ab" if rule["append_to"] else "wb") as out:
        if rule["rows"]:
            for row in FORMS[rule["rows"]](stream):
                out.write(line(row))
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
