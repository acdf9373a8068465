//! `pt dpo`: every form of row, references, resuming, and what is refused.

use crate::common::{Workshop, extend_with, stderr};
use crate::interruptions::check_readable;
use serde_json::{Value, json};
use std::process::Stdio;
use std::time::Instant;

/// Pairs in words of one token: the chosen side goes on counting, the rejected one does not.
fn pairs(count: usize) -> Vec<Value> {
    let pair = |n: usize| {
        let (first, second) = (8 + n * 7 % 100, 8 + n * 13 % 100);
        json!({"prompt": format!("t1 t{first} t{second}"), "chosen": format!(" t{} t{}", first + 1, second + 1),
               "rejected": format!(" t{} t{} t{}", second, first, 100 + n % 7)})
    };
    (0..count).map(pair).collect()
}

fn workshop() -> Workshop {
    let workshop = Workshop::new();
    write(&workshop, "pairs.jsonl", &pairs(16));
    write(&workshop, "other.jsonl", &pairs(24)[16..]);
    workshop
}

fn write(workshop: &Workshop, name: &str, rows: &[Value]) {
    workshop.write(name, &rows.iter().map(|row| format!("{row}\n")).collect::<String>());
}

/// A short run; later settings win.
fn dpo<'a>(data: &'a str, output: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let mut args = vec!["dpo", "--model", "model", "--device", "cpu", "--data", data, "--output", output];
    let settings = [
        "max_steps=4",
        "save_every=2",
        "batch.batch_size=4",
        "lora.rank=2",
        "learning_rate=0.05",
        "data.max_length=64",
    ];
    extend_with(&mut args, &settings, more);
    args
}

