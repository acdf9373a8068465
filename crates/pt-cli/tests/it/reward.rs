//! `pt reward` and what `pt score` makes of its models: lists and pairs, adapters and all weights, resuming, refusals.

use crate::common::{Workshop, extend_with, json_lines, stderr};
use serde_json::{Value, json};

/// Pairs in words of one token: the chosen side has a word that the rejected side lacks.
fn pairs(count: usize) -> Vec<Value> {
    let pair = |n: usize| {
        let (first, second) = (8 + n * 7 % 100, 8 + n * 13 % 100);
        json!({"prompt": format!("t1 t{first} t{second}"), "chosen": format!(" t{} t7 t7", second + 1),
               "rejected": format!(" t{second} t{first} t{}", 100 + n % 7)})
    };
    (0..count).map(pair).collect()
}

/// The same as lists of three, the first and the last tied.
fn lists(count: usize) -> Vec<Value> {
    let list = |row: Value| {
        let completions = json!([row["rejected"], row["chosen"], " t9"]);
        json!({"prompt": row["prompt"], "completions": completions, "ranks": [2, 0, 2]})
    };
    pairs(count).into_iter().map(list).collect()
}

fn workshop() -> Workshop {
    let workshop = Workshop::new();
    write(&workshop, "pairs.jsonl", &pairs(16));
    write(&workshop, "lists.jsonl", &lists(16));
    write(&workshop, "other.jsonl", &pairs(28)[16..]);
    write(&workshop, "other_lists.jsonl", &lists(24)[16..]);
    workshop
}

fn write(workshop: &Workshop, name: &str, rows: &[Value]) {
    workshop.write(name, &rows.iter().map(|row| format!("{row}\n")).collect::<String>());
}

/// A short run; later settings win.
fn reward<'a>(data: &'a str, output: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let mut args = vec!["reward", "--model", "model", "--device", "cpu", "--data", data, "--output", output];
    let settings = [
        "max_steps=4",
        "save_every=2",
        "batch.batch_size=4",
        "lora.rank=2",
        "learning_rate=0.02",
        "data.max_length=48",
    ];
    extend_with(&mut args, &settings, more);
    args
}

fn metrics(workshop: &Workshop, run: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(workshop.path(&format!("{run}/metrics.jsonl"))).unwrap();
    json_lines(&text)
}

fn json_file(workshop: &Workshop, name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(workshop.path(name)).unwrap()).unwrap()
}

/// What `pt score` gives each completion of each row.
fn scores(workshop: &Workshop, args: &[&str]) -> Vec<Vec<f64>> {
    let command = [&["score", "--device", "cpu"][..], args].concat();
    let of_row = |row: &Value| {
        let completions = row["completions"].as_array().unwrap().iter();
        completions.map(|completion| completion["score"].as_f64().unwrap()).collect()
    };
    json_lines(&workshop.stdout(&command)).iter().map(of_row).collect()
}

