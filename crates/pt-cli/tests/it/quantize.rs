use crate::common::{Workshop, json_lines, stderr};

/// Summed log-probs of the held-out rows.
fn score(workshop: &Workshop, model: &str, more: &[&str]) -> f64 {
    let mut args = vec!["score", "--model", model, "--data", "held_out.jsonl", "--dtype", "f32"];
    args.extend(more);
    let lines = json_lines(&workshop.stdout(&args));
    lines.iter().map(|line| line["completions"][0]["logprob"].as_f64().unwrap()).sum()
}

#[test]
fn a_quantized_checkpoint_is_what_weights_nf4_computes_with() {
    let workshop = Workshop::new();
    workshop.stdout(&["quantize", "--model", "model", "--to", "nf4", "--dtype", "f32", "--output", "4bit"]);
    let (dense, stored) = (score(&workshop, "model", &[]), score(&workshop, "4bit", &[]));
    let (on_load, int8) =
        (score(&workshop, "model", &["--weights", "nf4"]), score(&workshop, "4bit", &["--weights", "nf4-int8"]));
    assert!((stored - on_load).abs() < 1e-3, "{stored} and {on_load}");
    assert!((stored - dense).abs() > 1e-2, "4 bits show: {stored} and {dense}");
    assert!((int8 - stored).abs() > 1e-6 && (int8 - stored).abs() < 0.05 * stored.abs(), "{int8} and {stored}");
    let size = |folder: &str| std::fs::metadata(workshop.path(folder).join("model.safetensors")).unwrap().len();
    assert!(size("4bit") < size("model"));

    // Scales in 8 bits are close, and take less.
    workshop.stdout(&["quantize", "--model", "model", "--double-quant", "--dtype", "f32", "--output", "double"]);
    let double = score(&workshop, "double", &[]);
    assert!(double != stored && (double - stored).abs() < 0.05 * stored.abs(), "{double} and {stored}");

    // LoRA trains on it and answers with it: QLoRA.
    let mut sft = workshop.sft("run", &["--set", "learning_rate=0.05"]);
    sft[2] = "4bit";
    workshop.stdout(&sft);
    let adapted = score(&workshop, "4bit", &["--adapter", "run/checkpoints/step-00000006/adapter"]);
    assert!((adapted - stored).abs() > 1e-2, "{adapted} and {stored}");
    // Merging gives a dense checkpoint.
    workshop.stdout(&["merge", "--model", "4bit", "--adapter", "run", "--dtype", "f32", "--output", "merged"]);
    let merged = score(&workshop, "merged", &[]);
    assert!((merged - adapted).abs() < 1e-2, "{merged} and {adapted}");
}

#[test]
fn what_cannot_be_quantized_is_refused_and_nothing_is_written() {
    let workshop = Workshop::new();
    workshop.stdout(&["quantize", "--model", "model", "--output", "4bit"]);
    let refused = |args: &[&str], words: &str| {
        let output = workshop.run(args);
        assert!(matches!(output.status.code(), Some(1 | 2)) && stderr(&output).contains(words), "{}", stderr(&output));
    };
    refused(&["quantize", "--model", "4bit", "--output", "new"], "in 4 bits already");
    refused(
        &["quantize", "--model", "model", "--block-size", "48", "--output", "new"],
        "a power of two from 32 to 4096",
    );
    refused(&["quantize", "--model", "model", "--adapter", "model", "--output", "new"], "`pt merge` it first");
    refused(&["quantize", "--model", "model", "--to", "int4", "--output", "new"], "nf4");
    refused(&["quantize", "--model", "model", "--output", "4bit"], "already exists");
    assert!(!workshop.path("new").exists());
    // A part that is missing, and a description that lies.
    let path = workshop.path("4bit/model.safetensors");
    let whole = std::fs::read(&path).unwrap();
    for (from, to) in [("up_proj.weight.absmax", "up_proj.weight.absmin"), ("\"blocksize\": 64", "\"blocksize\": 63")] {
        let at = whole.windows(from.len()).position(|window| window == from.as_bytes()).unwrap();
        let mut damaged = whole.clone();
        damaged[at..at + from.len()].copy_from_slice(to.as_bytes());
        std::fs::write(&path, damaged).unwrap();
        refused(&["score", "--model", "4bit", "--data", "held_out.jsonl"], "proj.weight");
    }
}
