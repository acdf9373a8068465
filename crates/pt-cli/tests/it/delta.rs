use crate::common::{Workshop, json_lines, stderr};

/// Summed log-probs of the held-out rows.
fn score(workshop: &Workshop, model: &str, more: &[&str]) -> f64 {
    let mut args = vec!["score", "--model", model, "--data", "held_out.jsonl", "--dtype", "f32"];
    args.extend(more);
    let lines = json_lines(&workshop.stdout(&args));
    lines.iter().map(|line| line["completions"][0]["logprob"].as_f64().unwrap()).sum()
}

/// A workshop with a run of LoRA in `run` and the fine-tuned model in `tuned`.
fn tuned() -> Workshop {
    let workshop = Workshop::new();
    workshop.stdout(&workshop.sft("run", &["--set", "learning_rate=0.02"]));
    workshop.stdout(&["merge", "--model", "model", "--adapter", "run", "--dtype", "f32", "--output", "tuned"]);
    workshop
}

const BASE: [&str; 4] = ["--model", "model", "--device", "cpu"];

fn delta<'a>(command: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["delta", command], &BASE[..], more].concat()
}

#[test]
fn a_fine_tune_is_compressed_distilled_applied_merged_and_exchanged() {
    let workshop = tuned();
    let from_model = delta("compress", &["--fine-tuned", "tuned", "--output", "delta"]);
    let output = workshop.run(&from_model);
    assert!(output.status.success() && stderr(&output).contains("times smaller"), "{}", stderr(&output));
    workshop.stdout(&delta("compress", &["--adapter", "run", "--output", "from_adapter"]));
    let bytes = |folder: &str| std::fs::read(workshop.path(folder).join("adapter_model.safetensors")).unwrap();
    assert!(bytes("delta") == bytes("from_adapter"), "a fine-tune by its adapter is the merged one");

    // On the fly and merged.
    let on = score(&workshop, "model", &["--adapter", "delta"]);
    assert!((on - score(&workshop, "model", &[])).abs() > 1e-2);
    workshop.stdout(&delta("merge", &["--delta", "delta", "--dtype", "f32", "--output", "merged"]));
    assert!((score(&workshop, "merged", &[]) - on).abs() < 1e-3);
    let generate = |args: &[&str]| {
        let common = ["generate", "--prompt", "t5 t6 t7", "--max-new-tokens", "4", "--device", "cpu"];
        workshop.stdout(&[&common[..], args].concat())
    };
    assert_eq!(generate(&["--model", "model", "--adapter", "delta"]), generate(&["--model", "merged"]));

    // Distilled, with either teacher, it comes closer.
    for (teacher, name, output) in [("--fine-tuned", "tuned", "distilled"), ("--adapter", "run", "distilled2")] {
        let settings = ["--data", "rows.jsonl", "--steps", "30", "--learning-rate", "2e-3", "--seq-len", "16"];
        let more = [&["--delta", "delta", teacher, name, "--output", output], &settings[..]].concat();
        let told = stderr(&workshop.run(&delta("distill", &more)));
        let line = told.lines().find(|line| line.starts_with("mean squared error")).unwrap_or_else(|| panic!("{told}"));
        let errors: Vec<f64> = line.split([' ', ',']).filter_map(|word| word.parse().ok()).collect();
        assert!(errors[2] < errors[1], "{line}");
    }
    let shown: serde_json::Value =
        serde_json::from_str(&workshop.stdout(&["delta", "inspect", "distilled", "--json"])).unwrap();
    assert_eq!(
        (&shown["settings"]["distilled_steps"], &shown["settings"]["scale_sharing"]),
        (&30.into(), &"matrix".into())
    );
    assert!(workshop.stdout(&["inspect", "delta"]).contains("a 1-bit delta"));

    // BitDelta's own packing.
    workshop.stdout(&["delta", "export", "distilled", "--output", "diff.safetensors"]);
    workshop.stdout(&delta("import", &["--file", "diff.safetensors", "--output", "imported"]));
    let of = |folder| score(&workshop, "model", &["--adapter", folder]);
    assert_eq!(of("imported"), of("distilled"));
}

#[test]
fn what_makes_no_delta_is_refused_and_nothing_is_written() {
    let workshop = tuned();
    workshop.stdout(&delta("compress", &["--fine-tuned", "tuned", "--scales", "row", "--output", "delta"]));
    let refused = |args: &[&str], words: &str| {
        let output = workshop.run(args);
        assert!(matches!(output.status.code(), Some(1 | 2)) && stderr(&output).contains(words), "{}", stderr(&output));
    };
    refused(&delta("compress", &["--output", "new"]), "--fine-tuned");
    refused(
        &delta("compress", &["--fine-tuned", "tuned", "--adapter", "run", "--output", "new"]),
        "cannot be used with",
    );
    refused(&delta("compress", &["--fine-tuned", "tuned", "--output", "delta"]), "already exists");
    refused(&delta("merge", &["--delta", "run", "--output", "new"]), "adapter_config.json");
    refused(&["score", "--model", "tuned", "--adapter", "delta", "--data", "held_out.jsonl"], "base_checksum");
    refused(&["delta", "export", "delta", "--output", "new"], "one scale for a matrix");
    workshop.write("diff.pt", "PK\u{3}\u{4}");
    refused(&delta("import", &["--file", "diff.pt", "--output", "new"]), "save_file");
    let distill = ["--delta", "delta", "--fine-tuned", "tuned", "--data", "rows.jsonl", "--output", "new"];
    refused(&delta("distill", &[&distill[..], &["--learning-rate=-1"]].concat()), "learning_rate");
    refused(&workshop.sft("new", &["--adapter", "delta"]), "pt delta distill");
    assert!(!workshop.path("new").exists());
}
