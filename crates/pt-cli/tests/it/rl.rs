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
    let cases: [(&[&str], &str); 8] = [
        (&["rollout.max_new_tokens=70"], "the model's context holds"),
        (&["rewards=[]"], "rewards is empty"),
        (&["rewards=[{type: number, answer_field: solution}]"], "solution"),
        (&["rollout.temperature=0"], "rollout.temperature is 0"),
        (&["rewards=[{type: model, path: nowhere}]"], "nowhere"),
        (&["critic.kind=actor_head", "critic.learning_rate=1e-4"], "one optimizer has both"),
        (&["kl_control.kind=adaptive", "kl_coef=0"], "kl_coef is 0"),
        (&["peft=bottleneck"], "the method is bottleneck"),
    ];
    for (sets, named) in cases {
        let output = workshop.run(&command("ppo", "run", sets));
        let text = stderr(&output);
        assert!(!output.status.success() && text.contains(named), "{sets:?}: {text}");
        assert!(!text.contains("panicked") && !workshop.path("run").exists(), "{sets:?}: {text}");
    }
    // Found by the dry run as well.
    let rows =
        [command("ppo", "run", &["rewards=[{type: number, answer_field: solution}]"]), vec!["--dry-run"]].concat();
    assert!(stderr(&workshop.run(&rows)).contains("solution"));
}

#[test]
fn whole_models_are_critics_and_judges_too() {
    let workshop = workshop();
    let pair =
        |n: usize| format!("{{\"prompt\": \"t{}\", \"chosen\": \"t77 t78\", \"rejected\": \"t5 t6\"}}\n", 10 + n);
    workshop.write("pairs.jsonl", &(0..8).map(pair).collect::<String>());
    for (output, method) in [("whole", "none"), ("part", "lora")] {
        let training = ["reward", "--model", "model", "--device", "cpu", "--data", "pairs.jsonl", "--output", output];
        let settings = ["--set", "max_steps=1", "--set", "data.max_length=60", "--peft", method];
        workshop.stdout(&[&training[..], &settings].concat());
    }
    let rewards = "rewards=[{type: model, path: whole}]";
    workshop.stdout(&command("ppo", "lora", &["max_steps=1", rewards, "critic.path=whole"]));
    assert!(workshop.path("lora/checkpoints/step-00000001/critic/model.safetensors").exists());
    let full =
        |output, critic| [command("ppo", output, &["max_steps=1", rewards, critic]), vec!["--peft", "none"]].concat();
    workshop.stdout(&full("full", "critic.path=whole"));
    assert!(workshop.path("full/checkpoints/step-00000001/critic/model.safetensors").exists());
    let refused = stderr(&workshop.run(&full("other", "critic.path=part")));
    assert!(refused.contains("critic.path") && refused.contains("is an adapter"), "{refused}");
}

#[test]
fn a_refused_resume_leaves_the_run_as_it_was() {
    let workshop = workshop();
    workshop.stdout(&command("ppo", "run", &["max_steps=1"]));
    workshop.write("other.jsonl", "{\"prompt\": \"t20 t21\", \"answer\": \"t3\"}\n");
    let kept = |name: &str| std::fs::read_to_string(workshop.path(&format!("run/{name}"))).unwrap();
    let before = [kept("config.yaml"), kept("command.yaml")];
    let resume = ["ppo", "--resume", "--output", "run", "--set", "max_steps=2"];
    let refused = workshop.run(&[&resume[..], &["--data", "other.jsonl"]].concat());
    assert!(stderr(&refused).contains("other prompts"), "{}", stderr(&refused));
    assert_eq!([kept("config.yaml"), kept("command.yaml")], before);
    workshop.stdout(&resume);
}

/// A program that fails the third time that it is asked.
#[cfg(unix)]
#[test]
fn a_scorer_that_crashes_costs_nothing_and_the_run_goes_on_to_the_same_adapter() {
    let workshop = workshop();
    let script = |name: &str, fails_at: usize| {
        let text = format!(
            "n=$(cat {name}.count 2>/dev/null || echo 0); n=$((n + 1)); echo $n > {name}.count\n\
             if [ $n -eq {fails_at} ]; then echo no scorer today >&2; exit 3; fi\n\
             while IFS= read -r line; do echo ${{#line}}; done\n"
        );
        workshop.write(&format!("{name}.sh"), &text);
        format!("rewards=[{{type: command, command: [sh, {name}.sh], weight: 0.01}}]")
    };
    let (sound, failing) = (script("sound", 0), script("failing", 3));
    workshop.stdout(&command("ppo", "whole", &["max_steps=4", "save_every=0", &sound]));
    let failed = workshop.run(&command("ppo", "parts", &["max_steps=4", "save_every=0", &failing]));
    assert_eq!(failed.status.code(), Some(1), "{}", stderr(&failed));
    assert!(stderr(&failed).contains("no scorer today"), "{}", stderr(&failed));
    // The two iterations before stand.
    assert!(workshop.path("parts/checkpoints/step-00000002").exists());
    workshop.stdout(&["ppo", "--resume", "--output", "parts"]);
    let file = |run: &str| {
        std::fs::read(workshop.path(&format!("{run}/checkpoints/step-00000004/adapter/adapter_model.safetensors")))
            .unwrap()
    };
    assert!(file("whole") == file("parts"));
}

