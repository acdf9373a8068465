use crate::common::{Workshop, stderr};
use std::path::PathBuf;

/// The command fails with exit code `code`, each of `says` stands in its error, it has a hint, and it leaves no file.
fn refused(workshop: &Workshop, args: &[&str], code: i32, says: &[&str]) {
    let before = workshop.files(".");
    let output = workshop.run(args);
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(code), "{args:?}: {text}");
    let error = text.lines().find(|line| line.starts_with("error: ")).unwrap_or_else(|| panic!("no error: {text}"));
    for part in says {
        assert!(text.contains(part), "{args:?}: `{part}` is not in {text}");
    }
    assert!(text.contains("\n  hint: "), "{args:?} has no hint: {error}");
    assert!(!text.contains("panicked"), "{text}");
    assert!(output.stdout.is_empty(), "{}", String::from_utf8_lossy(&output.stdout));
    assert_eq!(workshop.files("."), before, "{args:?} left something behind");
}

fn sft_refused(workshop: &Workshop, more: &[&str], code: i32, says: &[&str]) {
    refused(workshop, &workshop.sft("run", more), code, says);
}

/// As [`sft_refused`] with other rows, given as text.
fn rows_refused(text: &str, says: &[&str]) {
    let workshop = Workshop::new();
    workshop.write("rows.jsonl", text);
    sft_refused(&workshop, &[], 1, says);
}

/// As [`sft_refused`] with another config.json.
fn config_refused(change: impl Fn(&mut serde_json::Map<String, serde_json::Value>), says: &[&str]) {
    let workshop = Workshop::new();
    let path = workshop.path("model/config.json");
    let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(config.as_object_mut().unwrap());
    workshop.write("model/config.json", &config.to_string());
    sft_refused(&workshop, &[], 1, says);
}

#[test]
fn a_missing_model_is_named() {
    let workshop = Workshop::new();
    for command in ["generate", "score"] {
        let args = [command, "--model", "models/nothing", "--data", "rows.jsonl"];
        refused(&workshop, &args, 1, &["models/nothing"]);
    }
    sft_refused(&workshop, &["--adapter", "no/adapter"], 1, &["no/adapter"]);
    std::fs::remove_dir_all(workshop.path("model")).unwrap();
    std::fs::create_dir(workshop.path("model")).unwrap();
    sft_refused(&workshop, &[], 1, &["model", "no config.json"]);
}

#[test]
fn a_model_without_a_tokenizer_is_refused() {
    let workshop = Workshop::new();
    std::fs::remove_file(workshop.path("model/tokenizer.json")).unwrap();
    sft_refused(&workshop, &[], 1, &["tokenizer.json"]);
}

#[test]
fn a_truncated_safetensors_file_is_named_at_any_length() {
    let workshop = Workshop::new();
    let path = workshop.path("model/model.safetensors");
    let whole = std::fs::read(&path).unwrap();
    for length in [0, 4, 8, 100, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&path, &whole[..length]).unwrap();
        sft_refused(&workshop, &[], 1, &["model.safetensors"]);
    }
}

#[test]
fn a_config_without_a_required_key_is_named() {
    config_refused(|config| drop(config.remove("hidden_size")), &["config.json", "`hidden_size`"]);
    config_refused(
        |config| drop(config.insert("num_attention_heads".into(), "four".into())),
        &["config.json", "`num_attention_heads`", "four"],
    );
}

#[test]
fn an_unknown_architecture_is_named() {
    let change = |config: &mut serde_json::Map<String, serde_json::Value>| {
        config.insert("model_type".into(), "lama".into());
        config.insert("architectures".into(), serde_json::json!(["LamaForCausalLM"]));
    };
    config_refused(change, &["config.json", "ama"]);
}

#[test]
fn bad_rows_are_named_by_line() {
    let good = r#"{"prompt": "t1 t9", "completion": " t10"}"#;
    rows_refused(&format!("{good}\n{good}\n{{\"prompt\": \"t1\n"), &["rows.jsonl:3", "JSON"]);
    rows_refused(
        &format!("{good}\n{{\"prompt\": \"t1\", \"complete\": \" t10\"}}\n"),
        &["rows.jsonl:2", "`completion`"],
    );
    rows_refused(
        &format!("{good}\n{{\"prompt\": \"t1\", \"completion\": 5}}\n"),
        &["rows.jsonl:2", "`completion`", "5"],
    );
    rows_refused(
        &format!("{good}\n{{\"prompt\": \"t1\", \"completion\": \"\"}}\n"),
        &["rows.jsonl:2", "empty completion"],
    );
    rows_refused("", &["rows.jsonl", "no rows"]);
    rows_refused("\n\n", &["rows.jsonl", "no rows"]);
}

