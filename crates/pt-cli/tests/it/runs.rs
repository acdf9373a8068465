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
fn resuming_a_finished_run_says_so_and_changes_nothing() {
    let workshop = Workshop::new();
    workshop.stdout(&with_held_out(&workshop, &["--set", "max_steps=2"]));
    let bytes = || -> Vec<_> {
        workshop.files("run").into_iter().map(|path| (std::fs::read(&path).unwrap_or_default(), path)).collect()
    };
    let before = bytes();
    let resume = |more: &[&'static str]| {
        let output = workshop.run(&[&["sft", "--resume", "--output", "run"], more].concat());
        (output.status.code(), stderr(&output))
    };
    let (code, said) = resume(&[]);
    assert_eq!(code, Some(0), "{said}");
    for part in ["run is complete: 2 of 2 steps", "nothing was changed", "step-00000002/adapter", "max_steps=N"] {
        assert!(said.contains(part), "{part} is not in {said}");
    }
    assert!(!said.contains("loading"), "{said}");
    assert_eq!(bytes(), before);
    // With other rows it is no complete run, but a mistake.
    let (code, said) = resume(&["--data", "held_out.jsonl"]);
    assert!(code == Some(2) && said.contains("other training rows"), "{said}");
    let (code, said) = resume(&["--set", "max_steps=3"]);
    assert!(code == Some(0) && said.contains("step 3/3"), "{said}");
}

#[test]
fn a_run_stands_for_the_adapter_of_its_best_checkpoint() {
    let workshop = Workshop::new();
    workshop.stdout(&with_held_out(&workshop, &["--set", "max_steps=2", "--set", "learning_rate=0.05"]));
    let score = |adapter: &str| {
        let output = workshop.run(&["score", "--model", "model", "--data", "held_out.jsonl", "--adapter", adapter]);
        assert!(output.status.success(), "{}", stderr(&output));
        (String::from_utf8_lossy(&output.stdout).into_owned(), stderr(&output))
    };
    let best = RunDir::open(&workshop.path("run")).unwrap().best().unwrap().unwrap().step;
    let (expected, _) = score(&format!("run/checkpoints/step-{best:08}/adapter"));
    let (of_run, said) = score("run");
    let named = format!("run/checkpoints/step-{best:08}/adapter, of the run's best checkpoint");
    assert!(said.contains(&named), "{said}");
    let (of_checkpoint, said) = score(&format!("run/checkpoints/step-{best:08}"));
    assert!(said.contains("adapter: run/checkpoints"), "{said}");
    assert_eq!((&of_run, &of_checkpoint), (&expected, &expected));
    workshop.stdout(&["merge", "--model", "model", "--adapter", "run", "--output", "merged"]);
    let more = ["--set", "data.max_length=64", "--set", "max_steps=1", "--device", "cpu"];
    let args = ["sft", "--model", "model", "--data", "rows.jsonl", "--adapter", "run", "--output", "second"];
    workshop.stdout(&[&args[..], &more].concat());
    assert!(read(&workshop, "second/command.yaml").contains(&format!("step-{best:08}/adapter")));
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
    // Steps too small to move a weight: none is better.
    let worse = ["--set", "max_steps=4", "--set", "learning_rate=1e-30", "--set", "eval_every=1"];
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