#[test]
fn the_demo_of_rlhf_runs_its_stages_and_goes_on_where_one_was_stopped() {
    let workshop = Workshop::new().with_template();
    let pair = |n: usize| format!("{{\"prompt\": \"t{}\", \"chosen\": \" t77\", \"rejected\": \" t5 t6\"}}\n", 10 + n);
    std::fs::create_dir(workshop.path("rows")).unwrap();
    workshop.write("rows/train.jsonl", &(0..16).map(pair).collect::<String>());
    workshop.write("rows/validation.jsonl", &(20..24).map(pair).collect::<String>());
    let ranking = |n: usize| {
        format!("{{\"prompt\": \"t{}\", \"completions\": [\"t7\", \"t8 t9\", \"t6\"], \"ranks\": [0, 1, 1]}}\n", 40 + n)
    };
    workshop.write("rows/rankings_train.jsonl", &(0..6).map(ranking).collect::<String>());
    workshop.write("rows/rankings_validation.jsonl", &(6..9).map(ranking).collect::<String>());
    let mut args = vec!["demo", "rlhf", "--model", "model", "--data", "rows", "--rankings", "rows", "--output", "out"];
    args.extend(["--device", "cpu"]);
    for set in ["sft.data.max_length=60", "reward.data.max_length=60", "ppo.max_steps=2", "ppo.eval_every=1"] {
        args.extend(["--set", set]);
    }
    // A stage that fails ends the demo with its code and message, and what came before stays.
    let failed = workshop.run(&[&args[..], &["--set", "ppo.num_samples=0"]].concat());
    assert_eq!(failed.status.code(), Some(2), "{}", stderr(&failed));
    assert!(stderr(&failed).contains("num_samples is 0"), "{}", stderr(&failed));
    let again = workshop.run(&args);
    assert!(stderr(&again).contains("--resume to go on"), "{}", stderr(&again));
    args.push("--resume");
    let text = workshop.stdout(&args);
    for line in ["reward model's accuracy", "F1 with the right answer", "KL to SFT", "--adapter out/ppo"] {
        assert!(text.contains(line), "{line}: {text}");
    }
    let metrics = std::fs::read_to_string(workshop.path("out/ppo/metrics.jsonl")).unwrap();
    assert!(metrics.contains("\"eval_rewards/f1/mean\""), "{metrics}");
    // The policy's questions are of no other stage.
    let rows = |name: &str| std::fs::read_to_string(workshop.path(&format!("out/{name}.jsonl"))).unwrap();
    let prompts = |name: &str| -> Vec<String> {
        let row = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["prompt"].to_string();
        rows(name).lines().map(row).collect()
    };
    let asked = prompts("prompts");
    assert_eq!(asked.len(), 4);
    assert!(["sft", "pairs", "held_out_pairs"].iter().all(|name| prompts(name).iter().all(|p| !asked.contains(p))));
}

#[test]
fn the_demo_of_grpo_takes_settings_of_its_stage_alone() {
    let workshop = Workshop::new().with_template();
    let args = ["demo", "grpo", "--model", "model", "--output", "sums", "--device", "cpu"];
    let refused = workshop.run(&[&args[..], &["--set", "max_steps=1"]].concat());
    assert_eq!(refused.status.code(), Some(2), "{}", stderr(&refused));
    assert!(stderr(&refused).contains("--set is `max_steps=1`, expected grpo.FIELD=VALUE"), "{}", stderr(&refused));
    let text = workshop.stdout(&[&args[..], &["--set", "grpo.max_steps=1"]].concat());
    assert!(text.contains("right sums") && text.contains("--adapter sums/grpo"), "{text}");
    assert_eq!(std::fs::read_to_string(workshop.path("sums/held_out.jsonl")).unwrap().lines().count(), 64);
}