#[test]
fn a_reward_model_is_trained_measured_reported_and_scores_rows() {
    let workshop = workshop();
    write(&workshop, "many.jsonl", &[&pairs(128)[32..], &lists(64)[32..]].concat());
    let more = ["--eval-data", "other.jsonl", "--eval-data", "other_lists.jsonl", "--set", "max_steps=40"];
    let output = workshop.run(&reward("many.jsonl", "run", &more));
    let text = stderr(&output);
    assert!(output.status.success(), "{text}");
    assert!(text.contains("held out before training") && text.contains("held out, other_lists: 16 pairs"), "{text}");
    let records = metrics(&workshop, "run");
    for name in ["loss", "accuracy", "margin", "min_reward", "mean_reward", "max_reward"] {
        assert!(records[0][name].is_f64(), "{name}: {}", records[0]);
    }
    let last = records.iter().rev().find(|record| !record["eval_loss"].is_null()).unwrap();
    assert!(last["eval_accuracy"].as_f64().unwrap() > 0.9, "{last}");
    assert!(last["eval_loss"].as_f64().unwrap() < 0.3 && last["eval_calibration_error"].is_f64(), "{last}");
    let report = std::fs::read_to_string(workshop.path("run/report.html")).unwrap();
    for part in ["Reward model", "held-out accuracy", "Reliability", "by source", "other_lists", "pt score --model"] {
        assert!(report.contains(part), "no {part}");
    }
    assert!(!report.contains("pt chat") && !report.contains("Before and after"));

    // The adapter is PEFT's, with the head and, beside it, what its scores are like.
    let adapter = "run/checkpoints/step-00000040/adapter";
    let config = json_file(&workshop, &format!("{adapter}/adapter_config.json"));
    assert_eq!((&config["task_type"], &config["modules_to_save"]), (&json!("SEQ_CLS"), &json!(["score"])));
    let statistics = json_file(&workshop, &format!("{adapter}/reward.json"));
    assert!(statistics["count"].as_u64().unwrap() > 320, "40 steps of 4 rows with 2 or 3 completions: {statistics}");
    let shown = workshop.stdout(&["inspect", "run"]);
    assert!(shown.contains("pt score --model"), "{shown}");
    assert!(workshop.stdout(&["inspect", adapter]).contains("a reward model, scores of mean"));

    let of_pairs = scores(&workshop, &["--model", "model", "--adapter", "run", "--data", "other.jsonl"]);
    assert_eq!(of_pairs.len(), 12);
    let right = of_pairs.iter().filter(|row| row[0] > row[1]).count();
    assert!(right >= 11, "{of_pairs:?}");
    // Any form of row, and the same score for the same completion.
    let row = &pairs(17)[16];
    write(&workshop, "plain.jsonl", &[json!({"prompt": row["prompt"], "completion": row["chosen"]})]);
    let plain = scores(&workshop, &["--model", "model", "--adapter", "run", "--data", "plain.jsonl"]);
    assert!((plain[0][0] - of_pairs[0][0]).abs() < 1e-5, "{plain:?} {of_pairs:?}");
    let line = workshop.stdout(&["score", "--model", "model", "--adapter", "run", "--data", "plain.jsonl"]);
    let scored = &json_lines(&line)[0]["completions"][0];
    let (mean, std) = (statistics["mean"].as_f64().unwrap(), statistics["std"].as_f64().unwrap());
    let normalized = (scored["score"].as_f64().unwrap() - mean) / std;
    assert!((scored["normalized_score"].as_f64().unwrap() - normalized).abs() < 1e-5, "{scored}");
}

#[test]
fn a_resumed_run_equals_one_that_was_not_stopped() {
    let workshop = workshop();
    workshop.stdout(&reward("lists.jsonl", "whole", &["--set", "schedule.kind=constant"]));
    workshop.stdout(&reward("lists.jsonl", "parts", &["--set", "schedule.kind=constant", "--set", "max_steps=2"]));
    workshop.stdout(&["reward", "--resume", "--output", "parts", "--set", "max_steps=4"]);
    for file in ["adapter_model.safetensors", "reward.json", "adapter_config.json"] {
        let of = |run: &str| {
            std::fs::read(workshop.path(&format!("{run}/checkpoints/step-00000004/adapter/{file}"))).unwrap()
        };
        assert_eq!(of("whole"), of("parts"), "{file}");
    }
    assert!(workshop.stdout(&["inspect", "parts"]).contains("pt reward --resume --output parts"));
    let output = workshop.run(&["dpo", "--resume", "--output", "parts"]);
    assert!(stderr(&output).contains("is a run of `pt reward`"), "{}", stderr(&output));
}

