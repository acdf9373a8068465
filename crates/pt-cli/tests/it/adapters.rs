//! Every method from training to use, several adapters in one batch, adapters made one.

use crate::common::{Workshop, json_lines, stderr};
use pt_peft::Method;

#[test]
fn every_method_trains_is_inspected_and_generates() {
    let workshop = Workshop::new();
    for kind in Method::ALL {
        let method = kind.name();
        let args = ["sft", "--model", "model", "--data", "rows.jsonl", "--output", method, "--device", "cpu"];
        let set = ["--peft", method, "--samples", "0", "--set", "data.max_length=40", "--set", "max_steps=1"];
        workshop.stdout(&[&args[..], &set].concat());
        let adapter = format!("{method}/checkpoints/step-00000001/adapter");
        let shown = workshop.stdout(&["inspect", &adapter]);
        assert!(shown.contains(&format!("an adapter: {method}, ")), "{shown}");
        let generate =
            ["generate", "--model", "model", "--adapter", &adapter, "--prompt", "t5 t6", "--max-new-tokens", "3"];
        let line = &json_lines(&workshop.stdout(&generate))[0];
        assert!(!line["token_ids"].as_array().unwrap().is_empty(), "{method}: {line}");
        let output = format!("{method}-merged");
        let merged = workshop.run(&["merge", "--model", "model", "--adapter", &adapter, "--output", &output]);
        assert_eq!(merged.status.success(), kind.is_mergeable(), "{method}: {}", stderr(&merged));
    }
    // Biases alone are a change of weights, and the report says so.
    workshop.stdout(&workshop.sft("biases", &["--peft", "tinytl", "--set", "tinytl.mode=bias"]));
    for (run, is_there) in [("biases", true), ("tinytl", false)] {
        let report = std::fs::read_to_string(workshop.path(run).join("report.html")).unwrap();
        assert_eq!(report.contains("pt merge"), is_there, "{run}");
    }
    workshop.stdout(&["merge", "--model", "model", "--adapter", "biases", "--output", "biases-merged"]);
    // A pickle is named as what it is.
    let folder = workshop.path("lora/checkpoints/step-00000001/adapter");
    std::fs::rename(folder.join("adapter_model.safetensors"), folder.join("adapter_model.bin")).unwrap();
    let refused = workshop.run(&["inspect", "lora/checkpoints/step-00000001/adapter"]);
    assert!(stderr(&refused).contains("a pickle, which can run code"), "{}", stderr(&refused));
    let refused = workshop.run(&workshop.sft("run", &["--peft", "lorra"]));
    assert_eq!(refused.status.code(), Some(2));
    assert!(stderr(&refused).contains("lorra"), "{}", stderr(&refused));
}

/// Two adapters that were trained far enough to answer otherwise than the model does.
fn two_adapters() -> Workshop {
    let workshop = Workshop::new();
    for (name, seed) in [("a", "seed=1"), ("b", "seed=2")] {
        workshop.stdout(&workshop.sft(name, &["--set", seed, "--set", "learning_rate=0.3", "--samples", "0"]));
    }
    workshop
}

