//! What a run keeps: its settings, its command, its best checkpoint, answers before and after.

use crate::common::{Workshop, stderr};
use pt_train::run_dir::RunDir;

/// A run with held-out rows.
fn with_held_out<'a>(workshop: &Workshop, more: &[&'a str]) -> Vec<&'a str> {
    let mut args = workshop.sft("run", &["--eval-data", "held_out.jsonl"]);
    args.extend(more);
    args
}

fn read(workshop: &Workshop, name: &str) -> String {
    std::fs::read_to_string(workshop.path(name)).unwrap()
}

#[test]
fn a_run_is_resumed_with_its_own_command_and_keeps_new_settings() {
    let workshop = Workshop::new();
    workshop.stdout(&with_held_out(&workshop, &["--set", "max_steps=2", "--samples", "2", "--dtype", "f32"]));
    let resume = ["sft", "--resume", "--output", "run"];
    let with = |more: &[&'static str]| resume.iter().chain(more).copied().collect::<Vec<_>>();
    workshop.stdout(&with(&["--set", "max_steps=4", "--set", "save_every=2"]));
    assert!(workshop.path("run/checkpoints/step-00000004").is_dir());
    let config = read(&workshop, "run/config.yaml");
    assert!(config.contains("max_steps: 4") && config.contains("save_every: 2"), "{config}");

    // Refused settings are not kept.
    let refused = workshop.run(&with(&["--set", "lora.rank=4"]));
    assert_eq!(refused.status.code(), Some(2), "{}", stderr(&refused));
    assert_eq!(read(&workshop, "run/config.yaml"), config);
    for (flag, other) in [("--model", "run"), ("--dtype", "bf16"), ("--eval-data", "rows.jsonl")] {
        let output = workshop.run(&with(&[flag, other]));
        assert_eq!(output.status.code(), Some(2), "{flag}: {}", stderr(&output));
        let text = stderr(&output);
        assert!(text.contains(flag) && text.contains("the run was started with"), "{text}");
    }
    // The same rows under another name are the same rows.
    std::fs::rename(workshop.path("rows.jsonl"), workshop.path("moved.jsonl")).unwrap();
    workshop.stdout(&with(&["--data", "moved.jsonl"]));
}

#[test]
fn held_out_answers_stand_in_the_report_and_survive_a_resume() {
    let workshop = Workshop::new();
    workshop.stdout(&with_held_out(&workshop, &["--set", "max_steps=2", "--set", "learning_rate=0.05"]));
    let samples = |key: &str| -> Vec<serde_json::Value> {
        let kept: serde_json::Value = serde_json::from_str(&read(&workshop, "run/samples.json")).unwrap();
        assert!(kept["loss"].is_f64());
        kept["samples"].as_array().unwrap().iter().map(|sample| sample[key].clone()).collect()
    };
    let (before, after) = (samples("before"), samples("after"));
    assert_eq!((before.len(), after.iter().filter(|text| text.is_string()).count()), (4, 4));
    assert_ne!(before, after);
    let report = read(&workshop, "run/report.html");
    assert!(report.contains("Before and after") && report.contains("held-out loss"), "no samples");
    for text in before.iter().chain(&after) {
        assert!(report.contains(text.as_str().unwrap()), "{text}");
    }

    // A finished run writes its report again from what it kept.
    std::fs::remove_file(workshop.path("run/report.html")).unwrap();
    workshop.stdout(&["sft", "--resume", "--output", "run"]);
    assert_eq!((samples("before"), samples("after")), (before, after));
    let again = read(&workshop, "run/report.html");
    assert!(again.contains("Before and after") && again.contains("held-out loss"));
}

#[test]
fn samples_can_be_turned_off() {
    let workshop = Workshop::new();
    workshop.stdout(&with_held_out(&workshop, &["--samples", "0", "--set", "max_steps=1"]));
    assert!(!read(&workshop, "run/report.html").contains("Before and after"));
}

#[test]
fn the_best_checkpoint_is_named_with_the_last_beside_it() {
    let workshop = Workshop::new();
    workshop.stdout(&with_held_out(&workshop, &["--set", "max_steps=2", "--set", "learning_rate=0.01"]));
    // Steps so large that the held-out loss rises.
    let worse = ["--set", "max_steps=4", "--set", "learning_rate=3", "--set", "eval_every=1"];
    let args: Vec<&str> = ["sft", "--resume", "--output", "run"].iter().chain(&worse).copied().collect();
    let output = workshop.run(&args);
    let text = stderr(&output);
    assert!(output.status.success(), "{text}");
    let best = RunDir::open(&workshop.path("run")).unwrap().best().unwrap().unwrap().step;
    assert!(best < 4, "{text}");
    let saved = format!("saved run/checkpoints/step-{best:08}/adapter (step {best}, the best held-out loss");
    assert!(text.contains(&saved) && text.contains("last  run/checkpoints/step-00000004/adapter"), "{text}");
    let chat = format!("--adapter run/checkpoints/step-{best:08}/adapter");
    assert!(read(&workshop, "run/report.html").contains(&chat));
}

#[test]
fn a_starting_adapter_is_what_is_measured_before() {
    let workshop = Workshop::new();
    workshop.stdout(&workshop.sft("first", &["--set", "learning_rate=0.05"]));
    let adapter = "first/checkpoints/step-00000006/adapter";
    let args = ["sft", "--model", "model", "--data", "rows.jsonl", "--eval-data", "held_out.jsonl", "--device", "cpu"];
    let more = ["--dtype", "f32", "--set", "data.max_length=64", "--set", "max_steps=1", "--samples", "0"];
    let run = |adapter: &[&str], output: &str| -> f64 {
        let args: Vec<&str> = args.iter().chain(&more).chain(adapter).chain(&["--output", output]).copied().collect();
        workshop.stdout(&args);
        let kept: serde_json::Value =
            serde_json::from_str(&read(&workshop, &format!("{output}/samples.json"))).unwrap();
        kept["loss"].as_f64().unwrap()
    };
    let (bare, adapted) = (run(&[], "bare"), run(&["--adapter", adapter], "adapted"));
    assert!((bare - adapted).abs() > 1e-3, "{bare} {adapted}");
    assert!(read(&workshop, "adapted/config.yaml").contains("rank: 2"));
}

#[test]
fn inspect_tells_what_a_run_has_come_to_and_touches_nothing() {
    let workshop = Workshop::new();
    workshop.stdout(&with_held_out(&workshop, &["--set", "max_steps=3"]));
    // A live trainer is writing this.
    std::fs::create_dir(workshop.path("run/checkpoints/.step-00000004.tmp-x")).unwrap();
    let before = workshop.files("run");
    let text = workshop.stdout(&["inspect", "run"]);
    for part in ["3 steps done", "eval_loss", "step-00000003 (best", "pt sft --resume --output run", "pt chat --model"]
    {
        assert!(text.contains(part), "{part}: {text}");
    }
    let json: serde_json::Value = serde_json::from_str(&workshop.stdout(&["inspect", "run", "--json"])).unwrap();
    assert_eq!((&json["steps"], &json["best"]["step"]), (&3.into(), &3.into()));
    assert_eq!(workshop.files("run"), before);
}
