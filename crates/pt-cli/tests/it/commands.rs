//! What each command does when all is well.

use crate::common::{Workshop, json_lines, stderr};
use std::io::Write;
use std::process::Stdio;

#[test]
fn generate_completes_each_row_in_order() {
    let workshop = Workshop::new().with_template();
    let rows = [
        r#"{"prompt": "t1 t9"}"#,
        r#"{"messages": [{"role": "user", "content": "t8"}]}"#,
        r#"{"prompt": [{"role": "user", "content": "t8"}]}"#,
        r#"{"prompt": "t1 t9", "completion": " t10"}"#,
    ];
    workshop.write("prompts.jsonl", &rows.join("\n"));
    let args = ["generate", "--model", "model", "--data", "prompts.jsonl", "--max-new-tokens", "5"];
    let lines = json_lines(&workshop.stdout(&args));
    assert_eq!(lines.len(), 4);
    for line in &lines {
        let count = line["token_ids"].as_array().unwrap().len();
        assert!((1..=5).contains(&count) && line["completion"].is_string(), "{line}");
        assert!(line["finish_reason"] == "length" || line["finish_reason"] == "stop", "{line}");
    }
    // The same prompt in another form.
    assert_eq!((&lines[0], &lines[1]), (&lines[3], &lines[2]));

    let with = |more: &[&'static str]| args.iter().chain(more).copied().collect::<Vec<_>>();
    assert_eq!(workshop.stdout(&with(&["--output", "out.jsonl"])), "");
    assert_eq!(json_lines(&std::fs::read_to_string(workshop.path("out.jsonl")).unwrap()), lines);
    let sampled = with(&["--num-samples", "3", "--temperature", "1", "--logprobs", "--set", "data.max_rows=2"]);
    let sampled = json_lines(&workshop.stdout(&sampled));
    assert_eq!(sampled.len(), 6);
    assert_eq!(sampled[0]["logprobs"].as_array().unwrap().len(), sampled[0]["token_ids"].as_array().unwrap().len());
}

#[test]
fn score_sums_the_tokens_of_each_completion() {
    let workshop = Workshop::new();
    workshop.write(
        "pairs.jsonl",
        "{\"prompt\": \"t5\", \"completion\": \" t6 t7\"}\n\
         {\"prompt\": \"t5\", \"chosen\": \" t6\", \"rejected\": \" t7\"}\n",
    );
    let args = ["score", "--model", "model", "--data", "pairs.jsonl", "--tokens", "--dtype", "f32"];
    let lines = json_lines(&workshop.stdout(&args));
    assert_eq!(lines[0]["completions"].as_array().unwrap().len(), 1);
    assert_eq!(lines[1]["completions"].as_array().unwrap().len(), 2);
    // Two tokens and the end of the turn, which is added to plain text.
    let scored = &lines[0]["completions"][0];
    let tokens: Vec<f64> =
        scored["token_logprobs"].as_array().unwrap().iter().map(|logprob| logprob.as_f64().unwrap()).collect();
    assert_eq!((tokens.len(), &scored["num_tokens"]), (3, &3.into()));
    assert!((tokens.iter().sum::<f64>() - scored["logprob"].as_f64().unwrap()).abs() < 1e-6);
}

#[test]
fn chat_answers_and_ends_before_a_stop_text() {
    let workshop = Workshop::new().with_template();
    let chat = |more: &[&str], input: &str| {
        let mut args = vec!["chat", "--model", "model", "--dtype", "f32", "--max-new-tokens", "6"];
        args.extend(more);
        let mut command = workshop.command(&args);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        (String::from_utf8_lossy(&output.stdout).into_owned(), stderr(&output))
    };
    let (one, _) = chat(&["--system", "t50"], "t20\n");
    let (text, _) = chat(&["--system", "t50"], "t20\n\n/new\nt20\nt21\n/quit\nt22\n");
    let answers: Vec<&str> = text.lines().collect();
    assert_eq!(answers.len(), 3, "{text}");
    assert_eq!((answers[0], answers[1]), (one.trim_end(), one.trim_end()));

    let words: Vec<&str> = one.split_whitespace().collect();
    assert!(words.len() > 2, "{one}");
    let (stopped, _) = chat(&["--system", "t50", "--stop", words[2]], "t20\n");
    let expected = one.split(words[2]).next().unwrap();
    assert_eq!(stopped.trim_end(), expected.trim_end());

    // 64 tokens of context: old turns are forgotten, a message that cannot fit is told so, and the session goes on.
    let (long, said) = chat(&[], &format!("{}{}\nt7\n", "t30 t31 t32 t33\n".repeat(9), "t9 ".repeat(70)));
    assert_eq!(long.lines().count(), 10, "{long}");
    assert!(said.contains("oldest messages are forgotten") && said.contains("longer than the context"), "{said}");
}

#[test]
fn merge_writes_the_model_that_the_adapter_made() {
    let workshop = Workshop::new();
    workshop.stdout(&workshop.sft("run", &["--set", "learning_rate=0.05"]));
    let adapter = "run/checkpoints/step-00000006/adapter";
    workshop.stdout(&["merge", "--model", "model", "--adapter", adapter, "--output", "merged"]);
    let score = |model: &'static str, more: &[&'static str]| {
        let mut args = vec!["score", "--model", model, "--data", "held_out.jsonl", "--dtype", "f32"];
        args.extend(more);
        let lines = json_lines(&workshop.stdout(&args));
        lines.iter().map(|line| line["completions"][0]["logprob"].as_f64().unwrap()).sum::<f64>()
    };
    let (base, adapted, merged) = (score("model", &[]), score("model", &["--adapter", adapter]), score("merged", &[]));
    assert!((adapted - merged).abs() < 1e-3 && (adapted - base).abs() > 1e-2, "{base} {adapted} {merged}");

    let config = |folder: &str| -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(workshop.path(folder).join("config.json")).unwrap()).unwrap()
    };
    assert_eq!(config("merged")["dtype"], "float32");
    let mut half = config("model");
    half.as_object_mut().unwrap().remove("torch_dtype");
    half["dtype"] = "float16".into();
    workshop.write("model/config.json", &half.to_string());
    workshop.stdout(&["merge", "--model", "model", "--adapter", adapter, "--output", "half"]);
    assert_eq!(config("half")["dtype"], "float16");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let mode = |name: &str| std::fs::metadata(workshop.path(name)).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode("merged"), mode("run"));
    }
    let again = workshop.run(&["merge", "--model", "model", "--adapter", adapter, "--output", "half"]);
    assert_eq!(again.status.code(), Some(1));
    assert!(stderr(&again).contains("half already exists") && stderr(&again).contains("hint: "), "{}", stderr(&again));
}