#[test]
fn all_weights_are_trained_into_a_model_folder_that_scores_and_trains_on() {
    let workshop = workshop();
    let more = ["--peft", "none", "--set", "learning_rate=0.001"];
    workshop.stdout(&reward("pairs.jsonl", "full", &[&more[..], &["--eval-data", "other.jsonl"]].concat()));
    let model = "full/checkpoints/step-00000004/model";
    let config = json_file(&workshop, &format!("{model}/config.json"));
    assert_eq!(config["architectures"], json!(["LlamaForSequenceClassification"]));
    assert_eq!((&config["id2label"], &config["pad_token_id"]), (&json!({"0": "LABEL_0"}), &json!(1)));
    assert_eq!(json_file(&workshop, &format!("{model}/tokenizer_config.json"))["pad_token"], "t1");
    assert_eq!(json_file(&workshop, &format!("{model}/reward.json"))["count"], 32);
    let direct = scores(&workshop, &["--model", model, "--data", "other.jsonl"]);
    assert_eq!(direct.len(), 12);
    assert!(workshop.stdout(&["inspect", model]).contains("a reward model"));
    assert!(workshop.stdout(&["inspect", "full"]).contains("pt score --model"));
    // An adapter over it starts from its head: without a step taken, its scores.
    let mut on = reward("pairs.jsonl", "on", &["--set", "max_steps=1", "--set", "learning_rate=1e-12"]);
    on[2] = model;
    workshop.stdout(&on);
    let adapted = scores(&workshop, &["--model", model, "--adapter", "on", "--data", "other.jsonl"]);
    let worst = direct.concat().iter().zip(adapted.concat()).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(worst < 1e-5, "{worst}");
    // And the adapter's own head comes with the adapter that is trained on.
    let more = ["--adapter", "on", "--set", "max_steps=1", "--set", "learning_rate=1e-12"];
    let mut again: Vec<&str> = vec!["reward", "--model", model, "--device", "cpu", "--data", "pairs.jsonl"];
    again.extend(["--output", "again", "--set", "data.max_length=48"]);
    again.extend(more);
    workshop.stdout(&again);
    let again = scores(&workshop, &["--model", model, "--adapter", "again", "--data", "other.jsonl"]);
    assert!(adapted.concat().iter().zip(again.concat()).all(|(a, b)| (a - b).abs() < 1e-5));
}

#[test]
fn every_loss_method_and_start_trains() {
    let workshop = workshop();
    workshop.stdout(&workshop.sft("tuned", &["--set", "max_steps=1"]));
    for (index, settings) in [
        &["--set", "loss=plackett_luce"][..],
        &["--set", "center_rewards_coefficient=0.01", "--set", "batch.max_tokens=20"],
        &["--peft", "ia3"],
        &["--peft", "prompt-tuning", "--set", "prompt_tuning.num_virtual_tokens=3"],
        &["--peft", "bitfit"],
        &["--set", "lora.modules_to_save=[embed_tokens]", "--set", "activation_checkpointing=true"],
        &["--weights", "nf4", "--dtype", "bf16"],
    ]
    .into_iter()
    .enumerate()
    {
        let run = format!("run-{index}");
        let args = reward("lists.jsonl", &run, &[&["--set", "max_steps=2"][..], settings].concat());
        workshop.stdout(&args);
        let loss = metrics(&workshop, &run)[0]["loss"].as_f64().unwrap();
        assert!(loss.is_finite() && loss > 0.0, "{settings:?}: {loss}");
        let scored = scores(&workshop, &["--model", "model", "--adapter", &run, "--data", "other.jsonl"]);
        assert!(scored.iter().flatten().all(|score| score.is_finite()), "{settings:?}");
    }
    // From an adapter that was trained to answer, which has no head yet.
    let mut args = vec!["reward", "--model", "model", "--device", "cpu", "--data", "pairs.jsonl", "--adapter", "tuned"];
    args.extend(["--output", "from", "--set", "max_steps=1", "--set", "data.max_length=48"]);
    workshop.stdout(&args);
    scores(&workshop, &["--model", "model", "--adapter", "from", "--data", "other.jsonl"]);
}

#[test]
fn margins_are_used_when_asked_for_and_told_when_not() {
    let workshop = workshop();
    let rows: Vec<Value> = pairs(8)
        .into_iter()
        .map(|mut row| {
            row["margin"] = json!(3.0);
            row
        })
        .collect();
    write(&workshop, "margins.jsonl", &rows);
    let first = |run: &str| metrics(&workshop, run)[0]["loss"].as_f64().unwrap();
    let output = workshop.run(&reward("margins.jsonl", "without", &["--set", "max_steps=1"]));
    assert!(output.status.success() && stderr(&output).contains("--set use_margin=true"), "{}", stderr(&output));
    workshop.stdout(&reward("margins.jsonl", "with", &["--set", "max_steps=1", "--set", "use_margin=true"]));
    assert!(first("with") > first("without") + 0.5, "{} {}", first("with"), first("without"));
}

