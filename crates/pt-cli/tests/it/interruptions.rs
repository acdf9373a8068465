use crate::common::{Workshop, stderr, wait_for_a_step};
use pt_tensor::io::SafetensorsReader;
use pt_train::run_dir::RunDir;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Instant;

/// Moments at which a run is killed.
const KILLS: u64 = 20;
const LAST_STEP: u64 = 8;

fn args<'a>(workshop: &Workshop, output: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let settings = ["max_steps=8", "eval_every=1", "lora.lora_dropout=0.1", "keep_checkpoints=3"];
    let mut all = workshop.sft(output, &["--eval-data", "held_out.jsonl"]);
    settings.iter().for_each(|setting| all.extend(["--set", setting]));
    all.extend(more);
    all
}

/// Fails unless everything that a reader of the run looks at is whole.
pub(crate) fn check_readable(root: &Path) {
    let run = RunDir::open(root).unwrap();
    for step in run.checkpoint_steps().unwrap() {
        let checkpoint = run.checkpoint_path(step);
        for file in ["trainer_state.safetensors", "adapter/adapter_model.safetensors"] {
            SafetensorsReader::open(checkpoint.join(file)).unwrap();
        }
        for file in ["trainer_state.json", "adapter/adapter_config.json"] {
            let text = std::fs::read(checkpoint.join(file)).unwrap();
            serde_json::from_slice::<serde_json::Value>(&text).unwrap();
        }
    }
    run.best().unwrap();
    if run.metrics_path().exists() {
        pt_train::metrics::read_series(&run.metrics_path()).unwrap();
    }
}

fn final_adapter(workshop: &Workshop, output: &str) -> Vec<u8> {
    let run = RunDir::open(&workshop.path(output)).unwrap();
    std::fs::read(run.checkpoint_path(LAST_STEP).join("adapter/adapter_model.safetensors")).unwrap()
}

/// Step and value of each record of a metric.
fn losses(workshop: &Workshop, output: &str) -> String {
    let run = RunDir::open(&workshop.path(output)).unwrap();
    let series = pt_train::metrics::read_series(&run.metrics_path()).unwrap();
    format!("{:?} {:?} {:?}", series["loss"], series["eval_loss"], run.best().unwrap())
}

#[test]
fn a_run_killed_at_any_moment_stays_readable_and_ends_as_if_it_had_not_been() {
    let workshop = Workshop::new();
    let started = Instant::now();
    let straight = workshop.run(&args(&workshop, "straight", &[]));
    assert!(straight.status.success(), "{}", stderr(&straight));
    let length = started.elapsed();
    let (expected, expected_losses) = (final_adapter(&workshop, "straight"), losses(&workshop, "straight"));

    let mut random = 0x5EED_u64;
    let (mut number, mut num_killed) = (0, 0);
    for kill in 0..=KILLS {
        let output = format!("run-{number}");
        let root = workshop.path(&output);
        // Killed before its configuration stood, it is no run yet and begins anew.
        let resume: &[&str] = if root.join("config.yaml").exists() { &["--resume"] } else { &[] };
        let log = std::fs::File::create(workshop.path("log")).unwrap();
        let mut child =
            workshop.command(&args(&workshop, &output, resume)).stdout(Stdio::null()).stderr(log).spawn().unwrap();
        if kill < KILLS {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            std::thread::sleep(length.mul_f64((random >> 33) as f64 / (1_u64 << 31) as f64));
            let _ = child.kill();
        }
        let status = child.wait().unwrap();
        let text = || std::fs::read_to_string(workshop.path("log")).unwrap();
        if root.join("config.yaml").exists() {
            check_readable(&root);
        }
        match status.code() {
            Some(0) => {
                assert!(final_adapter(&workshop, &output) == expected, "{output} ends with another adapter");
                assert_eq!(losses(&workshop, &output), expected_losses, "{output}");
                number += 1;
            }
            Some(code) => panic!("kill {kill}: exit code {code}: {}", text()),
            None => num_killed += 1,
        }
    }
    println!("{num_killed} kills hit a living process; an unbroken run took {length:?}; {number} runs ended");
    assert!(number >= 1 && num_killed > 0);
}

