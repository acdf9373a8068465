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
    assert_eq!(stored, on_load, "the same codes and scales");
    assert!((stored - dense).abs() > 1e-2, "4 bits show: {stored} and {dense}");
    assert!((int8 - stored).abs() > 1e-6 && (int8 - stored).abs() < 0.05 * stored.abs(), "{int8} and {stored}");
    let size = |folder: &str| std::fs::metadata(workshop.path(folder).join("model.safetensors")).unwrap().len();
    assert!(size("4bit") < size("model"));

    // Scales in f32 are close, and take more.
    workshop.stdout(&["quantize", "--model", "model", "--double-quant=false", "--dtype", "f32", "--output", "plain"]);
    let plain = score(&workshop, "plain", &[]);
    assert!(plain != stored && (plain - stored).abs() < 0.05 * stored.abs(), "{plain} and {stored}");

    // LoRA trains on it and answers with it: QLoRA.
    let mut sft = workshop.sft("run", &["--set", "learning_rate=0.05"]);
    sft[2] = "4bit";
    workshop.stdout(&sft);
    let adapted = score(&workshop, "4bit", &["--adapter", "run/checkpoints/step-00000006/adapter"]);
    assert!((adapted - stored).abs() > 1e-2, "{adapted} and {stored}");
    // Merging gives a dense checkpoint, and says how far it is from the adapter on its base.
    let merge = ["merge", "--model", "4bit", "--adapter", "run", "--dtype", "f32", "--output"];
    let said = workshop.stdout(&[&merge[..], &["merged"]].concat());
    let merged = score(&workshop, "merged", &[]);
    assert!((merged - adapted).abs() < 1e-2, "{merged} and {adapted}");
    let (logit, kl) = drift(&said, "merged, f32");
    assert!(said.contains("the adapter on its 4-bit base") && logit < 1e-3 && kl.abs() < 1e-6, "{said}");
    // In 4 bits again it is farther.
    let rows = ["--data", "held_out.jsonl", "--set", "data.max_length=64"];
    let said = workshop.stdout(&[&merge[..], &["again", "--requantize"], &rows].concat());
    let (logit_again, kl_again) = drift(&said, "merged, NF4 again");
    assert!(said.contains("of 4 texts") && logit_again > logit && kl_again > 1e-6, "{said}");
    let again = score(&workshop, "again", &[]);
    assert!(again != merged && (again - merged).abs() < 0.5 * (merged - stored).abs().max(1.0), "{again} and {merged}");
    assert!(size("again") < size("merged"));
    let refused = workshop.run(&["merge", "--model", "model", "--adapter", "run", "--output", "no", "--requantize"]);
    assert!(stderr(&refused).contains("no weight of model is in 4 bits"), "{}", stderr(&refused));
    assert!(!workshop.path("no").exists());

    // What it takes is known without decoding it.
    let inspected = workshop.stdout(&["inspect", "4bit"]);
    assert!(inspected.contains("in 4 bits: 0 MB, 0.0 M weights of 0.519"), "{inspected}");
    let inspected = workshop.stdout(&["inspect", "plain"]);
    assert!(inspected.contains("in 4 bits: 0 MB, 0.0 M weights of 0.562"), "{inspected}");

    // Over weights quantized on load, all commands mean the same: the merge is as near as that of the stored ones.
    let over = ["--model", "model", "--weights", "nf4", "--adapter", "qlora"];
    let mut sft = workshop.sft("qlora", &["--set", "learning_rate=0.05", "--weights", "nf4"]);
    sft[2] = "model";
    workshop.stdout(&sft);
    workshop.stdout(&[&["merge"], &over[..], &["--dtype", "f32", "--output", "merged2"]].concat());
    let (adapted, merged) = (score(&workshop, "model", &over[2..]), score(&workshop, "merged2", &[]));
    assert!((merged - adapted).abs() < 1e-2, "{merged} and {adapted}");
}

/// max |Δlogit| and mean KL of a line of `pt merge`.
fn drift(said: &str, line: &str) -> (f64, f64) {
    let line = said.lines().find(|found| found.trim_start().starts_with(line)).unwrap_or_else(|| panic!("{said}"));
    let number = |after: &str| {
        let rest = line.split_once(after).unwrap().1.trim_start();
        rest.split([',', ' ']).next().unwrap().parse().unwrap()
    };
    (number("|Δlogit|"), number("mean KL"))
}