#[test]
fn an_early_best_checkpoint_is_the_one_that_is_told_of() {
    let workshop = workshop();
    // Held-out pairs the other way round: they get worse with each step.
    let turned: Vec<Value> = pairs(24)[16..]
        .iter()
        .map(|row| json!({"prompt": row["prompt"], "chosen": row["rejected"], "rejected": row["chosen"]}))
        .collect();
    write(&workshop, "turned.jsonl", &turned);
    let more = ["--eval-data", "turned.jsonl", "--set", "eval_every=4", "--set", "max_steps=24"];
    let output = workshop.run(&reward("pairs.jsonl", "run", &more));
    assert!(output.status.success(), "{}", stderr(&output));
    let best = json_file(&workshop, "run/checkpoints/best.json")["step"].as_u64().unwrap();
    assert!(best < 24, "{best}");
    let report = std::fs::read_to_string(workshop.path("run/report.html")).unwrap();
    assert!(report.contains(&format!("by source, step {best}")), "the table is of the checkpoint that is handed on");
    // As the metrics of that step have it.
    let at = metrics(&workshop, "run").into_iter().find(|r| r["step"] == best && r["eval_accuracy"].is_f64()).unwrap();
    let accuracy = format!("accuracy {:.1} %", at["eval_accuracy"].as_f64().unwrap() * 100.0);
    assert!(stderr(&output).contains(&accuracy), "{accuracy}: {}", stderr(&output));
}

#[test]
fn faults_are_named_and_leave_no_run() {
    let workshop = workshop();
    let row = &pairs(1)[0];
    write(&workshop, "without.jsonl", &[json!({"prompt": row["prompt"], "chosen": row["chosen"]})]);
    let labelled = json!({"prompt": row["prompt"], "completion": row["chosen"], "label": true});
    write(&workshop, "labelled.jsonl", &[labelled]);
    let tied = json!({"prompt": row["prompt"], "completions": [row["chosen"], row["rejected"]], "ranks": [0, 0]});
    write(&workshop, "tied.jsonl", &[tied]);
    for (data, settings, named) in [
        ("without.jsonl", &[][..], "rejected"),
        ("labelled.jsonl", &[], "a reward model takes pairs or ranked lists"),
        ("tied.jsonl", &[], "all ranks are tied"),
        ("pairs.jsonl", &["center_rewards_coefficient=-1"], "center_rewards_coefficient is -1"),
        ("pairs.jsonl", &["loss=plackett_luce", "use_margin=true"], "knows no margins"),
        ("pairs.jsonl", &["loss=listwise"], "unknown variant `listwise`"),
        ("pairs.jsonl", &["peft=bottleneck"], "no place for a reward head"),
        ("pairs.jsonl", &["objective.use_margn=true"], "did you mean `objective.use_margin`"),
    ] {
        let sets: Vec<&str> = settings.iter().flat_map(|setting| ["--set", setting]).collect();
        let output = workshop.run(&reward(data, "run", &sets));
        let text = stderr(&output);
        assert!(!output.status.success() && text.contains(named), "{data} {settings:?}: {text}");
        assert!(!text.contains("panicked") && !workshop.path("run").exists(), "{text}");
    }
    // A reward model writes no answers, and its scores are of whole completions.
    workshop.stdout(&reward("pairs.jsonl", "run", &["--set", "max_steps=1"]));
    let refused = |args: &[&str], code: i32, named: &str| {
        let output = workshop.run(args);
        assert_eq!(output.status.code(), Some(code), "{}", stderr(&output));
        assert!(stderr(&output).contains(named), "{args:?}: {}", stderr(&output));
    };
    let prompt = ["--prompt", "t1 t2"];
    let generate = [&["generate", "--model", "model", "--adapter", "run"][..], &prompt].concat();
    refused(&generate, 1, "is a reward model, which writes no answers");
    let score = ["score", "--model", "model", "--adapter", "run", "--data", "other.jsonl", "--tokens"];
    refused(&score, 2, "--tokens: this is a reward model");
}

#[test]
fn the_help_and_the_dry_run_tell_what_would_be_done() {
    let workshop = workshop();
    let help = workshop.stdout(&["reward", "--help"]);
    for part in ["center_rewards_coefficient", "use_margin", "`chosen`, `rejected`"] {
        assert!(help.contains(part), "no {part} in {help}");
    }
    let output = workshop.run(&reward("lists.jsonl", "run", &["--dry-run"]));
    assert!(output.status.success() && stderr(&output).contains("nothing was trained"), "{}", stderr(&output));
    assert!(!workshop.path("run").exists());
    let shown = workshop.stdout(&["reward", "--print-config"]);
    assert!(shown.contains("loss: pairwise") && shown.contains("learning_rate: 0.0001"), "{shown}");
}
