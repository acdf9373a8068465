//! `pt dpo`: every form of row, references, resuming, and what is refused.

use crate::common::{Workshop, stderr};
use serde_json::{Value, json};

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
    for setting in
        ["max_steps=4", "save_every=2", "batch.batch_size=4", "lora.rank=2", "learning_rate=0.05", "data.max_length=64"]
    {
        args.extend(["--set", setting]);
    }
    args.extend(more);
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
    // Kept log-probs of other rows are told, and those of another reference.
    let output =
        workshop.run(&["dpo", "--resume", "--output", "parts", "--set", "max_steps=6", "--data", "other.jsonl"]);
    assert!(stderr(&output).contains("other"), "{}", stderr(&output));
    assert!(!output.status.success());
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
        let mut args = dpo("pairs.jsonl", &run, &quick);
        settings.iter().for_each(|setting| args.extend(["--set", setting]));
        workshop.stdout(&args);
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
    write(&workshop, "labelled.jsonl", &[labelled]);
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
    ] {
        let mut args = dpo(data, "run", &[]);
        settings.iter().for_each(|setting| args.extend(["--set", setting]));
        let output = workshop.run(&args);
        let text = stderr(&output);
        assert!(!output.status.success() && text.contains(named), "{data} {settings:?}: {text}");
        assert!(!text.contains("panicked") && !workshop.path("run").exists(), "{text}");
    }
}