#[test]
fn a_missing_data_file_is_named() {
    let workshop = Workshop::new();
    sft_refused(&workshop, &["--eval-data", "no/such.jsonl"], 1, &["no/such.jsonl"]);
}

#[test]
fn unknown_keys_and_bad_values_are_named_with_near_names() {
    let workshop = Workshop::new();
    sft_refused(&workshop, &["--set", "learning_rat=1"], 2, &["learning_rat", "did you mean `learning_rate`?"]);
    sft_refused(&workshop, &["--set", "lr=1e-4"], 2, &["did you mean `learning_rate`?"]);
    sft_refused(&workshop, &["--set", "lora.rnk=4"], 2, &["lora.rnk", "did you mean `lora.rank`?"]);
    sft_refused(&workshop, &["--set", "learning_rate=-1"], 2, &["learning_rate is -1"]);
    sft_refused(&workshop, &["--set", "learning_rate=fast"], 2, &["learning_rate=fast"]);
    sft_refused(&workshop, &["--set", "batch.batch_size=0"], 2, &["batch_size"]);
    sft_refused(&workshop, &["--set", "schedule.warmup_ratio=2"], 2, &["warmup_ratio is 2"]);
    sft_refused(&workshop, &["--set", "data.max_length=65"], 2, &["data.max_length is 65", "64"]);
    let args = ["score", "--model", "model", "--data", "rows.jsonl", "--device", "tpu"];
    refused(&workshop, &args, 2, &["tpu"]);
    workshop.write("run.yaml", "learning_rate: 1e-4\nbatchsize: 4\n");
    sft_refused(&workshop, &["--config", "run.yaml"], 2, &["run.yaml", "batchsize"]);
}

#[test]
fn a_misspelt_name_of_the_catalog_gets_a_suggestion() {
    let workshop = Workshop::new();
    let generate = |model| ["generate", "--model", model, "--prompt", "t5"];
    refused(&workshop, &generate("smolm2-135m-instruct"), 1, &["did you mean `smollm2-135m-instruct`?"]);
    refused(&workshop, &generate("gsm8k"), 1, &["`gsm8k` is a data set"]);
    refused(&workshop, &["fetch", "libtorch-2.11.0-linux-x86_64"], 1, &["no model or data set named"]);
}