#[test]
fn inspect_shows_models_adapters_and_data_sets() {
    let workshop = Workshop::new();
    let text = workshop.stdout(&["inspect", "model"]);
    assert!(text.contains("LlamaForCausalLM") && text.contains("vocabulary 128"), "{text}");
    let json: serde_json::Value = serde_json::from_str(&workshop.stdout(&["inspect", "model", "--json"])).unwrap();
    assert_eq!(json["architecture"], "LlamaForCausalLM");

    workshop.stdout(&workshop.sft("run", &["--set", "max_steps=1"]));
    let adapter = workshop.stdout(&["inspect", "run/checkpoints/step-00000001/adapter"]);
    assert!(adapter.contains("an adapter: lora, ") && adapter.contains("  lora.rank: 2\n"), "{adapter}");
    let json = workshop.stdout(&["inspect", "run/checkpoints/step-00000001/adapter", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!((&json["method"], &json["settings"]["rank"]), (&"lora".into(), &2.into()));

    let data = |more: &[&'static str]| {
        let mut args = vec!["inspect", "rows.jsonl", "--model", "model", "--max-length", "64"];
        args.extend(more);
        workshop.stdout(&args)
    };
    let text = data(&[]);
    assert!(text.contains("rows.jsonl:1") && text.contains("[["), "{text}");
    // What training would refuse is counted.
    let json: serde_json::Value = serde_json::from_str(&data(&["--json", "--set", "data.max_length=5"])).unwrap();
    assert_eq!((&json["kept"], &json["rows"]), (&0.into(), &24.into()));
    let text = data(&["--set", "data.max_length=5"]);
    assert!(text.contains("none of 24 rows") && text.contains("rows.jsonl:1: 6 tokens"), "{text}");
}

#[test]
fn models_are_listed_and_a_closed_pipe_is_no_fault() {
    let workshop = Workshop::new();
    assert!(workshop.stdout(&["models"]).contains("smollm2-135m-instruct"));
    assert!(json_lines(&workshop.stdout(&["models", "--json"])).iter().any(|entry| entry["name"] == "gsm8k"));
    for args in [&["models"][..], &["inspect", "model"], &["sft", "--print-config"]] {
        let mut child = workshop.command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(0), ""), "{args:?}");
    }
}

#[test]
fn print_config_needs_nothing_else() {
    let workshop = Workshop::new();
    let text = workshop.stdout(&["sft", "--print-config", "--set", "lora.rank=3"]);
    assert!(text.contains("learning_rate:") && text.contains("rank: 3"), "{text}");
}

#[test]
fn print_config_says_what_each_field_is_and_is_itself_a_config() {
    let workshop = Workshop::new();
    let text = workshop.stdout(&["sft", "--print-config", "--set", "lora.rank=3"]);
    assert!(text.contains("# Highest learning rate.\nlearning_rate: ") && text.contains("\n  rank: 3\n"), "{text}");
    workshop.write("run.yaml", &text);
    assert_eq!(workshop.stdout(&["sft", "--print-config", "--config", "run.yaml"]), text);
    let help = workshop.stdout(&["sft", "--help"]);
    for line in ["  learning_rate=0.0002", "  data.max_length=1024", "  lora.target_modules=all-linear", "  seed=0"] {
        assert!(help.lines().any(|found| found == line), "{line} is not in {help}");
    }
    assert!(!workshop.stdout(&["sft", "-h"]).contains("data.max_length=1024"));
}