fn metrics(workshop: &Workshop, run: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(workshop.path(&format!("{run}/metrics.jsonl"))).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn pairs_are_learned_measured_and_reported() {
    let workshop = workshop();
    let more = ["--eval-data", "other.jsonl", "--set", "max_steps=40", "--samples", "2"];
    let output = workshop.run(&dpo("pairs.jsonl", "run", &more));
    let text = stderr(&output);
    assert!(output.status.success(), "{text}");
    assert!(text.contains("without shared prompts") && text.contains("of the training pairs"), "{text}");
    let records = metrics(&workshop, "run");
    let first = &records[0];
    assert!((first["loss"].as_f64().unwrap() - 2f64.ln()).abs() < 1e-6, "{first}");
    let last = records.iter().rev().find(|record| !record["eval_loss"].is_null()).unwrap();
    assert!(last["eval_loss"].as_f64().unwrap() < 0.65, "{last}");
    assert!(last["eval_rewards/accuracies"].as_f64().unwrap() > 0.7, "{last}");
    for name in ["rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"] {
        assert!(first[name].is_f64(), "{name}: {first}");
    }
    let report = std::fs::read_to_string(workshop.path("run/report.html")).unwrap();
    assert!(report.contains("Preference training") && report.contains("rewards/accuracies"), "no metrics");
    assert!(report.contains("Before and after"), "no samples");
    workshop.stdout(&[
        "generate",
        "--model",
        "model",
        "--adapter",
        "run",
        "--prompt",
        "t1 t8 t8",
        "--max-new-tokens",
        "2",
    ]);
}

#[test]
fn a_resumed_run_reads_its_reference_and_equals_one_that_was_not_stopped() {
    let workshop = workshop();
    workshop.stdout(&dpo("pairs.jsonl", "whole", &["--set", "schedule.kind=constant"]));
    workshop.stdout(&dpo("pairs.jsonl", "parts", &["--set", "schedule.kind=constant", "--set", "max_steps=2"]));
    let kept = std::fs::read(workshop.path("parts/reference_logps.safetensors")).unwrap();
    workshop.stdout(&["dpo", "--resume", "--output", "parts", "--set", "max_steps=4"]);
    assert_eq!(std::fs::read(workshop.path("parts/reference_logps.safetensors")).unwrap(), kept);
    let weights = |run: &str| {
        std::fs::read(workshop.path(&format!("{run}/checkpoints/step-00000004/adapter/adapter_model.safetensors")))
            .unwrap()
    };
    assert_eq!(weights("whole"), weights("parts"));
    // It is told by the command that it was started with, and by no other.
    assert!(workshop.stdout(&["inspect", "parts"]).contains("pt dpo --resume --output parts"));
    let output = workshop.run(&["sft", "--resume", "--output", "parts"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("is a run of `pt dpo`"), "{}", stderr(&output));
    // Other rows are told.
    let output =
        workshop.run(&["dpo", "--resume", "--output", "parts", "--set", "max_steps=6", "--data", "other.jsonl"]);
    assert!(stderr(&output).contains("was saved with other training rows"), "{}", stderr(&output));
    assert!(!output.status.success());
}

#[test]
fn a_reference_adapter_is_used_kept_by_its_whole_path_and_cannot_change() {
    let workshop = workshop();
    for (run, seed) in [("one", "seed=1"), ("two", "seed=2")] {
        workshop.stdout(&dpo("pairs.jsonl", run, &["--set", seed]));
    }
    let more = ["--set", "reference.adapter=one", "--set", "max_steps=2"];
    workshop.stdout(&dpo("pairs.jsonl", "held", &more));
    // The policy begins away from that reference.
    let first = metrics(&workshop, "held")[0]["loss"].as_f64().unwrap();
    assert!((first - 2f64.ln()).abs() > 1e-3, "{first}");
    let config = std::fs::read_to_string(workshop.path("held/config.yaml")).unwrap();
    let whole = workshop.path("one").canonicalize().unwrap();
    assert!(config.contains(&whole.display().to_string()), "{config}");
    let resume = |adapter: &str| {
        let adapter = format!("reference.adapter={adapter}");
        workshop.run(&["dpo", "--resume", "--output", "held", "--set", "max_steps=4", "--set", &adapter])
    };
    let output = resume("two");
    assert!(!output.status.success());
    assert!(stderr(&output).contains("log-probs of another reference"), "{}", stderr(&output));
    let output = resume("one");
    assert!(output.status.success(), "{}", stderr(&output));
}

#[test]
fn scores_only_rank_unless_they_are_to_be_margins() {
    let workshop = workshop();
    let listed = |row: &Value| json!({"prompt": row["prompt"], "completions": [row["rejected"], row["chosen"]], "scores": [0, 9]});
    write(&workshop, "scored.jsonl", &pairs(8).iter().map(listed).collect::<Vec<_>>());
    let first = |run: &str, more: &[&str]| {
        let more = [&["--set", "max_steps=1"], more].concat();
        workshop.stdout(&dpo("scored.jsonl", run, &more));
        metrics(&workshop, run)[0]["loss"].as_f64().unwrap()
    };
    assert!((first("ranks", &[]) - 2f64.ln()).abs() < 1e-6);
    // −log σ(−1).
    let margin = first("margins", &["--set", &format!("margin_scale={}", 1.0 / 9.0)]);
    assert!((margin - 1f64.exp().ln_1p()).abs() < 1e-5, "{margin}");
}

#[test]
fn prompts_that_stand_in_both_sides_are_answered_too() {
    let workshop = workshop();
    let whole = |row: &Value| {
        let side = |name: &str| format!("{}{}", row["prompt"].as_str().unwrap(), row[name].as_str().unwrap());
        json!({"chosen": side("chosen"), "rejected": side("rejected")})
    };
    write(&workshop, "whole.jsonl", &pairs(24)[16..].iter().map(whole).collect::<Vec<_>>());
    workshop.stdout(&dpo("pairs.jsonl", "run", &["--eval-data", "whole.jsonl", "--samples", "2"]));
    let report = std::fs::read_to_string(workshop.path("run/report.html")).unwrap();
    assert!(report.contains("Before and after"), "no samples");
}

/// A copy of the model under another name, one file changed (or taken away).
fn another_model(workshop: &Workshop, name: &str, file: &str, change: impl Fn(&str) -> Option<String>) {
    std::fs::create_dir(workshop.path(name)).unwrap();
    for entry in std::fs::read_dir(workshop.path("model")).unwrap() {
        let entry = entry.unwrap();
        let copy = workshop.path(name).join(entry.file_name());
        match entry.file_name() == *file {
            true => match change(&std::fs::read_to_string(entry.path()).unwrap()) {
                Some(text) => std::fs::write(copy, text).unwrap(),
                None => continue,
            },
            false => drop(std::fs::copy(entry.path(), copy).unwrap()),
        }
    }
}

#[test]
fn references_that_do_not_fit_leave_no_run() {
    let workshop = workshop();
    another_model(&workshop, "words", "tokenizer.json", |text| Some(text.replace("\"t9\"", "\"other\"")));
    another_model(&workshop, "mute", "tokenizer.json", |_| None);
    another_model(&workshop, "short", "config.json", |text| {
        let mut config: Value = serde_json::from_str(text).unwrap();
        config["max_position_embeddings"] = json!(16);
        Some(config.to_string())
    });
    workshop.stdout(&dpo("pairs.jsonl", "good", &["--set", "max_steps=2"]));
    let adapter = workshop.path("good/checkpoints/step-00000002/adapter");
    std::fs::create_dir(workshop.path("damaged")).unwrap();
    std::fs::copy(adapter.join("adapter_config.json"), workshop.path("damaged/adapter_config.json")).unwrap();
    workshop.write("damaged/adapter_model.safetensors", "nothing");
    for (setting, named) in [
        ("reference.model=words", "words: token 9 is `other`, the model's is `t9`"),
        ("reference.model=mute", "mute: has no tokenizer"),
        ("reference.model=short", "short: its context is 16, data.max_length is 64"),
        ("reference.adapter=damaged", "damaged"),
    ] {
        let output = workshop.run(&dpo("pairs.jsonl", "run", &["--set", setting]));
        let text = stderr(&output);
        assert!(!output.status.success() && text.contains(named), "{setting}: {text}");
        assert!(!text.contains("panicked") && !workshop.path("run").exists(), "{setting}: {text}");
    }
}

#[test]
fn a_run_killed_at_any_moment_ends_as_if_it_had_not_been() {
    let workshop = workshop();
    let more = ["--eval-data", "other.jsonl", "--set", "max_steps=8", "--set", "save_every=1"];
    let started = Instant::now();
    workshop.stdout(&dpo("pairs.jsonl", "straight", &more));
    let length = started.elapsed();
    let root = workshop.path("killed");
    let mut num_killed = 0;
    // From its first moments, when the reference is computed, to its last.
    for part in [0.15, 0.3, 0.45, 0.6, 0.75, 0.9, f64::INFINITY] {
        // Killed before its configuration stood, it is no run yet and begins anew.
        let resume: &[&str] = if root.join("config.yaml").exists() { &["--resume"] } else { &[] };
        let args = dpo("pairs.jsonl", "killed", &[&more[..], resume].concat());
        let log = std::fs::File::create(workshop.path("log")).unwrap();
        let mut child = workshop.command(&args).stdout(Stdio::null()).stderr(log).spawn().unwrap();
        if part.is_finite() {
            std::thread::sleep(length.mul_f64(part));
            let _ = child.kill();
        }
        let status = child.wait().unwrap();
        num_killed += u32::from(status.code().is_none());
        if root.join("config.yaml").exists() {
            check_readable(&root);
        }
        let text = || std::fs::read_to_string(workshop.path("log")).unwrap();
        assert!(status.code().is_none_or(|code| code == 0), "{part}: {}", text());
    }
    assert!(num_killed > 0);
    let weights = |run: &str| {
        std::fs::read(workshop.path(&format!("{run}/checkpoints/step-00000008/adapter/adapter_model.safetensors")))
            .unwrap()
    };
    assert!(weights("straight") == weights("killed"));
}

#[test]
fn every_loss_and_form_of_row_trains() {
    let workshop = workshop();
    let ranked: Vec<Value> = pairs(8)
        .iter()
        .map(|row| json!({"prompt": row["prompt"], "completions": [row["rejected"], row["chosen"], " t9"], "ranks": [2, 0, 2]}))
        .collect();
    write(&workshop, "ranked.jsonl", &ranked);
    let labelled: Vec<Value> = pairs(8)
        .iter()
        .enumerate()
        .map(|(n, row)| {
            let side = if n % 2 == 0 { "chosen" } else { "rejected" };
            json!({"prompt": row["prompt"], "completion": row[side], "label": n % 2 == 0})
        })
        .collect();
    write(&workshop, "labelled.jsonl", &labelled);
    let quick = ["--set", "max_steps=1"];
    workshop.stdout(&dpo("ranked.jsonl", "ranked", &quick));
    workshop.stdout(&dpo("labelled.jsonl", "kto", &["--set", "max_steps=1", "--set", "loss_type=kto"]));
    for (index, settings) in [
        &["loss_type=[sigmoid, sft]", "loss_weights=[1.0, 0.1]"][..],
        &["loss_type=simpo", "beta=2.0"],
        &["loss_type=orpo"],
        &["loss_type=ipo", "reference.sync_every=1"],
        &["ld_alpha=0.5", "reference.precompute=false"],
        &["peft=null", "learning_rate=1e-4"],
        &["reference.model=model"],
    ]
    .into_iter()
    .enumerate()
    {
        let run = format!("run-{index}");
        let sets = settings.iter().flat_map(|setting| ["--set", setting]);
        let more: Vec<&str> = quick.iter().copied().chain(sets).collect();
        workshop.stdout(&dpo("pairs.jsonl", &run, &more));
        let loss = metrics(&workshop, &run)[0]["loss"].as_f64().unwrap();
        assert!(loss.is_finite(), "{settings:?}: {loss}");
    }
}

#[test]
fn faults_are_named_and_leave_no_run() {
    let workshop = workshop();
    let row = &pairs(1)[0];
    let without = json!({"prompt": row["prompt"], "chosen": row["chosen"]});
    let equal = json!({"prompt": row["prompt"], "chosen": row["chosen"], "rejected": row["chosen"]});
    write(&workshop, "without.jsonl", &[without]);
    write(&workshop, "equal.jsonl", &[equal]);
    let labelled = json!({"prompt": row["prompt"], "completion": row["chosen"], "label": true});
    write(&workshop, "labelled.jsonl", std::slice::from_ref(&labelled));
    let other = json!({"prompt": row["prompt"], "completion": row["rejected"], "label": false});
    write(&workshop, "good_labels.jsonl", &[labelled, other]);
    let margin = json!({"prompt": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"], "margin": 1.0});
    write(&workshop, "margin.jsonl", &[margin]);
    for (data, settings, named) in [
        ("without.jsonl", &[][..], "rejected"),
        ("equal.jsonl", &[], "are equal"),
        ("labelled.jsonl", &[], "takes pairs"),
        ("pairs.jsonl", &["loss_type=kto"], "takes single completions"),
        ("pairs.jsonl", &["beta=0"], "beta is 0"),
        ("pairs.jsonl", &["loss_type=robust", "label_smoothing=0.5"], "label_smoothing is 0.5"),
        ("pairs.jsonl", &["loss_type=dpo"], "unknown variant `dpo`"),
        ("pairs.jsonl", &["reference.model=gone.gguf"], "gone.gguf"),
        ("pairs.jsonl", &["bta=0.2"], "bta"),
        ("pairs.jsonl", &["reference.sync_mixup=0"], "sync_mixup is 0"),
        ("pairs.jsonl", &["reference.sync_mixup=0.5"], "sync_every is 0"),
        ("pairs.jsonl", &["desirable_weight=2"], "desirable_weight is 2, expected 1"),
        ("margin.jsonl", &["loss_type=aot"], "margin.jsonl:1: has a `margin`, and `aot` takes none"),
        ("pairs.jsonl", &["loss_type=aot", "batch.accumulation=2"], "`aot` sorts the pairs of a step"),
        ("good_labels.jsonl", &["loss_type=kto"], "all 1 rows have the same prompt"),
    ] {
        let mut args = dpo(data, "run", &[]);
        settings.iter().for_each(|setting| args.extend(["--set", setting]));
        let output = workshop.run(&args);
        let text = stderr(&output);
        assert!(!output.status.success() && text.contains(named), "{data} {settings:?}: {text}");
        assert!(!text.contains("panicked") && !workshop.path("run").exists(), "{text}");
    }
}
