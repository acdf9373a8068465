use crate::common::{Workshop, stderr};
use pt_tensor::io::SafetensorsReader;
use pt_train::run_dir::RunDir;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

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
fn check_readable(root: &Path) {
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
    let child =
        workshop.command(&workshop.sft("run", &long)).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    // Once a step is recorded the training loop is running.
    let metrics = workshop.path("run/metrics.jsonl");
    let patience = Instant::now();
    while std::fs::metadata(&metrics).map_or(0, |file| file.len()) == 0 {
        assert!(patience.elapsed() < Duration::from_secs(60), "no step in a minute");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
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