#[test]
fn settings_that_contradict_each_other_are_refused() {
    let workshop = Workshop::new();
    workshop.stdout(&workshop.sft("first", &["--set", "max_steps=1"]));
    let adapter = "first/checkpoints/step-00000001/adapter";
    sft_refused(&workshop, &["--adapter", adapter], 2, &["--set lora.rank=2 beside --adapter"]);
    // Those of a file and of methods that are not chosen are no more dropped than those of --set.
    workshop.write("rank.yaml", "lora:\n  rank: 4\n");
    workshop.write("ia3.yaml", "ia3:\n  exclude_modules: [down_proj]\n");
    let on = ["sft", "--model", "model", "--data", "rows.jsonl", "--output", "run", "--dry-run"];
    let on = |more: &[&'static str]| on.iter().chain(more).copied().collect::<Vec<_>>();
    let fits = ["--set", "data.max_length=64"];
    let in_file = ["--adapter", adapter, "--config", "rank.yaml"];
    refused(&workshop, &on(&in_file), 2, &["settings in `lora`", "step-00000001/adapter hold"]);
    let other = ["--adapter", adapter, "--config", "ia3.yaml"];
    refused(&workshop, &on(&other), 2, &["ia3 has settings and peft is lora"]);
    refused(&workshop, &on(&["--peft", "ia3", "--set", "lora.rank=4"]), 2, &["lora has settings and peft is ia3"]);
    workshop.stdout(&on(&[&["--peft", "ia3", "--config", "ia3.yaml"][..], &fits].concat()));
    workshop.stdout(&on(&[&["--adapter", adapter, "--set", "lora.loraplus_lr_ratio=4"][..], &fits].concat()));
    let without_lora = ["sft", "--model", "model", "--data", "rows.jsonl", "--output", "run", "--peft", "none"];
    let with = |more: &[&'static str]| without_lora.iter().chain(more).copied().collect::<Vec<_>>();
    refused(&workshop, &with(&["--adapter", adapter]), 2, &["peft is null"]);
    refused(&workshop, &with(&["--dtype", "bf16"]), 2, &["--dtype is bf16", "in f32"]);
    let score = ["score", "--model", "model", "--data", "rows.jsonl", "--set", "lora.rank=2"];
    refused(&workshop, &score, 2, &["--set lora.rank"]);
}

#[test]
fn numbers_out_of_range_are_wrong_usage() {
    let workshop = Workshop::new();
    let faults = [
        ("--top-p", "2"),
        ("--top-p", "NaN"),
        ("--min-p", "-1"),
        ("--temperature", "-1"),
        ("--repetition-penalty", "0"),
        ("--max-new-tokens", "0"),
        ("--num-samples", "0"),
        ("--batch-size", "0"),
    ];
    for (flag, value) in faults {
        let argument = format!("{flag}={value}");
        let output = workshop.run(&["generate", "--model", "model", "--prompt", "t5", &argument]);
        assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
        assert!(stderr(&output).contains(flag), "{}", stderr(&output));
    }
    // As many as one may wish; the context ends the completion.
    workshop.stdout(&["generate", "--model", "model", "--prompt", "t5", "--max-new-tokens", &usize::MAX.to_string()]);
}

#[test]
fn what_to_complete_is_asked_for_by_both_names() {
    let workshop = Workshop::new();
    for more in [&[][..], &["--data", "rows.jsonl", "--prompt", "t5"]] {
        let output = workshop.run(&[&["generate", "--model", "model"], more].concat());
        assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
        assert!(stderr(&output).contains("--data") && stderr(&output).contains("--prompt"), "{}", stderr(&output));
    }
}

#[test]
fn a_taken_output_is_told_before_anything_is_read() {
    let workshop = Workshop::new();
    workshop.stdout(&workshop.sft("run", &["--set", "max_steps=1"]));
    std::fs::create_dir(workshop.path("full")).unwrap();
    workshop.write("full/note", "mine");
    let sft = |output| ["sft", "--model", "no/model", "--data", "no/rows.jsonl", "--output", output];
    refused(&workshop, &sft("run"), 1, &["run: already holds a run", "--resume"]);
    refused(&workshop, &sft("full"), 1, &["full: is not empty", "choose another --output"]);
    let demo = ["demo", "sft", "--model", "no/model", "--data", "no", "--output", "run"];
    refused(&workshop, &demo, 1, &["run: already holds a run"]);
}

#[test]
fn a_folder_without_an_adapter_is_told_what_to_name() {
    let workshop = Workshop::new();
    let chat = |adapter| ["generate", "--model", "model", "--prompt", "t5", "--adapter", adapter];
    refused(&workshop, &chat("no/adapter"), 1, &["no/adapter: holds no adapter_config.json"]);
    refused(&workshop, &chat("model"), 1, &["model: holds no adapter_config.json", "a run of `pt sft`"]);
    std::fs::create_dir(workshop.path("torn")).unwrap();
    workshop.write("torn/adapter_config.json", "{");
    refused(&workshop, &["inspect", "torn"], 1, &["torn/adapter_config.json: not valid JSON"]);
    let full = ["--peft", "none", "--set", "max_steps=1", "--set", "data.max_length=64"];
    let args = ["sft", "--model", "model", "--data", "rows.jsonl", "--output", "full", "--device", "cpu"];
    workshop.stdout(&[&args[..], &full].concat());
    refused(&workshop, &chat("full"), 1, &["all weights were trained", "--model full/checkpoints/step-00000001/model"]);
    std::fs::remove_dir_all(workshop.path("full/checkpoints/step-00000001")).unwrap();
    refused(&workshop, &chat("full"), 1, &["no checkpoint yet", "pt sft --resume --output full"]);
}

#[test]
fn a_bad_prompt_is_named_before_any_is_completed() {
    let workshop = Workshop::new();
    let long = serde_json::json!({"prompt": vec!["t9"; 64].join(" ")});
    workshop.write("prompts.jsonl", &format!("{{\"prompt\": \"t5\"}}\n{long}\n"));
    let args = ["generate", "--model", "model", "--data", "prompts.jsonl", "--batch-size", "1"];
    refused(&workshop, &args, 1, &["prompts.jsonl:2", "context of 64"]);
}

#[test]
fn tensors_that_do_not_fit_the_config_are_named() {
    config_refused(|config| drop(config.insert("vocab_size".into(), 96.into())), &["shape", "[128", "[96"]);
    config_refused(|config| drop(config.insert("num_hidden_layers".into(), 1.into())), &["layers.1.", "fit no part"]);
}

#[test]
fn a_template_that_does_not_parse_is_named() {
    let workshop = Workshop::new();
    workshop.write("model/tokenizer_config.json", r#"{"eos_token": "t2", "chat_template": "{% for m in %}"}"#);
    let chat = r#"{"messages": [{"role": "user", "content": "t5"}, {"role": "assistant", "content": "t6"}]}"#;
    workshop.write("rows.jsonl", chat);
    sft_refused(&workshop, &[], 1, &["template"]);
}

#[test]
fn a_data_set_without_a_model_is_told_what_it_needs() {
    let workshop = Workshop::new();
    refused(&workshop, &["inspect", "rows.jsonl"], 2, &["rows.jsonl is a data set", "--model"]);
}

#[test]
fn lora_settings_that_cannot_be_are_named() {
    let workshop = Workshop::new();
    sft_refused(&workshop, &["--set", "lora.rank=0"], 2, &["rank", "0"]);
    sft_refused(&workshop, &["--set", "lora.target_modules=[q_proj, v_prj]"], 1, &["`v_prj`", "did you mean `v_proj`"]);
}

#[test]
fn an_output_that_cannot_be_written_is_named() {
    let workshop = Workshop::new();
    workshop.write("taken", "a file");
    refused(&workshop, &workshop.sft("taken/run", &[]), 1, &["cannot write", "taken/run"]);
    refused(&workshop, &workshop.sft("taken", &[]), 1, &["taken", "is a file"]);
    // Before the model is read.
    let merge = ["merge", "--model", "no/model", "--output", "taken/merged"];
    refused(&workshop, &merge, 1, &["cannot write", "taken/merged"]);
    let score = ["score", "--model", "model", "--data", "rows.jsonl", "--output", "no/such/folder/out.jsonl"];
    refused(&workshop, &score, 1, &["no/such/folder/out.jsonl"]);
}

#[test]
fn a_standing_run_is_neither_overwritten_nor_invented() {
    let workshop = Workshop::new();
    refused(&workshop, &workshop.sft("run", &["--resume"]), 1, &["run", "holds no config.yaml"]);
    let output = workshop.run(&workshop.sft("run", &[]));
    assert!(output.status.success(), "{}", stderr(&output));
    let bytes = |path: &PathBuf| std::fs::read(path).unwrap_or_default();
    let before: Vec<Vec<u8>> = workshop.files("run").iter().map(bytes).collect();
    refused(&workshop, &workshop.sft("run", &[]), 1, &["already holds a run", "--resume"]);
    assert_eq!(workshop.files("run").iter().map(bytes).collect::<Vec<_>>(), before);
    refused(
        &workshop,
        &workshop.sft("run", &["--resume", "--set", "lora.rank=4"]),
        2,
        &["checkpoint", "the configuration changed"],
    );
}

#[test]
fn a_prompt_with_no_room_for_an_answer_is_refused() {
    let workshop = Workshop::new();
    let prompt = vec!["t9"; 64].join(" ");
    let args = ["generate", "--model", "model", "--prompt", &prompt, "--output", "out.jsonl"];
    refused(&workshop, &args, 1, &["64", "context"]);
    let row = serde_json::json!({"prompt": prompt, "completion": " t10"}).to_string();
    workshop.write("rows.jsonl", &row);
    refused(&workshop, &["score", "--model", "model", "--data", "rows.jsonl"], 1, &["rows.jsonl:1", "context of 64"]);
    sft_refused(&workshop, &[], 1, &["1 too long for 64 tokens"]);
}