#[test]
fn an_interrupt_saves_exits_130_and_can_be_resumed() {
    let workshop = Workshop::new();
    let long = ["--set", "max_steps=100000", "--set", "save_every=0"];
    let output = interrupted(&workshop, &workshop.sft("run", &long), "run");
    assert_eq!(output.status.code(), Some(130), "{}", stderr(&output));
    assert!(stderr(&output).contains("--resume"), "{}", stderr(&output));
    check_readable(&workshop.path("run"));
    let (step, _) = RunDir::open(&workshop.path("run")).unwrap().latest().unwrap().unwrap();

    let last = format!("max_steps={}", step + 2);
    let resumed = workshop.run(&workshop.sft("run", &["--resume", "--set", &last]));
    assert!(resumed.status.success(), "{}", stderr(&resumed));
    check_readable(&workshop.path("run"));
    assert_eq!(RunDir::open(&workshop.path("run")).unwrap().latest().unwrap().unwrap().0, step + 2);
}

#[test]
fn an_interrupt_before_training_ends_at_once_and_loses_nothing() {
    let workshop = Workshop::new();
    // Answers that take a while.
    let row = "{\"prompt\": \"t1 t9 t10\", \"completion\": \" t10\"}\n";
    workshop.write("held_out.jsonl", &row.repeat(4000));
    let args = workshop.sft("run", &["--eval-data", "held_out.jsonl", "--samples", "4000"]);
    // With libtorch's threads at work, whose ground must not be taken away.
    let mut command = workshop.command(&args);
    let mut child = command.env("OMP_NUM_THREADS", "4").stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
    lines.by_ref().find(|line| line.starts_with("answers before training")).unwrap();
    let asked = Instant::now();
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let rest: Vec<String> = lines.collect();
    assert_eq!(child.wait().unwrap().code(), Some(130), "{rest:?}");
    assert!(asked.elapsed().as_secs_f64() < 2.0, "{:?}", asked.elapsed());
    assert!(rest.iter().any(|line| line.contains("continue with: pt sft --resume --output run")), "{rest:?}");
    check_readable(&workshop.path("run"));
    workshop.stdout(&["sft", "--resume", "--output", "run", "--samples", "0"]);
    assert_eq!(RunDir::open(&workshop.path("run")).unwrap().latest().unwrap().unwrap().0, 6);
}

/// Starts `pt`, interrupts it once `run` has done a step, and waits for its end.
fn interrupted(workshop: &Workshop, args: &[&str], run: &str) -> Output {
    let mut child = workshop.command(args).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    wait_for_a_step(&workshop.path(run), &mut child);
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    child.wait_with_output().unwrap()
}

