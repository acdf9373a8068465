//! `pt ppo` and `pt grpo`.

use crate::common::{Workshop, stderr};

const REWARDS: &str = "rewards=[{type: exact, contains: true}, {type: length, max: 6, weight: 0.1}]";

/// A workshop with prompts that have answers.
fn workshop() -> Workshop {
    let workshop = Workshop::new();
    let row = |n: usize| format!("{{\"prompt\": \"t{} t{}\", \"answer\": \"t77\"}}\n", 10 + n, 40 + n);
    workshop.write("prompts.jsonl", &(0..12).map(row).collect::<String>());
    workshop
}

fn command<'a>(name: &'a str, output: &'a str, sets: &[&'a str]) -> Vec<&'a str> {
    let mut args = vec![name, "--model", "model", "--device", "cpu", "--data", "prompts.jsonl", "--output", output];
    let settings = ["rollout.max_new_tokens=6", "batch.batch_size=6", "save_every=2", "schedule.kind=constant"];
    for set in [REWARDS].iter().chain(&settings).chain(sets) {
        args.extend(["--set", set]);
    }
    args
}

#[test]
fn ppo_trains_reports_and_resumes_to_the_same_adapter() {
    let workshop = workshop();
    let with_eval = |output, steps| [command("ppo", output, &[steps]), vec!["--eval-data", "prompts.jsonl"]].concat();
    workshop.stdout(&with_eval("whole", "max_steps=4"));
    workshop.stdout(&with_eval("parts", "max_steps=2"));
    workshop.stdout(&["ppo", "--resume", "--output", "parts", "--set", "max_steps=4"]);
    for part in ["adapter", "critic"] {
        let file = |run: &str| {
            let path = format!("{run}/checkpoints/step-00000004/{part}/adapter_model.safetensors");
            std::fs::read(workshop.path(&path)).unwrap()
        };
        assert!(file("whole") == file("parts"), "{part}");
    }
    let metrics = std::fs::read_to_string(workshop.path("whole/metrics.jsonl")).unwrap();
    for name in ["objective/scores", "rewards/exact/mean", "objective/kl", "val/explained_variance", "eval_objective"] {
        assert!(metrics.contains(name), "{name}: {metrics}");
    }
    let report = std::fs::read_to_string(workshop.path("whole/report.html")).unwrap();
    assert!(report.contains("Proximal policy optimization") && report.contains("held-out score"));
    // Another command's run is refused by name.
    let other = workshop.run(&["grpo", "--resume", "--output", "whole"]);
    assert!(stderr(&other).contains("is a run of `pt ppo`"), "{}", stderr(&other));
}

#[test]
fn grpo_trains_with_a_reference_and_all_weights_can_be_trained() {
    let workshop = workshop();
    workshop.stdout(&command("grpo", "group", &["max_steps=2", "beta=0.1"]));
    assert!(workshop.path("group/checkpoints/step-00000002/adapter/adapter_config.json").exists());
    workshop.stdout(&[command("ppo", "full", &["max_steps=1"]), vec!["--peft", "none"]].concat());
    assert!(workshop.path("full/checkpoints/step-00000001/model/model.safetensors").exists());
}

#[test]
fn a_reward_model_judges_and_is_found_again_from_another_folder() {
    let workshop = workshop();
    let pair = |n: usize| {
        format!("{{\"prompt\": \"t{} t{}\", \"chosen\": \"t77 t78\", \"rejected\": \"t5 t6\"}}\n", 10 + n, 40 + n)
    };
    workshop.write("pairs.jsonl", &(0..8).map(pair).collect::<String>());
    let training = ["reward", "--model", "model", "--device", "cpu", "--data", "pairs.jsonl", "--output", "judge"];
    workshop.stdout(&[&training[..], &["--set", "max_steps=2", "--set", "data.max_length=60"]].concat());
    let rewards = "rewards=[{type: model, path: judge}]";
    workshop.stdout(&command("ppo", "run", &["max_steps=1", rewards, "critic.path=judge"]));
    // As the run keeps it.
    let config = std::fs::read_to_string(workshop.path("run/config.yaml")).unwrap();
    let judge = workshop.path("judge").canonicalize().unwrap();
    assert_eq!(config.matches(&*judge.to_string_lossy()).count(), 2, "{config}");
    std::fs::create_dir(workshop.path("elsewhere")).unwrap();
    let run = workshop.path("run").to_string_lossy().into_owned();
    let mut resumed = workshop.command(&["ppo", "--resume", "--output", &run, "--set", "max_steps=2"]);
    let resumed = resumed.current_dir(workshop.path("elsewhere")).output().unwrap();
    assert!(resumed.status.success(), "{}", stderr(&resumed));
    assert!(workshop.path("run/checkpoints/step-00000002/critic/adapter_model.safetensors").exists());
}

#[test]
fn faults_are_named_and_leave_no_run() {
    let workshop = workshop();
    let cases: [(&[&str], &str); 5] = [
        (&["rollout.max_new_tokens=70"], "the model's context holds"),
        (&["rewards=[]"], "rewards is empty"),
        (&["rewards=[{type: number, answer_field: solution}]"], "solution"),
        (&["rollout.temperature=0"], "rollout.temperature is 0"),
        (&["rewards=[{type: model, path: nowhere}]"], "nowhere"),
    ];
    for (sets, named) in cases {
        let output = workshop.run(&command("ppo", "run", sets));
        let text = stderr(&output);
        assert!(!output.status.success() && text.contains(named), "{sets:?}: {text}");
        assert!(!text.contains("panicked") && !workshop.path("run").exists(), "{sets:?}: {text}");
    }
}