#[test]
fn an_output_is_replaced_only_where_that_is_asked_for() {
    let workshop = Workshop::new();
    workshop.write("out.jsonl", "dear\n");
    for args in [
        &["score", "--model", "model", "--data", "held_out.jsonl"][..],
        &["generate", "--model", "model", "--prompt", "t5"],
    ] {
        let with = |more: &[&'static str]| {
            args.iter().chain(&["--output", "out.jsonl"]).chain(more).copied().collect::<Vec<_>>()
        };
        let refused = workshop.run(&with(&[]));
        assert_eq!(refused.status.code(), Some(2), "{}", stderr(&refused));
        assert!(stderr(&refused).contains("out.jsonl already exists"), "{}", stderr(&refused));
        assert!(
            stderr(&refused).contains("hint: ") && stderr(&refused).contains("--overwrite"),
            "{}",
            stderr(&refused)
        );
        assert_eq!(std::fs::read_to_string(workshop.path("out.jsonl")).unwrap(), "dear\n");
        workshop.stdout(&with(&["--overwrite"]));
        assert!(!json_lines(&std::fs::read_to_string(workshop.path("out.jsonl")).unwrap()).is_empty());
        workshop.write("out.jsonl", "dear\n");
    }
    // An empty file holds nothing to lose.
    workshop.write("empty.jsonl", "");
    workshop.stdout(&["generate", "--model", "model", "--prompt", "t5", "--output", "empty.jsonl"]);
}

#[test]
fn plain_prompts_on_a_chat_model_are_told_and_can_be_asked_as_turns() {
    let workshop = Workshop::new().with_template();
    let generate = |more: &[&str]| {
        let mut args = vec!["generate", "--model", "model", "--data", "prompts.jsonl", "--max-new-tokens", "5"];
        args.extend(more);
        let output = workshop.run(&args);
        assert!(output.status.success(), "{}", stderr(&output));
        (String::from_utf8_lossy(&output.stdout).into_owned(), stderr(&output))
    };
    workshop.write("prompts.jsonl", r#"{"prompt": "t20"}"#);
    let (_, said) = generate(&[]);
    assert!(said.contains("warning: 1 prompts are plain text") && said.contains("data.as_chat=true"), "{said}");
    let (asked, said) = generate(&["--set", "data.as_chat=true"]);
    assert!(!said.contains("warning"), "{said}");
    let prompt = workshop.stdout(&["generate", "--model", "model", "--prompt", "t20", "--max-new-tokens", "5"]);
    assert_eq!(asked, prompt);

    let check = |more: &[&'static str]| stderr(&workshop.run(&workshop.sft("run", &[&["--dry-run"], more].concat())));
    assert!(check(&[]).contains("prompts are plain text, trained without the chat template"), "{}", check(&[]));
    let as_chat = check(&["--set", "data.as_chat=true"]);
    assert!(!as_chat.contains("plain text") && as_chat.contains("t3 t1 t8"), "{as_chat}");
}

#[cfg(unix)]
#[test]
fn an_output_that_is_no_ordinary_file_is_written_to_and_not_replaced() {
    let workshop = Workshop::new();
    workshop.write("target.jsonl", "old");
    std::os::unix::fs::symlink("target.jsonl", workshop.path("link.jsonl")).unwrap();
    let score = |output: &str| {
        workshop.stdout(&["score", "--model", "model", "--data", "held_out.jsonl", "--overwrite", "--output", output]);
    };
    score("link.jsonl");
    assert!(std::fs::symlink_metadata(workshop.path("link.jsonl")).unwrap().is_symlink());
    assert_eq!(json_lines(&std::fs::read_to_string(workshop.path("target.jsonl")).unwrap()).len(), 4);

    assert!(std::process::Command::new("mkfifo").arg(workshop.path("pipe")).status().unwrap().success());
    let path = workshop.path("pipe");
    let reader = std::thread::spawn(move || std::fs::read_to_string(path).unwrap());
    score("pipe");
    assert_eq!(json_lines(&reader.join().unwrap()).len(), 4);
    assert!(!std::fs::symlink_metadata(workshop.path("pipe")).unwrap().is_file());
}

#[test]
fn the_real_model_knows_the_capital_of_france() {
    let Some(model) = std::env::var_os("PT_TEST_MODEL") else {
        println!("PT_TEST_MODEL is not set: `cargo xtask test` sets it");
        return;
    };
    let workshop = Workshop::new();
    let model = model.to_str().unwrap();
    let question = "What is the capital of France? Answer in one sentence.";
    let text = workshop.stdout(&["generate", "--model", model, "--prompt", question, "--max-new-tokens", "24"]);
    let line = &json_lines(&text)[0];
    assert!(line["completion"].as_str().unwrap().contains("Paris"), "{line}");
}