#[test]
fn an_interrupted_demo_exits_130_and_goes_on_with_resume() {
    let workshop = Workshop::new().with_template();
    let qas =
        |n: usize| serde_json::json!([{"question": format!("t{n} ?"), "answers": [{"text": format!("t{}", n + 1)}]}]);
    let article = |n: usize| serde_json::json!({"paragraphs": [{"context": "t9 t10", "qas": qas(n)}]});
    let squad = serde_json::json!({"data": (20..40).map(article).collect::<Vec<_>>()});
    workshop.write("squad.json", &squad.to_string());
    let mut args = vec!["demo", "sft", "--model", "model", "--data", ".", "--output", "run", "--device", "cpu"];
    args.extend(["--set", "data.max_length=64", "--set", "lora.rank=2", "--set", "batch.batch_size=4"]);
    let endless: Vec<&str> = args.iter().copied().chain(["--set", "max_steps=100000"]).collect();
    let output = interrupted(&workshop, &endless, "run");
    assert_eq!(output.status.code(), Some(130), "{}", stderr(&output));
    assert!(stderr(&output).contains("max_steps=100000 --resume"), "{}", stderr(&output));
    let (step, _) = RunDir::open(&workshop.path("run")).unwrap().latest().unwrap().unwrap();

    // As any run: it kept its rows.
    let last = format!("max_steps={}", step + 2);
    workshop.stdout(&["sft", "--resume", "--output", "run", "--set", &last]);
    // And as itself, with its own measures.
    let last = format!("max_steps={}", step + 4);
    args.extend(["--resume", "--set", &last]);
    let text = workshop.stdout(&args);
    assert!(text.contains("exact answers") && text.contains("Talk with it"), "{text}");
    assert_eq!(RunDir::open(&workshop.path("run")).unwrap().latest().unwrap().unwrap().0, step + 4);
    assert!(workshop.stdout(&["inspect", "run"]).contains("pt sft --resume --output run"));
}

/// What makes the second part of the test below fail to write.
enum Full {
    /// A file system with no room, where mounting one is allowed.
    Disk,
    /// A limit on the size of a file.
    Limit,
}

#[test]
fn a_full_disk_leaves_the_last_checkpoint_and_nothing_half_written() {
    for full in [Full::Disk, Full::Limit] {
        let workshop = Workshop::new();
        std::fs::create_dir(workshop.path("disk")).unwrap();
        let disk = workshop.path("disk");
        let mount = if matches!(full, Full::Disk) { Mount::new(&disk) } else { None };
        if matches!(full, Full::Disk) && mount.is_none() {
            println!("no file system can be mounted here: only the limit on files is tested");
            continue;
        }
        let sft = |more: &[&'static str]| workshop.sft("disk/run", more);
        workshop.stdout(&sft(&["--set", "max_steps=3"]));
        let steps = || RunDir::open(&workshop.path("disk/run")).unwrap().checkpoint_steps().unwrap();
        let before = steps();

        let more = sft(&["--resume", "--set", "max_steps=6"]);
        let output = match full {
            Full::Disk => {
                fill(&workshop.path("disk/filler"));
                workshop.run(&more)
            }
            Full::Limit => {
                // With the signal ignored, a write past the limit fails as one on a full disk does.
                let script = "trap '' XFSZ; ulimit -f 1; exec \"$@\"";
                let mut command = Command::new("sh");
                command.args(["-c", script, "sh", env!("CARGO_BIN_EXE_pt")]).args(&more);
                command.current_dir(workshop.path(".")).env("OMP_NUM_THREADS", "1").output().unwrap()
            }
        };
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(text.contains("cannot write") && text.contains("hint: "), "{text}");
        let is_disk = matches!(full, Full::Disk);
        assert_eq!(text.contains("the disk is full"), is_disk, "{text}");
        if is_disk {
            std::fs::remove_file(workshop.path("disk/filler")).unwrap();
        }
        check_readable(&workshop.path("disk/run"));
        assert_eq!(steps(), before);

        workshop.stdout(&more);
        assert_eq!(steps().last(), Some(&6));
        let is_left_over = |path: &std::path::PathBuf| path.to_string_lossy().contains(".tmp-");
        assert!(!workshop.files("disk/run").iter().any(is_left_over));
    }
}

/// Writes until there is no room.
fn fill(path: &Path) {
    use std::io::Write;
    let mut file = std::fs::File::create(path).unwrap();
    while file.write_all(&[7; 512]).is_ok() {}
}

/// A small file system in memory, gone when dropped.
struct Mount<'a>(&'a Path);

impl<'a> Mount<'a> {
    fn new(path: &'a Path) -> Option<Self> {
        let mut command = Command::new("mount");
        command.args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"]).arg(path).stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success()).then_some(Self(path))
    }
}

impl Drop for Mount<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0).status();
    }
}
