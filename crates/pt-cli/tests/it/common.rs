use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// A folder with a tiny model that has a tokenizer, and data for it.
pub(crate) struct Workshop {
    folder: tempfile::TempDir,
}

impl Workshop {
    pub(crate) fn new() -> Self {
        Self::of("llama")
    }

    /// With another of the models under `fixtures/models`.
    pub(crate) fn of(model: &str) -> Self {
        let workshop = Self { folder: tempfile::tempdir().unwrap() };
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../../fixtures/models/{model}/model"));
        std::fs::create_dir(workshop.path("model")).unwrap();
        for name in ["config.json", "generation_config.json", "model.safetensors"] {
            std::fs::copy(source.join(name), workshop.path("model").join(name)).unwrap();
        }
        // Words `t0` to `t127`, one token each.
        let vocabulary: serde_json::Map<_, _> = (0..128).map(|id| (format!("t{id}"), json!(id))).collect();
        let tokenizer = json!({
            "version": "1.0",
            "added_tokens": [],
            "pre_tokenizer": {"type": "WhitespaceSplit"},
            "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "t0"},
        });
        workshop.write("model/tokenizer.json", &tokenizer.to_string());
        workshop.write("model/tokenizer_config.json", r#"{"bos_token": "t1", "eos_token": "t2"}"#);
        workshop.write("rows.jsonl", &rows(0..24));
        workshop.write("held_out.jsonl", &rows(24..28));
        workshop
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
    }

    /// `pt` with arguments, started in the folder.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pt"));
        command.args(args).current_dir(self.folder.path()).stdin(Stdio::null());
        // One thread is fastest on tensors this small; the cache of fetched models is an empty one.
        command.env("OMP_NUM_THREADS", "1").env("XDG_CACHE_HOME", self.path("cache"));
        command
    }

    pub(crate) fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Gives the model a chat template: `t3` before a turn, `t4` before an answer and `t2` after it.
    pub(crate) fn with_template(self) -> Self {
        let template = "{% for m in messages %}{% if m.role == 'assistant' %}t4 {{ m.content }} t2 {% else %}\
                        t3 {{ m.content }} {% endif %}{% endfor %}{% if add_generation_prompt %}t4 {% endif %}";
        let config = json!({"bos_token": "t1", "eos_token": "t2", "chat_template": template});
        self.write("model/tokenizer_config.json", &config.to_string());
        self
    }

    /// Runs `pt`, which must succeed, and returns what it wrote to stdout.
    pub(crate) fn stdout(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(output.status.success(), "{args:?}: {}", stderr(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Arguments of a short fine-tuning run that saves every step.
    pub(crate) fn sft<'a>(&self, output: &'a str, more: &[&'a str]) -> Vec<&'a str> {
        let mut args = vec!["sft", "--model", "model", "--device", "cpu", "--data", "rows.jsonl", "--output", output];
        let settings = ["max_steps=6", "save_every=1", "batch.batch_size=4", "data.max_length=64", "lora.rank=2"];
        extend_with(&mut args, &settings, more);
        args
    }

    /// All paths below a folder, sorted.
    pub(crate) fn files(&self, name: &str) -> Vec<PathBuf> {
        fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
            let Ok(entries) = std::fs::read_dir(folder) else { return };
            for entry in entries {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    walk(&path, found);
                }
                found.push(path);
            }
        }
        let mut found = vec![];
        walk(&self.path(name), &mut found);
        found.sort();
        found
    }
}

/// Adds settings and more arguments; LoRA's are left out beside another method, where they would be refused.
pub(crate) fn extend_with<'a>(args: &mut Vec<&'a str>, settings: &[&'a str], more: &[&'a str]) {
    let is_other = more.iter().any(|arg| *arg == "--peft" || arg.starts_with("peft="));
    for setting in settings.iter().filter(|setting| !(is_other && setting.starts_with("lora."))) {
        args.extend(["--set", setting]);
    }
    args.extend(more);
}

fn rows(numbers: std::ops::Range<usize>) -> String {
    numbers
        .map(|n| {
            let (first, second) = (8 + n * 7 % 100, 8 + n * 13 % 100);
            let completion = format!(" t{} t{}", first + 1, second + 1);
            json!({"prompt": format!("t1 t{first} t{second}"), "completion": completion}).to_string() + "\n"
        })
        .collect()
}

/// The values of JSON lines.
pub(crate) fn json_lines(text: &str) -> Vec<serde_json::Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Waits until the run that `child` trains has done a step.
pub(crate) fn wait_for_a_step(run: &Path, child: &mut std::process::Child) {
    let patience = std::time::Instant::now();
    while std::fs::metadata(run.join("metrics.jsonl")).map_or(0, |file| file.len()) == 0 {
        assert!(patience.elapsed().as_secs() < 60, "no step in a minute");
        if child.try_wait().unwrap().is_some() {
            let mut said = String::new();
            let _ = child.stderr.as_mut().map(|stderr| std::io::Read::read_to_string(stderr, &mut said));
            panic!("the run ended before its first step: {said}");
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}