#[test]
fn a_dense_checkpoint_is_quantized_on_load_for_training_and_stays_so_in_a_resumed_run() {
    let workshop = Workshop::new();
    let settings = ["learning_rate=0.05", "adamw.variant=paged_adamw_8bit", "schedule.kind=constant"];
    let more: Vec<&str> =
        ["--weights", "nf4"].into_iter().chain(settings.iter().flat_map(|set| ["--set", set])).collect();
    let output = workshop.run(&workshop.sft("run", &[&more[..], &["--set", "max_steps=3"]].concat()));
    let said = stderr(&output);
    assert!(output.status.success(), "{said}");
    for part in ["4-bit weights ", "weights of 0.5", "adapter ", "gradients ", "paged_adamw_8bit, in a file in the run"]
    {
        assert!(said.contains(part), "no `{part}` in {said}");
    }
    let command = std::fs::read_to_string(workshop.path("run/command.yaml")).unwrap();
    assert!(command.contains("weights: nf4"), "{command}");
    let other = workshop.run(&["sft", "--resume", "--output", "run", "--weights", "as-stored"]);
    assert!(
        stderr(&other).contains("--weights is \"as-stored\", the run was started with \"nf4\""),
        "{}",
        stderr(&other)
    );
    workshop.stdout(&["sft", "--resume", "--output", "run", "--set", "max_steps=6"]);
    // The whole run at once ends equally.
    workshop.stdout(&workshop.sft("whole", &more));
    let adapter = |run: &str| {
        let file = format!("{run}/checkpoints/step-00000006/adapter/adapter_model.safetensors");
        std::fs::read(workshop.path(&file)).unwrap()
    };
    assert!(adapter("run") == adapter("whole"));

    // Merged where it was trained, without a flag, and not into weights that it has not seen.
    let merge = ["merge", "--model", "model", "--adapter", "run", "--dtype", "f32", "--output"];
    let said = workshop.stdout(&[&merge[..], &["merged"]].concat());
    assert!(said.contains("the adapter on its 4-bit base") && drift(&said, "merged, f32").0 < 1e-3, "{said}");
    let merged = score(&workshop, "merged", &[]);
    let refused = workshop.run(&[&merge[..], &["no", "--weights", "as-stored"]].concat());
    assert!(stderr(&refused).contains("the run was started with \"nf4\""), "{}", stderr(&refused));
    assert!(!workshop.path("no").exists());
    // Out of its run nothing is known of it.
    let copy = workshop.path("copy");
    std::fs::create_dir(&copy).unwrap();
    for path in workshop.files("run/checkpoints/step-00000006/adapter") {
        std::fs::copy(&path, copy.join(path.file_name().unwrap())).unwrap();
    }
    let other = ["merge", "--model", "model", "--adapter", "copy", "--dtype", "f32", "--output", "dense"];
    assert!(workshop.stdout(&other).contains("the adapter on its base"));
    assert!((score(&workshop, "dense", &[]) - merged).abs() > 1e-3);
    // Who answers over other weights is told.
    for (weights, is_warned) in [("as-stored", true), ("nf4", false)] {
        let args = ["score", "--model", "model", "--data", "held_out.jsonl", "--adapter", "run", "--weights", weights];
        let said = stderr(&workshop.run(&args));
        assert_eq!(
            said.contains("warning: ") && said.contains("was trained over weights in 4 bits"),
            is_warned,
            "{said}"
        );
    }

    let full = workshop.run(&workshop.sft("full", &["--weights", "nf4", "--peft", "none"]));
    assert!(stderr(&full).contains("weights in 4 bits are frozen"), "{}", stderr(&full));
    assert!(!workshop.path("full").exists());
}

#[test]
fn biases_that_a_merge_adds_have_a_place_in_4_bits_too() {
    let train = |workshop: &Workshop, name: &'static str, more: &[&'static str]| {
        let rate = ["--set", "learning_rate=0.05", "--weights", "nf4", "--samples", "0"];
        workshop.stdout(&workshop.sft(name, &[&rate[..], more].concat()));
    };
    let merge = |workshop: &Workshop, name: &str, output: &str| {
        let args = ["merge", "--model", "model", "--adapter", name, "--dtype", "f32", "--requantize", "--output"];
        workshop.run(&[&args[..], &[output]].concat())
    };
    let bitfit = ["--peft", "bitfit", "--set", r#"bitfit.target_modules=["q_proj","down_proj"]"#];
    let tinytl = ["--peft", "tinytl", "--set", "tinytl.mode=bias"];
    let llama = Workshop::new();
    for (name, more) in [("bitfit", &bitfit), ("tinytl", &tinytl)] {
        train(&llama, name, more);
        let output = format!("{name}-4bit");
        let said = merge(&llama, name, &output);
        assert!(said.status.success(), "{}", stderr(&said));
        let adapted = score(&llama, "model", &["--weights", "nf4", "--adapter", name]);
        let (bare, merged) = (score(&llama, "model", &["--weights", "nf4"]), score(&llama, &output, &[]));
        // The codes are the base's: the biases alone were added.
        assert!((adapted - bare).abs() > 0.1 && (merged - adapted).abs() < 1e-3, "{bare} {adapted} {merged}");
    }
    // A Mistral has no biases, in 4 bits as little as in 16.
    let mistral = Workshop::of("mistral");
    train(&mistral, "bitfit", &bitfit);
    let refused = merge(&mistral, "bitfit", "no");
    assert!(stderr(&refused).contains("a mistral checkpoint has no place for it"), "{}", stderr(&refused));
    assert!(!mistral.path("no").exists());
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