#[test]
fn rows_of_a_batch_get_the_adapters_that_they_ask_for() {
    let workshop = two_adapters();
    let row = |adapter: &str| format!("{{\"prompt\": \"t5 t6 t7\", \"completion\": \" t9 t8\"{adapter}}}\n");
    let named = |name: &str| row(&format!(", \"adapter\": \"{name}\""));
    workshop.write("mixed.jsonl", &[named("b"), row(""), named("a"), named("b"), row(", \"adapter\": null")].concat());
    workshop.write("one.jsonl", &row(""));
    for command in [&["generate", "--max-new-tokens", "4"][..], &["score", "--tokens"]] {
        let run = |more: &[&str]| {
            json_lines(&workshop.stdout(&[command, &["--model", "model", "--device", "cpu"], more].concat()))
        };
        let mixed = run(&["--data", "mixed.jsonl", "--row-adapter", "a=a", "--row-adapter", "b=b"]);
        let alone = |adapter: &[&str]| run(&[&["--data", "one.jsonl"], adapter].concat())[0].clone();
        let (bare, a, b) = (alone(&[]), alone(&["--adapter", "a"]), alone(&["--adapter", "b"]));
        assert!(bare != a && a != b && bare != b, "the adapters answer alike: {bare} {a} {b}");
        let close = |x: &serde_json::Value, y: &serde_json::Value| {
            let sum = |value: &serde_json::Value| value["completions"][0]["logprob"].as_f64();
            match (sum(x), sum(y)) {
                (Some(x), Some(y)) => (x - y).abs() < 1e-3,
                _ => x == y,
            }
        };
        for (found, want) in mixed.iter().zip([&b, &bare, &a, &b, &bare]) {
            assert!(close(found, want), "{found} {want}");
        }
    }
    workshop.write("unknown.jsonl", &named("c"));
    let generate = |more: &[&str]| workshop.run(&[&["generate", "--model", "model"], more].concat());
    let refused = generate(&["--data", "unknown.jsonl", "--row-adapter", "a=a"]);
    assert!(stderr(&refused).contains("unknown.jsonl:1") && stderr(&refused).contains("`c`"), "{}", stderr(&refused));
    for wrong in [&["--row-adapter", "a"][..], &["--row-adapter", "a=a", "--row-adapter", "a=b"]] {
        assert_eq!(generate(&[&["--data", "one.jsonl"], wrong].concat()).status.code(), Some(2));
    }
}

#[test]
fn the_room_of_a_row_is_that_of_its_own_adapter() {
    let workshop = Workshop::new();
    let args = ["--peft", "prompt-tuning", "--set", "prompt_tuning.num_virtual_tokens=5", "--samples", "0"];
    workshop.stdout(
        &workshop.sft("prompt", &[&args[..], &["--set", "max_steps=1", "--set", "data.max_length=40"]].concat()),
    );
    // The model's context is 64.
    let words = |count: usize| vec!["t5"; count].join(" ");
    let row = |adapter: &str| format!("{{\"prompt\": \"{}\", \"completion\": \" t9\"{adapter}}}\n", words(59));
    workshop.write("bare.jsonl", &row(""));
    workshop.write("prompt.jsonl", &row(", \"adapter\": \"prompt\""));
    for command in [&["generate", "--max-new-tokens", "1"][..], &["score"]] {
        let run = |data| {
            let args = ["--model", "model", "--row-adapter", "prompt=prompt", "--data", data];
            workshop.run(&[command, &args].concat())
        };
        let (bare, prompt) = (run("bare.jsonl"), run("prompt.jsonl"));
        assert!(bare.status.success(), "{}", stderr(&bare));
        assert!(stderr(&prompt).contains("prompt.jsonl:1"), "{}", stderr(&prompt));
    }
}

#[test]
fn adapters_are_made_one() {
    let workshop = two_adapters();
    let combine = |more: &[&str]| workshop.run(&[&["combine", "--model", "model"], more].concat());
    let both = ["--adapter", "a=0.5", "--adapter", "b=-0.25"];
    let made = combine(&[&both[..], &["--output", "cat"]].concat());
    assert!(made.status.success() && stderr(&made).contains("cat, rank 4"), "{}", stderr(&made));
    let shown = workshop.stdout(&["inspect", "cat"]);
    assert!(shown.contains("lora.rank: 4\n") && shown.contains("lora.lora_alpha: 4.0\n"), "{shown}");
    let made =
        combine(&[&both[..], &["--type", "ties_svd", "--density", "0.5", "--rank", "3", "--output", "ties"]].concat());
    assert!(made.status.success(), "{}", stderr(&made));
    for (wrong, code, part) in [
        (&["--type", "tie", "--output", "x"][..], 2, "no combination"),
        (&["--density", "0.5", "--output", "x"], 2, "--density does not bear on --type cat"),
        (&["--type", "ties", "--density", "2", "--output", "x"], 1, "`density` is 2"),
        (&["--output", "cat"], 1, "already exists"),
    ] {
        let refused = combine(&[&both[..], wrong].concat());
        assert_eq!(refused.status.code(), Some(code), "{}", stderr(&refused));
        assert!(stderr(&refused).contains(part), "{}", stderr(&refused));
    }
    assert_eq!(combine(&["--adapter", "a", "--output", "x"]).status.code(), Some(2));
    assert!(!workshop.path("x").exists());
}
